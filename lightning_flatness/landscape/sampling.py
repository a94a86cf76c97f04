"""How far a mean over the samples of a landscape is from the mean over all samples that they were drawn from.

A measure that is a mean over samples, ``q = 1/N sum_n q_n``, misses the whole set of M by about
``sd_n(q_n) / sqrt(N) · sqrt(1 - N/M)``. The ``q_n`` are made of the losses of single samples at a few points, by
``vmap`` over forward passes. Where a sample has no loss of its own (normalisation over the batch, weights of classes)
or ``vmap`` fails, the same is done with the losses of groups of samples, 32 where there are enough.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.loss_landscape import LossLandscape
from lightning_flatness.landscape.per_sample import LossModule
from lightning_flatness.module.batches import copy_batch, map_tensors, slice_samples, tensors_in
from lightning_flatness.module.loss import check_loss, loss_in

NUM_GROUPS = 32
LEAST_GROUPS = 8
_SAME_LOSS = 1e-3


class SampleLosses:
    """The losses of single samples, or of groups of them, at points near the weights.

    Those at the weights cost two thirds of a gradient, once in a measurement.

    Args:
        landscape: The loss, inside one of its measurements.
        value: The loss of all samples, if it is known.

    Attributes:
        value: The loss of all samples.
        typical: Root mean square of the losses at the weights.
        at_weights: Losses at the weights themselves, shape (groups of this rank,), in float64 on the CPU.
        sizes: Samples in each group.
    """

    def __init__(self, landscape: LossLandscape, value: float | None = None) -> None:
        self._landscape = landscape
        loss = landscape.batched_loss
        self._pieces: Sequence[tuple[int, Any]] | None = None
        self._is_checked = False
        point = loss.point
        if point.sample_losses is None:
            point.sample_losses = self._by_sample()
        if point.loss is None:
            point.loss = float(landscape.loss()) if value is None else value
        self.at_weights, self.value = point.sample_losses, point.loss
        self.sizes = torch.ones(sum(loss.samples.sizes), dtype=torch.float64, device="cpu")
        if not abs(self._mean(self.at_weights) - self.value) <= _SAME_LOSS * abs(self.value):
            self._divide()
        self.typical = math.sqrt(self._mean(self.at_weights.square()))

    @property
    def num_groups(self) -> int:
        """Groups on all ranks."""
        return int(_sums(self._landscape, torch.tensor(float(len(self.sizes)), device="cpu"))[0])

    def at(self, displacement: Tensor) -> Tensor:
        """Return the losses at displaced weights, shape (groups of this rank,), for one forward pass."""
        with self._landscape.displaced(displacement):
            return self._by_sample() if self._pieces is None else self._by_group()

    def second_derivatives(self, velocity: Tensor, acceleration: Tensor) -> Tensor | None:
        """Return the second derivatives of the losses of samples or groups along a curve through the weights.

        Costs four thirds of a gradient by forward mode for samples, three gradients by two backward passes for groups.
        The first call checks forward mode by a product, at two gradients: torch has no nested one for some operators
        (squared error, SiLU), and a wrong one for others (LayerNorm). Groups take the place of samples then.

        Args:
            velocity: First derivative of the curve, shape (num_parameters,).
            acceleration: Second derivative of the curve.

        Returns:
            Shape (samples or groups of this rank,); None where an operator has no such derivative.
        """
        loss = self._landscape.batched_loss
        along = loss.unflatten(velocity), loss.unflatten(acceleration)
        if self._pieces is None:
            self._landscape.cost.gradient_evaluations += 1  # and a third, counted below
            found = self._joined(_second_by_vmap(loss, index, *along) for index in loss.indices)
            if self._is_checked or self._is_right(found, velocity, acceleration):
                self._is_checked = True
                return found
            self._divide()
        self._landscape.cost.gradient_evaluations += 3 - 1 / 3
        groups = self._pieces or []
        found = self._joined(_second_of_group(loss, index, piece, *along).sum()[None] for index, piece in groups)
        return found if _sums(self._landscape, found.isnan().sum().double())[0] == 0 else None

    def second_derivatives_by_tensor(self, velocity: Tensor) -> Tensor:
        """Return what each parameter adds to the second derivatives of the losses of groups along a line.

        ``u_iᵀ (H u)_i`` with the entries of parameter i. Costs three gradients. Groups take the place of samples.

        Args:
            velocity: The direction ``u`` of the line, shape (num_parameters,).

        Returns:
            Shape (parameters, groups of this rank); not numbers where an operator has no such derivative.
        """
        loss = self._landscape.batched_loss
        if self._pieces is None:
            self._divide(least=1)  # a sample has a loss of its own
        u = loss.unflatten(velocity)
        still = loss.unflatten(torch.zeros_like(velocity))
        self._landscape.cost.gradient_evaluations += 3 - 1 / 3
        found = self._joined(_second_of_group(loss, i, piece, u, still) for i, piece in self._pieces or [])
        return found.view(-1, len(u)).T

    def _is_right(self, found: Tensor, velocity: Tensor, acceleration: Tensor) -> bool:
        """Return whether the mean of second derivatives is that of the loss of all samples."""
        mean, size = self._mean(found), math.sqrt(self._mean(found.square()))
        if math.isnan(mean):
            return False
        landscape = self._landscape
        expected = torch.dot(velocity, landscape.hvp(velocity)) + torch.dot(landscape.gradient(), acceleration)
        return abs(mean - float(expected)) <= math.sqrt(torch.finfo(landscape.dtype).eps) * size

    def _divide(self, least: int = 2) -> None:
        """Take groups of some samples at least in the place of samples from now on: BatchNorm refuses a single one."""
        loss = self._landscape.batched_loss
        pieces, self.sizes = _groups(loss, max(least, self._landscape.num_samples // NUM_GROUPS))
        self._pieces = loss.in_step(pieces)
        self.at_weights = self._by_group()

    def standard_error(self, values: Tensor) -> float:
        """Return the standard error of the mean of some values of all groups, one of several estimates of each.

        Args:
            values: Independent estimates of what belongs to a group, shape (estimates, groups of this rank). Their
                scatter within a group is none between groups, and is taken out, at most half of the variance.

        Returns:
            The error for the whole set that the samples were drawn from; not a number for fewer than 8 groups.
        """
        num_groups = self.num_groups
        if num_groups < LEAST_GROUPS:
            return math.nan
        shares = self.sizes / self._landscape.num_samples
        common = _sums(self._landscape, (shares * values).sum(dim=1))
        values = values - torch.tensor(common, dtype=values.dtype, device=values.device).unsqueeze(1)
        within = values.var(dim=0) / len(values) if len(values) > 1 else torch.zeros_like(shares)
        squares = shares.square() * torch.stack([values.mean(dim=0).square(), within])
        total, inner = _sums(self._landscape, squares.sum(dim=1))
        variance = max(total - inner, total / 2) * num_groups / (num_groups - 1)
        return math.sqrt(variance * self._landscape.samples.unseen_share)

    def _mean(self, values: Tensor) -> float:
        """Return the mean over the samples of all ranks."""
        return _sums(self._landscape, (self.sizes * values).sum() / self._landscape.num_samples)[0]

    def _by_sample(self) -> Tensor:
        """Return the losses of this rank's samples; not numbers where they have none."""
        loss = self._landscape.batched_loss
        return self._joined(_losses_by_vmap(loss, index) for index in loss.indices)

    def _by_group(self) -> Tensor:
        assert self._pieces is not None
        loss = self._landscape.batched_loss
        return self._joined(_loss_of(loss, index, piece) for index, piece in self._pieces)[: len(self.sizes)]

    def _joined(self, losses: Iterator[Tensor]) -> Tensor:
        self._landscape.cost.gradient_evaluations += 1 / 3
        with self._landscape.batched_loss.summed(0):  # what one rank raises, all raise
            joined = torch.cat([torch.empty(0, device="cpu"), *losses])
        return joined.double()


