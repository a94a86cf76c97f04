"""SAM as a callback: every gradient that the Trainer makes is replaced by the one at the worst weights nearby.

SAM as an optimizer does not fit the Trainer: it would call the closure, and with it ``training_step``, logging and
all hooks, twice. So nothing is done to the optimizer. The Trainer runs ``training_step`` and ``backward`` as ever;
right after its backward the callback runs the same microbatch once more at the perturbed weights, in isolation, and
leaves that gradient in ``.grad``. Whatever comes later (unscaling, clipping, the optimizer's step, schedulers,
checkpoints) sees one ordinary gradient and counts one ordinary step.

Without a second pass (``ascent``) weights are moved right before the Trainer's forward pass, and put back right after
its backward pass.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatness.callbacks.epoch_means import EpochMeans
from lightning_flatness.callbacks.perturbed_step import PerturbedStep
from lightning_flatness.callbacks.recorded_step import (
    RecordedStep,
    accumulates,
    average_gradients,
    is_synchronizing,
    without_sync,
)
from lightning_flatness.callbacks.sam_refusals import check_module, check_optimizer, check_weights
from lightning_flatness.geometry import FirstBatch, Geometry
from lightning_flatness.module.batches import infer_batch_size
from lightning_flatness.module.loss import training_step_of
from lightning_flatness.module.sharding import has_sharded_weights
from lightning_flatness.sam import (
    Ascent,
    PreviousGradient,
    check_ascent,
    check_rho,
    linear_geometry,
    optimized_parameters,
    perturbed,
)


class SharpnessAwareMinimization(Callback):
    r"""Train sharpness-aware (SAM, ASAM) by adding this callback; nothing else changes.

    Every gradient ``g`` of a microbatch at the weights ``w`` is replaced by the gradient of the same microbatch at
    ``w + rho S² g / ‖S g‖``, with the diagonal ``S`` of a geometry's chart ``w = w0 + S z``. The second pass uses the
    same dropout masks; BatchNorm statistics, metrics, logs and counters have seen the first pass only. With gradient
    accumulation each microbatch is perturbed on its own and the gradients add up. Clipping, loss scaling and the
    optimizer act on the sharpness-aware gradient. Callbacks that look at gradients see it too, wherever they stand
    in the list: this callback moves itself to the front.

    Logged at the end of every epoch with at least one sharpness-aware step, also for ``trainer.callback_metrics``:

    - ``sam/loss_rise``: mean of ``L(w + perturbation) - L(w)`` over the microbatches, the sharpness that SAM sees (not
      with one gradient per step);
    - ``sam/perturbation_norm``: mean Euclidean length of the perturbation (``rho`` in geometry ``"euclidean"``).

    ``rho=0.0`` gives the same run, bit for bit, as leaving the callback out.

    Two other values of ``ascent`` take one gradient per step, at weights moved before it is known, by the same for all
    microbatches and ranks; a step before which there is none is ordinary:

    - ``"momentum"`` (MSAM, arXiv 2401.12033, algorithm 1): ``w - rho S² v / ‖S v‖``, ``v`` the ``momentum_buffer``
      (``v <- mu v + g``) or ``exp_avg`` of the optimizer; minus as in the paper: ahead along the step, as Nesterov's.
    - ``"previous"``: ``w + rho S² g' / ‖S g'‖``, ``g'`` the gradient of the step before, kept in the optimizer's state.

    BatchNorm statistics, metrics and the logged loss are then those at the moved weights. ``on_before_zero_grad`` and
    ``on_before_backward`` see these, too; validation and checkpoints do not. Writes of ``training_step`` to them are
    undone, with a warning.

    Costs ``1 + 1/interval`` gradients per step, and during the second pass one extra copy of the weights. The peak
    between the passes is two copies, with gradient accumulation or geometry ``"element"``. One gradient and one copy
    with ``ascent="momentum"``, one copy more with ``"previous"``.

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
            saves one all-reduce per microbatch; not with sharded weights, and only with ``ascent="gradient"``.
        ascent: ``"gradient"`` (SAM), ``"momentum"`` or ``"previous"``.

    Attributes:
        has_perturbed: Whether the latest microbatch had a second pass.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``fit``, before the first step: manual optimization, a ``training_step`` that
            takes ``dataloader_iter``, LBFGS, an optimizer without momentum if ``ascent`` needs it, or a strategy that
            shards the weights in another way than FSDP2.

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
        ascent: Ascent = "gradient",
    ) -> None:
        check_rho(rho)
        check_ascent(ascent)
        if interval < 1:
            raise ValueError(f"Expected `interval` to be >= 1, got {interval}. Use 1 to perturb in every step.")
        if start_epoch < 0:
            raise ValueError(f"Expected `start_epoch` to be >= 0, got {start_epoch}. Use 0 to start at once.")
        if not sync_perturbation and ascent != "gradient":
            raise ValueError(
                f"Expected `sync_perturbation` to be True for ascent={ascent!r}, got False. Leave it out: momentum and "
                "earlier gradients are the same on all ranks."
            )
        self.rho = rho
        self.ascent = ascent
        self.geometry = linear_geometry(geometry)
        self._bound: Geometry | None = None  # to the loss of this run
        self.interval = interval
        self.start_epoch = start_epoch
        self.sync_perturbation = sync_perturbation
        self._step: RecordedStep | None = None
        self._perturbed_step: PerturbedStep | None = None  # in its place where one gradient is enough
        self._previous: PreviousGradient | None = None
        self._hooks = ExitStack()
        self._is_sharded = False
        self._first_pass = ExitStack()
        self._means = EpochMeans()
        self.has_perturbed = False

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
        check_module(trainer, pl_module)
        self._forget()
        self._means, self._bound = EpochMeans(), None
        self.has_perturbed = False
        # In front, so that the hooks of all other callbacks see the sharpness-aware gradient. A new list: the old
        # one is being iterated over.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse sharded weights that it cannot perturb, and optimizers that evaluate the closure themselves."""
        check_weights(pl_module, self.geometry, sync_perturbation=self.sync_perturbation)
        self._is_sharded = has_sharded_weights(pl_module)
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer, self.ascent)
        self._release_optimizer()
        if self.ascent == "previous" and self.rho > 0:
            self._previous = previous = PreviousGradient(trainer.optimizers[0])
            handle = trainer.optimizers[0].register_step_post_hook(lambda *_: previous.keep())
            self._hooks.callback(handle.remove)

    # ---------------------------------------------------------------------------------------------- one microbatch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Get ready to record the coming ``training_step``."""
        self._forget()
        self.has_perturbed = False
        if not self.should_perturb(trainer.global_step, trainer.current_epoch):
            return
        self._means.begin(trainer.current_epoch)
        if self._bound is None and self.geometry.follows_loss:
            first = FirstBatch(training_step_of(pl_module), batch, infer_batch_size(batch))
            self._bound = self.geometry.for_loss(first)
        if self.ascent != "gradient":
            geometry = self._bound or self.geometry
            self._perturbed_step = PerturbedStep(
                trainer, pl_module, self.ascent, self.rho, geometry, is_sharded=self._is_sharded
            )
            self._perturbed_step.install()
            return
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
        """Replace this microbatch's gradient by the one at the perturbed weights, or put moved weights back."""
        if self._perturbed_step is not None and self._perturbed_step.has_run:
            self._perturbed_step.end()
            self._means.add(self._perturbed_step.norm)
            return
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
        if loss is not None and step.loss is not None:
            self._means.add(norm, loss - step.loss)
        step.release()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradient of the step, averaged and unscaled, which is the next one's direction."""
        if self._previous is not None:
            self._previous.take()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave nothing behind where ``training_step`` returned None."""
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._forget()
        self._release_optimizer()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._forget()
        self._release_optimizer()

    def _release_optimizer(self) -> None:
        self._hooks.close()
        self._previous = None

    def _forget(self) -> None:
        if self._perturbed_step is not None:
            self._perturbed_step.end()
        self._perturbed_step = None
        if self._step is not None:
            self._step.uninstall()
            self._step.release()
        self._step = None
        self._first_pass.close()

    # ----------------------------------------------------------------------------------------------------- logging

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means over the microbatches of the epoch, of all ranks."""
        self._forget()  # of a batch at which `on_train_batch_start` of the module ended the epoch
        sums = self._means.take(trainer.current_epoch)
        if sums is None:
            return
        totals = torch.tensor(sums, device=trainer.strategy.root_device)
        rise, norm, count = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        if count and not trainer.barebones:
            values = {"sam/loss_rise": rise / count} if self.ascent == "gradient" else {}
            values["sam/perturbation_norm"] = norm / count
            pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of a begun epoch, for a checkpoint in the middle of it; nothing at its end."""
        return self._means.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums of a begun epoch; on several ranks those of the first one stand for all."""
        self._means.load_state_dict(state_dict)
