"""A callback that counts the gradients that training and its own measurements take, and keeps to a budget."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_flatness.callbacks.budget import (
    LARGE_SHARE,
    GradientWork,
    TrainedSamples,
    advice_without_budget,
    gradients_of_epoch,
    plan,
)
from lightning_flatness.callbacks.failures import Attempt
from lightning_flatness.callbacks.probe import SeenBatches
from lightning_flatness.landscape import LossLandscape, ShardedLandscape
from lightning_flatness.landscape.cost import Cost
from lightning_flatness.landscape.options import EngineName
from lightning_flatness.metrics import FlatnessMetric


@dataclass
class MonitoredRun:
    """The state of the present run. ``setup`` makes a new one, so that a second ``fit`` starts as new.

    Attributes:
        engine: The engine of Hessian-vector products.
        kind_of_landscape: The class that measures.
        probe: The samples, once they are drawn.
        seen: Collects samples where they cannot be drawn.
        last_step: The ``global_step`` of the latest measurement.
        warned: Names that a warning was given for.
        seconds: All the time that was spent on measurements.
        work: The gradients that training and measuring have taken.
        microbatch: Counts those of the present microbatch.
        num_samples: The size of the probe.
        epoch: Gradients of samples that an epoch takes, if that is known.
        num_epochs: Epochs that have ended.
        open_epoch: The epoch of the latest microbatch, until it ends.
        spent: The cost of the present measurement, once it has begun.
        has_ended: Whether training is over, so that ``log`` of the module is no longer allowed.
        has_resumed: Whether counts of an interrupted run have been loaded.
        metrics: What is measured, by name.
        starts: The directions from which the metrics of a resumed run start, until training begins.
    """

    engine: EngineName
    kind_of_landscape: type[LossLandscape] = LossLandscape
    probe: list[Any] | None = None
    seen: SeenBatches | None = None
    last_step: int | None = None
    warned: set[str] = field(default_factory=set)
    seconds: float = 0.0
    work: GradientWork = field(default_factory=GradientWork)
    microbatch: TrainedSamples = field(default_factory=TrainedSamples)
    num_samples: int = 0
    epoch: float | None = None
    num_epochs: int = 0
    open_epoch: int | None = None
    spent: Cost | None = None
    has_ended: bool = False
    has_resumed: bool = False
    metrics: dict[str, FlatnessMetric] = field(default_factory=dict)
    starts: dict[str, Tensor] = field(default_factory=dict)


_KEPT = ("last_step", "open_epoch", "engine")


class CountedWork(Callback):
    """Counts gradients of samples, in training and in measurements; what a measurement is, a subclass says.

    Attributes:
        budget: The largest share of the training's gradients; None for no bound.
        run: The state of the present run.
    """

    budget: float | None
    run: MonitoredRun
    probe_size: int
    split: Literal["train", "val"]
    log_key_prefix: str

    @property
    def has_whole_vectors(self) -> bool:
        """Whether directions of metrics are whole on each rank."""
        return not issubclass(self.run.kind_of_landscape, ShardedLandscape)

    @abstractmethod
    def survived(self, what: str, trainer: Trainer, *, alone: bool = False) -> AbstractContextManager[Attempt]:
        """Return a block whose exceptions may become warnings."""

    @abstractmethod
    def expected_gradients(self) -> float:
        """Return how many gradients of the loss on the probe a measurement takes, before one has been made."""

    def plan(self) -> str:
        """Return what a measurement is expected to cost: samples, gradients and, once `fit` runs, share of an epoch."""
        return plan(self.run.num_samples or self.probe_size, self.expected_gradients(), self.run.epoch, self.budget)

    def expect(self, trainer: Trainer) -> None:
        """Find out what a measurement is expected to take, and say so if there is a budget."""
        num_total = getattr(self.run.probe, "num_total", None)
        self.run.num_samples = min(self.probe_size, num_total or self.probe_size)
        self.run.epoch = gradients_of_epoch(trainer, num_total if self.split == "train" else None)
        self.run.work.largest = self.run.work.largest or self.expected_gradients() * self.run.num_samples
        for name in self.run.starts.keys() & self.run.metrics.keys():
            self.run.metrics[name].start = self.run.starts[name]
        self.run.starts = {}
        if self.budget is not None:
            rank_zero_info(f"{type(self).__name__}: {self.plan()}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at how many samples come."""
        with self.survived("Counting samples", trainer, alone=True):
            self.run.microbatch.start(batch, trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the gradients of samples that training takes."""
        self.run.work.trained += self.run.microbatch.after_backward(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what was not known before."""
        with self.survived("Counting samples", trainer, alone=True):
            self.run.open_epoch = trainer.current_epoch
            is_manual = not pl_module.automatic_optimization
            self.run.work.trained += self.run.microbatch.end(batch, trainer, is_manual=is_manual)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say after the second epoch, if there is no budget and much was spent, which budget would halve that."""
        self.run.num_epochs += 1
        self.run.open_epoch = None
        share = self.run.work.share
        if self.run.num_epochs == 2 and self.budget is None and share > LARGE_SHARE:
            rank_zero_info(f"{type(self).__name__}: {advice_without_budget(share)}")

    def affords(self, trainer: Trainer) -> bool:
        """Return whether the budget has room for a measurement; the ranks' counts can differ, so the first decides."""
        return self.budget is None or trainer.strategy.broadcast(self.run.work.affords(self.budget))

    def count_measurement(self) -> None:
        """Count what the present measurement has taken, if it has got so far as to evaluate the loss."""
        if self.run.spent is not None:
            self.run.work.add(self.run.spent.gradient_evaluations * self.run.num_samples)
            self.run.spent = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to measure at the same steps as if it had not stopped; {} without a budget.

        That is what was counted, and the directions from which the next measurement starts, which decide on its cost.
        Of sharded directions this rank has a slice only, which is not kept.
        """
        if self.budget is None:
            return {}
        directions = {name: metric.start for name, metric in self.run.metrics.items() if self.has_whole_vectors}
        starts = {name: start for name, start in directions.items() if start is not None}
        kept = {name: getattr(self.run, name) for name in _KEPT}
        return kept | {"work": vars(self.run.work).copy(), "starts": starts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the counts of the interrupted run."""
        if self.budget is not None and "work" in state_dict:
            self.run.has_resumed = True
            self.run.work, self.run.starts = GradientWork(**state_dict["work"]), state_dict["starts"]
            for name in _KEPT:
                setattr(self.run, name, state_dict[name])

    @property
    def state_key(self) -> str:
        """Tells several of these in one Trainer apart."""
        key = self._generate_state_key(key=self.log_key_prefix, split=self.split)
        # Without a budget nothing is saved. Lightning refuses equal keys, and only `setup` says what to do.
        return key if self.budget is not None else f"{key}{id(self)}"
