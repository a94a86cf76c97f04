"""The latest optimizer step of a run: its learning rates and, where it is going to be measured, its update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_flatness.estimators import current_learning_rates
from lightning_flatness.landscape import OptimizerStep


@dataclass
class LastStep:
    """What is kept of the latest optimizer step.

    The weights are copied before a batch, not before the optimizer's ``step``: then the update is all that the batch
    does to them, whether by an optimizer of Lightning, several of them, or code of the user's.

    Attributes:
        learning_rates: Those of the step, which a scheduler may change before they are looked at.
        update: The step, from the batch before it until it is measured; None where it is not going to be.
        count: The ``global_step`` before it.
    """

    learning_rates: dict[Optimizer, Sequence[Any]] = field(default_factory=dict)
    update: OptimizerStep | None = None
    count: int = -1

    def keep_learning_rates(self, optimizer: Optimizer) -> None:
        """Keep the learning rates of a step that is about to be made."""
        self.learning_rates |= current_learning_rates(optimizer)

    def before_batch(self, trainer: Trainer, keep: bool) -> None:
        """Copy the weights if a measurement may follow, and drop those before a step that was not measured."""
        # Code of the user's may make steps that are not counted.
        is_same = self.count == trainer.global_step and trainer.lightning_module.automatic_optimization
        if not is_same:
            self.update = None
        if keep and self.update is None:  # else those before the first of several batches that make a step
            self.update, self.count = OptimizerStep(trainer.optimizers), trainer.global_step
            self.update.begin()

    def taken(self) -> OptimizerStep | None:
        """Return the update that led to the present weights, and keep it no longer; None if it is not known."""
        step, self.update = self.update, None
        if step is not None:
            step.end()
            rates = {**current_learning_rates(step.optimizers), **self.learning_rates}
            kept = [float(lr) for each in step.optimizers for lr in rates[each] if lr is not None]
            step.learning_rate = max(kept, default=math.nan)
        return step
