"""SAM as a callback: every gradient that the Trainer makes is replaced by the one at the worst weights nearby.

SAM as an optimizer does not fit the Trainer: it would call the closure, and with it ``training_step``, logging and
all hooks, twice. So nothing is done to the optimizer. The Trainer runs ``training_step`` and ``backward`` as ever;
right after its backward the callback runs the same microbatch once more at the perturbed weights, in isolation, and
leaves that gradient in ``.grad``. Whatever comes later (unscaling, clipping, the optimizer's step, schedulers,
checkpoints) sees one ordinary gradient and counts one ordinary step.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS

from lightning_flatness.batches import copy_batch
from lightning_flatness.geometry import Geometry
from lightning_flatness.isolation import ReplayedPass
from lightning_flatness.sam import SAM, check_rho, linear_geometry, optimized_parameters, perturbed
from lightning_flatness.sharding import has_sharded_weights, is_tensor_parallel

_UNSUPPORTED_STRATEGIES = (
    "FSDPStrategy",
    "DeepSpeedStrategy",
    "XLAStrategy",
    "SingleDeviceXLAStrategy",
)
"""By name: the classes of `lightning` and of `pytorch_lightning` are different ones."""


class SharpnessAwareMinimization(Callback):
    r"""Train sharpness-aware (SAM, ASAM) by adding this callback; nothing else changes.

    Every gradient ``g`` of a microbatch at the weights ``w`` is replaced by the gradient of the same microbatch at
    ``w + rho S² g / ‖S g‖``, with the diagonal ``S`` of a geometry's chart ``w = w0 + S z``. The second pass uses the
    same dropout masks; BatchNorm statistics, metrics, logs and counters have seen the first pass only. With gradient
    accumulation each microbatch is perturbed on its own and the gradients add up. Clipping, loss scaling and the
    optimizer act on the sharpness-aware gradient. Callbacks that look at gradients see it too, wherever they stand
    in the list: this callback moves itself to the front.

    Logged at the end of every epoch with at least one sharpness-aware step, also for ``trainer.callback_metrics``:

    - ``sam/loss_rise``: mean of ``L(w + perturbation) - L(w)`` over the microbatches, the sharpness that SAM sees;
    - ``sam/perturbation_norm``: mean Euclidean length of the perturbation (``rho`` in geometry ``"euclidean"``).

    ``rho=0.0`` gives the same run, bit for bit, as leaving the callback out.

    Costs ``1 + 1/interval`` gradients per step, and during the second pass one extra copy of the weights. The peak
    between the passes is two copies, with gradient accumulation or geometry ``"element"``.

    Args:
        rho: Length of the ascent step in the coordinates of the geometry, >= 0. Usual values: 0.05 for
            ``"euclidean"``, 0.5 to 2 for ``"element"``.
        geometry: ``"euclidean"`` (SAM, arXiv 2010.01412), ``"element"`` (ASAM, arXiv 2102.11600), ``"layer"`` or
            ``"filter"``, the geometries that the monitor measures in; or a linear ``Geometry``.
        interval: Take the sharpness-aware gradient in every ``interval``-th optimizer step, the ordinary one in the
            others.
        start_epoch: First epoch with sharpness-aware steps, counted from 0.
        sync_perturbation: With several ranks, perturb with the mean gradient of all ranks, as one process with the
            whole batch would. False: each rank perturbs with the gradient of its own samples (m-sharpness), which
            saves one all-reduce per microbatch; not with sharded weights.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``fit``, before the first step: manual optimization, a ``training_step`` that
            takes ``dataloader_iter``, LBFGS, or a strategy that shards the weights in another way than FSDP2.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[SharpnessAwareMinimization(rho=0.05)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        rho: float = 0.05,
        geometry: str | Geometry = "euclidean",
        interval: int = 1,
        start_epoch: int = 0,
        sync_perturbation: bool = True,
    ) -> None:
        check_rho(rho)
        if interval < 1:
            raise ValueError(f"Expected `interval` to be >= 1, got {interval}. Use 1 to perturb in every step.")
        if start_epoch < 0:
            raise ValueError(f"Expected `start_epoch` to be >= 0, got {start_epoch}. Use 0 to start at once.")
        self.rho = rho
        self.geometry = linear_geometry(geometry)
        self.interval = interval
        self.start_epoch = start_epoch
        self.sync_perturbation = sync_perturbation
        self._step: _RecordedStep | None = None
        self._first_pass = ExitStack()
        self._totals: list[float] | None = None  # of the rises, of the norms, of the microbatches
        self._pending: tuple[Tensor, float] | None = None

    def should_perturb(self, step_idx: int, epoch_idx: int) -> bool:
        """Say whether an optimizer step is sharpness-aware; override it for another schedule.

        Args:
            step_idx: Number of optimizer steps taken so far. All microbatches of a step share it.
            epoch_idx: The current epoch, counted from 0.

        Returns:
            True if the step is to be sharpness-aware. All ranks have to agree.
        """
        return self.rho > 0 and epoch_idx >= self.start_epoch and step_idx % self.interval == 0

    # --------------------------------------------------------------------------------------------- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what SAM cannot do, and go to the front of the callbacks."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "SharpnessAwareMinimization works with automatic optimization only, got a module with manual "
                "optimization. HINT: Wrap its optimizer instead: lightning_flatness.SAM(optimizer, rho=0.05)."
            )
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                "SharpnessAwareMinimization needs each batch twice, got a `training_step` that takes "
                "`dataloader_iter`. HINT: Let `training_step` take `batch`."
            )
        names = {c.__name__ for c in type(trainer.strategy).__mro__}
        if not names.isdisjoint(_UNSUPPORTED_STRATEGIES):
            raise MisconfigurationException(
                "SharpnessAwareMinimization needs the whole weights and gradients on every device, got the strategy "
                f"{type(trainer.strategy).__name__}. HINT: Use strategy='auto' or 'ddp', or "
                "ModelParallelStrategy with torch.distributed.fsdp.fully_shard."
            )
        self._forget()
        self._totals = self._pending = None
        # In front, so that the hooks of all other callbacks see the sharpness-aware gradient. A new list: the old
        # one is being iterated over.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse sharded weights that it cannot perturb, and optimizers that evaluate the closure themselves."""
        if has_sharded_weights(pl_module):
            if is_tensor_parallel(pl_module):
                raise MisconfigurationException(
                    "SharpnessAwareMinimization needs gradients that are whole or sharded by FSDP2 alone, got a module "
                    "with tensor parallelism. HINT: Use fully_shard with tensor_parallel_size=1, or DDP."
                )
            if not self.sync_perturbation:
                raise MisconfigurationException(
                    "SharpnessAwareMinimization needs whole gradients for `sync_perturbation=False`, got weights "
                    "sharded by FSDP2, of which each rank has a part. HINT: Use sync_perturbation=True."
                )
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS | SAM):
                raise MisconfigurationException(
                    "SharpnessAwareMinimization needs an optimizer that takes one step per gradient, got "
                    f"{type(optimizer).__name__}. HINT: Return e.g. torch.optim.SGD or torch.optim.AdamW from "
                    "`configure_optimizers`; SAM is for manual optimization, without this callback."
                )

    # ---------------------------------------------------------------------------------------------- one microbatch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Get ready to record the coming ``training_step``."""
        self._forget()
        if not self.should_perturb(trainer.global_step, trainer.current_epoch):
            return
        if self._totals is None:
            self._totals = [0.0, 0.0, 0.0]
        self._step = _RecordedStep(pl_module, trainer.strategy.root_device)
        if not self.sync_perturbation and not _accumulates(trainer, batch_idx):
            # DDP would average the first gradient, which is only for this rank's perturbation. (Where gradients are
            # accumulated the Trainer itself holds DDP back.)
            self._first_pass.enter_context(_without_sync(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Set the gradients of earlier microbatches aside: the perturbation is this microbatch's own."""
        if self._step is not None and self._step.replay is not None:
            self._step.uninstall()
            self._step.set_gradients_aside(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace this microbatch's gradient by the one at the perturbed weights."""
        step, self._step = self._step, None
        if step is None or step.replay is None:
            return
        averaged = _is_synchronizing(trainer)
        self._first_pass.close()
        parameters = optimized_parameters(trainer.optimizers[0])
        if self.sync_perturbation and not averaged:
            _average_gradients(trainer, parameters)
        with perturbed(parameters, self.rho, self.geometry, pl_module) as norm:
            self._add_pending()
            step.bring_gradients_back(trainer, averaged)
            loss = _second_pass(trainer, pl_module, step)
            step.remove_placeholders()
        if loss is None:  # e.g. a step that returns None for a loss that is not finite: then as without SAM
            norm, loss = 0.0, _second_pass(trainer, pl_module, step)
        self._record(step, loss, norm)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave nothing behind where ``training_step`` returned None."""
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._forget()

    def _forget(self) -> None:
        if self._step is not None:
            self._step.uninstall()
        self._step = None
        self._first_pass.close()

    # ----------------------------------------------------------------------------------------------------- logging

    def _record(self, step: _RecordedStep, loss: Tensor | None, norm: float) -> None:
        # On an accelerator the loss is not there yet. It is read at the next microbatch, when the length of that
        # one's gradient has been waited for anyway.
        if loss is not None and step.loss is not None:
            self._pending = (loss - step.loss, norm)

    def _add_pending(self) -> None:
        if self._pending is None or self._totals is None:
            return
        rise, norm = self._pending[0].item(), self._pending[1]
        self._pending = None
        if math.isfinite(rise):  # not finite: an overflow in half precision
            self._totals = [total + value for total, value in zip(self._totals, (rise, norm, 1.0), strict=True)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over the microbatches of the epoch, of all ranks."""
        self._forget()  # of a batch at which `on_train_batch_start` of the module ended the epoch
        if self._totals is None:
            return
        self._add_pending()
        totals = torch.tensor(self._totals, device=trainer.strategy.root_device)
        self._totals = None
        rise, norm, count = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        if count and not trainer.barebones:
            values = {"sam/loss_rise": rise / count, "sam/perturbation_norm": norm / count}
            pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of a begun epoch, for a checkpoint in the middle of it; nothing at its end."""
        self._add_pending()
        return {} if self._totals is None else {"totals": self._totals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums of a begun epoch."""
        self._totals = state_dict.get("totals")


class _RecordedStep:
    """Stands in front of ``training_step`` for one microbatch: remembers where it starts and what it is given.

    Only there is it known which random numbers, buffers and arguments the step sees: hooks that run after
    ``on_train_batch_start`` of this callback may draw numbers and change the batch.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.replay: ReplayedPass | None = None
        self.loss: Tensor | None = None
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}
        self._module = module
        self._aside: list[tuple[Tensor, Tensor | None]] = []
        self._placeholders: list[tuple[Tensor, Tensor, int]] = []
        # A compiled `training_step` is in the instance's dictionary already.
        self._shadowed = {name: v for name, v in module.__dict__.items() if name == "training_step"}
        training_step: Any = module.training_step

        @functools.wraps(training_step)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.uninstall()  # `self.log` looks at the signature of `training_step`, also under torch.compile
            self.arguments, self.keywords = copy_batch((args, kwargs))
            self.replay = ReplayedPass(module, device)
            output = training_step(*args, **kwargs)
            loss = loss_of(output)
            self.loss = None if loss is None else loss.detach().clone()
            module.__dict__["training_step"] = recorded  # whoever else calls the step, the last call is the Trainer's
            return output

        module.__dict__["training_step"] = recorded

    def uninstall(self) -> None:
        self._module.__dict__.pop("training_step", None)
        self._module.__dict__.update(self._shadowed)

    def set_gradients_aside(self, trainer: Trainer) -> None:
        # Also those of parameters that the optimizer does not hold: they would be counted twice.
        parameters = {id(p): p for p in (*optimized_parameters(trainer.optimizers[0]), *self._module.parameters())}
        wrapped = trainer.strategy.model
        for p in parameters.values():
            gradient, p.grad = p.grad, None
            if isinstance(wrapped, DistributedDataParallel):
                # DDP remembers what the microbatches before used, in the second pass or in the first one only, and
                # expects a gradient there. A gradient that is a view of its bucket would be overwritten by the next
                # backward.
                if gradient is not None or (trainer.accumulate_grad_batches > 1 and _may_be_unused(p, wrapped)):
                    p.grad = torch.zeros_like(p)
                if gradient is not None and wrapped.gradient_as_bucket_view:
                    gradient = gradient.clone()
            self._aside.append((p, gradient))

    def bring_gradients_back(self, trainer: Trainer, averaged: bool) -> None:
        wrapped = trainer.strategy.model
        for p, gradient in self._aside:
            if gradient is None and not averaged and _may_be_unused(p, wrapped):  # what the first pass has used
                gradient = torch.zeros_like(p)
                self._placeholders.append((p, gradient, gradient._version))
            p.grad = gradient
        self._aside.clear()

    def remove_placeholders(self) -> None:
        """Take away what stands for no gradient: the optimizer would decay a weight that has one, even of zeros."""
        for p, gradient, version in self._placeholders:
            if p.grad is gradient and gradient._version == version:
                p.grad = None
        self._placeholders.clear()


def _may_be_unused(parameter: Tensor, wrapped: Any) -> bool:
    """Return whether DDP keeps a record of the passes that used a parameter."""
    return isinstance(wrapped, DistributedDataParallel) and wrapped.find_unused_parameters and parameter.requires_grad


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in what ``training_step`` returned, None if it skipped the batch."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _second_pass(trainer: Trainer, module: LightningModule, step: _RecordedStep) -> Tensor | None:
    """Run forward and backward once more at the present weights, adding to ``.grad``; return the loss."""
    assert step.replay is not None
    with step.replay.again():
        loss = loss_of(trainer.strategy.training_step(*step.arguments, **step.keywords))
        if loss is not None:
            with _muted_backward_hooks(trainer, module):
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])
        elif trainer.world_size > 1:
            raise RuntimeError(
                "Expected `training_step` to return a loss at the perturbed weights, got None. Skipping a batch is not "
                "supported in distributed training: the other ranks would wait for this one."
            )
        return None if loss is None else loss.detach()


@contextmanager
def _muted_backward_hooks(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Let ``on_before_backward`` and ``on_after_backward`` be called once per microbatch, as without SAM.

    The precision plugin calls them, together with the scaling of the loss that the second pass needs.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = []  # type: ignore[attr-defined]
    module.__dict__.update(on_before_backward=_do_nothing, on_after_backward=_do_nothing)  # undone by the replay
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


def _do_nothing(*args: Any) -> None:
    return None


def _accumulates(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether the Trainer will take no optimizer step after this microbatch."""
    is_last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    return (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not is_last


@contextmanager
def _without_sync(trainer: Trainer) -> Iterator[None]:
    wrapped = trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    else:
        yield


def _is_synchronizing(trainer: Trainer) -> bool:
    """Return whether the gradients that the first backward left are already the mean over the ranks."""
    wrapped = trainer.strategy.model
    return trainer.world_size == 1 or getattr(wrapped, "require_backward_grad_sync", True)


def _average_gradients(trainer: Trainer, parameters: list[Tensor]) -> None:
    """Average over the ranks in one all-reduce; a parameter may be without gradient on some of them."""
    trainable = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trainable])
    for p in trainable:
        p.grad = None
    flat = trainer.strategy.reduce(flat, reduce_op="mean")
    for p, mean in zip(trainable, flat.split([p.numel() for p in trainable]), strict=True):
        p.grad = mean.view(p.shape).to(p.dtype)
