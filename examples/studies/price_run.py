"""One run of ``sam_at_what_price.py``: SGD with momentum, plain or sharpness-aware, measured at up to three points.

The points are the end of a number of epochs, the step at which a number of gradients is spent, and the end of the epoch
in which the training loss falls below a level. Gradients are counted as they are taken: one for each batch, and another
where SAM had a second pass. Seconds are those of the processor, for training alone.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # shared helpers
import fashion_mnist
from to_accuracy import AccuracyRecipe, Data, SgdModule, ShuffledBatches, data_of, landscape_of
from training import finite, loss_and_accuracy, trainer_of

from lightning_flatness import InvariantSharpness, SharpnessAwareMinimization, TopEigenvalues
from lightning_flatness.sam.ascent import Ascent

POINTS = {"epochs": "equal epochs", "gradients": "equal gradients", "loss": "equal train loss"}
"""Where runs are measured, by the name in the table of runs."""


@dataclass(frozen=True)
class PriceRecipe(AccuracyRecipe):
    """How a network is trained, and where it is measured. Training does not look at ``accuracy``.

    Attributes:
        geometry: Of SAM.
        interval: Of SAM.
        start_epoch: Of SAM.
        ascent: Of SAM.
        epochs: The point ``"epochs"``; 0 for none.
        gradients: The point ``"gradients"``, in epochs of plain SGD; 0 for none.
        loss: The point ``"loss"``: the end of the epoch in which the loss on all training samples, in evaluation mode,
            falls to this level. An epoch before ``start_epoch`` is no such point: SAM has not begun. 0 for none.
    """

    geometry: str = "euclidean"
    interval: int = 1
    start_epoch: int = 0
    ascent: Ascent = "gradient"
    epochs: int = 0
    gradients: int = 0
    loss: float = 0.0

    def sam(self) -> list[SharpnessAwareMinimization]:
        """Return the callbacks that make a run sharpness-aware: none or one."""
        if not self.rho:
            return []
        sam = SharpnessAwareMinimization(
            self.rho, self.geometry, interval=self.interval, start_epoch=self.start_epoch, ascent=self.ascent
        )
        return [sam]


class PriceMonitor(pl.Callback):
    """Counts gradients and seconds, measures at the points, and ends training when all are behind."""

    def __init__(self, recipe: PriceRecipe, data: Data, sam: list[SharpnessAwareMinimization]) -> None:
        self.recipe = recipe
        self.data = data
        self.sam = sam
        self.pending = [name for name in POINTS if getattr(recipe, name)]
        self.rows: list[dict[str, Any]] = []
        self.num_gradients = 0
        self.began = 0.0
        self.paused = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.began = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and look whether the gradients are spent."""
        self.num_gradients += 1 + sum(sam.has_perturbed for sam in self.sam)
        if self.num_gradients >= self.recipe.gradients * trainer.num_training_batches:
            self.measure("gradients", trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether this is the last epoch, or the loss is at its level."""
        epoch = trainer.current_epoch + 1
        if epoch == self.recipe.epochs:
            self.measure("epochs", trainer, pl_module)
        if "loss" not in self.pending:
            return
        start = time.process_time()
        loss, _ = loss_and_accuracy(pl_module, self.data.train)
        self.paused += time.process_time() - start
        if loss <= self.recipe.loss:
            if epoch > self.recipe.start_epoch:
                self.measure("loss", trainer, pl_module)
            else:
                self.pending.remove("loss")
                self.rows.append({"point": "loss", "reached": False})
                trainer.should_stop = not self.pending
        elif not math.isfinite(loss):
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which points were not reached."""
        self.rows += [{"point": point, "reached": False} for point in self.pending]
        self.pending = []

    def measure(self, point: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the row of a point, if it is still to come, with the clock held."""
        if point not in self.pending:
            return
        start = time.process_time()
        row: dict[str, Any] = {"point": point, "reached": True, "step": trainer.global_step}
        row["epoch"] = trainer.global_step / trainer.num_training_batches
        row["gradients"] = self.num_gradients / trainer.num_training_batches
        row["seconds"] = start - self.began - self.paused
        row["device"] = pl_module.device.type
        for name, samples in (("train", self.data.train), ("test", self.data.test)):
            row[f"{name}_loss"], row[f"{name}_accuracy"] = loss_and_accuracy(pl_module, samples)
        row |= self.curvatures(pl_module) if math.isfinite(row["train_loss"]) else {"reached": False}
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({f"at_{point}/{k}": v for k, v in row.items() if isinstance(v, float)}, row["step"])
        self.pending.remove(point)
        trainer.should_stop = not self.pending
        self.paused += time.process_time() - start

    def curvatures(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return lambda_max and invariant sharpness with their errors, by column."""
        assert isinstance(pl_module, SgdModule)
        row: dict[str, Any] = {}
        metrics = {"lambda_max": TopEigenvalues(tol=1e-2), "invariant_sharpness": InvariantSharpness(tol=1e-2)}
        for name, metric in metrics.items():
            metric.update(landscape_of(pl_module.net, self.recipe, self.data))
            row |= {name: float(metric.compute()), f"{name}_error": float(metric.error)}
            row |= {f"{name}_standard_error": float(metric.standard_error), f"{name}_converged": bool(metric.converged)}
        return row


def train_and_measure(
    setting: str,
    seed: int,
    recipe: PriceRecipe,
    folder: Path,
    data_dir: Path = fashion_mnist.FOLDER,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train from the weights that belong to ``seed``, log for TensorBoard into ``folder``, return a row per point."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left would be mixed into the curves
    data = data_of(recipe, data_dir, device)
    sam = recipe.sam()
    monitor = PriceMonitor(recipe, data, sam)
    pl.seed_everything(seed, verbose=False)
    module = SgdModule(recipe, data.pixels)
    trainer = trainer_of(folder, [*sam, monitor], device, max_epochs=recipe.max_epochs)
    trainer.fit(module, ShuffledBatches(data.train, recipe.batch_size))
    place = {"setting": setting, "seed": seed}
    return [place | {k: finite(v) for k, v in row.items()} for row in monitor.rows]
