"""Optimizers and schedulers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from fuzz.base import Base, add, feature


def optimizer(name: str, make: Any, **options: Any) -> None:
    """Register an optimizer; `make` takes the parameters."""

    class Optimized(Base):
        def make_optimizer(self) -> torch.optim.Optimizer:
            return make(self.parameters())

    add(name, Optimized, **({"slot": "optimizer"} | options))


def _adafactor(parameters: Any) -> Any:
    from transformers import Adafactor

    return Adafactor(parameters)


def _adafactor_with_rate(parameters: Any) -> Any:
    from transformers import Adafactor

    return Adafactor(parameters, lr=0.01, relative_step=False, scale_parameter=False)


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another, with slow weights of its own."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        self.base = torch.optim.SGD(parameters, lr=0.1)
        self.slow = [p.detach().clone() for p in parameters]
        self.user_state = {"steps": 0}
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.user_state["steps"] += 1
        if self.user_state["steps"] % 2 == 0:
            for p, slow in zip(self.base.param_groups[0]["params"], self.slow):
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
        return loss


class NoisyDescent(torch.optim.Optimizer):
    """Draws noise in every step, from a generator of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.generator = torch.Generator().manual_seed(1)
        self.user_state = {"generator": self.generator}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    noise = 0.01 * torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
                    p.add_(p.grad + noise, alpha=-group["lr"])
        return loss


optimizer("momentum", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3))
optimizer("nesterov", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True))
optimizer("adam", lambda p: torch.optim.Adam(p, 0.01))
optimizer("adam_amsgrad", lambda p: torch.optim.Adam(p, 0.01, amsgrad=True))
optimizer("adam_foreach", lambda p: torch.optim.Adam(p, 0.01, foreach=True))
optimizer("adam_with_tensor_rate", lambda p: torch.optim.Adam(p, torch.tensor(0.01)))
optimizer("adamw", lambda p: torch.optim.AdamW(p, 0.01))
optimizer("adamw_fused", lambda p: torch.optim.AdamW(p, 0.01, fused=True), slot=("optimizer", "clip"))
optimizer("nadam", lambda p: torch.optim.NAdam(p, 0.01))
optimizer("radam", lambda p: torch.optim.RAdam(p, 0.01))
optimizer("adamax", lambda p: torch.optim.Adamax(p, 0.01))
optimizer("adadelta", lambda p: torch.optim.Adadelta(p, 0.5))
optimizer("adagrad", lambda p: torch.optim.Adagrad(p, 0.05))
optimizer("rmsprop", lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True))
optimizer("rprop", lambda p: torch.optim.Rprop(p, 0.01))
optimizer("asgd", lambda p: torch.optim.ASGD(p, 0.05))
optimizer("adafactor_of_torch", lambda p: torch.optim.Adafactor(p, 0.01))
optimizer("adafactor_without_rate", _adafactor, slot=("optimizer", "scheduler", "rates"))
optimizer("adafactor_of_transformers", _adafactor_with_rate)
optimizer("lookahead", Lookahead, slot=("optimizer", "resume", "rates", "scheduler", "copies"))
optimizer("noisy_descent", NoisyDescent)
optimizer("lbfgs", lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2), kinds=("monitor",),
          slot=("optimizer", "accumulate", "clip", "stop", "precision"))  # fmt: skip


@feature(slot=("optimizer", "rates"))
class ParameterGroups(Base):
    def make_optimizer(self) -> torch.optim.Optimizer:
        head = {id(p) for p in self.head.parameters()}
        rest = [p for p in self.parameters() if id(p) not in head]
        own: dict[str, Any] = {"params": self.head.parameters(), "lr": 0.02, "weight_decay": 0.0}
        return torch.optim.AdamW([own, {"params": rest, "name": "rest"}], 0.01)


@feature(slot=("optimizer",))
class OnlyTrainableParameters(Base):
    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.5)


@feature(slot="optimizer")
class HooksOnTheOptimizer(Base):
    def make_optimizer(self) -> torch.optim.Optimizer:
        made = super().make_optimizer()
        self.optimizer_calls: list[str] = []
        made.register_step_pre_hook(lambda *args: self.optimizer_calls.append("before"))
        made.register_step_post_hook(lambda *args: self.optimizer_calls.append("after"))
        return made


@feature(slot="optimizer")
class OptimizerOnTheModule(Base):
    """The module keeps its optimizer, and reads its state."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        self.kept_optimizer = super().make_optimizer()
        return self.kept_optimizer

    def compute(self, batch: Any) -> Any:
        return super().compute(batch) * (1 + 0.1 * len(self.kept_optimizer.state) / 10)


def schedule(name: str, make: Any, interval: str = "epoch", **options: Any) -> None:
    """Register a scheduler; `make` takes the optimizer."""

    class Scheduled(Base):
        def make_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
            config = {"scheduler": make(optimizer), "interval": interval, "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    add(name, Scheduled, **({"slot": "scheduler"} | options))


def _warm_up(o: Any) -> Any:
    first = schedulers.LinearLR(o, 0.1, total_iters=2)
    return schedulers.SequentialLR(o, [first, schedulers.ExponentialLR(o, 0.9)], milestones=[2])


def _hugging_face(o: Any) -> Any:
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(o, 2, 8)


schedule("step_schedule", lambda o: schedulers.StepLR(o, 1, 0.5))
schedule("cosine_schedule", lambda o: schedulers.CosineAnnealingLR(o, 4), "step")
schedule("one_cycle_schedule", lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=40), "step",
         slot=("scheduler", "optimizer", "rates"))  # fmt: skip
schedule(
    "lambda_schedule",
    lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "step",
    slot=("scheduler", "rates"),
)
schedule("warm_up_schedule", _warm_up, "step")
schedule("plateau_schedule", lambda o: schedulers.ReduceLROnPlateau(o, patience=0), effects=False,
         slot=("scheduler", "needs_validation", "validation", "resume"))  # fmt: skip
schedule("linear_schedule_of_transformers", _hugging_face, "step", slot=("scheduler", "rates"))


class OwnSchedule:
    """A scheduler of the user's own class."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self, *args: Any) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@feature(slot=("scheduler", "rates"))
class ScheduleOfTheUser(Base):
    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": OwnSchedule(optimizer), "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


@feature(slot=("optimizer", "encoder", "clip", "precision", "rates"))
class SparseAdam(Base):
    """SparseAdam takes sparse gradients only."""

    def make_encoder(self) -> nn.Module:
        from fuzz.modules import Embedded

        return Embedded(sparse=True)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(self.encoder.parameters(), 0.01)