def _sums(landscape: LossLandscape, values: Tensor) -> list[float]:
    """Return sums over the ranks of one or several numbers."""
    with landscape.batched_loss.summed(values.numel()) as total:
        total += values.reshape(-1).to(total)
    numbers: list[float] = total[: values.numel()].tolist()
    return numbers


def _losses_by_vmap(loss: BatchedLoss, index: int) -> Tensor:
    def loss_of(batch: Callable[[], Any]) -> Tensor:
        value: Tensor = loss_in(loss.loss_fn(loss.module, batch()))
        return value.reshape(())

    return _by_vmap(loss, index, loss_of)


def _second_by_vmap(
    loss: BatchedLoss, index: int, velocity: Sequence[Tensor], acceleration: Sequence[Tensor]
) -> Tensor:
    at = LossModule(loss).at
    pieces = zip(loss.parameters, velocity, acceleration, strict=True)
    cast = [(p.detach(), u.to(p.dtype), c.to(p.dtype)) for p, u, c in pieces]
    weights, velocities, accelerations = (list(column) for column in zip(*cast, strict=True))

    def second(batch: Callable[[], Any]) -> Tensor:
        def loss_at(values: list[Tensor]) -> Tensor:
            return at(values, batch())

        def slope(values: list[Tensor], velocity: list[Tensor]) -> Tensor:
            found: Tensor = torch.func.jvp(loss_at, (values,), (velocity,))[1]
            return found

        bend: Tensor = torch.func.jvp(slope, (weights, velocities), (velocities, accelerations))[1]
        return bend

    return _by_vmap(loss, index, second)


