"""What measuring takes of a run's gradients, counted in gradients of single samples, never by the clock."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_flatness.callbacks.loggers.hyperparameters import batch_size_of_run, callbacks
from lightning_flatness.callbacks.sharpness_aware_minimization import SharpnessAwareMinimization
from lightning_flatness.module.batches import infer_batch_size

LARGE_SHARE = 0.2
"""Share of the training's gradients above which a run without a budget says how to bound it."""


def check_budget(budget: Any) -> None:
    """Check what a user passes as a budget.

    Args:
        budget: The largest share of the training's gradients; None for no bound.

    Raises:
        ValueError: If it is neither None nor in (0, 1].
    """
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if budget is not None and not (is_number and 0 < budget <= 1):
        raise ValueError(
            f"Expected `budget` to be a share in (0, 1], got {budget!r}. Use 0.05 to spend at most 5 % of the "
            "training's gradients on measuring, None for no bound."
        )


@dataclass
class GradientWork:
    """The gradients of samples that training and measuring have taken so far, and whether the next fits a budget.

    Args:
        trained: What training has taken, over all ranks.
        measured: What measurements have taken.
        largest: The most that one has taken; before that, what the first is expected to take.
    """

    trained: float = 0.0
    measured: float = 0.0
    largest: float = 0.0

    @property
    def share(self) -> float:
        """What measuring has taken so far, as a share of what training has."""
        return self.measured / self.trained if self.trained else 0.0

    def affords(self, budget: float) -> bool:
        """Return whether measuring stays within a share of the training if one more takes as much as any so far.

        Args:
            budget: That share.

        Example:
            >>> work = GradientWork(trained=1000.0, largest=100.0)
            >>> work.affords(0.05), work.affords(0.1)
            (False, True)
        """
        return self.measured + self.largest <= budget * self.trained

    def add(self, gradients: float) -> None:
        """Count a measurement.

        Args:
            gradients: What it took.
        """
        self.measured += gradients
        self.largest = max(self.largest, gradients)


@dataclass
class TrainedSamples:
    """Counts the gradients of samples that a microbatch of training takes: its samples, once per backward pass.

    Args:
        size: Its samples, over all ranks; 0 while they are not known.
        num_passes: Its backward passes so far.
    """

    size: int = 0
    num_passes: int = 0

    def start(self, batch: Any, trainer: Trainer) -> None:
        """Look at the coming microbatch."""
        self.size, self.num_passes = _num_samples(batch, trainer), 0

    def after_backward(self, trainer: Trainer) -> int:
        """Return what a backward pass has taken; twice its samples if SAM's callback has added its second pass."""
        sams = [c for c in callbacks(trainer) if isinstance(c, SharpnessAwareMinimization)]
        num_passes = 1 + sum(sam.has_perturbed for sam in sams)
        self.num_passes += num_passes
        return num_passes * self.size

    def end(self, batch: Any, trainer: Trainer, *, is_manual: bool) -> int:
        """Return what was not counted before.

        Args:
            batch: The microbatch. Where ``training_step`` has fetched it itself, only now is it known.
            trainer: The Trainer.
            is_manual: Whether the module may have called ``backward`` of the loss itself, which nobody else sees.
        """
        num_passes = max(self.num_passes, 1) if is_manual else self.num_passes
        if self.size:
            return (num_passes - self.num_passes) * self.size
        return num_passes * _num_samples(batch, trainer)


def _num_samples(batch: Any, trainer: Trainer) -> int:
    """Return the samples of a microbatch over all ranks, which have equally many; 0 if they cannot be counted."""
    with suppress(ValueError):
        return infer_batch_size(batch) * _num_replicas(trainer)
    return 0


def _num_replicas(trainer: Trainer) -> int:
    """Return how many ranks train on samples of their own: with tensor parallelism several see the same."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size))


def gradients_of_epoch(trainer: Trainer, num_total: int | None) -> float | None:
    """Return how many gradients of samples an epoch of training takes; None if it cannot be told.

    Args:
        trainer: When training has started.
        num_total: Number of training samples, if it is known.
    """
    step = batch_size_of_run(trainer)
    if step is None or not math.isfinite(trainer.num_training_batches):
        return None
    share = _num_replicas(trainer) / trainer.world_size / trainer.accumulate_grad_batches
    num_samples = min(trainer.num_training_batches * step * share, num_total or math.inf)
    sams = [c for c in callbacks(trainer) if isinstance(c, SharpnessAwareMinimization) and c.rho > 0]
    return num_samples * (1 + sum(1 / sam.interval for sam in sams if sam.ascent == "gradient"))


def is_last_epoch(trainer: Trainer) -> bool:
    """Return whether training ends with the present epoch, as far as is known at its end."""
    epochs, steps = trainer.current_epoch + 1, trainer.global_step
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
        return True
    may_stop = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
    return (trainer.max_steps != -1 and steps >= trainer.max_steps) or (trainer.should_stop and may_stop)


def percent(share: float) -> str:
    """Return a share with two digits, in percent.

    Example:
        >>> percent(0.0512), percent(3.14)
        ('5.1 %', '310 %')
    """
    return f"{_rounded(100 * share)} %"


def _rounded(number: float) -> str:
    return f"{float(f'{number:.2g}'):g}"


def advice_without_budget(share: float) -> str:
    """Return what measuring took, and the budget that halves it.

    Args:
        share: What it took, of the training's gradients.

    Example:
        >>> advice_without_budget(0.32)
        "measuring has taken 32 % of the training's gradients so far. budget=0.16 would halve that."
    """
    budget = _rounded(min(1.0, share / 2))
    effect = "halve that" if share <= 2 else "keep it at 100 % at most"
    return f"measuring has taken {percent(share)} of the training's gradients so far. budget={budget} would {effect}."


def plan(num_samples: int, gradients: float, epoch: float | None, budget: float | None) -> str:
    """Return what a measurement is expected to cost, and how often a budget allows one.

    Args:
        num_samples: The size of the probe.
        gradients: Gradients of the loss on the probe that a measurement takes.
        epoch: Gradients of samples that an epoch of training takes; None if it is not known.
        budget: The largest share of the training's gradients, if there is one.

    Example:
        >>> print(plan(512, 24, 50_000, 0.05))
        A measurement on 512 samples takes about 24 gradients of these, 25 % of an epoch. budget=0.05 allows about one in 4.9 epochs.
    """  # noqa: E501
    text = f"A measurement on {num_samples} samples takes about {gradients:.0f} gradients of these"
    if epoch:
        share = num_samples * gradients / epoch
        text += f", {percent(share)} of an epoch"
        if budget is not None:
            often = share / budget
            allowed = f"one in {_rounded(often)} epochs" if often > 1 else f"{_rounded(1 / often)} in an epoch"
            text += f". budget={budget:g} allows about {allowed}"
    return text + "."
