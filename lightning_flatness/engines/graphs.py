"""Graphs that are kept between the products of one measurement, within a budget of bytes."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor

Key: TypeAlias = tuple[type, int | str]
"""The engine that made a graph, and the batch."""


class GraphStore:
    """What products of one measurement leave for the next: the graphs of batches, as long as there is room.

    Args:
        budget: Bytes that all graphs together may hold.
        keeps_first: Whether the first graph is kept however large it is: where there is but one batch, memory has to
            hold its graph in any case. Not with a budget of zero.
    """

    def __init__(self, budget: float, *, keeps_first: bool = False) -> None:
        self.budget = budget
        self.keeps_first = keeps_first and budget > 0
        self.gradient_sum: Tensor | None = None
        """The gradients of batches that were by-products, weighted and added up, for the gradient of all."""
        self.summed: set[int] = set()
        """Whose gradients those are."""
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
        """Keep a graph if there is room.

        Args:
            key: Whose graph it is.
            graph: Anything.
            num_bytes: What it holds.

        Returns:
            Whether it is kept.
        """
        self._sizes[key] = num_bytes
        if num_bytes > self.room and not self._is_first_kept:
            return False
        self._graphs[key] = graph
        return True

    @property
    def _is_first_kept(self) -> bool:
        return self.keeps_first and not self._graphs

    def discard(self, engine: type) -> None:
        """Forget the graphs of an engine."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] is not engine}
