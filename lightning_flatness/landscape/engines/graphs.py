"""Graphs that are kept between the products of one measurement, within a budget of bytes."""

from __future__ import annotations

from typing import Any, TypeAlias

Key: TypeAlias = tuple[type, int]
"""The engine that made a graph, and the batch."""


class GraphStore:
    """The graphs of batches, as long as there is room.

    Args:
        budget: Bytes that all graphs together may hold.
        keeps_first: Whether the first graph is kept however large it is: a single batch has to fit into memory with
            its graph in any case. Not with a budget of zero.
    """

    def __init__(self, budget: float, *, keeps_first: bool = False) -> None:
        self.budget = budget
        self.keeps_first = keeps_first and budget > 0
        self._graphs: dict[Key, Any] = {}
        self._sizes: dict[Key, int] = {}

    @property
    def room(self) -> float:
        """Bytes that are left."""
        return self.budget - sum(self._sizes[key] for key in self._graphs)

    def get(self, key: Key) -> Any:
        """Return the graph kept under a key, or None."""
        return self._graphs.get(key)

    def may_fit(self, key: Key) -> bool:
        """Return whether there is room for a graph, as far as its size is known from an earlier one."""
        return self._is_first_kept or (self.room > 0 and self._sizes.get(key, 0) <= self.room)

    def offer(self, key: Key, graph: Any, num_bytes: int) -> bool:
        """Keep a graph if there is room for its ``num_bytes``; return whether it is kept."""
        self._sizes[key] = num_bytes
        if num_bytes > self.room and not self._is_first_kept:
            return False
        self._graphs[key] = graph
        return True

    def close(self) -> None:
        """Keep no graph any more: the forward pass writes to what other graphs have saved."""
        self.budget, self.keeps_first = 0.0, False
        self._graphs.clear()

    @property
    def _is_first_kept(self) -> bool:
        return self.keeps_first and not self._graphs
