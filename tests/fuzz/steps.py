"""What a training step (or another hook of the module) does besides computing a loss."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.base import NUM_HIDDEN, Base, feature, unpack

# ------------------------------------------------------------------------------------------- parameters that move


@feature()
class ByolTeacher(Base):
    """The teacher follows the student inside `training_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)
        self.predictor = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            for t, p in zip(self.teacher.parameters(), (*self.encoder.parameters(), *self.head.parameters())):
                t.mul_(0.9).add_(p, alpha=0.1)
        return super().training_step(batch, batch_idx)

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        with torch.no_grad():
            target = self.teacher(x + 0.01 * torch.randn_like(x))
        return super().compute(batch) + 0.1 * F.mse_loss(self.predictor(self(x)), target)


@feature()
class TeacherAfterTheLoss(Base):
    """As before, after the loss, through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.encoder)
        for p in self.slow.parameters():
            p.requires_grad = False

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        loss = super().compute(batch) + 0.1 * F.mse_loss(self.features(x), self.slow(x))
        for t, p in zip(self.slow.parameters(), self.encoder.parameters()):
            t.data = 0.9 * t.data + 0.1 * p.data
        return loss


@feature()
class DinoCentre(Base):
    """A teacher and a centre that is moved by what the teacher returns."""

    def __init__(self) -> None:
        super().__init__()
        self.dino = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(1, NUM_HIDDEN))

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        with torch.no_grad():
            target = self.dino(x)
            self.centre.mul_(0.9).add_(target.mean(0, keepdim=True), alpha=0.1)
            for t, p in zip(self.dino.parameters(), self.encoder.parameters()):
                t.lerp_(p, 0.1)
        soft = F.softmax((target - self.centre) / 0.5, -1)
        return super().compute(batch) - 0.1 * (soft * F.log_softmax(self.features(x), -1)).sum(-1).mean()


@feature()
class MocoQueue(Base):
    """A momentum encoder and a queue of its keys."""

    pointer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.ones(8, NUM_HIDDEN))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        with torch.no_grad():
            for t, p in zip(self.key_encoder.parameters(), self.encoder.parameters()):
                t.mul_(0.9).add_(p, alpha=0.1)
            keys = self.key_encoder(x)
        q = self.features(x)
        logits = torch.cat([(q * keys).sum(-1, keepdim=True), q @ self.queue.clone().T], 1)
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
        start = int(self.pointer)
        rows = [(start + i) % 8 for i in range(len(keys))]
        self.queue[rows] = keys.to(self.queue.dtype)
        self.pointer[0] = (start + len(keys)) % 8
        return super().compute(batch) + 0.1 * loss


@feature()
class MeanTeacherStateDict(Base):
    """Moved by `load_state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = copy.deepcopy(self.head).requires_grad_(False)

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        student, own = self.head.state_dict(), self.mean.state_dict()
        self.mean.load_state_dict({k: 0.9 * own[k] + 0.1 * student[k] for k in own if k in student}, strict=False)
        return super().compute(batch) + 0.1 * F.mse_loss(self(x), self.mean(self.features(x)))


@feature()
class TeacherInAList(Base):
    """No submodule: not in `parameters()`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_teacher = [copy.deepcopy(self.encoder).requires_grad_(False)]

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        teacher = self.hidden_teacher[0].to(x.dtype)
        loss = super().compute(batch) + 0.1 * F.mse_loss(self.features(x), teacher(x))
        with torch.no_grad():
            for t, p in zip(teacher.parameters(), self.encoder.parameters()):
                t.lerp_(p.to(t.dtype), 0.1)
        return loss


@feature(kinds=("monitor",), monitor={"metrics": "all"})
class TeacherInAListAll(TeacherInAList):
    """Written to inside the transforms of ``torch.func``, its weights crashed the process."""


@feature()
class AveragedModel(Base):
    def __init__(self) -> None:
        super().__init__()
        self.averaged = torch.optim.swa_utils.AveragedModel(self.head)
        self.averaged.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.averaged.update_parameters(self.head)
        return super().training_step(batch, batch_idx)

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        return super().compute(batch) + 0.1 * F.mse_loss(self(x), self.averaged(self.features(x)))


@feature()
class AveragedModelAfterTheStep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(
            self.head, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.head)


@feature()
class WeightClamping(Base):
    """As the critic of a WGAN."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.head.weight.clamp_(-0.3, 0.3)
        return super().training_step(batch, batch_idx)


