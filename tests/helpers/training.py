"""Training in tests: one `fit`, a logger and a callback that keep what they see, and all that a run leaves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from helpers.modules import Classifier, loader, loaders, trainer


class Recorder(Logger):
    """Keeps what is logged."""

    name = "recorder"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append((step, dict(metrics)))


class Gradients(pl.Callback):
    """Keeps what the optimizer is given, and counts the hooks around backward."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor | None]] = []
        self.after_backward: list[list[Tensor | None]] = []
        self.num_before = 0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.num_before += 1

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after_backward.append(gradients_of(pl_module))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.gradients.append(gradients_of(pl_module))


def fit(
    path: Path | None,
    *callbacks: pl.Callback,
    module: Any = None,
    data: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Any:
    """Train, by default a `Classifier` on `loader()` with a `Recorder` as logger, and return the trainer."""
    run: Any = trainer(path, *callbacks, **({"logger": Recorder()} | options))
    run.fit(Classifier() if module is None else module, *((loader(),) if data is None else data), ckpt_path=ckpt_path)
    return run


def fit_with_tensorboard(
    path: Path, *callbacks: pl.Callback, default_hp_metric: bool = True, max_epochs: int = 1, **options: Any
) -> Any:
    """Train and validate with a fixed log folder, so that a resumed run appends to the interrupted one's."""
    torch.manual_seed(0)
    logger = TensorBoardLogger(path, name="", version="run", default_hp_metric=default_hp_metric)
    defaults: Any = {"data": loaders(), "logger": logger, "max_epochs": max_epochs, "enable_checkpointing": True}
    return fit(path, *callbacks, **(defaults | options))


def gradients_of(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def everything(module: Any, trainer: Any) -> dict[str, Any]:
    """All that a run leaves behind."""
    return {
        "weights": state_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "rng": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("sam/")},
        "global_step": trainer.global_step,
        "progress": trainer.fit_loop.state_dict(),
        "seen": getattr(module, "seen", None),
        "calls": getattr(module, "calls", None),
    }
