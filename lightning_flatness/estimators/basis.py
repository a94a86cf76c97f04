"""Orthonormal bases of a few long vectors."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 4


class Basis:
    """Orthonormal rows, stored in blocks so that memory grows with use and products are matrix products.

    Args:
        capacity: Rows that there will be at most.
        size: Length of a row.
        dtype: Of the rows.
        device: Of the rows.
    """

    def __init__(self, capacity: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.size = size
        self.dtype = dtype
        self.device = device
        self._blocks: list[Tensor] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Tensor:
        return self._blocks[index // _BLOCK][index % _BLOCK]

    def append(self, vector: Tensor) -> None:
        """Add a row."""
        if self._num_rows == len(self._blocks) * _BLOCK:
            num_rows = min(_BLOCK, self.capacity - self._num_rows)
            self._blocks.append(torch.empty(num_rows, self.size, dtype=self.dtype, device=self.device))
        self._num_rows += 1
        self[self._num_rows - 1].copy_(vector)

    def _filled(self) -> list[Tensor]:
        return [block[: self._num_rows - i * _BLOCK] for i, block in enumerate(self._blocks) if i * _BLOCK < len(self)]

    def orthogonalize(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of a vector in the basis, and what is left of it; twice is enough."""
        remainder, total = vector.clone(), torch.zeros(len(self), dtype=torch.float64)
        for _ in range(2):
            coefficients = [block @ remainder for block in self._filled()]
            for block, c in zip(self._filled(), coefficients, strict=True):
                remainder.addmv_(block.T, c, alpha=-1)
            total += torch.cat(coefficients).cpu().double()
        return total, remainder

    def rotate(self, coefficients: Tensor) -> None:
        """Replace the rows by the combinations that the columns of ``coefficients`` name, a strip at a time."""
        mixing = coefficients.T.to(self.dtype).to(self.device)
        width = max(1, min(2**22, self.size) // self._num_rows)  # so a strip is no larger than a row
        for first in range(0, self.size, width):
            strip = torch.cat([block[:, first : first + width] for block in self._filled()])
            for row, values in enumerate(mixing @ strip):
                self[row][first : first + width] = values
        self._num_rows = coefficients.shape[1]
        del self._blocks[-(-self._num_rows // _BLOCK) :]


def normalized(vector: Tensor) -> Tensor:
    """Return a vector of norm one in the same direction."""
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit
