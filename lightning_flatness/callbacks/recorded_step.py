"""One microbatch of SAM's callback: the first pass, recorded as it runs, and the second one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_flatness.module.batches import copy_batch
from lightning_flatness.module.copying_builtin import REPLACED
from lightning_flatness.module.loss import loss_in
from lightning_flatness.module.replay import ReplayedPass
from lightning_flatness.sam import optimized_parameters


class RecordedStep:
    """Stands in front of ``training_step`` for one microbatch: remembers where it starts and what it is given.

    Only there is it known which random numbers, buffers and arguments the step sees: hooks that run after
    ``on_train_batch_start`` of the callback may draw numbers and change the batch.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.loss: Tensor | None = None
        self._replay: ReplayedPass | None = None
        self._arguments: tuple[Any, ...] = ()
        self._keywords: dict[str, Any] = {}
        self._trainer = trainer
        self._module = module
        self._aside: list[tuple[Tensor, Tensor | None]] = []
        self._placeholders: list[tuple[Tensor, Tensor, int]] = []
        # A compiled `training_step` is in the instance's dictionary already.
        self._shadowed = {name: v for name, v in module.__dict__.items() if name == "training_step"}

    @property
    def is_recorded(self) -> bool:
        """Whether ``training_step`` has been called."""
        return self._replay is not None

    def install(self) -> None:
        """Take the place of ``training_step``."""
        training_step: Any = self._module.training_step

        @functools.wraps(training_step)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.uninstall()  # `self.log` looks at the signature of `training_step`, also under torch.compile
            self._arguments, self._keywords = copy_batch((args, kwargs))
            device = self._trainer.strategy.root_device
            self._replay = ReplayedPass(self._module, device, self._trainer.optimizers)
            output = training_step(*args, **kwargs)
            loss = _loss_of(output)
            self.loss = None if loss is None else loss.detach().clone()
            # Whoever else calls the step, the last call is the Trainer's.
            self._module.__dict__["training_step"] = recorded
            return output

        setattr(recorded, REPLACED, training_step)
        self._module.__dict__["training_step"] = recorded

    def uninstall(self) -> None:
        """Give ``training_step`` its place back."""
        if self._shadowed:
            self._module.__dict__.update(self._shadowed)
        else:
            self._module.__dict__.pop("training_step", None)

    def set_gradients_aside(self) -> None:
        """Set the gradients of earlier microbatches aside."""
        # Also those of parameters that the optimizer does not hold: they would be counted twice.
        held = (*optimized_parameters(self._trainer.optimizers[0]), *self._module.parameters())
        wrapped = self._trainer.strategy.model
        distributed = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        for p in {id(p): p for p in held}.values():
            gradient, p.grad = p.grad, None
            if distributed is not None:
                # DDP remembers what the microbatches before used, in the second pass or in the first one only, and
                # expects a gradient there. A gradient that is a view of its bucket would be overwritten by the next
                # backward.
                if gradient is not None or (
                    self._trainer.accumulate_grad_batches > 1 and _may_be_unused(p, distributed)
                ):
                    p.grad = torch.zeros_like(p)
                if gradient is not None and distributed.gradient_as_bucket_view:
                    gradient = gradient.clone()
            self._aside.append((p, gradient))

    def bring_gradients_back(self, averaged: bool) -> None:
        """Bring back what :meth:`set_gradients_aside` took; ``averaged``: the first pass left means over the ranks."""
        wrapped = self._trainer.strategy.model
        for p, gradient in self._aside:
            if gradient is None and not averaged and _may_be_unused(p, wrapped):  # what the first pass has used
                gradient = torch.zeros_like(p)
                self._placeholders.append((p, gradient, gradient._version))
            p.grad = gradient
        self._aside.clear()

    def release(self) -> None:
        """Let go of the batch and of the state at its start; what holds this object waits for the garbage collector."""
        self._replay, self._arguments, self._keywords = None, (), {}
        self._aside.clear()

    def remove_placeholders(self) -> None:
        """Take away what stands for no gradient: the optimizer would decay a weight that has one, even of zeros."""
        for p, gradient, version in self._placeholders:
            if p.grad is gradient and gradient._version == version:
                p.grad = None
        self._placeholders.clear()

    def second_pass(self) -> Tensor | None:
        """Run forward and backward once more at the present weights, adding to ``.grad``.

        Returns:
            The loss, None if ``training_step`` skipped the batch.

        Raises:
            RuntimeError: If ``training_step`` skips the batch, and other ranks would wait.
        """
        trainer = self._trainer
        assert self._replay is not None
        with self._replay.again():
            loss = _loss_of(trainer.strategy.training_step(*self._arguments, **self._keywords))
            if loss is not None:
                # `on_before_backward` and `on_after_backward` are called once per microbatch, as without SAM. (The
                # precision plugin calls them, beside the scaling that is needed here.) The replay brings them back.
                trainer.callbacks = []  # type: ignore[attr-defined]
                self._module.__dict__.update(on_before_backward=_do_nothing, on_after_backward=_do_nothing)
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])
            elif trainer.world_size > 1:
                raise RuntimeError(
                    "Expected `training_step` to return a loss at the perturbed weights, got None. Skipping a batch is "
                    "not supported in distributed training: the other ranks would wait for this one."
                )
            return None if loss is None else loss.detach()


def _may_be_unused(parameter: Tensor, wrapped: Any) -> bool:
    """Return whether DDP keeps a record of the passes that used a parameter."""
    return isinstance(wrapped, DistributedDataParallel) and wrapped.find_unused_parameters and parameter.requires_grad


def _loss_of(output: Any) -> Tensor | None:
    """Return the loss in what ``training_step`` returned, None if it skipped the batch."""
    loss = loss_in(output)
    return loss if isinstance(loss, Tensor) else None


def _do_nothing(*_: Any) -> None:
    return None


def accumulates(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether the Trainer will take no optimizer step after this microbatch."""
    is_last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    return (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not is_last


@contextmanager
def without_sync(trainer: Trainer) -> Iterator[None]:
    """Hold back the all-reduce of DDP."""
    wrapped = trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    else:
        yield


def is_synchronizing(trainer: Trainer) -> bool:
    """Return whether the gradients that the first backward left are already the mean over the ranks."""
    wrapped = trainer.strategy.model
    return trainer.world_size == 1 or getattr(wrapped, "require_backward_grad_sync", True)


def average_gradients(trainer: Trainer, parameters: list[Tensor]) -> None:
    """Average over the ranks in one all-reduce; a parameter may be without gradient on some of them."""
    trainable = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trainable])
    for p in trainable:
        p.grad = None
    flat = trainer.strategy.reduce(flat, reduce_op="mean")
    for p, mean in zip(trainable, flat.split([p.numel() for p in trainable]), strict=True):
        p.grad = mean.view(p.shape).to(p.dtype)