def _by_vmap(loss: BatchedLoss, index: int, function: Callable[[Callable[[], Any]], Tensor]) -> Tensor:
    """Return a function's values on the samples of a batch, in batches of one; not numbers if it fails."""
    batch, size, num_counted = loss.samples.fresh(index), loss.samples.length(index), loss.samples.sizes[index]
    is_sliced = [leaf.dim() > 0 and leaf.shape[0] == size for leaf in tensors_in(batch)]

    def of_sample(*sample: Tensor) -> Tensor:
        leaves = [t.unsqueeze(0) if sliced else t for t, sliced in zip(sample, is_sliced, strict=True)]

        def one() -> Any:
            pieces = iter(leaves)
            return map_tensors(lambda _: next(pieces).clone(), batch)  # the user's code may write into its batch

        return function(one)

    in_dims = tuple(0 if sliced else None for sliced in is_sliced)
    if loss.measured.has_hidden_weights:  # written to inside a transform they crash torch
        return torch.full((num_counted,), math.nan, device="cpu")
    try:
        with torch.no_grad(), loss.measured.forward_pass(index), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that vmap has to loop over
            values: Tensor = torch.func.vmap(of_sample, in_dims=in_dims, randomness="same")(*tensors_in(batch))
            return values.cpu()[:num_counted]
    except MemoryError:
        raise
    except Exception:  # a branch on data, a buffer written in place, an operator without a rule, a sample too few
        return torch.full((num_counted,), math.nan, device="cpu")


def _second_of_group(
    loss: BatchedLoss, index: int, batch: Any, velocity: Sequence[Tensor], acceleration: Sequence[Tensor]
) -> Tensor:
    """Return what each parameter adds to the second derivative of a group's loss, shape (parameters,).

    By two backward passes: forward mode refuses to update running statistics.
    """
    with torch.enable_grad(), loss.measured.forward_pass(index):
        value = loss_in(loss.loss_fn(loss.module, copy_batch(batch)))
        try:
            gradient = torch.autograd.grad(value, loss.parameters, create_graph=True, allow_unused=True)
            slope = value.new_zeros(()).requires_grad_() + _dots(gradient, velocity).sum()
            bends = _dots(torch.autograd.grad(slope, loss.parameters, allow_unused=True), velocity)
        except RuntimeError:  # an operator without a second derivative
            return torch.full((len(velocity),), math.nan, device="cpu")
    return (bends + _dots(gradient, acceleration)).detach().cpu()


def _dots(gradient: Sequence[Tensor | None], direction: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradient, direction, strict=True)
    return torch.stack([d.new_zeros(()) if g is None else (g * d.to(g.dtype)).sum().to(d.dtype) for g, d in pairs])


def _groups(loss: BatchedLoss, group_size: int) -> tuple[list[tuple[int, Any]], Tensor]:
    """Divide this rank's batches into groups of nearly equal size; a batch that cannot be split is one.

    Returns:
        Groups, each with the number of its batch, and their sizes. Where all batches are there for other ranks only:
        one of them, and no sizes.
    """
    pieces: list[tuple[int, Any]] = []
    sizes: list[int] = []
    for index in [i for i in loss.indices if loss.samples.sizes[i] == loss.samples.length(i)]:
        batch, size = loss.samples.batches[index], loss.samples.sizes[index]
        num_groups = max(1, size // group_size)
        ends = [round(i * size / num_groups) for i in range(num_groups + 1)]
        try:
            parts = [slice_samples(batch, size, a, b) for a, b in pairwise(ends)]
        except ValueError:
            parts, ends = [batch], [0, size]
        pieces += [(index, part) for part in parts]
        sizes += [b - a for a, b in pairwise(ends)]
    pieces = pieces or [(i, loss.samples.batches[i]) for i in loss.indices[-1:]]
    return pieces, torch.tensor(sizes, dtype=torch.float64, device="cpu")


def _loss_of(loss: BatchedLoss, index: int, batch: Any) -> Tensor:
    gradients = nullcontext() if loss.operators.differentiates else torch.no_grad()
    with gradients, loss.measured.forward_pass(index):
        output = loss.loss_fn(loss.module, copy_batch(batch))
    # Not finite: of samples that are all left out (`ignore_index`), or far away. The error is then not known.
    return check_loss(loss_in(output), allow_non_finite=True).detach().cpu().reshape(1)
