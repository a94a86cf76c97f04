"""The edge of stability: the curvature above which an optimizer's steps grow instead of shrinking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_flatness.geometry import unwrapped_optimizers


def stability_edge(optimizer: Optimizer | Sequence[Optimizer]) -> float:
    r"""Return the lambda_max above which full-batch steps of ``optimizer`` diverge along the sharpest direction.

    Along an eigenvector of the eigenvalue lambda the steps are a linear recurrence in one number, which is unstable
    above, with the learning rate eta (arXiv 2103.00065, 2207.14484):

    - SGD: ``2 / eta``; with momentum beta and dampening d: ``(2 + 2 beta) / ((1 - d) eta)``; with Nesterov's:
      ``(2 + 2 beta) / ((1 + 2 beta) eta)``.
    - Adam, AdamW: ``(2 + 2 beta1) / ((1 - beta1) eta)``; RMSprop: ``(2 + 2 momentum) / eta``; Adagrad: ``2 / eta`` with
      its decayed eta. For those lambda is the preconditioned sharpness: measure it in the geometry ``"optimizer"``.

    Weight decay is not part of the loss that is measured, and left out: SGD's lowers the edge by itself. Of several
    groups the smallest edge counts, so that of the largest learning rate where the groups agree on the rest.

    Args:
        optimizer: An optimizer with its current learning rates, or several.

    Returns:
        The edge, in the units of lambda_max; infinite if all learning rates are zero, not a number for an optimizer
        whose edge is not known.

    Example:
        >>> import torch
        >>> round(stability_edge(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)), 6)
        38.0
    """
    edges = [_edge(each, group) for each in unwrapped_optimizers(optimizer) for group in each.param_groups]
    return math.nan if any(math.isnan(edge) for edge in edges) else min(edges, default=math.nan)


def is_preconditioned(optimizer: Optimizer | Sequence[Optimizer]) -> bool:
    """Return whether the edge is one of the preconditioned sharpness, geometry ``"optimizer"``."""
    return any(isinstance(each, Adam | AdamW | RMSprop | Adagrad) for each in unwrapped_optimizers(optimizer))


def _edge(optimizer: Optimizer, group: dict[str, Any]) -> float:
    lr = float(group["lr"])
    if isinstance(optimizer, SGD):
        factor = _momentum_factor(float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]))
    elif isinstance(optimizer, Adam | AdamW):
        beta = float(group["betas"][0])
        factor = (2 + 2 * beta) / (1 - beta)
    elif isinstance(optimizer, RMSprop):
        factor = 2 + 2 * float(group["momentum"])
    elif isinstance(optimizer, Adagrad):
        steps = max((float(optimizer.state[p]["step"]) for p in group["params"] if p in optimizer.state), default=0.0)
        factor = 2 * (1 + max(steps - 1, 0.0) * float(group["lr_decay"]))
    else:
        return math.nan
    return factor / lr if lr > 0 else math.inf


def _momentum_factor(beta: float, dampening: float, nesterov: bool) -> float:
    if beta == 0:
        return 2.0  # torch applies dampening to the momentum buffer alone
    if nesterov:
        return (2 + 2 * beta) / (1 + 2 * beta)
    return (2 + 2 * beta) / (1 - dampening) if dampening < 1 else math.inf
