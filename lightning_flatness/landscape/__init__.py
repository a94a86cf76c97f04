"""The loss of a module over fixed samples as a function of the weights."""

from lightning_flatness.landscape.loss_landscape import LossLandscape
from lightning_flatness.landscape.output_loss import OutputLoss
from lightning_flatness.landscape.sharded_landscape import ShardedLandscape
from lightning_flatness.landscape.update import MissingUpdateError, OptimizerStep

__all__ = ["LossLandscape", "MissingUpdateError", "OptimizerStep", "OutputLoss", "ShardedLandscape"]
