"""One run in the protocol of arXiv 2206.10654: plain SGD until a training accuracy, then lambda_max, once.

From the authors' code: cross-entropy, SGD with a constant learning rate and without momentum or weight decay, inputs
standardised and not augmented, training to the end of the epoch in which 99 % of the training samples are right in
evaluation mode; lambda_max on 1,000 evenly spaced training samples, with batch statistics and without dropout.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # shared helpers
import fashion_mnist
from digits import DigitsDataModule
from training import finite, loss_and_accuracy, standardised_fashion, trainer_of

from lightning_flatness import LossLandscape, SharpnessAwareMinimization, TopEigenvalues
from lightning_flatness.estimators import top_eigenvalues
from lightning_flatness.module.modes import Mode

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AccuracyRecipe:
    """How a network is trained until it has an accuracy, and what is measured then.

    Attributes:
        lr: Learning rate.
        batch_size: Of training.
        network: ``"mlp"`` (784-256-256-10) or ``"vgg"`` (the first four convolutions of VGG11, an eighth as wide).
        dropout: After both hidden layers of ``"mlp"``.
        batch_norm: After each convolution of ``"vgg"``.
        rho: Of SAM; 0 for plain training.
        momentum: Of SGD; the paper has none.
        accuracy: On the training samples in evaluation mode, percent; training ends with the epoch that reaches it.
        max_epochs: Where training ends in any case.
        num_train: Training samples, the first ones.
        num_test: Test samples, the first ones.
        num_probe: Evenly spaced training samples that lambda_max is measured on.
        num_between: Points between the last and the next iterate, both included, at which lambda_max is measured, too;
            0 for none.
        data: ``"fashion"`` or ``"digits"``.
    """

    lr: float
    batch_size: int
    network: str = "mlp"
    dropout: float = 0.0
    batch_norm: bool = False
    rho: float = 0.0
    momentum: float = 0.0
    accuracy: float = 99.0
    max_epochs: int = 2000
    num_train: int = 10_000
    num_test: int = 10_000
    num_probe: int = 1000
    num_between: int = 0
    data: str = "fashion"


@dataclass(frozen=True)
class Data:
    """Standardised images (num, 1, pixels, pixels) and their classes."""

    train: Batch
    test: Batch

    @property
    def pixels(self) -> int:
        """Of an image, per side."""
        return self.train[0].shape[-1]

    def probe(self, num_samples: int) -> Batch:
        """Return training samples at even distances."""
        chosen = torch.arange(num_samples) * len(self.train[0]) // num_samples
        return self.train[0][chosen], self.train[1][chosen]


def data_of(recipe: AccuracyRecipe, folder: Path, device: str) -> Data:
    """Read a recipe's data, and standardise them by mean and deviation of the training pixels."""
    if recipe.data == "digits":
        digits = DigitsDataModule()
        (x, y), (x_test, y_test) = digits.train_set.tensors, digits.test_set.tensors
        x, y = x[: recipe.num_train], y[: recipe.num_train]
        mean, deviation = x.mean(), x.std()
        x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    else:
        (x, y), (x_test, y_test) = standardised_fashion(recipe.num_train, folder)
    x_test, y_test = x_test[: recipe.num_test], y_test[: recipe.num_test]
    return Data((x.to(device), y.to(device)), (x_test.to(device), y_test.to(device)))


class ShuffledBatches:
    """The training samples in a new order in each epoch, the last batch as small as it comes."""

    def __init__(self, samples: Batch, batch_size: int) -> None:
        self.samples = samples
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.samples[0]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        x, y = self.samples
        for chosen in torch.randperm(len(x)).to(x.device).split(self.batch_size):
            yield x[chosen], y[chosen]


