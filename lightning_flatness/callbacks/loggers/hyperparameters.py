"""TensorBoard's HParams tab: flatness beside the hyperparameters of each run.

The tab shows the columns of the first description of an experiment that it finds, and of each run the first
hyperparameters in its event file; the values of its columns are the last points of the curves. So there is nothing to
write at the end of a run, but the description has to come before the one that Lightning writes at its start, whose only
column is the placeholder ``hp_metric`` of -1. Where Lightning writes none, the user may, when training starts, and goes
first.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import hparams

from lightning_flatness.callbacks.loggers.tensorboard import tensorboard_loggers
from lightning_flatness.callbacks.sharpness_aware_minimization import SharpnessAwareMinimization
from lightning_flatness.sam.optimizer import SAM

_PLACEHOLDER = "hp_metric"
_SYNONYMS = {"lr": ("lr", "learning_rate"), "sam_rho": ("sam_rho", "rho")}


def log_hyperparameters(trainer: Trainer, metrics: Sequence[str], *, training_has_started: bool) -> None:
    """Write the hyperparameters of this run for TensorBoard, and which curves (``metrics``) are their outcome.

    Call it twice: in ``on_fit_start``, and with ``training_has_started`` when the first epoch ends. It writes to each
    of the Trainer's loggers once, at the moment that is right for it. Beside what the module and the datamodule saved
    for the logger are ``optimizer``, ``lr``, ``momentum``, ``weight_decay``, ``batch_size`` (samples behind one
    optimizer step, over ranks and accumulated batches), ``sam_rho`` (0 without SAM) and, with one gradient per step,
    ``sam_ascent``, where they can be told and the user has no hyperparameter of that name.
    """
    loggers = tensorboard_loggers(trainer)
    if not loggers or not getattr(trainer, "enable_autolog_hparams", True):
        return
    # On all ranks: the first to read what is logged reduces it over them.
    others = _logged(trainer, metrics) if training_has_started else [_PLACEHOLDER]
    logs_hyperparameters = any(_logs_hyperparameters(owner) for owner in _owners(trainer))
    for logger in loggers if trainer.is_global_zero else []:
        has_placeholder = logs_hyperparameters and getattr(logger, "_default_hp_metric", True)
        writer = getattr(logger.experiment, "file_writer", None)
        if writer is None or has_placeholder == training_has_started:
            continue
        names = [*metrics, *_monitored(trainer), *others]
        prefix = getattr(logger, "_prefix", "")
        columns = {f"{prefix}-{name}" if prefix else name: 0.0 for name in names if name != "epoch"}
        describe: Any = hparams  # has no types
        for summary in describe(_hyperparameters(trainer), columns):
            writer.add_summary(summary, trainer.global_step)


def callbacks(trainer: Trainer) -> list[Any]:
    """Return the Trainer's callbacks in the order of their calls; its class does not declare them."""
    untyped: Any = trainer
    return list(untyped.callbacks)


# Lightning says nowhere in public whether `save_hyperparameters(logger=False)` was called, whether a logger writes the
# placeholder, and which DataLoader was passed to `fit` before it is used. tests/test_hyperparameters.py knows when
# these names move; then the tab lacks columns, and nothing else.


def _owners(trainer: Trainer) -> list[Any]:
    return [trainer.lightning_module, *filter(None, [getattr(trainer, "datamodule", None)])]


def _logs_hyperparameters(owner: Any) -> bool:
    return bool(getattr(owner, "_log_hyperparams", False))


def _train_dataloader(trainer: Trainer) -> Any:
    loader = trainer.train_dataloader
    source = getattr(trainer.fit_loop, "_data_source", None)
    return getattr(source, "instance", None) if loader is None else loader


def saved_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Return what ``save_hyperparameters`` of module and datamodule kept for the logger: numbers, bools and strings.

    Names of nested ones are joined by ``/``.
    """
    return {
        name: value
        for owner in _owners(trainer)
        if _logs_hyperparameters(owner)
        for name, value in _flattened(dict(owner.hparams_initial))
        if not name.startswith("_")  # LightningCLI's own
    }


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        value = vars(value) if isinstance(value, Namespace) else value
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}/")
        else:
            if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
                value = value.item()
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Return what was saved, and what optimizer, data and SAM know beside."""
    saved = saved_hyperparameters(trainer)
    known = {"batch_size": samples_per_step(trainer), "sam_rho": _rho(trainer), "sam_ascent": _ascent(trainer)}
    known |= _optimizer_settings(trainer.optimizers)
    return saved | {
        name: value
        for name, value in known.items()
        if value is not None and not any(synonym in saved for synonym in _SYNONYMS.get(name, (name,)))
    }


def _optimizer_settings(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    if len(optimizers) != 1:
        return {}
    (optimizer,) = optimizers
    inner = optimizer.base_optimizer if isinstance(optimizer, SAM) else optimizer
    settings: dict[str, Any] = {"optimizer": type(inner).__name__}
    for name in ("lr", "momentum", "weight_decay"):
        # A scheduler may have begun with another rate than the one that the user set.
        values = {group.get(f"initial_{name}", group[name]) for group in inner.param_groups if name in group}
        if len(values) == 1 and (value := values.pop()) is not None:  # None: a rate that the optimizer finds itself
            settings[name] = float(value)
    return settings


def _rho(trainer: Trainer) -> float:
    return max((sam.rho for sam in _sams(trainer)), default=0.0)


def _ascent(trainer: Trainer) -> str | None:
    """Return how SAM perturbs with one gradient per step; None if there is none, or it takes two."""
    return next((sam.ascent for sam in _sams(trainer) if sam.ascent != "gradient"), None)


def _sams(trainer: Trainer) -> list[SharpnessAwareMinimization | SAM]:
    found = [c for c in callbacks(trainer) if isinstance(c, SharpnessAwareMinimization)]
    return [*found, *(optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SAM))]


def samples_per_step(trainer: Trainer) -> int | None:
    """Return how many samples are behind one optimizer step, over ranks and accumulated batches; None if unknown."""
    loader = _train_dataloader(trainer)
    sources = [loader, getattr(loader, "batch_sampler", None), *_owners(trainer)]
    sizes = [getattr(source, "batch_size", None) for source in sources]
    # Only of owners that have some: to ask others for ``hparams`` would give them the attribute.
    sizes += [owner.hparams.get("batch_size") for owner in _owners(trainer) if owner.hparams_initial]
    size = next((size for size in sizes if isinstance(size, int)), None)
    return None if size is None else size * trainer.accumulate_grad_batches * trainer.world_size


def batch_size_of_run(trainer: Trainer) -> int | None:
    """Return how many samples are behind an optimizer step, those of the dataset at most; None if unknown."""
    size = samples_per_step(trainer)
    dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
    try:
        return None if size is None else min(size, len(dataset))
    except (TypeError, NotImplementedError):  # a stream
        return size


def _logged(trainer: Trainer, metrics: Sequence[str]) -> list[str]:
    """Return what the module has logged, without the errors and costs that come with the metrics."""
    groups = {name.rpartition("/")[0] for name in metrics} - {""}
    ours = tuple(f"{group}{kind}/" for group in (*groups, "flatness") for kind in ("", "_errors", "_cost"))
    return sorted(name for name in trainer.callback_metrics if not name.startswith((*ours, "sam/")))


def _monitored(trainer: Trainer) -> list[str]:
    """Return the curves that checkpoints and early stopping go by: those the user cares for."""
    return [name for callback in callbacks(trainer) if isinstance(name := getattr(callback, "monitor", None), str)]
