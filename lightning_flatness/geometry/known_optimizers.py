"""Torch's optimizers in one table: their edge of stability and their preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_flatness.module.sharding import whole

Group = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True)
class KnownOptimizer:
    """One row of the table.

    Attributes:
        edge: The learning rate times the curvature above which full-batch steps diverge along an eigenvector. A
            function of a parameter group and the states of its parameters.
        squares: The square of what divides the steps, without ``eps``. A function of the state of a parameter, which
            has made a step, and its group. None for an optimizer that divides by nothing.
    """

    edge: Callable[[Group, Sequence[State]], float]
    squares: Callable[[State, Group], Tensor] | None = None


def _sgd_edge(group: Group, _states: Sequence[State]) -> float:
    beta, dampening = float(group["momentum"]), float(group["dampening"])
    if beta == 0:
        return 2.0  # torch applies dampening to the momentum buffer alone
    if group["nesterov"]:
        return (2 + 2 * beta) / (1 + 2 * beta)
    return (2 + 2 * beta) / (1 - dampening) if dampening < 1 else math.inf


def _adam_edge(group: Group, _states: Sequence[State]) -> float:
    beta = float(group["betas"][0])
    return (2 + 2 * beta) / (1 - beta)


def _adagrad_edge(group: Group, states: Sequence[State]) -> float:
    steps = max((float(state["step"]) for state in states), default=0.0)
    return 2 * (1 + max(steps - 1, 0.0) * float(group["lr_decay"]))


def _adam_squares(state: State, group: Group) -> Tensor:
    second = _as_float(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    correction: float = 1 - float(group["betas"][1]) ** float(state["step"])
    return second / correction


def _rmsprop_squares(state: State, group: Group) -> Tensor:
    second = _as_float(state["square_avg"])
    if group["centered"]:
        second = (second - _as_float(state["grad_avg"]).square()).clamp_min(0)
    return second


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


_ADAM = KnownOptimizer(_adam_edge, _adam_squares)

KNOWN_OPTIMIZERS: dict[type[Optimizer], KnownOptimizer] = {
    SGD: KnownOptimizer(_sgd_edge),
    Adam: _ADAM,
    AdamW: _ADAM,
    RMSprop: KnownOptimizer(lambda group, _states: 2 + 2 * float(group["momentum"]), _rmsprop_squares),
    Adagrad: KnownOptimizer(_adagrad_edge, lambda state, _group: _as_float(state["sum"])),
}


def decays_apart(optimizer: Optimizer, group: Group) -> bool:
    """Return whether weight decay acts on the weights themselves, and is no part of the gradient."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def largest_divisor(known: KnownOptimizer, group: Group, states: Sequence[State]) -> float:
    """Return the largest number that the steps of a group's weights are divided by; 1 where none is.

    States of parameters that have made no step are passed over.
    """
    if known.squares is None:
        return 1.0
    largest = [float(whole(known.squares(s, group)).max()) for s in states if float(s.get("step", 0)) > 0]
    return math.sqrt(max(largest)) + float(group["eps"]) if largest else math.inf


def known_optimizer(optimizer: Optimizer) -> KnownOptimizer | None:
    """Return what is known of an optimizer, or of the class that its own derives from; None for any other."""
    return next((known for kind, known in KNOWN_OPTIMIZERS.items() if isinstance(optimizer, kind)), None)


def is_preconditioned(optimizer: Any) -> bool:
    """Return whether an optimizer divides its steps: its edge is then one of the geometry ``"optimizer"``."""
    known = map(known_optimizer, unwrapped_optimizers(optimizer))
    return any(each is not None and each.squares is not None for each in known)


def unwrapped_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers of torch inside one optimizer or several, without wrappers such as Lightning's or SAM.

    Raises:
        TypeError: If it is neither an optimizer, nor holds one as ``optimizer`` or ``base_optimizer``, nor a sequence.
    """
    if isinstance(optimizer, list | tuple):
        return [inner for each in optimizer for inner in unwrapped_optimizers(each)]
    for attribute in ("base_optimizer", "optimizer"):
        inner = getattr(optimizer, attribute, None)
        if isinstance(inner, Optimizer):
            return unwrapped_optimizers(inner)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer, or several in a list, got {type(optimizer).__name__}.")
    return [optimizer]