@feature()
class WeightClampingThroughData(Base):
    def compute(self, batch: Any) -> Tensor:
        self.head.bias.data.clamp_(-0.2, 0.2)
        return super().compute(batch)


@feature()
class NormalisedPrototypes(Base):
    """As SwAV: the rows of a layer are normalised before each use, with `copy_`."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(NUM_HIDDEN, 5, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight.data.clone(), dim=1))
        return super().training_step(batch, batch_idx)

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        return super().compute(batch) + 0.1 * self.prototypes(self.features(x)).logsumexp(1).mean()


@feature()
class EmbeddingWithMaximalNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.renormed = nn.Embedding(5, 3, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.renormed((x[:, 0] * 3).long() % 5)


@feature()
class WeightsDecayedByTheStep(Base):
    def compute(self, batch: Any) -> Tensor:
        loss = super().compute(batch)
        for p in self.head.parameters():
            p.data.mul_(0.999)
        return loss


@feature()
class NoiseOnTheWeights(Base):
    """Random weights for one pass, put back by the step itself."""

    def compute(self, batch: Any) -> Tensor:
        noise = 0.01 * torch.randn_like(self.head.bias)
        self.head.bias.data += noise
        loss = super().compute(batch)
        self.head.bias.data -= noise
        return loss


@feature()
class RequiresGradToggled(Base):
    """Warm-up of the head: the encoder is frozen in the first steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.encoder.requires_grad_(self.trainer.global_step >= 2)
        return super().training_step(batch, batch_idx)


@feature()
class RequiresGradToggledAround(Base):
    """As `toggle_optimizer`: off and on within one step."""

    def compute(self, batch: Any) -> Tensor:
        self.head.requires_grad_(False)
        with torch.no_grad():
            self(unpack(batch)[0])
        self.head.requires_grad_(True)
        return super().compute(batch)


@feature()
class FrozenByAHook(Base):
    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.encoder.requires_grad_(self.current_epoch > 0)


# ------------------------------------------------------------------- Trainer, optimizers and schedulers from the step


@feature(reference=False, slot="rates")
class OwnScheduler(Base):
    """A scheduler that the module makes and steps by itself."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.own_scheduler = torch.optim.lr_scheduler.StepLR(self.trainer.optimizers[0], 1, 0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step > 0:
            self.own_scheduler.step()
        return super().training_step(batch, batch_idx)


@feature(reference=False, slot="rates")
class GroupsChangedByTheStep(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.9
        return super().training_step(batch, batch_idx)


@feature(reference=False, slot="rates")
class GroupsThroughOptimizers(Base):
    """Through `self.optimizers()`, which wraps; a key of its own in the group."""

    def compute(self, batch: Any) -> Tensor:
        group = self.optimizers().param_groups[0]
        group["user"] = group.get("user", 0) + 1
        group["weight_decay"] = 1e-3 * group["user"]
        return super().compute(batch)


@feature(reference=False)
class OptimizerStateChangedByTheStep(Base):
    def compute(self, batch: Any) -> Tensor:
        state = self.trainer.optimizers[0].state
        for value in list(state.values()):
            for name in ("momentum_buffer", "exp_avg"):
                if torch.is_tensor(value.get(name)):
                    value[name].mul_(0.9)
        return super().compute(batch)


@feature(reference=False, slot="stop")
class ShouldStop(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step >= 2:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


@feature(reference=False)
class TrainerAttribute(Base):
    def compute(self, batch: Any) -> Tensor:
        self.trainer.user_count = getattr(self.trainer, "user_count", 0) + 1
        return super().compute(batch) * (1 + 0.01 * self.trainer.user_count)


@feature(reference=False)
class TrainerSetting(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.limit_val_batches = 1
        self.trainer.gradient_clip_val = 0.5
        return super().training_step(batch, batch_idx)


@feature(reference=False)
class MoreEpochsFromTheStep(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1 and self.trainer.max_epochs == 2:
            self.trainer.fit_loop.max_epochs += 1
        return super().training_step(batch, batch_idx)


@feature(reference=False)
class OtherCallbackFromTheStep(Base):
    """The step counts in another callback, found in the Trainer."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hooks = self.trainer.callbacks[-1]
        for callback in self.trainer.callbacks:
            if type(callback).__name__ == "Hooks":
                hooks = callback
        hooks.called.append("from the step")
        return super().training_step(batch, batch_idx)


