"""SAM as a callback: every gradient that the Trainer makes is replaced by the one at the worst weights nearby.

SAM as an optimizer does not fit the Trainer: it would call the closure, and with it ``training_step``, logging and
all hooks, twice. So nothing is done to the optimizer. The Trainer runs ``training_step`` and ``backward`` as ever;
right after its backward the callback runs the same microbatch once more at the perturbed weights, in isolation, and
leaves that gradient in ``.grad``. Whatever comes later (unscaling, clipping, the optimizer's step, schedulers,
checkpoints) sees one ordinary gradient and counts one ordinary step.
"""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS

from lightning_flatness.callbacks.recorded_step import (
    RecordedStep,
    accumulates,
    average_gradients,
    is_synchronizing,
    without_sync,
)
from lightning_flatness.callbacks.strategies import why_unsupported
from lightning_flatness.geometry import FirstBatch, Geometry
from lightning_flatness.module.batches import infer_batch_size
from lightning_flatness.module.loss import training_step_of
from lightning_flatness.module.sharding import has_sharded_weights, is_tensor_parallel
from lightning_flatness.sam import SAM, check_rho, linear_geometry, optimized_parameters, perturbed

_MOST_PENDING = 256


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
        geometry: ``"euclidean"`` (SAM, arXiv 2010.01412), ``"element"`` (ASAM, arXiv 2102.11600), ``"layer"``,
            ``"filter"``, ``"attention"``, ``"path_norm"`` (follows the ``training_step`` of the first batch; a step
            takes the time of three gradients); or a linear ``Geometry``.
        interval: Take the sharpness-aware gradient in every ``interval``-th optimizer step, the ordinary one in the
            others.
        start_epoch: First epoch with sharpness-aware steps, counted from 0.
        sync_perturbation: With several ranks, perturb with the mean gradient of all ranks, as one process with the
            whole batch would. False: each rank perturbs with the gradient of its own samples (m-sharpness), which
            saves one all-reduce per microbatch; not with sharded weights.

    Attributes:
        has_perturbed: Whether the latest microbatch had a second pass.

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
        self._bound: Geometry | None = None  # to the loss of this run
        self.interval = interval
        self.start_epoch = start_epoch
        self.sync_perturbation = sync_perturbation
        self._step: RecordedStep | None = None
        self._first_pass = ExitStack()
        self._totals: list[float] | None = None  # of the rises, of the norms, of the microbatches
        self._epoch = 0
        self.has_perturbed = False
        self._pending: list[tuple[Tensor, float]] = []  # rises and norms of the last microbatches

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
        if why_unsupported(trainer) is not None:
            raise MisconfigurationException(
                "SharpnessAwareMinimization needs the whole weights and gradients on every device, got the strategy "
                f"{type(trainer.strategy).__name__}. HINT: Use strategy='auto' or 'ddp', or "
                "ModelParallelStrategy with torch.distributed.fsdp.fully_shard."
            )
        self._forget()
        self._totals, self._pending, self._epoch, self._bound = None, [], 0, None
        self.has_perturbed = False
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
            if self.geometry.needs_whole_weights:
                raise MisconfigurationException(
                    f"SharpnessAwareMinimization needs whole weights for the geometry {self.geometry.name!r}, got "
                    "weights sharded by FSDP2. HINT: Use the geometry 'layer' or 'element', or DDP."
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
        self.has_perturbed = False
        if not self.should_perturb(trainer.global_step, trainer.current_epoch):
            return
        if self._totals is None or self._epoch != trainer.current_epoch:
            # A checkpoint that was written at the last step of an epoch holds the sums of that one.
            self._totals, self._pending, self._epoch = [0.0, 0.0, 0.0], [], trainer.current_epoch
        if self._bound is None and self.geometry.follows_loss:
            first = FirstBatch(training_step_of(pl_module), batch, infer_batch_size(batch))
            self._bound = self.geometry.for_loss(first)
        self._step = RecordedStep(trainer, pl_module)
        self._step.install()
        if not self.sync_perturbation and not accumulates(trainer, batch_idx):
            # DDP would average the first gradient, which is only for this rank's perturbation. (Where gradients are
            # accumulated the Trainer itself holds DDP back.)
            self._first_pass.enter_context(without_sync(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Set the gradients of earlier microbatches aside: the perturbation is this microbatch's own."""
        if self._step is not None and self._step.is_recorded:
            self._step.uninstall()
            self._step.set_gradients_aside()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace this microbatch's gradient by the one at the perturbed weights."""
        step, self._step = self._step, None
        if step is None or not step.is_recorded:
            return
        averaged = is_synchronizing(trainer)
        self._first_pass.close()
        parameters = optimized_parameters(trainer.optimizers[0])
        if self.sync_perturbation and not averaged:
            average_gradients(trainer, parameters)
        with perturbed(parameters, self.rho, self._bound or self.geometry, pl_module) as norm:
            step.bring_gradients_back(averaged)
            loss = step.second_pass()
            step.remove_placeholders()
        if loss is None:  # e.g. a step that returns None for a loss that is not finite: then as without SAM
            norm, loss = 0.0, step.second_pass()
        self.has_perturbed = True
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

    def _record(self, step: RecordedStep, loss: Tensor | None, norm: float) -> None:
        # On an accelerator the loss is not there yet, and waiting for it would hold up the step.
        if loss is not None and step.loss is not None:
            self._pending.append((loss - step.loss, norm))
            if len(self._pending) == _MOST_PENDING:
                self._add_pending()

    def _add_pending(self) -> None:
        rises = torch.stack([rise for rise, _ in self._pending]).tolist() if self._pending else []
        for rise, (_, norm) in zip(rises, self._pending, strict=True):
            if self._totals is not None and math.isfinite(rise):  # not finite: an overflow in half precision
                self._totals = [total + value for total, value in zip(self._totals, (rise, norm, 1.0), strict=True)]
        self._pending.clear()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over the microbatches of the epoch, of all ranks."""
        self._forget()  # of a batch at which `on_train_batch_start` of the module ended the epoch
        if self._totals is None or self._epoch != trainer.current_epoch:
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
        return {} if self._totals is None else {"totals": self._totals, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums of a begun epoch; on several ranks those of the first one stand for all."""
        self._totals, self._epoch = state_dict.get("totals"), state_dict.get("epoch", 0)
