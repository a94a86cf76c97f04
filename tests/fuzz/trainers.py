"""Settings of the Trainer, loggers, resuming, manual optimization."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.base import NUM_FEATURES, Base, add, feature, unpack
from lightning_flatness import SAM

add("accumulate_2", trainer={"accumulate_grad_batches": 2}, slot="accumulate")
add("accumulate_3", trainer={"accumulate_grad_batches": 3}, slot="accumulate")
add("clip_norm", trainer={"gradient_clip_val": 0.1}, slot="clip")
add("clip_value", trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, slot="clip")
add("precision_64", trainer={"precision": "64-true"}, slot="precision")
add("precision_bf16_mixed", trainer={"precision": "bf16-mixed"}, slot="precision")
add("precision_bf16_true", trainer={"precision": "bf16-true"}, slot="precision")
add("validation_within_the_epoch", trainer={"val_check_interval": 2}, slot="validation")
add("validation_at_half", trainer={"val_check_interval": 0.5}, slot=("validation", "set", "sampler", "epochs"))
add("validation_every_2_epochs", trainer={"check_val_every_n_epoch": 2}, slot="validation")
add(
    "no_validation",
    trainer={"limit_val_batches": 0},
    slot=("validation", "needs_validation"),
    monitor={"split": "train"},
)
add("sanity_check", trainer={"num_sanity_val_steps": 1})
add(
    "val_split_every_2_epochs",
    trainer={"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0},
    slot="validation",
    kinds=("monitor",),
    monitor={"split": "val", "probe_size": 4},
)
add("no_inference_mode", trainer={"inference_mode": False})
add("anomaly_detection", trainer={"detect_anomaly": True})
add("deterministic", trainer={"deterministic": True}, slot="sparse")
add(
    "overfit_batches",
    trainer={"overfit_batches": 2},
    slot=("sampler", "batch_sampler", "set", "loaders", "epochs", "validation"),
)
add("limit_train_batches", trainer={"limit_train_batches": 2}, slot="epochs")
add("limit_share_of_batches", trainer={"limit_train_batches": 0.6}, slot=("epochs", "set", "sampler", "loaders"))
add("max_steps", trainer={"max_steps": 5}, slot="stop")
add("three_epochs", trainer={"max_epochs": 3})
add("no_distributed_sampler", trainer={"use_distributed_sampler": False})
add("log_every_3_steps", trainer={"log_every_n_steps": 3})
add("profiler", trainer={"profiler": "simple"})
add("fast_dev_run", trainer={"fast_dev_run": 2}, slot=("stop", "epochs", "validation", "logger", "needs_validation"))
add("resume_from_epoch", resume="epoch", slot=("resume", "stop"))
add("resume_from_step", resume="step", slot=("resume", "stop"))

# -------------------------------------------------------------------------------------------------------- loggers


class ChecksItsLogger(Base):
    """What users ask of their logger."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert isinstance(self.logger, CSVLogger), type(self.logger)
        assert os.path.isdir(os.path.dirname(os.path.join(self.logger.log_dir, "x"))) or self.logger.log_dir
        assert self.logger.save_dir
        return super().training_step(batch, batch_idx)


class WritesToTensorBoard(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logger: Any = self.logger
        logger.experiment.add_scalar("own", float(batch_idx), self.global_step)
        logger.experiment.add_histogram("weights", self.head.weight.detach(), self.global_step)
        assert os.path.join(logger.log_dir, "x")
        return super().training_step(batch, batch_idx)


class Summary(dict):
    """A run's summary of Weights and Biases."""


class RecordingExperiment(CSVLogger):
    """A logger whose `experiment` has indices, attributes and methods."""

    class Experiment:
        def __init__(self) -> None:
            self.summary, self.config, self.calls = Summary(), Summary(), 0

        def log(self, values: dict[str, Any], commit: bool = True) -> int:
            self.calls += 1
            return self.calls

        def log_metrics(self, *args: Any) -> None: ...

        def save(self) -> None: ...

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.own = self.Experiment()

    @property
    def experiment(self) -> Any:
        return self.own

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


class UsesTheExperiment(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logger: Any = self.logger
        experiment = logger.experiment
        experiment.summary["x"] = batch_idx
        experiment.config.update({"a": 1})
        experiment.log({"x": 1}, commit=False)
        assert os.path.join(logger.log_dir, "x")
        return super().training_step(batch, batch_idx)


def _logger(make: Callable[[str], Any]) -> dict[str, Any]:
    return {"logger": make}


add("csv_logger", ChecksItsLogger, trainer=_logger(CSVLogger), slot="logger", reference=False)
add("tensorboard_logger", WritesToTensorBoard, trainer=_logger(TensorBoardLogger), slot="logger", reference=False)
add("experiment_of_the_logger", UsesTheExperiment, trainer=_logger(RecordingExperiment), slot="logger", reference=False)
add("two_loggers", trainer={"logger": lambda path: [CSVLogger(path), CSVLogger(path, "other")]}, slot="logger",
    reference=False)  # fmt: skip
add("no_logger", trainer={"logger": lambda path: False}, slot=("logger", "needs_logger"))

# -------------------------------------------------------------------------------------------- manual optimization

MANUAL = ("optimizer", "scheduler", "clip", "accumulate", "rates", "stop", "resume", "output")


def mean_loss(module: Any, batch: Any) -> Tensor:
    """The loss of manually optimized modules, for the monitor."""
    return module.compute(batch)


@feature(slot=MANUAL, kinds=("monitor",), monitor={"loss_fn": mean_loss})
class ManualOptimization(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.manual_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.compute(batch)
        self.manual_backward(loss)
        self.manual_steps += 1
        if (batch_idx + 1) % 2 == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()
            optimizer.zero_grad()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@feature(slot=(*MANUAL, "precision"), kinds=("monitor",), monitor={"loss_fn": mean_loss})
class GanLoop(Base):
    """Two optimizers, toggled; a generator, a clamped critic."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, NUM_FEATURES))
        self.critic = nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.LeakyReLU(), nn.Dropout(0.1), nn.Linear(5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = unpack(batch)
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_critic)
        fake = self.generator(torch.randn(len(x), 2)).detach()
        loss = F.softplus(self.critic(fake)).mean() + F.softplus(-self.critic(x)).mean()
        for_critic.zero_grad()
        self.manual_backward(loss + self.compute(batch))
        for_critic.step()
        self.untoggle_optimizer(for_critic)
        with torch.no_grad():
            for p in self.critic.parameters():
                p.clamp_(-0.5, 0.5)
        self.toggle_optimizer(for_generator)
        for_generator.zero_grad()
        self.manual_backward(F.softplus(-self.critic(self.generator(torch.randn(len(x), 2)))).mean())
        for_generator.step()
        self.untoggle_optimizer(for_generator)
        self.log_dict({"critic": loss.detach()})

    def configure_optimizers(self) -> Any:
        rest = [p for name, p in self.named_parameters() if not name.startswith("generator.")]
        return [torch.optim.Adam(self.generator.parameters(), 0.01), torch.optim.RMSprop(rest, 0.01)]


@feature(slot=MANUAL, kinds=("monitor",), monitor={"loss_fn": mean_loss})
class ManualClosure(Base):
    """`step` is given a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.compute(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    def configure_optimizers(self) -> Any:
        return self.make_schedule(self.make_optimizer())


@feature(slot=MANUAL, kinds=("monitor",), monitor={"loss_fn": mean_loss})
class ManualSam(ManualClosure):
    """SAM as an optimizer."""

    def make_optimizer(self) -> Any:
        return SAM(super().make_optimizer(), rho=0.1, module=self)
