"""What a landscape takes from a module: its loss on a batch, and its parameters; checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

LossFunction: TypeAlias = Callable[[nn.Module, Any], Any]
"""``loss_fn(module, batch)``: the mean loss over the samples of ``batch``, a scalar tensor or a dict with "loss"."""


class NonFiniteLossError(ValueError):
    """The loss is infinite or not a number: flatness is not defined there."""


def training_step_of(module: nn.Module) -> LossFunction:
    """Return the loss of a LightningModule's own ``training_step``.

    Raises:
        TypeError: If it has no ``training_step``.
        ValueError: If its ``training_step`` does not simply return the loss of a batch.
    """
    step = getattr(module, "training_step", None)
    if step is None:
        raise TypeError(
            f"Expected a `loss_fn`, or a LightningModule with a `training_step`, got {type(module).__name__} without "
            "either. Pass loss_fn=lambda module, batch: ... that returns the mean loss of a batch."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "Expected a `loss_fn` for a module with manual optimization, whose `training_step` updates the weights "
            "itself, got None. Pass loss_fn=lambda module, batch: ... that returns the mean loss of a batch."
        )
    names = list(inspect.signature(step).parameters)
    if "dataloader_iter" in names:
        raise ValueError(
            "Expected a `training_step` that takes a batch, got one that takes `dataloader_iter`. Pass "
            "loss_fn=lambda module, batch: ... that returns the mean loss of a batch."
        )
    arguments = (0,) if len(names) > 1 else ()
    return lambda module, batch: module.training_step(batch, *arguments)  # type: ignore[operator]


def loss_in(output: Any) -> Any:
    """Return what a loss function or training step says the loss is."""
    return output["loss"] if isinstance(output, Mapping) and "loss" in output else output


def check_loss(loss: Any, allow_non_finite: bool = False) -> Tensor:
    """Return what a loss function returned as a tensor without axes, with its graph.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has several entries.
        NonFiniteLossError: If it is not finite, unless that is allowed.
    """
    if loss is None:
        raise TypeError(
            "Expected the loss function (or training_step) to return a scalar tensor or a dict with 'loss', got "
            "None. Return the loss for every batch of the probe, or pass a `loss_fn` that does."
        )
    if not isinstance(loss, Tensor):
        raise TypeError(f"Expected the loss to be a scalar tensor or a dict with 'loss', got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(
            f"Expected the loss to be a scalar, got a tensor of shape {tuple(loss.shape)}. Take the mean over the "
            "samples of the batch."
        )
    if not allow_non_finite:
        check_finite_loss(loss)
    return loss.reshape(())


def check_finite_loss(loss: Tensor) -> None:
    """Raise an error if a loss is infinite or not a number; waits for the device.

    Raises:
        NonFiniteLossError: If it is.
    """
    if not torch.isfinite(loss):
        raise NonFiniteLossError(
            f"Expected a finite loss, got {loss.item()}. The flatness of a diverged run is not defined: check the "
            "weights and the samples of the probe."
        )


def graph_nodes(outputs: Iterable[Tensor]) -> set[Any]:
    """Return the nodes of the graph of some tensors."""
    nodes: set[Any] = set()
    pending: list[Any] = [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return nodes


def measured_parameters(module: nn.Module, patterns: str | Sequence[str] | None = None) -> list[Tensor]:
    """Return the parameters of a module that are the weights of its landscape, each once, in the module's order.

    Args:
        module: Any module.
        patterns: Patterns of names, ``"encoder.*,head.*"`` or a list of them; frozen parameters may be among those that
            match. Default: the trainable ones.

    Raises:
        ValueError: If there are none, or they do not make one flat real vector on one device.
    """
    if patterns is None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    else:
        named = _matching(dict(module.named_parameters()), patterns)
    if not named:
        raise ValueError(
            f"Expected trainable parameters, got {type(module).__name__} with none. Set requires_grad=True on the "
            "parameters whose landscape is to be measured."
        )
    for name, p in named.items():
        if is_lazy(p):
            raise ValueError(f"Expected initialised parameters, got the lazy {name!r}. Run a forward pass first.")
        if not p.is_floating_point():
            raise ValueError(f"Expected real parameters, got {name!r} of {p.dtype}. Freeze it, or use real tensors.")
    devices = {p.device for p in named.values()}
    if len(devices) > 1:
        raise ValueError(f"Expected all measured parameters on one device, got {sorted(map(str, devices))}.")
    return list(named.values())


def _matching(named: dict[str, nn.Parameter], patterns: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters whose names match; an error with the nearest names for a pattern that matches none."""
    wanted = [p.strip() for p in patterns.split(",")] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in named):
            near = get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:3]
            raise ValueError(
                f"Expected patterns of `parameters` to match names of parameters, got {pattern!r}, which matches none. "
                f"Names near it: {', '.join(near)}."
            )
    return {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in wanted)}
