"""What a module does while its loss is measured: which of its layers act as in training, and which as in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

Mode = Literal["batch_statistics", "eval", "train"]
"""How the module of a landscape is evaluated; see :func:`training_flags`."""

_OVER_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OVER_SAMPLE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_MEANS = {"running_mean"}
_SPREADS = {"running_var", "running_std", "running_invstd", "running_covar", "running_covariance"}


def keeps_running_statistics(layer: nn.Module) -> bool:
    """Return whether a layer normalises by statistics of the batch in training, and by running ones in evaluation.

    Args:
        layer: A layer of torch, or one of any class that keeps a running mean beside a running variance under their
            usual names.

    Example:
        >>> keeps_running_statistics(nn.BatchNorm1d(2)), keeps_running_statistics(nn.LayerNorm(2))
        (True, False)
    """
    if isinstance(layer, (*_OVER_BATCH, *_OVER_SAMPLE)):
        return bool(layer.track_running_stats)
    held = [*layer.named_buffers(recurse=False), *layer.named_parameters(recurse=False)]
    names = {name for name, tensor in held if not tensor.requires_grad}
    return bool(names & _MEANS) and bool(names & _SPREADS)


def training_flags(modules: Sequence[nn.Module], mode: Mode) -> list[bool]:
    """Decide for a module and all modules in it whether each is to act as in training.

    Args:
        modules: A module and those below it, in the modes in which training left them.
        mode: ``"batch_statistics"``: layers that keep running statistics act as in training, everything else as in
            evaluation. ``"eval"``: none acts as in training. ``"train"``: all do. Where some modules are in training
            mode and others are not, the user has frozen the latter, and they stay frozen.

    Returns:
        A flag for each.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.BatchNorm1d(2).eval())
        >>> training_flags(list(net.modules()), "batch_statistics")
        [False, True, False, False]
    """
    if mode == "eval":
        return [False for _ in modules]
    trains = any(module.training for module in modules)
    if mode == "train":
        root = next(iter(modules))
        return [module.training if root.training else True for module in modules]
    return [keeps_running_statistics(module) and (module.training or not trains) for module in modules]


def set_training(layer: nn.Module, flag: bool, mode: Mode) -> None:
    """Let a layer of a copied module act as in training, or not.

    In the mode ``"batch_statistics"`` a ``SyncBatchNorm`` takes the statistics of this rank's batch: so the loss does
    not depend on the number of ranks, ranks may have different numbers of batches, and it has second derivatives.

    Args:
        layer: A layer of a copy.
        flag: Whether it is to act as in training.
        mode: How the module is evaluated.
    """
    if flag and mode == "batch_statistics" and isinstance(layer, nn.SyncBatchNorm):
        layer.running_mean = layer.running_var = None
        flag = False
    layer.training = flag


def uses_batch_statistics(module: nn.Module, mode: Mode) -> bool:
    """Return whether the loss of a sample depends on the batch that it comes in, given the modes that training left."""
    modules = list(module.modules())
    flags = training_flags(modules, mode)
    return any(
        flag and keeps_running_statistics(layer) and not isinstance(layer, _OVER_SAMPLE)
        for layer, flag in zip(modules, flags, strict=True)
    )
