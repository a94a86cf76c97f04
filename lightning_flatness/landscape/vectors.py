"""Flat vectors: whole in each process, or a slice of every vector on each rank.

An algorithm on vectors is the same either way, if all numbers that it draws from their entries come from here: inner
products, norms, and random vectors, which are the same whole vector for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_flatness.landscape.ranks import check_ranks
from lightning_flatness.module.sharding import is_distributed

_STRIP = 2**20
_BLOCK_OF_RANDOM_NUMBERS = 16
"""``torch.randn`` makes normal numbers in blocks of so many; a last part of a block begins anew."""


class Vectors:
    """Flat vectors that are whole in each process.

    Args:
        size: Number of entries.
        dtype: Of the entries.
        device: Where they are.

    Attributes:
        size: Number of entries, over all ranks.
        local_size: Number of entries in this process.
        largest_local_size: Number of entries on the rank that has most.
        dtype: Of the entries.
        device: Where they are.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = self.local_size = self.largest_local_size = size
        self.dtype = dtype
        self.device = device

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over all entries of something, given its sum over those of this process."""
        return numbers

    def agreed(self, condition: bool) -> bool:
        """Return whether a condition on the entries holds in all processes."""
        return condition

    def norms(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the norms of vectors, or of the same pieces of one, shape (pieces,)."""
        return torch.stack([torch.linalg.vector_norm(piece) for piece in pieces])

    def norm(self, v: Tensor) -> Tensor:
        """Return the norm of a vector."""
        return self.norms([v])[0]

    def dot(self, v: Tensor, w: Tensor) -> Tensor:
        """Return the inner product of two vectors."""
        return self.total(v @ w)

    def normalized(self, v: Tensor) -> Tensor:
        """Return a vector of norm one in the same direction."""
        return v / self.norm(v)

    def gaussian(self, generator: torch.Generator) -> Tensor:
        """Return a vector of independent standard normal numbers, the same on every device."""
        return self._normal(self.size, generator).to(self.device)

    def _normal(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator, dtype=self.dtype, device="cpu")


class ShardedVectors(Vectors):
    """Flat vectors of which each rank holds slices. All ranks have to make the same calls.

    Args:
        slices: Where this rank's entries are in the whole vector, first and last (exclusive), in ascending order.
        size: Number of entries, over all ranks.
        dtype: Of the entries.
        device: Where they are.
        largest_local_size: Number of entries on the rank that has most.
    """

    def __init__(
        self,
        slices: Sequence[tuple[int, int]],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        largest_local_size: int,
    ) -> None:
        super().__init__(size, dtype, device)
        self.slices = [(start, stop) for start, stop in slices if start < stop]
        self.local_size = sum(stop - start for start, stop in self.slices)
        self.largest_local_size = largest_local_size

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over all entries of something, given its sum over those of this process."""
        if not is_distributed():
            return numbers
        check_ranks(self.device)
        numbers = numbers.contiguous()
        dist.all_reduce(numbers)
        return numbers

    def agreed(self, condition: bool) -> bool:
        """Return whether a condition on the entries holds in all processes."""
        return float(self.total(torch.tensor(0.0 if condition else 1.0, device=self.device))) == 0

    def norms(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the norms of vectors, or of the same pieces of one, shape (pieces,)."""
        return self.total(super().norms(pieces).double().square_()).sqrt_().to(self.dtype)

    def gaussian(self, generator: torch.Generator) -> Tensor:
        """Return this rank's entries of the whole vector, which is drawn a strip at a time."""
        vector, first, rest = torch.empty(self.local_size, dtype=self.dtype, device=self.device), 0, list(self.slices)
        for low, high in _strips(self.size):
            strip = self._normal(high - low, generator)
            while rest and rest[0][0] < high:
                start, stop = rest.pop(0)
                end = min(stop, high)
                vector[first : first + end - start] = strip[start - low : end - low].to(self.device)
                first += end - start
                if end < stop:
                    rest.insert(0, (end, stop))
        return vector


def _strips(size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts in which random numbers are those of a vector drawn at once; the last is no short one."""
    bounds = list(range(0, size, _STRIP))
    if len(bounds) > 1 and size - bounds[-1] < _BLOCK_OF_RANDOM_NUMBERS:
        bounds.pop()
    return pairwise([*bounds, size])
