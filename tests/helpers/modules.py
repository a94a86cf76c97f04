"""LightningModules and data for tests of the callbacks: small, and with everything that can leave a trace."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy


class Plain(Dataset[tuple[Tensor, Tensor]]):
    """Samples without augmentation."""

    def __init__(self, size: int = 40, num_features: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, num_features, generator=generator)
        self.y = torch.randint(3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Augmented(Plain):
    """The same, jittered by three random number generators."""

    def __init__(self, size: int = 48) -> None:
        super().__init__(size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(6) * 0.1 + float(np.random.randn()) * 0.1 + random.gauss(0, 0.1)  # noqa: NPY002
        return self.x[index] + noise, self.y[index]


class Meter:
    """A plain object of the user's that counts."""

    def __init__(self) -> None:
        self.count = 0
        self.seen: dict[str, list[float]] = {"loss": []}

    def add(self, value: float) -> None:
        self.count += 1
        self.seen["loss"].append(value)


class Busy(pl.LightningModule):
    """BatchNorm, dropout, torchmetrics, logging on step and epoch, and state of every kind."""

    num_forwards: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(16, 8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("num_forwards", torch.zeros(()))
        self.losses: list[Tensor] = []
        self.recent: deque[float] = deque(maxlen=5)
        self.total = torch.zeros(3)
        self.meter = Meter()
        self.generator = torch.Generator().manual_seed(3)
        self.rng = np.random.default_rng(4)
        self.step = 0
        self.history: list[tuple[int, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        x = x + 0.01 * torch.randn(x.shape, generator=self.generator) + 0.01 * float(self.rng.normal())
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.step += 1
        self.total += logits.detach().sum(0)
        self.losses.append(loss)
        self.recent.append(loss.item())
        self.meter.add(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy, "noise": torch.rand(())}, on_step=True, on_epoch=True)
        if self.logger is not None and batch_idx % 3 == 0:
            self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def on_train_epoch_end(self) -> None:
        self.history.append((self.step, float(torch.stack(self.losses).detach().mean())))
        self.losses.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]


class Classifier(pl.LightningModule):
    """A tanh network without surprises."""

    def __init__(self, lr: float = 0.1, num_hidden: int = 8) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(6, num_hidden), nn.Tanh(), nn.Linear(num_hidden, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Adapted(Classifier):
    """A classifier of which only a low-rank change of a frozen layer is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[1](self.net[0](x) + self.up(self.down(x))))
        return out


def loader(
    dataset: Dataset[Any] | None = None, batch_size: int = 8, shuffle: bool = True, **options: Any
) -> DataLoader[Any]:
    return DataLoader(Plain() if dataset is None else dataset, batch_size=batch_size, shuffle=shuffle, **options)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """For training and for validation."""
    return loader(), loader(shuffle=False)


def trainer(path: Path | None, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": path,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))