@feature(reference=False)
class DatasetThroughTheTrainer(Base):
    """The step writes hardness into the dataset."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loaders = self.trainer.fit_loop._combined_loader.flattened
        dataset = getattr(loaders[0], "dataset", loaders[0])
        dataset.user_hits = getattr(dataset, "user_hits", 0) + 1
        if hasattr(dataset, "x"):
            dataset.x.mul_(0.99)
        return super().training_step(batch, batch_idx)


@feature(kinds=("monitor",), monitor={"metrics": "all"})
class DatasetThroughTheTrainerAll(DatasetThroughTheTrainer):
    """The same inside the transforms of ``torch.func``, which gradients of single samples take."""


@feature()
class DatasetOnTheModule(Base):
    def on_train_start(self) -> None:
        super().on_train_start()
        loaders = self.trainer.fit_loop._combined_loader.flattened
        self.data = getattr(loaders[0], "dataset", loaders[0])
        self.data.user_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.data.user_steps += 1
        return super().training_step(batch, batch_idx)


@feature()
class MadeAtTheStart(Base):
    """What the step uses is made when training starts."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.made_at_start = 0.1

    def compute(self, batch: Any) -> Tensor:
        return super().compute(batch) * (1 + self.made_at_start)


@feature()
class MadeAtTheStartOfTheEpoch(Base):
    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.made_at_epoch = 0.1 * self.current_epoch

    def compute(self, batch: Any) -> Tensor:
        return super().compute(batch) * (1 + self.made_at_epoch)


@feature()
class ReadsTheTrainer(Base):
    """The loss depends on the epoch and the step."""

    def compute(self, batch: Any) -> Tensor:
        weight = 1 + 0.1 * self.current_epoch + 0.01 * self.global_step + 0.01 * self.trainer.num_training_batches
        return super().compute(batch) * weight