def network_of(recipe: AccuracyRecipe, pixels: int) -> nn.Sequential:
    """Return a recipe's network with new weights."""
    layers: list[nn.Module] = []
    if recipe.network == "mlp":
        layers.append(nn.Flatten())
        for features, following in ((pixels**2, 256), (256, 256)):
            layers += [nn.Linear(features, following), nn.ReLU(), *[nn.Dropout(recipe.dropout)] * (recipe.dropout > 0)]
        return nn.Sequential(*layers, nn.Linear(256, 10))
    channels = 1
    for following, is_last_of_block in ((8, True), (16, True), (32, False), (32, True)):
        layers += [nn.Conv2d(channels, following, 3, padding=1), *[nn.BatchNorm2d(following)] * recipe.batch_norm]
        layers += [nn.ReLU(), *[nn.MaxPool2d(2)] * is_last_of_block]
        channels = following
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (pixels // 8) ** 2, 10))


def batch_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return F.cross_entropy(module(batch[0]), batch[1])


class SgdModule(pl.LightningModule):
    """The network of a recipe with its SGD."""

    def __init__(self, recipe: AccuracyRecipe, pixels: int) -> None:
        super().__init__()
        self.save_hyperparameters(vars(recipe))
        self.recipe = recipe
        self.net = network_of(recipe, pixels)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return batch_loss(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.recipe.lr, momentum=self.recipe.momentum)


class UntilAccuracy(pl.Callback):
    """Ends training with the epoch after which a training accuracy is reached, or the loss is not finite.

    The accuracy of all training samples costs a third of an epoch. It is looked at after every epoch from six points
    below the target on, and farther away after two or three epochs; in any case not before ten more steps.
    """

    points_per_epoch = 3.0
    least_steps = 10

    def __init__(self, train: Batch, accuracy: float) -> None:
        self.train = train
        self.accuracy = accuracy
        self.next_look = 1
        self.reached = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the accuracy."""
        epoch = trainer.current_epoch + 1
        if epoch < self.next_look and epoch != trainer.max_epochs:
            return
        loss, accuracy = loss_and_accuracy(pl_module, self.train)
        for logger in trainer.loggers:
            logger.log_metrics({"train_loss": loss, "train_accuracy": accuracy}, step=trainer.global_step)
        self.reached = accuracy >= self.accuracy
        least = math.ceil(self.least_steps / trainer.num_training_batches)
        self.next_look = epoch + max(least, min(3, int((self.accuracy - accuracy) / self.points_per_epoch)))
        trainer.should_stop = self.reached or not math.isfinite(loss)


def train_and_measure(
    setting: str,
    seed: int,
    recipe: AccuracyRecipe,
    folder: Path,
    data_dir: Path = fashion_mnist.FOLDER,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Train from the weights that belong to ``seed``, log for TensorBoard into ``folder``, return the only row."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left would be mixed into the curves
    data = data_of(recipe, data_dir, device)
    until = UntilAccuracy(data.train, recipe.accuracy)
    pl.seed_everything(seed, verbose=False)
    module = SgdModule(recipe, data.pixels)
    callbacks = [until, *([SharpnessAwareMinimization(rho=recipe.rho)] if recipe.rho else [])]
    trainer = trainer_of(folder, callbacks, device, max_epochs=recipe.max_epochs)
    trainer.fit(module, ShuffledBatches(data.train, recipe.batch_size))
    module.to(device)
    row: dict[str, Any] = {"setting": setting, "seed": seed, "point": f"accuracy={recipe.accuracy:g}"}
    row |= {
        "reached": until.reached,
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
        "device": torch.device(device).type,
    }
    for name, samples in (("train", data.train), ("test", data.test)):
        row[f"{name}_loss"], row[f"{name}_accuracy"] = loss_and_accuracy(module, samples)
    if until.reached:
        row |= curvature(module, recipe, data)
        for logger in trainer.loggers:
            logger.log_metrics({"flatness/lambda_max": row["lambda_max"]}, step=trainer.global_step)
            logger.finalize("success")
    return [{k: finite(v) for k, v in row.items()}]


def curvature(module: SgdModule, recipe: AccuracyRecipe, data: Data) -> dict[str, Any]:
    """Measure lambda_max where training has ended; with BatchNorm in evaluation mode, too, and up to the next step."""
    row = lambda_max(module.net, recipe, data)
    if recipe.batch_norm:
        row["lambda_max_eval"] = lambda_max(module.net, recipe, data, mode="eval")["lambda_max"]
    if recipe.num_between:
        row["lambda_max_between"] = max([row["lambda_max"], *lambda_max_between(module.net, recipe, data)])
    return row


def landscape_of(net: nn.Module, recipe: AccuracyRecipe, data: Data, mode: Mode = "batch_statistics") -> LossLandscape:
    """Return the loss on the evenly spaced samples, in batches of 125."""
    x, y = data.probe(min(recipe.num_probe, len(data.train[0])))
    batches = list(zip(x.split(125), y.split(125), strict=True))
    return LossLandscape(net, batches, batch_loss, mode=mode, num_total=len(data.train[0]))


def lambda_max(net: nn.Module, recipe: AccuracyRecipe, data: Data, mode: Mode = "batch_statistics") -> dict[str, Any]:
    """Measure lambda_max with its errors: of the solver, and of the samples for all training samples."""
    metric = TopEigenvalues(tol=1e-2)
    metric.update(landscape_of(net, recipe, data, mode))
    row: dict[str, Any] = {"lambda_max": float(metric.compute()), "lambda_max_error": float(metric.error)}
    row["lambda_max_standard_error"] = float(metric.standard_error)
    return row | {"lambda_max_converged": bool(metric.converged)}


def lambda_max_between(net: nn.Module, recipe: AccuracyRecipe, data: Data) -> list[float]:
    """Measure lambda_max at even distances on the way to the iterate of one more step of SGD, the start left out."""
    moved = copy.deepcopy(net).train()
    last = [p.detach().clone() for p in moved.parameters()]
    batch = next(iter(ShuffledBatches(data.train, recipe.batch_size)))
    gradients = torch.autograd.grad(batch_loss(moved, batch), list(moved.parameters()))
    found, start = [], None
    for i in range(1, recipe.num_between):
        with torch.no_grad():
            for p, old, gradient in zip(moved.parameters(), last, gradients, strict=True):
                p.copy_(old - recipe.lr * i / (recipe.num_between - 1) * gradient)
        result = top_eigenvalues(landscape_of(moved, recipe, data), k=1, tol=1e-2, start=start)
        found.append(float(result.eigenvalues[0]))
        start = result.subspace
    return found
