"""Other callbacks of the Trainer, Lightning's and users'."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor

from fuzz.base import Base, add, feature

add("swa", lambda: StochasticWeightAveraging(0.05, 1, annealing_epochs=1),
    slot=("scheduler", "resume", "averaging", "rates", "copies"))  # fmt: skip
add("ema", lambda: WeightAveraging(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9)),
    slot=("averaging", "copies", "resume"))  # fmt: skip
add("learning_rate_monitor", lambda: LearningRateMonitor("step"), slot="needs_logger")
add("early_stopping", lambda: EarlyStopping("loss_epoch", patience=0, min_delta=10.0), slot="stop", effects=False)
add("gradient_accumulation_scheduler", lambda: GradientAccumulationScheduler({0: 2, 1: 1}), slot="accumulate",
    reference=False)  # fmt: skip
add("model_checkpoint", lambda: ModelCheckpoint(monitor="val_loss", every_n_epochs=1), slot="needs_validation",
    trainer={"enable_checkpointing": True}, effects=False)  # fmt: skip
add("pruning", lambda: ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False),
    slot=("copies", "resume", "pruned"), reference=False, effects=False)  # fmt: skip
add("lambda_callback", lambda: LambdaCallback(on_train_batch_end=lambda *args: None))


@feature(slot="rates")
class Unfreezing(BaseFinetuning):
    """The encoder joins in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.encoder)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoder, optimizer, lr=0.05)


@feature()
class ForwardHooksOfACallback(pl.Callback):
    """Activations that another callback collects."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.num_calls = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.handle = pl_module.encoder.register_forward_hook(self._keep)
        self.other = pl_module.head.register_forward_pre_hook(self._count)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.seen.append(output.detach().clone())

    def _count(self, module: Any, inputs: Any) -> None:
        self.num_calls += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("num_activations", float(len(self.seen)))


@feature()
class BackwardHooksOfACallback(pl.Callback):
    def __init__(self) -> None:
        self.num_gradients = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.handles = [pl_module.head.weight.register_hook(self._count)]

    def _count(self, gradient: Tensor) -> None:
        self.num_gradients += 1


@feature()
class GradientStatistics(pl.Callback):
    """Looks at the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.norms += [p.grad.norm() for p in pl_module.parameters() if p.grad is not None and not p.grad.is_sparse]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        pl_module.log("gradient_norm", self.norms[-1].float())


@feature()
class OwnAverage(pl.Callback):
    average: tuple[Tensor, ...] = ()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = tuple(p.detach().clone() for p in pl_module.parameters())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for a, p in zip(self.average, pl_module.parameters()):
            a.lerp_(p.detach(), 0.1)


@feature()
class RandomNumbersOfACallback(pl.Callback):
    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.drawn.append(float(torch.rand(())))

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.drawn.append(float(torch.rand(())))


@feature()
class CallbackThatChangesTheBatch(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, list):
            batch[0].mul_(0.9)


@feature()
class CallbackOnTheModule(Base):
    """`configure_callbacks`."""

    def configure_callbacks(self) -> list[pl.Callback]:
        return [OwnAverage()]


@feature(slot="stop")
class StopsTheTrainer(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            trainer.should_stop = True


@feature()
class CallbackWithState(pl.Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
