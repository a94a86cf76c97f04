"""A landscape whose weights and vectors stay sharded over the ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_flatness.geometry import Chart, Geometry
from lightning_flatness.geometry.base import LinearChart, LinearGeometry
from lightning_flatness.geometry.optimizer import MissingOptimizerStateError
from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.loss_landscape import LossLandscape
from lightning_flatness.landscape.measured_module import sharded_module
from lightning_flatness.landscape.sharded_loss import ShardedLoss
from lightning_flatness.landscape.vectors import Vectors
from lightning_flatness.module.sharded_twin import ShardedTwin


def takes_shards(geometry: Geometry) -> bool:
    """Return whether the chart of a geometry is made of the weights of one tensor at a time."""
    return isinstance(geometry, LinearGeometry) and not geometry.needs_whole_weights


class ShardedLandscape(LossLandscape):
    """A :class:`LossLandscape` of which every rank holds a part: of R ranks ``1/R`` of the weights and of each vector.

    For modules under ``fully_shard`` (FSDP2) that do not fit into the memory of one device with the vectors of Lanczos.
    Under DDP it spreads the vectors and the weights of the copy that is measured. Operators gather the weights that
    they read one by one, forward and backward, so the peak beside the parts is one whole tensor of weights with its
    gradient. Products are exact as those of a :class:`LossLandscape`, and values agree with it up to rounding. The
    costs are its, plus the communication: all weights once in a forward pass and twice to four times in a product.

    Flat vectors hold this rank's entries, a slice of each parameter after the other. It is for the eigenvalues of
    :class:`TopEigenvalues` and :class:`InvariantSharpness`, in geometries that look at one tensor at a time
    (``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, ``"optimizer"``), and for :class:`CriticalSharpness` and
    :class:`DirectionalSharpness`; other measures raise. All ranks must run the same operators: a loss that branches on
    its samples makes them wait for each other forever, and so may an exception on one rank alone.

    Args:
        arguments: Those of :class:`LossLandscape`.
        options: Those of :class:`LossLandscape`.

    Raises:
        ValueError: As :class:`LossLandscape`; in :meth:`measurement` and :meth:`chart`, if a measure or a geometry
            needs whole weights.

    Example:
        >>> import torch
        >>> from lightning_flatness import ShardedLandscape, TopEigenvalues
        >>> module = torch.nn.Linear(2, 1, bias=False)  # under torchrun: fully_shard(module), and this rank's batches
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> metric = TopEigenvalues()
        >>> metric.update(ShardedLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute().round(decimals=3)  # of 2 · mean x xᵀ = diag(1, 9)
        tensor(9.)
    """

    _loss_class: ClassVar[type[BatchedLoss]] = ShardedLoss
    _measured_module = staticmethod(sharded_module)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.samples = self.samples.in_step(self.device)

    def measurement(self, *, on_shards: bool = False) -> AbstractContextManager[LossLandscape]:
        """Hold the module still for several evaluations at the same weights; see :meth:`LossLandscape.measurement`.

        Args:
            on_shards: Whether the block takes vectors of which each rank holds a part.

        Returns:
            The block.

        Raises:
            ValueError: If it does not.
        """
        if not on_shards:
            raise ValueError(
                "Expected a measure that takes sharded vectors, got one that needs whole ones. Use LossLandscape in "
                "the place of ShardedLandscape. (In code of your own that does: `measurement(on_shards=True)`.)"
            )
        return super().measurement(on_shards=True)

    def vectors_in(self, chart: Chart) -> Vectors:  # noqa: ARG002
        """Return where the vectors of coordinates are: slices on each rank."""
        return self.batched_loss.vectors

    def _chart(self, geometry: Geometry) -> Chart:
        if not isinstance(geometry, LinearGeometry) or not takes_shards(geometry):
            raise ValueError(
                f"Expected a geometry that looks at one tensor at a time, got {geometry!r}. Use LossLandscape in the "
                "place of ShardedLandscape."
            )
        measured, vectors = self.batched_loss.measured, self.batched_loss.vectors
        assert isinstance(measured, ShardedTwin)
        with torch.no_grad():
            return LinearChart(_diagonal(geometry, measured, vectors), vectors.size)


def _diagonal(geometry: LinearGeometry, twin: ShardedTwin, vectors: Vectors) -> Tensor | None:
    """Return this rank's entries of the diagonal of ``S``, from one tensor of weights at a time; None for ones."""
    found: list[Tensor | None] = []
    missing: list[MissingOptimizerStateError] = []
    for stand_in, shard in zip(twin.stand_ins, twin.shards, strict=True):
        try:
            scales = geometry.scales(twin.module, [stand_in])
        except MissingOptimizerStateError as error:  # of this tensor: it has had no gradient
            missing.append(error)
            scales = [torch.zeros((), device=vectors.device)]
        whole = None if scales is None else scales[0].to(vectors.dtype).expand(stand_in.shape)
        found.append(None if whole is None else shard.own(whole).clone())
    if len(missing) == len(found):
        raise missing[0]
    if all(scale is None for scale in found):
        return None
    ones = [torch.ones(len(s.leaf), dtype=vectors.dtype, device=vectors.device) for s in twin.shards]
    return torch.cat([one if scale is None else scale for scale, one in zip(found, ones, strict=True)])
