"""SAM with one gradient per step written down a second time, in plain PyTorch, as an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.sam_reference import ADAMW, SGD, make_optimizer, plain_gradient, plain_perturbation, plain_scales

ASCENTS = ("momentum", "previous")


def plain_ascent_loop(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    ascent: str,
    rho: float,
    optimizer: str = SGD,
    geometry: str = "euclidean",
    num_epochs: int = 3,
    accumulate: int = 1,
    max_norm: float | None = None,
    is_perturbed: Callable[[int], bool] = lambda step: True,
) -> list[float]:
    """Train; return the mean length of the perturbation in each epoch.

    The momentum is followed here, by the formulas of SGD and Adam, and not read from the optimizer.
    """
    model.train()
    torch.manual_seed(3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    own = make_optimizer(optimizer, parameters)
    direction: list[Tensor] | None = None
    means, step = [], 0
    for _ in range(num_epochs):
        lengths = []
        for start in range(0, len(batches), accumulate):
            weights = [p.detach().clone() for p in parameters]
            changes = [torch.zeros_like(p) for p in parameters]
            if direction is not None and is_perturbed(step):
                sign = -1.0 if ascent == "momentum" else 1.0
                changes = plain_perturbation([sign * d for d in direction], plain_scales(parameters, geometry), rho)
            total = [torch.zeros_like(p) for p in parameters]
            for x, y in batches[start : start + accumulate]:
                with torch.no_grad():
                    for p, e in zip(parameters, changes, strict=True):
                        p.add_(e)
                gradients = plain_gradient(lambda: F.cross_entropy(model(x), y), parameters)
                total = [t + g / accumulate for t, g in zip(total, gradients, strict=True)]
                with torch.no_grad():
                    for p, w in zip(parameters, weights, strict=True):
                        p.copy_(w)
                if is_perturbed(step):
                    lengths.append(float(torch.cat([e.flatten() for e in changes]).norm()))
            for p, t in zip(parameters, total, strict=True):
                p.grad = t.clone()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            clipped = [p.grad.clone() for p in parameters if p.grad is not None]
            if ascent == "previous":
                direction = total
            elif optimizer == ADAMW:
                before = direction if direction is not None else [torch.zeros_like(g) for g in clipped]
                direction = [0.9 * m + 0.1 * g for m, g in zip(before, clipped, strict=True)]
            else:
                decayed = [g + 1e-3 * w for g, w in zip(clipped, weights, strict=True)]
                direction = (
                    decayed if direction is None else [0.9 * v + g for v, g in zip(direction, decayed, strict=True)]
                )
            own.step()
            step += 1
        means.append(sum(lengths) / len(lengths) if lengths else 0.0)
    return means
