"""Graphs that are kept between the products of one measurement, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class GraphStore:
    """What products of one measurement leave for the next: the graphs of batches, as long as there is room.

    Args:
        budget: Bytes that all graphs together may hold.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._graphs: dict[Hashable, Any] = {}
        self._sizes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def room(self) -> float:
        """Bytes that are left."""
        return self.budget - sum(self._sizes[key] for key in self._graphs)

    def get(self, key: Hashable) -> Any:
        """Return the graph kept under a key, or None."""
        return self._graphs.get(key)

    def may_fit(self, key: Hashable) -> bool:
        """Return whether a graph may be kept: whether there is room for it, as far as its size is known."""
        return self._sizes.get(key, 0) <= self.room and self.budget > 0

    def offer(self, key: Hashable, graph: Any, num_bytes: int) -> bool:
        """Keep a graph if there is room.

        Args:
            key: Whose graph it is.
            graph: Anything.
            num_bytes: What it holds.

        Returns:
            Whether it is kept.
        """
        self._sizes[key] = num_bytes
        if num_bytes > self.room:
            return False
        self._graphs[key] = graph
        return True
