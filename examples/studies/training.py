"""One run of a study: a network trained by Lightning from a recipe, measured where the recipe says."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
import fashion_mnist
from digits import Classifier, DigitsDataModule

from lightning_flatness import (
    FlatnessMonitor,
    InvariantSharpness,
    PSISharpness,
    SharpnessAwareMinimization,
    TopEigenvalues,
)
from lightning_flatness.metrics import FlatnessMetric

MEASURES: dict[str, Callable[[], FlatnessMetric]] = {
    "lambda_max": lambda: TopEigenvalues(tol=1e-2),
    "invariant_sharpness": lambda: InvariantSharpness(tol=1e-2),
    "path_norm_sharpness": lambda: PSISharpness(geometry="path_norm", tol=1e-2),
}
"""What can be measured, by the name of its column and of its curve in TensorBoard."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and at which points it is measured.

    Attributes:
        points: ``"loss=0.01"``: as soon as the loss on all training samples in evaluation mode is no larger (looked
            at after every step when it is near); ``"step=120"``: after that many optimizer steps. Training stops when
            all are behind.
        max_steps: Optimizer steps after which training stops in any case.
        measures: Names out of ``MEASURES``, measured on all training samples.
        data: ``"fashion"`` or ``"digits"``.
        num_train: Training samples of Fashion-MNIST, the first ones.
        num_probe: Training samples to measure on; 0 for all.
        looks: How often in an epoch the training loss is looked at when it is near; 0 for after every step.
        parts: In how many parts the gradient of a batch is computed, one after the other.
        network: ``"fully_connected"`` or ``"lenet"``; of ``which_measure.py`` a kind of ``four_kinds.py``.
        width: Of the hidden layers of ``"fully_connected"``.
        optimizer: ``"sgd"`` or ``"adam"`` (with decay: AdamW).
        rho: Of SAM; 0 for plain training.
        augmentation: Whether training images are mirrored and shifted at random (``which_measure.py`` only).
    """

    points: tuple[str, ...]
    measures: tuple[str, ...]
    max_steps: int
    batch_size: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    rho: float = 0.0
    network: str = "fully_connected"
    width: int = 512
    data: str = "fashion"
    num_train: int = 1000
    augmentation: bool = False
    num_probe: int = 0
    looks: int = 0
    parts: int = 1


class RecipeModule(Classifier):
    """The network and optimizer of a recipe."""

    def __init__(self, recipe: Recipe, pixels: int) -> None:
        super().__init__()
        self.save_hyperparameters(vars(recipe))
        self.recipe = recipe
        self.net = network_of(recipe, pixels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        if recipe.optimizer == "adam":
            # Without decay this is Adam. Decay as part of the gradient would be normalised, too: dead units would
            # shrink to nothing within epochs, and the products of their weights leave the range of float32.
            return torch.optim.AdamW(self.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        return torch.optim.SGD(
            self.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )


def network_of(recipe: Recipe, pixels: int) -> nn.Sequential:
    """Return a recipe's network for images with one channel and 10 classes."""
    if recipe.network == "fully_connected":
        widths = [pixels**2, *[recipe.width] * 5]
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(5):
            layers += [nn.Linear(widths[i], widths[i + 1], bias=False), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10, bias=False))
    if recipe.network != "lenet":
        raise ValueError(f"Expected the network to be 'fully_connected' or 'lenet', got {recipe.network!r}.")
    layers = []
    for channels, following in ((1, 6), (6, 16)):
        convolution = nn.Conv2d(channels, following, 5, padding=2, bias=False)
        layers += [convolution, nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    for features, following in ((16 * (pixels // 4) ** 2, 120), (120, 84)):
        layers += [nn.Linear(features, following, bias=False), nn.ReLU()]
    for layer in layers:  # faster on CPUs
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return nn.Sequential(*layers, nn.Linear(84, 10, bias=False))


def data_of(recipe: Recipe, folder: Path = fashion_mnist.FOLDER) -> DigitsDataModule:
    """Return a recipe's data, with the parts of its batches; Fashion-MNIST is read from a folder."""
    batch_size = recipe.batch_size // recipe.parts
    if recipe.data == "fashion":
        return FashionDataModule(batch_size, recipe.num_train, folder)
    return DigitsDataModule(batch_size)


class FashionDataModule(DigitsDataModule):
    """The first training images of Fashion-MNIST, standardised by their mean and deviation, and its whole test set."""

    def __init__(self, batch_size: int, num_train: int, folder: Path) -> None:
        super().__init__(batch_size)
        self.train_set, self.test_set = (TensorDataset(*part) for part in standardised_fashion(num_train, folder))


def standardised_fashion(num_train: int, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the first training images (num, 1, 28, 28) and all test images with their classes, standardised."""
    raw = fashion_mnist.load(folder)
    x, x_test = raw.train_images[:num_train, None].float(), raw.test_images[:, None].float()
    mean, deviation = x.mean(), x.std()
    y, y_test = raw.train_labels[:num_train].long(), raw.test_labels.long()
    return ((x - mean) / deviation, y), ((x_test - mean) / deviation, y_test)


def placed_on(device: str) -> dict[str, Any]:
    """Return the Trainer's arguments for a device such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""
    place = torch.device(device)
    return {"accelerator": place.type, "devices": 1 if place.index is None else [place.index]}


def trainer_of(folder: Path, callbacks: list[pl.Callback], device: str, **options: Any) -> pl.Trainer:
    """Return a quiet Trainer on a device that logs for TensorBoard into a folder."""
    return pl.Trainer(
        **placed_on(device),
        callbacks=callbacks,
        logger=TensorBoardLogger(folder.parent.parent, name=folder.parent.name, version=folder.name),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )


class PointsMonitor(FlatnessMonitor):
    """Measures flatness, losses and accuracies at the points of a recipe, and stops training after the last."""

    def __init__(self, recipe: Recipe, data: DigitsDataModule) -> None:
        metrics = {name: MEASURES[name]() for name in recipe.measures}
        probe_size = recipe.num_probe or len(data.train_set)
        super().__init__(metrics, every_n_epochs=None, probe_size=probe_size, probe_batch_size=500)
        self.data = data
        self.looks = recipe.looks
        self.batch_size = recipe.batch_size
        self.pending = list(recipe.points)
        self.next_look = 1
        self.rows: list[dict[str, Any]] = []

    def measure_and_log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, on_step: bool) -> None:
        """Leave out the measurement before training."""
        if trainer.global_step > 0:
            super().measure_and_log(trainer, pl_module, on_step=on_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        targets = {p: float(p.removeprefix("loss=")) for p in self.pending if p.startswith("loss=")}
        reached = [point for point in self.pending if point == f"step={trainer.global_step}"]
        if targets and trainer.global_step >= self.next_look:
            loss, _ = loss_and_accuracy(pl_module, self.data.train_set.tensors)
            reached += [point for point, target in targets.items() if loss <= target]
            self.next_look += self._steps_to_next_look(loss / max(targets.values()))
        if reached:
            self._add_rows(reached, trainer, pl_module)
        if not self.pending:
            trainer.should_stop = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return -(-len(self.data.train_set) // self.batch_size)

    def _steps_to_next_look(self, above: float) -> int:
        """Look often when the target is near, so that all runs are measured at nearly the same loss."""
        if above <= 1.5:
            return max(1, self.steps_per_epoch // self.looks) if self.looks else 1
        return max(1, self.steps_per_epoch // (4 if above <= 4 and not self.looks else 1))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which points were not reached."""
        for point in self.pending:
            self.rows.append({"point": point, "reached": False})

    def _add_rows(self, points: list[str], trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        row = self._losses(trainer, pl_module)
        if not math.isfinite(row["train_loss"]):
            return  # diverged: there is nothing to measure, and the points count as not reached
        self.measure_and_log(trainer, pl_module, on_step=True)
        for name, metric in self.metrics.items():
            row |= {name: float(metric.compute()), f"{name}_error": float(metric.error)}
            row |= {f"{name}_standard_error": float(metric.standard_error), f"{name}_converged": bool(metric.converged)}
        self.rows += [{"point": point} | row for point in points]
        self.pending = [point for point in self.pending if point not in points]

    def _losses(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        step = trainer.global_step
        row: dict[str, Any] = {"reached": True, "epoch": step / self.steps_per_epoch, "step": step}
        for name, data in (("train", self.data.train_set), ("test", self.data.test_set)):
            row[f"{name}_loss"], row[f"{name}_accuracy"] = loss_and_accuracy(pl_module, data.tensors)
        return row


@torch.no_grad()
def loss_and_accuracy(module: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return mean loss and accuracy in percent over all samples, in evaluation mode."""
    x, y = tensors
    training = module.training
    device = next(module.parameters()).device
    logits = torch.cat([module.eval()(part.to(device)) for part in x.split(500)])
    y = y.to(device)
    module.train(training)
    return float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(dim=1) == y).double().mean())


def train_and_measure(
    setting: str,
    seed: int,
    recipe: Recipe,
    folder: Path,
    data_dir: Path = fashion_mnist.FOLDER,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train from the weights that belong to ``seed``, log for TensorBoard into ``folder``, return a row per point."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left would be mixed into the curves
    data = data_of(recipe, data_dir)
    monitor = PointsMonitor(recipe, data)
    pl.seed_everything(seed, verbose=False)
    trainer = trainer_of(
        folder,
        [monitor, *([SharpnessAwareMinimization(rho=recipe.rho)] if recipe.rho else [])],
        device,
        max_epochs=-1,
        max_steps=recipe.max_steps,
        num_sanity_val_steps=0,
        accumulate_grad_batches=recipe.parts,
        check_val_every_n_epoch=-(-100 * recipe.batch_size // len(data.train_set)),
        log_every_n_steps=10,
    )
    trainer.fit(RecipeModule(recipe, data.train_set[0][0].shape[-1]), data)
    place = {"setting": setting, "seed": seed}
    return [place | {k: finite(v) for k, v in row.items()} for row in monitor.rows]


def finite(value: Any) -> Any:
    """Return None for what JSON does not know: a diverged run has no numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
