"""The edge of stability: the curvature above which an optimizer's steps grow instead of shrinking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_flatness.geometry import decays_apart, known_optimizer, largest_divisor, unwrapped_optimizers

LearningRates: TypeAlias = Mapping[Optimizer, Sequence[Any]]
"""The learning rate of each group of some optimizers."""


def stability_edge(optimizer: Optimizer | Sequence[Optimizer], learning_rates: LearningRates | None = None) -> float:
    r"""Return the lambda_max above which full-batch steps of ``optimizer`` diverge along the sharpest direction.

    Along an eigenvector of the eigenvalue lambda the steps are a linear recurrence in one number, which is unstable
    above, with the learning rate eta and the weight decay gamma (arXiv 2103.00065, 2207.14484, 2601.16979):

    - SGD: ``2 / eta - gamma``; with momentum beta and dampening d: ``(2 + 2 beta) / ((1 - d) eta) - gamma``; with
      Nesterov's: ``(2 + 2 beta) / ((1 + 2 beta) eta) - gamma``.
    - AdamW: ``(2 + 2 beta1) / (1 - beta1) · (1 / eta - gamma / 2)``. For this and the next ones lambda is the
      preconditioned sharpness: measure it in the geometry ``"optimizer"``.
    - Adam: ``(2 + 2 beta1) / ((1 - beta1) eta) - gamma / P``; RMSprop: ``(2 + 2 momentum) / eta - gamma / P``; Adagrad:
      ``2 / eta - gamma / P`` with its decayed eta. The decay is in the gradient, which the preconditioner divides by P,
      here the largest of its entries: elsewhere the edge can be lower.

    Of several groups the smallest edge counts, so that of the largest learning rate where the groups agree on the rest.

    Args:
        optimizer: An optimizer, or several.
        learning_rates: Those of the step just taken, from :func:`current_learning_rates`. Default: the present ones,
            which a schedule may have changed since, to zero at its end.

    Returns:
        The edge, in the units of lambda_max; infinite if all learning rates are zero, not a number for an optimizer
        whose edge is not known.

    Example:
        >>> import torch
        >>> round(stability_edge(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, weight_decay=0.5)), 6)
        37.5
    """
    edges = [_edge(each, group, lr) for each, group, lr in _groups(optimizer, learning_rates)]
    return math.nan if any(math.isnan(edge) for edge in edges) else min(edges, default=math.nan)


def stability_band(
    optimizer: Optimizer | Sequence[Optimizer], learning_rates: LearningRates | None = None
) -> tuple[float, float]:
    r"""Return where the batch sharpness hovers in training with momentum beta, from small to large batches.

    From ``2 (1 - beta) / eta`` to ``2 (1 + beta) / eta``, the edge of full-batch steps (arXiv 2604.14108); both less
    the weight decay. Without momentum both are ``2 / eta`` (arXiv 2412.20553).

    Args:
        optimizer: SGD, with any momentum and dampening, or several of them.
        learning_rates: See :func:`stability_edge`.

    Returns:
        Both ends, each the smallest of all groups; not a number for other optimizers.

    Example:
        >>> import torch
        >>> [round(edge, 6) for edge in stability_band(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))]
        [2.0, 38.0]
    """
    low = [_small_batch_edge(each, group, lr) for each, group, lr in _groups(optimizer, learning_rates)]
    if any(math.isnan(edge) for edge in low):
        return math.nan, math.nan
    return min(low, default=math.nan), stability_edge(optimizer, learning_rates)


def current_learning_rates(optimizer: Optimizer | Sequence[Optimizer]) -> LearningRates:
    """Return the present learning rates, to be kept: schedulers change those of the optimizers."""

    def kept(lr: Any) -> Any:
        return lr.detach().clone() if isinstance(lr, Tensor) else lr

    return {each: [kept(group.get("lr")) for group in each.param_groups] for each in unwrapped_optimizers(optimizer)}


def _groups(
    optimizer: Optimizer | Sequence[Optimizer], learning_rates: LearningRates | None
) -> list[tuple[Optimizer, dict[str, Any], Any]]:
    taken, groups = learning_rates or {}, []
    for each in unwrapped_optimizers(optimizer):
        rates = [*taken.get(each, ())]
        for i, group in enumerate(each.param_groups):  # groups may have been added since the step
            groups.append((each, group, rates[i] if i < len(rates) else group.get("lr")))
    return groups


def _edge(optimizer: Optimizer, group: dict[str, Any], lr: Any) -> float:
    known = known_optimizer(optimizer)
    if known is None:
        return math.nan
    if float(lr) <= 0:
        return math.inf
    states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
    edge, decay = known.edge(group, states), float(group.get("weight_decay", 0.0))
    if decays_apart(optimizer, group):
        return edge / float(lr) - edge * decay / 2
    return edge / float(lr) - (decay / largest_divisor(known, group, states) if decay else 0.0)


def _small_batch_edge(optimizer: Optimizer, group: dict[str, Any], lr: Any) -> float:
    if not isinstance(optimizer, SGD):
        return math.nan
    beta, decay = float(group["momentum"]), float(group["weight_decay"])
    step = float(lr) * (1 - float(group["dampening"]) if beta else 1)  # torch damps the momentum buffer alone
    return 2 * (1 - beta) / step - decay if step > 0 else math.inf
