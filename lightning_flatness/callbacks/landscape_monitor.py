"""What measures the loss landscape during a run has in common: when, on which samples, and under which Trainer."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_flatness.batches import copy_batch
from lightning_flatness.engines import EngineName
from lightning_flatness.isolation import Mode, isolated
from lightning_flatness.landscape import LossLandscape, check_options
from lightning_flatness.loss import LossFunction
from lightning_flatness.probe import SeenBatches, can_index, draw_probe

_UNSUPPORTED_STRATEGIES = {
    "FSDPStrategy": "which keeps slices of flattened weights (FSDP1)",
    "DeepSpeedStrategy": "which partitions weights or optimizer states itself",
    "XLAStrategy": "whose ranks are no process group of torch.distributed",
    "XLAFSDPStrategy": "which keeps slices of flattened weights, on XLA devices",
}
"""By name: the classes of `lightning` and of `pytorch_lightning` are different ones."""
_FIRST_MESSAGE_AFTER = 10.0


class LandscapeMonitor(Callback):
    """Measures before training, at the end of epochs and after steps, always on the same samples.

    A subclass says what in :meth:`measure_and_log`.

    Args:
        every_n_epochs: Measure at the end of every n-th training epoch; None for never.
        every_n_steps: Measure after every n-th optimizer step, too; None for never.
        probe_size: Number of samples to measure on, over all ranks.
        probe_batch_size: Samples per forward pass. Default: the loader's batch size, 128 at most.
        split: Draw the samples from the ``"train"`` or the ``"val"`` dataloader (the first, of several).
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of a batch. Default: the module's ``training_step``.
        mode: Measure the module in ``"eval"`` or in ``"train"`` mode.
        log_key_prefix: Put before every name.
        engine: See :class:`LossLandscape`.
        seed: Seed of the choice of samples and of all random numbers of a measurement.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer or module cannot be measured.
    """

    def __init__(
        self,
        every_n_epochs: int | None,
        every_n_steps: int | None,
        probe_size: int,
        probe_batch_size: int | None,
        split: Literal["train", "val"],
        loss_fn: LossFunction | None,
        mode: Mode,
        log_key_prefix: str,
        engine: EngineName,
        seed: int,
    ) -> None:
        _check_positive("probe_size", probe_size)
        for name, value in [("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)]:
            if value is not None:
                _check_positive(name, value)
        if probe_batch_size is not None:
            _check_positive("probe_batch_size", probe_batch_size)
        if split not in ("train", "val"):
            raise ValueError(f"Expected `split` to be 'train' or 'val', got {split!r}.")
        check_options(mode, engine)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.probe_size = probe_size
        self.probe_batch_size = probe_batch_size
        self.split = split
        self.loss_fn = loss_fn
        self.mode: Mode = mode
        self.log_key_prefix = log_key_prefix
        self.engine: EngineName = engine
        self.seed = seed
        self._probe: list[Any] | None = None
        self._is_transferred = False
        self._seen: SeenBatches | None = None
        self._last_step: int | None = None
        self._warned: set[str] = set()

    @abstractmethod
    def measure_and_log(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        """Measure at the current weights and log.

        Args:
            trainer: The Trainer, with its loggers.
            pl_module: The module.
            on_step: Whether this is after a step rather than at the end of an epoch or before training.
        """

    def prepare(self, trainer: Trainer) -> None:
        """Do what has to be done once when training starts, before the first measurement."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this module can be measured under this Trainer."""
        if stage != "fit":
            return
        self._probe = self._seen = self._last_step = None
        self._is_transferred = False
        name = type(self).__name__
        if not pl_module.automatic_optimization and self.loss_fn is None:
            raise MisconfigurationException(
                f"Expected `{name}(loss_fn=...)` for a module with manual optimization, whose `training_step` "
                "updates the weights itself. HINT: pass loss_fn=lambda module, batch: ... that returns the mean loss "
                "of a batch."
            )
        _check_strategy(trainer, name)
        if trainer.barebones:
            rank_zero_info(f"{name} measures nothing under `Trainer(barebones=True)`, which disables logging.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the samples and measure once before training."""
        if trainer.barebones:
            return
        self._draw_probe(trainer)
        self.prepare(trainer)
        if trainer.global_step > 0:
            self._last_step = trainer.global_step  # a resumed run: these weights have been measured before
        elif self._probe is not None:
            self._measure(trainer, pl_module, on_step=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect samples where they cannot be drawn."""
        if self._seen is not None and self._probe is None:
            self._seen.collect(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every n-th optimizer step."""
        step = trainer.global_step
        if self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0:
            self._measure_once(trainer, pl_module, on_step=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of every n-th epoch."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure_once(trainer, pl_module, on_step=False)

    def _measure_once(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        if trainer.barebones or trainer.global_step == self._last_step:
            return
        if self._seen is not None and (self._seen.is_complete or not on_step):
            self._probe, self._seen, self._is_transferred = self._seen.batches, None, True
        if self._probe is not None:
            self._measure(trainer, pl_module, on_step=on_step)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        # The precision plugin's context is for the default dtype of 64-true; the landscape turns autocast off.
        with trainer.precision_plugin.train_step_context():
            self.measure_and_log(trainer, pl_module, on_step=on_step)
        self._last_step = trainer.global_step

    def landscape(self, trainer: Trainer, pl_module: LightningModule) -> LossLandscape:
        """Return the loss on the probe, ready to be measured.

        Args:
            trainer: The Trainer.
            pl_module: The module.

        Returns:
            The landscape; it reports a long measurement's progress.
        """
        assert self._probe is not None
        batches = self._probe
        if not self._is_transferred:
            batches = _transferred(trainer, pl_module, batches, self.seed)
        landscape = LossLandscape(
            pl_module,
            batches,
            self.loss_fn,
            mode=self.mode,
            engine=self.engine,
            seed=self.seed,
            optimizer=trainer.optimizers,
        )
        landscape.on_evaluation = _Progress(type(self).__name__, trainer, landscape)
        return landscape

    def _draw_probe(self, trainer: Trainer) -> None:
        loader = trainer.train_dataloader if self.split == "train" else _first_loader(trainer.val_dataloaders)
        if loader is None:
            raise MisconfigurationException(
                f"Expected a {self.split} dataloader for {type(self).__name__}(split={self.split!r}), got none. HINT: "
                f"define `{self.split}_dataloader`, do not limit its batches to 0, or choose the other split."
            )
        if can_index(loader):
            self._probe = draw_probe(
                loader,
                self.probe_size,
                batch_size=self.probe_batch_size,
                max_batches=trainer.num_training_batches if self.split == "train" else float("inf"),
                seed=self.seed,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
        elif self.split == "train":
            self._seen = SeenBatches(-(-self.probe_size // trainer.world_size))
            rank_zero_info(
                f"{type(self).__name__}: the training data has no length, or several loaders; measuring on the first "
                f"{self.probe_size} samples that training sees, from the end of the first epoch on."
            )
        else:
            raise MisconfigurationException(
                f"Expected a validation dataset with a length for {type(self).__name__}(split='val'). "
                "HINT: use split='train'."
            )


def _check_strategy(trainer: Trainer, monitor: str) -> None:
    kind = type(trainer.strategy)
    reasons = [
        _UNSUPPORTED_STRATEGIES[base.__name__] for base in kind.__mro__ if base.__name__ in _UNSUPPORTED_STRATEGIES
    ]
    if not reasons and trainer.world_size > 1 and not (dist.is_available() and dist.is_initialized()):
        reasons = ["whose ranks are no process group of torch.distributed"]
    if reasons:
        raise MisconfigurationException(
            f"Expected one device, or a strategy under which {monitor} can put the weights together on every rank "
            f"(DDP; ModelParallelStrategy with FSDP2 or tensor parallelism), got {kind.__name__}, {reasons[0]}. HINT: "
            "use strategy='ddp', or ModelParallelStrategy with torch.distributed.fsdp.fully_shard, or measure "
            "checkpoints of this run with LossLandscape."
        )


def _transferred(trainer: Trainer, pl_module: LightningModule, batches: list[Any], seed: int) -> list[Any]:
    """Do to batches what the training loop does to them before the training step, the user's hooks included."""
    datamodule = getattr(trainer, "datamodule", None)
    source: Any = datamodule if _overrides(datamodule, "on_before_batch_transfer") else pl_module
    transferred = []
    with isolated(pl_module, "train", pl_module.device, seed) as isolation, torch.no_grad():
        for index, batch in enumerate(batches):
            with isolation.forward_pass(index):
                batch = trainer.precision_plugin.convert_input(copy_batch(batch))
                batch = source.on_before_batch_transfer(batch, 0)
                transferred.append(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
    return transferred


def _overrides(instance: Any, hook: str) -> bool:
    own = [c for c in type(instance).__mro__ if not c.__module__.startswith(("lightning.", "pytorch_lightning."))]
    return any(hook in vars(c) for c in own)


def _first_loader(loaders: Any) -> Any:
    if isinstance(loaders, list | tuple):
        return loaders[0] if loaders else None
    return loaders


class _Progress:
    """Says, after a while and ever more rarely, that a long measurement is under way."""

    def __init__(self, name: str, trainer: Trainer, landscape: LossLandscape) -> None:
        self._name = name
        self._trainer = trainer
        self._landscape = landscape
        self._start = time.perf_counter()
        self._next = _FIRST_MESSAGE_AFTER

    def __call__(self) -> None:
        elapsed = time.perf_counter() - self._start
        if elapsed < self._next:
            return
        self._next = 2 * elapsed
        if self._trainer.is_global_zero:
            bar = self._trainer.progress_bar_callback
            message = (
                f"{self._name}: measuring for {elapsed:.0f} s, "
                f"{self._landscape.cost.num_products} Hessian-vector products so far, engine "
                f"'{self._landscape.engine}'."
            )
            (rank_zero_info if bar is None else bar.print)(message)


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Expected `{name}` to be an integer >= 1, got {value!r}.")
