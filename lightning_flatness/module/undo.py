"""Leaving a block as it was entered, although a signal may arrive at any line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` on leaving the block, and once more (no harm) if an interruption cut the first call short."""
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        undo()
        raise
