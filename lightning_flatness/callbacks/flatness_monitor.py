"""Flatness curves of a training run: what to measure, and under which names to log it.

Values go to the loggers themselves, at ``trainer.global_step``, the number of optimizer steps behind the weights that
were measured; ``pl_module.log`` would put the first epoch of a one-step epoch on top of the value before training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_flatness.callbacks.averaged import MeasuredWeights, averaged_module, check_averaging
from lightning_flatness.callbacks.counted_work import MonitoredRun
from lightning_flatness.callbacks.epoch_clock import EpochClock
from lightning_flatness.callbacks.failures import OnError
from lightning_flatness.callbacks.landscape_monitor import LandscapeMonitor
from lightning_flatness.callbacks.last_step import LastStep
from lightning_flatness.callbacks.loggers.hyperparameters import batch_size_of_run, callbacks, log_hyperparameters
from lightning_flatness.callbacks.loggers.tensorboard import custom_scalars_layout, log_layout
from lightning_flatness.callbacks.loggers.values import log_values
from lightning_flatness.callbacks.sharded import kind_of_landscape
from lightning_flatness.callbacks.summary import say_once, summarize
from lightning_flatness.estimators import TOLERANCE
from lightning_flatness.landscape.options import EngineName
from lightning_flatness.metrics import FlatnessMetric, Preset
from lightning_flatness.metrics.measurement import (
    Measurement,
    check_metrics,
    edge_of_stability,
    logged_names,
    measure_metrics,
)
from lightning_flatness.metrics.named import chosen, preconditioned
from lightning_flatness.metrics.presets import typical_gradients
from lightning_flatness.module.loss import LossFunction, measured_parameters
from lightning_flatness.module.modes import Mode


@dataclass
class _Run(MonitoredRun):
    clock: EpochClock = field(default_factory=EpochClock)
    has_logged_hyperparameters: bool = False
    history: list[tuple[int, Measurement]] = field(default_factory=list)
    step: LastStep = field(default_factory=LastStep)


class FlatnessMonitor(LandscapeMonitor):
    r"""Measures how sharp the minimum is that training moves to, and logs it, without changing the run in any bit.

    Measures before training and at the end of training epochs, always on the same samples, and logs to every
    logger at the current ``global_step``, and to ``trainer.callback_metrics`` (for ``ModelCheckpoint`` and
    ``EarlyStopping``):

    - ``flatness/lambda_max``: the largest eigenvalue of the Hessian of the loss; with ``top_k`` ``flatness/lambda_2`` …
    - ``flatness/invariant_sharpness``: the spectral norm of the Hessian per relative change of a layer
      (arXiv 1902.02434), which rescaling whole tensors does not change.
    - ``flatness_errors/lambda_max_residual``, …: the numerical error of each value: how far the solver is from the
      eigenvalue of these samples. ``…_standard_error``: that for the whole training set, nearly always the larger.
    - ``flatness/stability_edge``: the lambda_max above which full-batch steps of the optimizer diverge, at the
      learning rates of the last one: ``2 / eta`` for plain gradient descent; see :func:`stability_edge`.
    - ``flatness/edge_of_stability``: lambda_max over that edge, ``eta · lambda_max / 2`` for plain gradient descent:
      unstable above 1 (arXiv 2103.00065). For Adam, AdamW, RMSprop and Adagrad lambda_max is the preconditioned
      sharpness (arXiv 2207.14484), which the default metrics then have, too, as
      ``flatness/preconditioned_sharpness``, from the first optimizer step on. Neither key is logged for optimizers
      whose edge is not known.
    - ``flatness_cost/seconds``, ``flatness_cost/gradient_evaluations`` (of the loss on the whole probe): its cost.
    - ``flatness_cost/share_of_epoch_time``: at the end of an epoch, those seconds over the seconds that the epoch took
      without measurements (its validation included). ``budget`` bounds what is spent.

    Other metrics log values under their names in ``flatness/`` and errors in ``flatness_errors/``. TensorBoard gets a
    picture ``flatness/spectral_density`` of every :class:`SpectralDensity`, whose curves are
    ``flatness/spectral_density_negative_share``, ``…_mean`` and ``…_mean_square``, and on its page "Custom Scalars" a
    chart of every measure, lambda_max with its stability edge first. Its page "HParams" has one column per
    metric, beside the hyperparameters that module and datamodule saved and, unless they have them, ``optimizer``,
    ``lr``, ``momentum``, ``weight_decay``, ``batch_size`` (samples per optimizer step) and ``sam_rho``. With
    ``TensorBoardLogger(default_hp_metric=False)`` all that the module logs is a column, too.

    Args:
        metrics: What to measure, by name: ``{"sharpest": TopEigenvalues(k=3)}`` logs ``flatness/sharpest``,
            ``flatness/sharpest_2``, ``flatness/sharpest_3`` and their residuals. Or a named set, see
            :func:`preset_metrics` for what each costs: ``"default"`` (lambda_max and invariant sharpness) or ``"all"``,
            which leaves out, with a warning, what is not defined for the module.
        top_k: How many eigenvalues the default metrics log.
        every_n_epochs: Measure at the end of every n-th training epoch; None for never.
        every_n_steps: Measure after every n-th optimizer step, too; None for never.
        probe_size: Number of samples to measure on, over all ranks. The choice depends on ``seed`` and the dataset
            alone, not on batch size or ranks. From a dataset without a length: the first samples that training sees.
        probe_batch_size: Samples per forward pass. Default: the loader's batch size, 128 at most. Where normalisation
            layers use statistics of the batch, the number depends on it, a little
            (``examples/benchmarks/probe_batch_size.py``), so that the default is 128 whatever the loader's (but 1 for a
            loader of batches of 1, whose samples may not fit together).
        split: Draw the samples from the ``"train"`` or the (first) ``"val"`` dataloader.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of a batch, a scalar tensor or a dict with
            ``"loss"``. Default: the module's ``training_step``, whose logging is muted.
        mode: ``"batch_statistics"`` measures the loss that training minimises, without its noise: normalisation
            layers that keep running statistics use those of the batch, dropout is off. ``"eval"``: as in evaluation.
            ``"train"``: as in training, with fixed dropout masks. Layers that you froze in eval mode stay frozen.
        tol: Relative Ritz residual at which the default metrics stop. The eigenvalue's own error is of the order of its
            square: by default 0.005 % in the median (``examples/benchmarks/tolerance.py``). The error of 512 samples
            against the whole training set is 3 to 18 % in the median (``examples/benchmarks/probe_size.py``).
        weights: ``"trained"``: those that the optimizer moves. ``"averaged"``: those that ``WeightAveraging`` or
            ``StochasticWeightAveraging`` averages, from the first average on, without an edge of stability.
            For both curves use two monitors, one of them with ``log_key_prefix="flatness_averaged/"``.
        log_key_prefix: Put before every name; before errors and costs with ``_errors/`` and ``_cost/`` at its end.
        engine: How Hessian-vector products are made, ``"auto"`` by default; see :class:`LossLandscape`.
        on_error: What an exception in a measurement does. ``"warn"``: a warning, nothing is logged, and training goes
            on; where the loss is not finite, as in a run that diverges, NaN is logged. ``"raise"``: it ends the run.
        seed: Seed of the choice of samples and of all random numbers of a measurement.
        budget: The largest share of the training's gradients (of samples) to spend over the run so far, 0.05 for 5 %;
            before training and after the last epoch it always measures. For a resumed run to measure at the same steps,
            checkpoints hold a vector of the size of the weights per eigenvalue. See :meth:`plan`. Default: no bound.
        parameters: The weights to measure, by name, frozen ones too, e.g. ``"encoder.*,head.*"`` or a list of patterns.
            Default: the trainable ones. There is no edge of stability of some of the weights.
        sharded: Keep weights and vectors sharded over the ranks, if all metrics can; see :class:`ShardedLandscape`.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer or module cannot be measured.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FlatnessMonitor(top_k=5)], logger=False, enable_checkpointing=False)
    """

    run: _Run

    def __init__(
        self,
        metrics: dict[str, FlatnessMetric] | str | None = None,
        top_k: int = 1,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        probe_size: int = 512,
        probe_batch_size: int | None = None,
        split: Literal["train", "val"] = "train",
        loss_fn: LossFunction | None = None,
        mode: Mode = "batch_statistics",
        weights: MeasuredWeights = "trained",
        tol: float = TOLERANCE,
        log_key_prefix: str = "flatness/",
        engine: EngineName = "auto",
        on_error: OnError = "warn",
        seed: int = 0,
        budget: float | None = None,
        parameters: str | Sequence[str] | None = None,
        sharded: bool = False,
    ) -> None:
        metrics = "default" if metrics is None else metrics
        self.is_preset = metrics in get_args(Preset) if isinstance(metrics, str) else False
        if isinstance(metrics, str):
            metrics = chosen(metrics, top_k=top_k, tol=tol, seed=seed)
        check_metrics(metrics)
        self._metrics = metrics
        if weights not in get_args(MeasuredWeights):
            raise ValueError(f"Expected `weights` to be 'trained' or 'averaged', got {weights!r}.")
        self.weights: MeasuredWeights = weights
        self.tol, self.parameters, self.sharded = tol, parameters, sharded
        super().__init__(
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            probe_size=probe_size,
            probe_batch_size=probe_batch_size,
            split=split,
            loss_fn=loss_fn,
            mode=mode,
            log_key_prefix=log_key_prefix,
            engine=engine,
            on_error=on_error,
            seed=seed,
            budget=budget,
        )

    def new_run(self) -> _Run:
        """Return what is known when a run starts."""
        return _Run(self.engine, metrics=dict(self._metrics))

    @property
    def _has_edge(self) -> bool:
        return self.weights == "trained" and self.parameters is None

    @property
    def metrics(self) -> dict[str, FlatnessMetric]:
        """What is measured in the present run, by name."""
        return self.run.metrics

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this module can be measured under this Trainer, and forget an earlier run."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_averaging(self.weights, trainer)
            for metric in self.metrics.values():
                metric.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what the edge of the optimizer's stability takes, and write hyperparameters before Lightning does."""
        if self.parameters is not None:
            measured_parameters(pl_module, self.parameters)  # a wrong name is an error before training
        with self.survived("The start", trainer):
            if self.is_preset and self._has_edge:
                for name, metric in preconditioned(trainer.optimizers, self.tol, self.seed).items():
                    self.metrics.setdefault(name, metric)
            self._log_hyperparameters(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of every n-th epoch; after the first, write the hyperparameters that are still missing."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self.run.has_logged_hyperparameters:
            self.run.has_logged_hyperparameters = True
            with self.survived("Logging the hyperparameters", trainer):
                self._log_hyperparameters(trainer, training_has_started=True)

    def _log_hyperparameters(self, trainer: Trainer, *, training_has_started: bool = False) -> None:
        monitors = [callback for callback in callbacks(trainer) if isinstance(callback, FlatnessMonitor)]
        if self is monitors[0]:  # one description has the measures of all
            names = [name for monitor in monitors for name in monitor._headlines(trainer)]
            log_hyperparameters(trainer, names, training_has_started=training_has_started)

    def _headlines(self, trainer: Trainer) -> list[str]:
        """Return the curves that sum up a run: one of each metric, and the edge of stability."""
        names = [metric.headline(name) for name, metric in self.metrics.items()]
        if self._has_edge and edge_of_stability(self.metrics, trainer.optimizers):
            names.append("edge_of_stability")
        return [self.log_key_prefix + name for name in names if name is not None]

    def prepare(self, trainer: Trainer) -> None:
        """Decide what to gather, and tell TensorBoard which curves belong together."""
        self.run.kind_of_landscape = kind_of_landscape(self.metrics, self.sharded)
        charts = [metric.charts(name, trainer.optimizers) for name, metric in self.metrics.items()]
        keys = {title: [self.log_key_prefix + key for key in chart[title]] for chart in charts for title in chart}
        log_layout(trainer, custom_scalars_layout(keys, self.log_key_prefix.rstrip("/") or "flatness"))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the learning rates of the step, which a scheduler may change before they are looked at."""
        with self.survived("Keeping the learning rates", trainer, alone=True):
            self.run.step.keep_learning_rates(optimizer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the weights before a step that a metric follows."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        with self.survived("Keeping the weights before a step", trainer, alone=True):
            follows = any(metric.follows_update for metric in self.metrics.values())
            self.run.step.before_batch(trainer, follows and self.may_measure_after(trainer, batch_idx))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the clock."""
        self.run.clock.start_epoch(self.seconds_of_others(trainer))

    def measure_and_log(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        """Measure all metrics in one measurement, and log them when all have succeeded."""
        start = time.perf_counter()
        module = pl_module if self.weights == "trained" else averaged_module(trainer, pl_module)
        if module is None:
            return  # there is no average yet
        landscape = self.landscape(trainer, module, trainer.optimizers if self.weights == "trained" else [])
        landscape.update = self.run.step.taken() if self.weights == "trained" else None
        measured = measure_metrics(
            self.metrics,
            landscape,
            trainer.optimizers if self._has_edge else [],
            self.run.step.learning_rates,
            batch_size_of_run(trainer),
            skips_undefined=self.is_preset,
            allow_non_finite=self.on_error == "warn",
        )
        say_once(measured, self.log_key_prefix, trainer.global_step, self.run.warned)
        if landscape.engine == "finite_difference":
            self.run.engine = "finite_difference"  # what "auto" came down to, so that it warns once
        seconds = time.perf_counter() - start
        costs = measured.costs | {"seconds": seconds}
        others = self.seconds_of_others(trainer)
        if not on_step and (share := self.run.clock.share_of_epoch(start, seconds, others)) is not None:
            costs["share_of_epoch_time"] = share
        self.run.clock.seconds_in_epoch += seconds
        measured = replace(measured, costs=costs)
        self.run.history.append((trainer.global_step, replace(measured, figures={})))
        values = logged_names(measured, self.log_key_prefix)
        figures = {f"{self.log_key_prefix}{name}": figure for name, figure in measured.figures.items()}
        log_values(trainer, None if self.run.has_ended else pl_module, values, figures, on_step=on_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was measured, and what to change."""
        if self.run.history:
            rank_zero_info(f"FlatnessMonitor: {self.summary()}")

    def summary(self) -> str:
        """Return a short text about the run: first and last values with errors, and what to change, with its number."""
        share = self.run.work.share
        return summarize(self.run.history, self.weights, self.run.num_samples, self.mode, share, self.budget)

    def expected_gradients(self) -> float:
        """Return what a measurement typically takes."""
        return typical_gradients(self.metrics.values())
