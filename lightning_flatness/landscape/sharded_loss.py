"""The mean loss over batches with sharded weights: every gradient is already summed over the ranks, and sliced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.ranks import check_ranks
from lightning_flatness.landscape.update import OptimizerStep
from lightning_flatness.landscape.vectors import ShardedVectors
from lightning_flatness.module.loss import NonFiniteLossError, check_finite_loss
from lightning_flatness.module.sharded_twin import ShardedTwin
from lightning_flatness.module.sharding import is_distributed
from lightning_flatness.module.shards import Shard, pack, unpack

_Pass = TypeVar("_Pass")


def sharded_vectors(shards: Sequence[Shard], dtype: torch.dtype, device: torch.device) -> ShardedVectors:
    """Return where the flat vectors are that belong to slices of parameters, one slice of each after the other."""
    slices, first = [], 0
    for shard in shards:
        slices.append((first + shard.start, first + shard.start + len(shard.leaf)))
        first += shard.num_entries
    return ShardedVectors(slices, first, dtype, device, sum(shard.largest for shard in shards))


class ShardedLoss(BatchedLoss):
    """The loss of a :class:`ShardedTwin`; all ranks make the same passes, in step.

    A backward pass adds up the gradients of all ranks. So each rank differentiates its batch's share of the mean, and
    a rank with fewer batches than others goes over one again, with the share zero.
    """

    measured: ShardedTwin

    def __post_init__(self) -> None:
        super().__post_init__()
        shards = self.measured.shards
        self.parameter_sizes = [shard.num_entries for shard in shards]
        self.vectors = sharded_vectors(shards, self.dtype, self.device)
        self._failure: NonFiniteLossError | None = None
        self._is_recording = False

    def batch_loss(self, index: int, *, allow_non_finite: bool = False) -> Tensor:
        """Return the mean loss over the samples of a batch; one that is not finite is an error on all ranks, later."""
        with nullcontext() if self._is_recording else saved_tensors_hooks(pack, unpack):
            loss = super().batch_loss(index, allow_non_finite=True)
        if not allow_non_finite:
            try:
                check_finite_loss(loss)
            except NonFiniteLossError as error:
                self._failure = error
        return loss

    def change_of(self, step: OptimizerStep) -> Tensor:
        """Return this rank's entries, from one whole tensor at a time."""
        pairs = zip(self.measured.stand_ins, self.measured.shards, strict=True)
        return torch.cat([shard.own(step.change([stand_in])).clone() for stand_in, shard in pairs])

    def objective(self, index: int, *, allow_non_finite: bool = False) -> Tensor:
        """Return what a batch contributes to the mean over all samples."""
        return self.batch_loss(index, allow_non_finite=allow_non_finite) * self._share(index)

    def _share(self, index: int) -> float:
        return self.samples.sizes[index] / self.samples.num_samples

    def _batch_value(self, index: int) -> Tensor:
        return super()._batch_value(index) * self._share(index)

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return loss and gradient."""
        return self.value(), self.gradient()

    @contextmanager
    def recorded(self, *, is_counted: bool) -> Iterator[dict[int, int]]:
        """Record a graph without gathered weights; yield the storages that it keeps."""
        storages: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.parameters}

        def note(tensor: Tensor) -> object:
            kept = pack(tensor)
            if is_counted and isinstance(kept, Tensor) and kept.layout == torch.strided:
                storage = kept.untyped_storage()
                if storage.data_ptr() not in own:
                    storages[storage.data_ptr()] = storage.nbytes()
            return kept

        self._is_recording = True
        try:
            with saved_tensors_hooks(note, unpack):
                yield storages
        finally:
            self._is_recording = False

    def agreed_bytes(self, storages: dict[int, int]) -> int:
        """Return the bytes of a graph on the rank where it is largest: all ranks keep it, or none."""
        return self._largest(sum(storages.values()))

    def in_step(self, passes: Sequence[_Pass]) -> Sequence[_Pass]:
        """Return as many passes as the rank with most has, the last one again."""
        return [*passes, *[passes[-1]] * (self._largest(len(passes)) - len(passes))]

    def _largest(self, number: int) -> int:
        """Return the largest of one number on each rank."""
        largest = torch.tensor(number, device=self.device)
        if is_distributed():
            check_ranks(self.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    @contextmanager
    def summed(self, size: int) -> Iterator[Tensor]:
        """Sum numbers over all ranks. What one rank raises, the others learn as :func:`left_together` says."""
        with self._together(size) as total:
            yield total
            if size > 0:
                total.copy_(self.vectors.total(total))

    def summed_vector(self) -> AbstractContextManager[Tensor]:
        """Return a block that starts with a vector of zeros; what ranks add to it is summed already."""
        return self._together(self.vectors.local_size)

    @contextmanager
    def _together(self, size: int) -> Iterator[Tensor]:
        self._failure = None
        yield torch.zeros(size, dtype=self.dtype, device=self.device)
        if not self.vectors.agreed(self._failure is None):
            raise self._failure or NonFiniteLossError(
                "Expected a finite loss, got one that is not on another rank; see its error."
            )
        if self.on_evaluation is not None:
            self.on_evaluation()

    def add(self, views: Sequence[Tensor], index: int, pieces: Sequence[Tensor | None]) -> None:  # noqa: ARG002
        """Add what a batch contributes to a mean over all samples; None stands for zeros."""
        for view, piece in zip(views, pieces, strict=True):
            if piece is not None:
                view.add_(piece.detach())
