"""The samples of a landscape: this rank's batches, and the number of samples on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_flatness.landscape.ranks import check_ranks, rank_and_world_size, total_count
from lightning_flatness.module.batches import (
    copy_batch,
    infer_batch_size,
    join_samples,
    prepare_batch,
    slice_samples,
)
from lightning_flatness.module.rng import preserved_rng


@dataclass(frozen=True)
class Samples:
    """Batches of samples.

    Attributes:
        batches: Those of this rank.
        sizes: Number of samples of each.
        num_samples: Number of samples on all ranks.
        num_total: Number of samples of the whole set that they were drawn from; None if that is not known.
        lengths: Number of samples in each batch, where that is not ``sizes``, the number of those that count.
    """

    batches: list[Any]
    sizes: list[int]
    num_samples: int
    num_total: int | None = None
    lengths: list[int] | None = None

    def length(self, index: int) -> int:
        """Return the number of samples in a batch; more than its size where it is there for other ranks only."""
        return (self.sizes if self.lengths is None else self.lengths)[index]

    @property
    def unseen_share(self) -> float:
        """Share of the whole set that was not drawn; one if its size is not known."""
        return 1.0 if self.num_total is None else max(0.0, 1 - self.num_samples / self.num_total)

    @classmethod
    def read(
        cls,
        batches: Iterable[Any],
        batch_size_fn: Callable[[Any], int] | None,
        device: torch.device,
        num_total: int | None = None,
    ) -> Samples:
        """Return the samples of an iterable of batches, read once; all ranks have to call this together.

        Raises:
            ValueError: If no rank has a sample, or this is a batch and not several.
        """
        if _is_a_batch(batches):
            raise ValueError(
                f"Expected `batches` to be an iterable of batches, got one batch ({type(batches).__name__}), whose "
                "parts would be taken for batches. Pass it in a list: [batch]."
            )
        with preserved_rng(device):
            own = [prepare_batch(batch, device) for batch in batches]
        sizes = [(batch_size_fn or infer_batch_size)(batch) for batch in own]
        num_samples = total_count(sum(sizes), device)
        if num_samples == 0:
            raise ValueError("Expected at least one sample in `batches`, got none. Check the loader or the probe.")
        return cls(own, sizes, num_samples, getattr(batches, "num_total", None) if num_total is None else num_total)

    def fresh(self, index: int) -> Any:
        """Return a copy of a batch: user code may write into its batch, or pop from it."""
        return copy_batch(self.batches[index])

    def in_step(self, device: torch.device) -> Samples:
        """Return as many batches on each rank as on the one with most, by one more than once whose samples count none.

        All ranks have to call this together.
        """
        rank, world_size = rank_and_world_size()
        if world_size == 1:
            return self
        check_ranks(device)
        most = torch.tensor([len(self.batches), -len(self.batches), rank if self.batches else -1], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        num_batches, least, giver = most.tolist()
        repeated: list[Any] = [(self.batches[-1], self.sizes[-1])] if self.batches else [None]
        if least == 0:
            given = list(repeated)
            dist.broadcast_object_list(given, giver)
            repeated = repeated if self.batches else given
        batch, length = repeated[0]
        num_missing = num_batches - len(self.batches)
        return replace(
            self,
            batches=[*self.batches, *[prepare_batch(batch, device)] * num_missing],
            sizes=[*self.sizes, *[0] * num_missing],
            lengths=[*self.sizes, *[length] * num_missing],
        )

    def parts(self, num_samples: int, device: torch.device) -> list[Samples]:
        """Return disjoint parts of ``num_samples`` over all ranks, which call this together; the last may be smaller.

        Sample ``i`` of rank ``r`` counts as sample ``i · world_size + r``, as the probe and a ``DistributedSampler``
        deal them out: the parts are the same for any number of ranks. A part is one batch where the
        largest one is as large, and several of about that size otherwise: a loss may depend on what is in a batch.

        Raises:
            ValueError: If a batch cannot be split.
        """
        rank, world_size = rank_and_world_size()
        starts = [max(0, -(-(i - rank) // world_size)) for i in range(0, self.num_samples, num_samples)]
        stops = [*starts[1:], max(sum(self.sizes), starts[-1])]
        return [self._between(start, stop, device) for start, stop in zip(starts, stops, strict=True)]

    def _between(self, start: int, stop: int, device: torch.device) -> Samples:
        batches, sizes, first = [], [], 0
        for batch, size in zip(self.batches, self.sizes, strict=True):
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                batches.append(slice_samples(batch, size, low, high))
                sizes.append(high - low)
            first += size
        if len(batches) > 1 and (joined := join_samples(batches, sizes)) is not None:
            total = sum(sizes)
            pieces = max(1, round(total / max(self.sizes)))
            ends = [i * total // pieces for i in range(pieces + 1)]
            batches = [slice_samples(joined, total, a, b) for a, b in pairwise(ends)]
            sizes = [b - a for a, b in pairwise(ends)]
        return Samples(batches, sizes, total_count(sum(sizes), device))


def _is_a_batch(batches: Any) -> bool:
    """Return whether what should be several batches is a tensor, a mapping, or tensors of different kinds."""
    if isinstance(batches, Tensor | Mapping):
        return True
    tensors = isinstance(batches, list | tuple) and all(isinstance(part, Tensor) for part in batches)
    return tensors and len({(part.dtype, part.dim()) for part in batches}) > 1