@feature()
class LearningRateOfTheStep(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


@feature()
class LossFromRates(Base):
    def compute(self, batch: Any) -> Tensor:
        return super().compute(batch) * (1 + 0.1 * self.trainer.optimizers[0].param_groups[0]["lr"])


# -------------------------------------------------------------------------------------------------------- logging


@feature()
class LogsMuch(Base):
    def compute(self, batch: Any) -> Tensor:
        loss = super().compute(batch)
        self.log_dict({"a": loss.detach() * 2, "b": torch.rand(())}, on_step=True, on_epoch=True)
        self.log("progress", 1.0, prog_bar=True, logger=False)
        self.print("hello")
        return loss


@feature(reference=False)
class LogsToTheLogger(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.logger.log_metrics({"direct": float(batch_idx)}, step=self.global_step)
        self.loggers[0].user_calls.append("x")
        return super().training_step(batch, batch_idx)


@feature()
class LogDirectoryOfTheLogger(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logger: Any = self.logger
        assert os.path.join(logger.log_dir, "x")
        assert os.path.join(str(self.trainer.log_dir), "x")
        assert self.logger.name is not None
        return super().training_step(batch, batch_idx)


# ------------------------------------------------------------------------------------ the step itself and its output


@feature()
class ReturnsADictionary(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return {"loss": output, "extra": torch.ones(2)} if torch.is_tensor(output) else output


@feature(reference=False, kinds=("sam0", "sam"))
class ReturnsNoneSometimes(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else output


@feature()
class StepWithoutIndex(Base):
    is_outermost = True  # the others give the index

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)


@feature(slot="stop")
class SkipsTheEpoch(Base):
    """`on_train_batch_start` returns -1 in the second epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 1 and batch_idx == 2 else None


@feature(slot=("second_derivative", "encoder"))
class GradientPenalty(Base):
    """A derivative inside the step."""

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return super().compute(batch) + 0.01 * gradient.square().sum()


@feature(slot="encoder")
class AdversarialBatch(Base):
    """Evaluates twice, with a gradient to the input."""

    def compute(self, batch: Any) -> Tensor:
        x, y = unpack(batch)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(F.cross_entropy(self(x), y), x)
        return super().compute(batch) + F.cross_entropy(self(x.detach() + 0.01 * gradient.sign()), y)


@feature()
class Mixup(Base):
    def compute(self, batch: Any) -> Tensor:
        x, y = unpack(batch)
        share = random.betavariate(1, 1)
        order = torch.randperm(len(x))
        logits = self(share * x + (1 - share) * x[order])
        mixed = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])
        return super().compute(batch) + mixed


@feature()
class ChangesTheBatch(Base):
    """In place, as some normalisations do."""

    def compute(self, batch: Any) -> Tensor:
        x, _ = unpack(batch)
        x.sub_(x.mean(0)).mul_(0.9)
        return super().compute(batch)


@feature()
class SwitchesToEval(Base):
    """A part is in eval mode during the step, by the step."""

    def compute(self, batch: Any) -> Tensor:
        self.encoder.eval()
        return super().compute(batch)


@feature()
class SwitchesModesOfAll(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.eval()
        with torch.no_grad():
            self(unpack(batch)[0])
        self.train()
        return super().training_step(batch, batch_idx)


@feature()
class SeedsInTheStep(Base):
    def compute(self, batch: Any) -> Tensor:
        torch.manual_seed(int(self.global_step))
        x, _ = unpack(batch)
        return super().compute(batch) * (1 + 0.1 * torch.rand(())) + 0 * x.sum()


@feature(reference=False, effects=False)
class BackwardOverridden(Base):
    def __init__(self) -> None:
        super().__init__()
        self.num_backwards = 0

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.num_backwards += 1
        super().backward(2 * loss, *args, **kwargs)


@feature()
class HooksWithNumbers(Base):
    """Random numbers and counts in the other hooks of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_calls: list[str] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        self.hook_calls.append(f"start {random.random()}")
        return super().on_train_batch_start(batch, batch_idx)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        super().on_before_zero_grad(optimizer)
        self.hook_calls.append(f"zero {float(torch.rand(()))}")

    def on_after_backward(self) -> None:
        super().on_after_backward()
        for p in self.parameters():
            if p.grad is not None:
                p.grad.add_(1e-3 * torch.randn_like(p.grad))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.hook_calls.append("step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.hook_calls.append(f"end {random.random()}")


@feature()
class HooksOfTheOptimizer(Base):
    """`optimizer_step`, `optimizer_zero_grad`, clipping and `lr_scheduler_step` are overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.step_calls: list[int] = []

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.step_calls.append(batch_idx)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        nn.utils.clip_grad_value_(self.parameters(), 0.4)


@feature()
class WarmUpInOptimizerStep(Base):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.global_step < 4:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (self.trainer.global_step + 1)


@feature(effects=False)
class ClampsAfterTheBatch(Base):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-1, 1)


@feature()
class StateInCheckpoints(Base):
    def __init__(self) -> None:
        super().__init__()
        self.saved_count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.saved_count += 1
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["user"] = self.saved_count

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved_count = checkpoint["user"]


@feature()
class EpochEndDraws(Base):
    offset = 0.0

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("drawn", float(torch.rand(())) + random.random())

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.offset = float(torch.rand(()))

    def compute(self, batch: Any) -> Tensor:
        return super().compute(batch) * (1 + 0.1 * self.offset)


@feature()
class ConfigureModel(Base):
    def configure_model(self) -> None:
        if not hasattr(self, "late_head"):
            self.late_head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.late_head(super().forward(x))
