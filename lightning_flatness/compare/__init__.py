"""Compare the flatness of runs from their TensorBoard logs."""

from lightning_flatness.compare.comparison import Cell, Comparison, Setting, compare_runs
from lightning_flatness.compare.moments import Reading
from lightning_flatness.compare.reading import Curve, Run, read_runs
from lightning_flatness.compare.tags import NothingToCompareError

__all__ = [
    "Cell",
    "Comparison",
    "Curve",
    "NothingToCompareError",
    "Reading",
    "Run",
    "Setting",
    "compare_runs",
    "read_runs",
]
