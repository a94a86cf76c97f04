"""Orthonormal bases of a few long vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.landscape.vectors import Vectors

_BLOCK = 4
_STRIP = 2**20
_NUM_NEWEST = 2
_SMALL_CORRECTION = 0.1
_SPARE_WEIGHT = 0.3


class Basis:
    """Orthonormal rows in blocks: memory grows with use, and projections are matrix products.

    Of sharded vectors, each rank holds its entries of every row, and a projection takes one sum over the ranks. If the
    final rows fill the ``first_block``, :meth:`rows` needs no copy.
    """

    def __init__(self, capacity: int, vectors: Vectors, first_block: int = _BLOCK) -> None:
        self.capacity = capacity
        self.vectors = vectors
        self.size = vectors.local_size
        self.dtype = vectors.dtype
        self.device = vectors.device
        self.first_block = min(first_block, capacity)
        self._blocks: list[Tensor] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Tensor:
        if index < self.first_block:
            return self._blocks[0][index]
        block, row = divmod(index - self.first_block, _BLOCK)
        return self._blocks[block + 1][row]

    def append(self, vector: Tensor, norm: float | Tensor = 1.0) -> None:
        """Add ``vector / norm`` as a row."""
        if self._num_rows == sum(len(block) for block in self._blocks):
            num_rows = min(_BLOCK, self.capacity - self._num_rows) if self._blocks else self.first_block
            self._blocks.append(torch.empty(num_rows, self.size, dtype=self.dtype, device=self.device))
        self._num_rows += 1
        torch.div(vector, norm, out=self[self._num_rows - 1])

    def _filled(self) -> list[Tensor]:
        filled, left = [], self._num_rows
        for block in self._blocks:
            if left > 0:
                filled.append(block[:left])
            left -= len(block)
        return filled

    def rows(self) -> Tensor:
        """Return all rows as one tensor: the first block itself if they fill it, else a copy."""
        filled = self._filled()
        return filled[0] if len(filled) == 1 and len(filled[0]) == len(self._blocks[0]) else torch.cat(filled)

    def orthogonalize(self, vector: Tensor) -> tuple[Tensor, Tensor, float]:
        """Project a vector onto the orthogonal complement of the basis, in place unless both share memory.

        The two newest rows come first: they hold most of a Lanczos vector's components. One pass over all rows follows,
        and a second one if the first correction was large (twice is enough).

        Returns:
            Its coefficients in the basis (float64 on the CPU), the remainder, and the norm of the remainder.
        """
        remainder = self._writable(vector)
        coefficients = torch.zeros(len(self), dtype=torch.float64, device="cpu")
        newest = self._take_out(remainder, [self[i][None] for i in range(max(0, len(self) - _NUM_NEWEST), len(self))])
        for _ in range(2):
            correction = self._take_out(remainder, self._filled())
            numbers = torch.cat([newest, correction, self.vectors.norm(remainder)[None]])
            of_newest, of_all, norm = numbers.cpu().double().split([len(newest), len(self), 1])  # one synchronisation
            coefficients += of_all
            coefficients[len(self) - len(newest) :] += of_newest
            newest = newest[:0]
            if not torch.linalg.vector_norm(of_all) > _SMALL_CORRECTION * norm:
                break
        return coefficients, remainder, float(norm)

    def _take_out(self, vector: Tensor, blocks: list[Tensor]) -> Tensor:
        """Subtract from a vector, in place, its components along some rows; return these."""
        found = self.vectors.total(torch.cat([vector.new_empty(0), *(block @ vector for block in blocks)]))
        for block, along in zip(blocks, found.split([len(block) for block in blocks]), strict=True):
            vector.addmv_(block.T, along, alpha=-1)
        return found

    def _writable(self, vector: Tensor) -> Tensor:
        """Return the vector, or a copy if it shares memory with the basis: an operator may return its argument."""
        own = {block.untyped_storage().data_ptr() for block in self._blocks}
        is_free = vector.is_contiguous() and vector.untyped_storage().data_ptr() not in own
        return vector.detach() if is_free else vector.detach().clone(memory_format=torch.contiguous_format)

    def rotate(self, coefficients: Tensor) -> None:
        """Replace the rows by linear combinations, one per column of ``coefficients``, a strip at a time."""
        mixing = coefficients.T.to(self.dtype).to(self.device)
        width = max(1, min(_STRIP, self.size) // self._num_rows)  # so a strip is no larger than a row
        for first in range(0, self.size, width):
            strip = torch.cat([block[:, first : first + width] for block in self._filled()])
            for row, values in enumerate(mixing @ strip):
                self[row][first : first + width] = values
        self._num_rows = coefficients.shape[1]
        del self._blocks[len(self._filled()) :]


def mixed(rows: Tensor, k: int, vectors: Vectors) -> Tensor:
    """Return a unit vector along the sum of the given ones: the first ``k`` with weight one, the others with less.

    If two eigenvalues have changed places, the newly wanted one is likely among the spare vectors. A run from the old
    top vector alone can converge to the wrong one.
    """
    rows = torch.atleast_2d(rows)
    if len(rows) == 1:
        return vectors.normalized(rows[0])
    return vectors.normalized(rows[:k].sum(dim=0).add_(rows[k:].sum(dim=0), alpha=_SPARE_WEIGHT))
