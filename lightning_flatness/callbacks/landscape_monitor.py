"""Base class of the monitors: when to measure, on which samples, and under which Trainer."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_flatness.callbacks.averaged import averaging_callback
from lightning_flatness.callbacks.budget import check_budget, is_last_epoch
from lightning_flatness.callbacks.counted_work import CountedWork, MonitoredRun
from lightning_flatness.callbacks.failures import Attempt, OnError, survived
from lightning_flatness.callbacks.loggers.hyperparameters import callbacks
from lightning_flatness.callbacks.probe import SeenBatches, can_index, draw_probe
from lightning_flatness.callbacks.progress import Progress
from lightning_flatness.callbacks.strategies import check_strategy
from lightning_flatness.callbacks.transfer import overrides, transferred
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.options import EngineName, check_options
from lightning_flatness.module.loss import LossFunction
from lightning_flatness.module.modes import Mode, uses_batch_statistics


class LandscapeMonitor(CountedWork):
    """Measures before training, at the end of epochs and after steps, always on the same samples.

    A subclass says what in :meth:`measure_and_log`. Arguments and errors as of :class:`FlatnessMonitor`.

    The samples are drawn once, before training, in a forked child process: no generator, cache or counter of the
    dataset, its samplers and ``collate_fn`` moves. Copies of the module and the DataModule run the hooks of the batch
    transfer. Without a fork (Windows, macOS, daemonic processes) or when the child fails (a warning says why), the
    samples are drawn in the training process. Data without a length is not drawn: the first samples that training sees
    are kept. What processes share (shared memory, files that the pipeline writes) is not protected. With
    ``split="val"`` and ``num_sanity_val_steps=0``, Lightning may load the validation data after training has started;
    measurements then start with the first validation.
    """

    parameters: str | Sequence[str] | None = None

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
        on_error: OnError,
        seed: int,
        budget: float | None = None,
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
        check_budget(budget)
        if on_error not in ("warn", "raise"):
            raise ValueError(f"Expected `on_error` to be 'warn' or 'raise', got {on_error!r}.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.probe_size = probe_size
        self.probe_batch_size = probe_batch_size
        self.split = split
        self.loss_fn = loss_fn
        self.mode: Mode = mode
        self.log_key_prefix = log_key_prefix
        self.engine: EngineName = engine
        self.on_error: OnError = on_error
        self.seed = seed
        self.budget = budget
        self._has_said_when = False
        self.run = self.new_run()

    def new_run(self) -> MonitoredRun:
        """Return what is known when a run starts."""
        return MonitoredRun(self.engine)

    @abstractmethod
    def measure_and_log(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        """Measure at the current weights and log; ``on_step``: after a step, not before training or an epoch's end."""

    def prepare(self, trainer: Trainer) -> None:
        """Do what has to be done once when training starts, before the first measurement."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this module can be measured under this Trainer."""
        name = type(self).__name__
        if stage != "fit":
            if stage in ("validate", "test") and not self._has_said_when:
                self._has_said_when = True
                rank_zero_info(f"{name} measures during `fit` only: `{TrainerFn(stage).value}` logs no flatness.")
            return
        self.run = self.new_run()
        rivals = [
            c for c in callbacks(trainer) if isinstance(c, type(self)) and c.log_key_prefix == self.log_key_prefix
        ]
        if len(rivals) > 1:
            raise MisconfigurationException(
                f"Expected one {name} for each `log_key_prefix`, got {len(rivals)} with {self.log_key_prefix!r}, whose "
                "curves would have the same names. HINT: give one of them another prefix, e.g. "
                "log_key_prefix='val_flatness/'; one monitor can have several metrics."
            )
        if not pl_module.automatic_optimization and self.loss_fn is None:
            raise MisconfigurationException(
                f"Expected `{name}(loss_fn=...)` for a module with manual optimization, whose `training_step` "
                "updates the weights itself. HINT: pass loss_fn=lambda module, batch: ... that returns the mean loss "
                "of a batch."
            )
        check_strategy(trainer, name)
        if trainer.barebones:
            rank_zero_info(f"{name} measures nothing under `Trainer(barebones=True)`, which disables logging.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the samples and measure once before training; at the first batch, if the module gets ready later."""
        if trainer.barebones:
            return
        self._draw_probe(trainer, pl_module)
        with self.survived("The start", trainer):
            self.prepare(trainer)
            self.expect(trainer)
        if trainer.global_step > 0:  # a resumed run: these weights have been measured before, or left out
            self.run.last_step = self.run.last_step if self.run.has_resumed else trainer.global_step
            epoch = self.run.open_epoch
            if epoch is not None and epoch < trainer.current_epoch and self._is_due(epoch):
                self._measure_once(trainer, pl_module, on_step=False)  # Lightning does not come back to that epoch
        elif self.run.probe is not None and not overrides(pl_module, "on_train_start", "on_train_epoch_start"):
            self._measure_once(trainer, pl_module, on_step=False, always=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect samples where they cannot be drawn; measure, if the module was not ready before."""
        if self.run.seen is not None and self.run.probe is None:
            with self.survived("Keeping a batch to measure on", trainer, alone=True):
                self.run.seen.collect(batch)
        elif self.run.probe is not None and self.run.last_step is None and trainer.global_step == 0:
            self._measure_once(trainer, pl_module, on_step=True, always=True)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every n-th optimizer step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        if self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0:
            self._measure_once(trainer, pl_module, on_step=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of every n-th epoch, with a budget after the last one in any case."""
        always = self.budget is not None and is_last_epoch(trainer)
        if always or self._is_due(trainer.current_epoch):
            self._measure_once(trainer, pl_module, on_step=False, always=always)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, with a budget, what another callback has turned into the last epoch after this one's turn."""
        # Averages take the place of the weights here.
        if self.budget is not None and averaging_callback(trainer) is None:
            self.run.has_ended = True
            self._measure_once(trainer, pl_module, on_step=False, always=True)

    def may_measure_after(self, trainer: Trainer, batch_idx: int) -> bool:
        """Return whether a measurement may follow a batch, as far as is known before it."""
        module, steps, n = trainer.lightning_module, trainer.global_step + 1, self.every_n_steps
        is_automatic = module.automatic_optimization  # else a batch makes any number of steps
        if n is not None and (steps % n == 0 or not is_automatic):
            return True
        is_last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches or trainer.should_stop
        may_end = is_last or not is_automatic or (trainer.max_steps != -1 and steps >= trainer.max_steps)
        return may_end and (self.budget is not None or self._is_due(trainer.current_epoch))

    def _is_due(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def _measure_once(
        self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool, always: bool = False
    ) -> None:
        if trainer.barebones or trainer.global_step == self.run.last_step:
            return
        if self.run.seen is not None and (self.run.seen.is_complete or not on_step):
            self.run.probe, self.run.seen = self.run.seen.batches, None
        elif self.run.probe is None and self.run.seen is None:
            self._draw_probe(trainer, pl_module)  # the validation data was not loaded before
        if self.run.probe is not None and (always or self.affords(trainer)):
            # The precision plugin's context is for the default dtype of 64-true; the landscape turns autocast off.
            self.run.last_step, start = trainer.global_step, time.perf_counter()
            with self.survived("A measurement", trainer), trainer.precision_plugin.train_step_context():
                self.measure_and_log(trainer, pl_module, on_step=on_step)
            self.run.seconds += time.perf_counter() - start
            self.count_measurement()

    def seconds_of_others(self, trainer: Trainer) -> float:
        """Return the time that the other monitors of this run have taken so far."""
        others = (c for c in callbacks(trainer) if isinstance(c, LandscapeMonitor) and c is not self)
        return sum(other.run.seconds for other in others)

    def survived(self, what: str, trainer: Trainer, *, alone: bool = False) -> AbstractContextManager[Attempt]:
        """Return a block whose exceptions become warnings, unless ``on_error="raise"``; see :func:`survived`."""
        return survived(f"{type(self).__name__}: {what}", trainer, self.on_error, self.run.warned, alone=alone)

    def landscape(
        self, trainer: Trainer, pl_module: LightningModule, optimizers: Sequence[Optimizer] | None = None
    ) -> LossLandscape:
        """Return the loss on the probe, ready to be measured; it reports a long measurement's progress."""
        assert self.run.probe is not None
        landscape = self.run.kind_of_landscape(
            pl_module,
            self.run.probe,
            self.loss_fn,
            mode=self.mode,
            engine=self.run.engine,
            seed=self.seed,
            optimizer=trainer.optimizers if optimizers is None else optimizers,
            parameters=self.parameters,
        )
        self.run.spent, self.run.num_samples = landscape.cost, landscape.num_samples
        landscape.on_evaluation = Progress(type(self).__name__, trainer, landscape)
        return landscape

    def _draw_probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader if self.split == "train" else _first_loader(trainer.val_dataloaders)
        if loader is None and self.split == "val" and trainer.enable_validation:
            if trainer.global_step == 0:
                rank_zero_info(
                    f"{type(self).__name__}: Lightning loads the validation data at the first validation; measuring "
                    "from then on. HINT: num_sanity_val_steps > 0 loads it before training."
                )
            return
        if loader is None:
            raise MisconfigurationException(
                f"Expected a {self.split} dataloader for {type(self).__name__}(split={self.split!r}), got none. HINT: "
                f"define `{self.split}_dataloader`, do not limit its batches to 0, or choose the other split."
            )
        if can_index(loader):
            with self.survived("Drawing the samples", trainer) as attempt:
                batches = draw_probe(
                    loader,
                    self.probe_size,
                    batch_size=self.probe_batch_size,
                    uses_batch_statistics=uses_batch_statistics(pl_module, self.mode),
                    max_batches=trainer.num_training_batches if self.split == "train" else float("inf"),
                    seed=self.seed,
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                    device=pl_module.device,
                )
                with trainer.precision_plugin.train_step_context():
                    batches = transferred(trainer, pl_module, batches, self.seed)
            self.run.probe = batches if attempt.succeeded else None
        elif self.split == "train":
            equal = uses_batch_statistics(pl_module, self.mode)
            self.run.seen = SeenBatches(-(-self.probe_size // trainer.world_size), equal_batches=equal)
            rank_zero_info(
                f"{type(self).__name__}: the training data has no length, or several loaders; measuring on the first "
                f"{self.probe_size} samples that training sees, from the end of the first epoch on."
            )
        else:
            raise MisconfigurationException(
                f"Expected a validation dataset with a length for {type(self).__name__}(split='val'). "
                "HINT: use split='train'."
            )


def _first_loader(loaders: Any) -> Any:
    if isinstance(loaders, list | tuple):
        return loaders[0] if loaders else None
    return loaders


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Expected `{name}` to be an integer >= 1, got {value!r}.")
