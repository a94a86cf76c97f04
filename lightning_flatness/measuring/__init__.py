"""Flatness outside of a Trainer's run: of one module, of any training loop, of checkpoints."""

from lightning_flatness.measuring.checkpoints import measure_checkpoints
from lightning_flatness.measuring.loading import CheckpointError
from lightning_flatness.measuring.report import FlatnessReport
from lightning_flatness.measuring.results import MeasuredCheckpoint, MeasuredCheckpoints
from lightning_flatness.measuring.tracker import FlatnessTracker, measure

__all__ = [
    "CheckpointError",
    "FlatnessReport",
    "FlatnessTracker",
    "MeasuredCheckpoint",
    "MeasuredCheckpoints",
    "measure",
    "measure_checkpoints",
]
