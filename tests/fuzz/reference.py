"""SAM a second time, by copies: the second pass runs in a deep copy of the module, so there is nothing to put back."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_flatness.sam import optimized_parameters, perturbed


class PlainSAM:
    """The gradient at the perturbed weights, taken in a copy that was made before the step."""

    def __init__(self, rho: float, geometry: Any, interval: int) -> None:
        self.rho, self.geometry, self.interval = rho, geometry, interval
        self.twin: Any = None
        self.batch: Any = None
        self.start: Any = None

    def wrap(self, module_class: type) -> type:
        """Return the class of a module whose ``training_step`` is preceded by a copy of the module."""
        plain = self

        class Copied(module_class):
            @functools.wraps(module_class.training_step)  # Lightning looks at the names of its arguments
            def training_step(self, *args: Any) -> Any:
                if self.trainer.global_step % plain.interval == 0:
                    plain.remember(self, args)
                return super().training_step(*args)

        return Copied

    def remember(self, module: Any, args: Any) -> None:
        self.twin = copy.deepcopy(module)
        self.twin._trainer = module._trainer
        self.twin.__class__ = type(module).__mro__[1]  # its step does not come back here
        self.twin._current_fx_name = None
        for name in ("log", "log_dict"):
            self.twin.__dict__[name] = lambda *args, **kwargs: None
        self.start = _random_states()
        self.batch = copy.deepcopy(args)

    def callback(self) -> pl.Callback:
        """Return the callback that replaces the gradients."""
        return _Replacing(self)

    def second_gradients(self, trainer: pl.Trainer, module: Any) -> list[Tensor | None]:
        own = dict(module.named_parameters(remove_duplicate=False))
        twins = dict(self.twin.named_parameters(remove_duplicate=False))
        for name, p in own.items():
            if p.requires_grad:  # what the step moved itself has moved; a teacher starts where the step started
                twins[name].data.copy_(p.data)
            twins[name].requires_grad_(p.requires_grad)
            twins[name].grad = None if p.grad is None else p.grad.clone()
        of = {id(p): twins[name] for name, p in own.items()}
        end = _random_states()
        with perturbed([of[id(p)] for p in optimized_parameters(trainer.optimizers[0])], self.rho, self.geometry,
                       self.twin):  # fmt: skip
            _set_random_states(self.start)
            for p in self.twin.parameters():
                p.grad = None
            with trainer.precision_plugin.train_step_context():
                output = self.twin.training_step(*self.batch)
            loss = output["loss"] if isinstance(output, dict) else output
            (loss / trainer.accumulate_grad_batches).backward()
        _set_random_states(end)
        gradients = [of[id(p)].grad for p in module.parameters()]
        self.twin = None
        return gradients


class _Replacing(pl.Callback):
    def __init__(self, plain: PlainSAM) -> None:
        self.plain = plain
        self.aside: list[Tensor | None] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.plain.twin is None:
            return
        self.aside = [p.grad for p in pl_module.parameters()]
        for p in pl_module.parameters():
            p.grad = None

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.plain.twin is None:
            return
        gradients = self.plain.second_gradients(trainer, pl_module)
        for p, earlier, gradient in zip(pl_module.parameters(), self.aside, gradients, strict=True):
            p.grad = gradient if earlier is None else earlier if gradient is None else earlier + gradient


class PlainPrevious(pl.Callback):
    """SAM along the previous step's gradient: weights moved around each ``training_step`` and its backward pass."""

    def __init__(self, rho: float, geometry: Any, interval: int) -> None:
        self.rho, self.geometry, self.interval = rho, geometry, interval
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.taken: list[tuple[Tensor, Tensor | None]] = []

    def wrap(self, module_class: type) -> type:
        """Return the class of a module whose ``training_step`` moves its weights."""
        plain = self

        class Moved(module_class):
            @functools.wraps(module_class.training_step)  # Lightning looks at the names of its arguments
            def training_step(self, *args: Any) -> Any:
                if self.trainer.global_step % plain.interval == 0:
                    plain.move(self)
                return super().training_step(*args)

        return Moved

    def move(self, module: Any) -> None:
        (optimizer,) = module.trainer.optimizers
        held = [p for p in optimized_parameters(optimizer) if p.requires_grad and KEY in optimizer.state.get(p, {})]
        before = [(p, p.detach().clone(), p.grad) for p in held]
        for p in held:
            p.grad = optimizer.state[p][KEY].clone()
        with perturbed(held, self.rho, self.geometry, module):
            moved = [p.detach().clone() for p in held]
        for (p, _, gradient), there in zip(before, moved, strict=True):
            p.grad = gradient
            p.data.copy_(there)
        self.saved = [(p, weight) for p, weight, _ in before]

    def put_back(self) -> None:
        for p, weight in self.saved:
            p.data.copy_(weight)
        self.saved = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.put_back()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.taken = [
            (p, None if p.grad is None else p.grad.detach().clone().to_dense()) for p in optimized_parameters(optimizer)
        ]

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.put_back()
        (optimizer,) = trainer.optimizers
        if all(g is None or bool(g.isfinite().all()) for _, g in self.taken):
            for p, gradient in self.taken:
                if gradient is not None:
                    optimizer.state[p][KEY] = gradient
                elif p in optimizer.state:
                    optimizer.state[p].pop(KEY, None)
        self.taken = []


KEY = "sam_previous_gradient"


def _random_states() -> Any:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), devices


def _set_random_states(states: Any) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
