"""Flatness curves of a training run: what to measure, and under which names to log it.

What is measured is left to the metrics, how to leave no trace to the landscape. Values go to the loggers
themselves, at ``trainer.global_step``, the number of optimizer steps behind the weights that were measured;
``pl_module.log`` would put the first epoch of a one-step epoch on top of the value before training.
"""

from __future__ import annotations

import math
import time
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_flatness.callbacks.hyperparameters import callbacks, log_hyperparameters
from lightning_flatness.callbacks.landscape_monitor import LandscapeMonitor
from lightning_flatness.callbacks.pictures import custom_scalars_layout, log_figure, log_layout
from lightning_flatness.engines import EngineName
from lightning_flatness.estimators import UndefinedMeasureError
from lightning_flatness.geometry import Euclidean, MissingOptimizerStateError, OptimizerGeometry
from lightning_flatness.isolation import Mode
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.loss import LossFunction
from lightning_flatness.metrics import FlatnessMetric, Preset, SpectralDensity, TopEigenvalues, preset_metrics
from lightning_flatness.stability import is_preconditioned, stability_edge


class FlatnessMonitor(LandscapeMonitor):
    r"""Measures how sharp the minimum is that training moves to, and logs it, without changing the run.

    Measures before training and at the end of training epochs, always on the same samples, and logs to every
    logger at the current ``global_step``, and to ``trainer.callback_metrics`` (for ``ModelCheckpoint`` and
    ``EarlyStopping``):

    - ``flatness/lambda_max``: the largest eigenvalue of the Hessian of the loss; ``flatness/lambda_2`` …
      with ``top_k``.
    - ``flatness/invariant_sharpness``: the spectral norm of the Hessian per relative change of a layer
      (arXiv 1902.02434), which rescaling the layers does not change.
    - ``flatness/lambda_max_residual``, ``flatness/invariant_sharpness_residual``: the error of each value, in
      its units.
    - ``flatness/stability_edge``: the lambda_max above which full-batch steps of the optimizer diverge, at the current
      learning rates: ``2 / eta`` for plain gradient descent; see :func:`stability_edge`.
    - ``flatness/edge_of_stability``: lambda_max over that edge, ``eta · lambda_max / 2`` for plain gradient descent:
      unstable above 1 (arXiv 2103.00065). For Adam, AdamW, RMSprop and Adagrad lambda_max is the preconditioned
      sharpness (arXiv 2207.14484), which the default metrics then have, too, as
      ``flatness/preconditioned_sharpness``, from the first optimizer step on. Neither key is logged for optimizers
      whose edge is not known.
    - ``flatness/seconds``, ``flatness/gradient_evaluations``: what the measurement cost; the latter in gradients of the
      loss on the whole probe.
    - ``flatness/share_of_epoch_time``: at the end of an epoch, those seconds over the seconds that the epoch took
      without measurements (its validation included). Raise ``every_n_epochs``, or lower ``probe_size``, if it is more
      than you want to spend.

    Other metrics log their values under their names, with ``_residual`` or ``_standard_error`` behind it. TensorBoard
    gets a picture ``flatness/spectral_density`` of every :class:`SpectralDensity`, whose curves are
    ``flatness/spectral_density_negative_share``, ``…_mean`` and ``…_mean_square``, and on its page "Custom Scalars" the
    eigenvalues in one chart and lambda_max with its stability edge in another. Its page "HParams" has one column per
    metric, beside the hyperparameters that module and datamodule saved and, unless they have them, ``optimizer``,
    ``lr``, ``momentum``, ``weight_decay``, ``batch_size`` (samples per optimizer step) and ``sam_rho``. With
    ``TensorBoardLogger(default_hp_metric=False)`` all that the module logs is a column, too.

    With the monitor, training gives the same weights, optimizer state, buffers, random numbers and logged values,
    bit for bit, as without it.

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
        probe_batch_size: Samples per forward pass. Default: the loader's batch size, 128 at most.
        split: Draw the samples from the ``"train"`` or the ``"val"`` dataloader (the first, of several).
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of a batch, a scalar tensor or a dict with
            ``"loss"``. Default: the module's ``training_step``, whose logging is muted.
        mode: Measure the module in ``"eval"`` or in ``"train"`` mode.
        tol: Relative Ritz residual at which the default metrics stop. The eigenvalue's own error is of the order of its
            square: by default less than 0.1 % in the median and 2 % at worst (``examples/warm_start.py``); that of 512
            samples for the whole training set is 3 to 18 % in the median (``examples/probe_size.py``).
        log_key_prefix: Put before every name.
        engine: How Hessian-vector products are made, ``"auto"`` by default; see :class:`LossLandscape`.
        seed: Seed of the choice of samples and of all random numbers of a measurement.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer or module cannot be measured.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FlatnessMonitor(top_k=5)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        metrics: dict[str, FlatnessMetric] | Preset | None = None,
        top_k: int = 1,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        probe_size: int = 512,
        probe_batch_size: int | None = None,
        split: Literal["train", "val"] = "train",
        loss_fn: LossFunction | None = None,
        mode: Mode = "eval",
        tol: float = 4e-2,
        log_key_prefix: str = "flatness/",
        engine: EngineName = "auto",
        seed: int = 0,
    ) -> None:
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
            seed=seed,
        )
        self.preset: Preset | None = "default" if metrics is None else metrics if isinstance(metrics, str) else None
        if isinstance(metrics, str) or metrics is None:
            metrics = preset_metrics(self.preset or "default", top_k=top_k, tol=tol, seed=seed)
        _check_metrics(metrics)
        self.metrics = metrics
        self.tol = tol
        self._epoch_start: float | None = None
        self._seconds_in_epoch = 0.0
        self._has_logged_hyperparameters = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this module can be measured under this Trainer, and forget an earlier run."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._epoch_start = None
            for metric in self.metrics.values():
                metric.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what the edge of the optimizer's stability takes, and write hyperparameters before Lightning does."""
        has_edge = not math.isnan(stability_edge(trainer.optimizers))
        if self.preset is not None and has_edge and is_preconditioned(trainer.optimizers):
            sharpness = TopEigenvalues(geometry="optimizer", tol=self.tol, seed=self.seed, shared_start=True)
            self.metrics.setdefault("preconditioned_sharpness", sharpness)
        self._log_hyperparameters(trainer)
        self._has_logged_hyperparameters = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of every n-th epoch; after the first, write the hyperparameters that are still missing."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self._has_logged_hyperparameters:
            self._has_logged_hyperparameters = True
            self._log_hyperparameters(trainer, training_has_started=True)

    def _log_hyperparameters(self, trainer: Trainer, *, training_has_started: bool = False) -> None:
        monitors = [callback for callback in callbacks(trainer) if isinstance(callback, FlatnessMonitor)]
        if self is monitors[0]:  # one description has the measures of all
            names = [name for monitor in monitors for name in monitor._headlines(trainer)]
            log_hyperparameters(trainer, names, training_has_started=training_has_started)

    def _headlines(self, trainer: Trainer) -> list[str]:
        """Return the curves that sum up a run: one of each metric, and the edge of stability."""
        names = [name for name, metric in self.metrics.items() if not isinstance(metric, SpectralDensity)]
        if self._sharpness_at_the_edge(trainer) and not math.isnan(stability_edge(trainer.optimizers)):
            names.append("edge_of_stability")
        return [self.log_key_prefix + name for name in names]

    def prepare(self, trainer: Trainer) -> None:
        """Tell TensorBoard which curves belong together."""
        log_layout(trainer, custom_scalars_layout(self._charts(trainer), self.log_key_prefix.rstrip("/") or "flatness"))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the clock."""
        self._epoch_start, self._seconds_in_epoch = time.perf_counter(), 0.0

    def measure_and_log(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        """Measure all metrics in one measurement, and log them when all have succeeded."""
        values = self._values(trainer, pl_module, on_step=on_step)
        for name, metric in self.metrics.items():
            if isinstance(metric, SpectralDensity):
                log_figure(trainer, f"{self.log_key_prefix}{name}", metric.figure())
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        for key, value in values.items():
            # The loggers have it; this is for callback_metrics. Ranks agree: sync_dist keeps Lightning from asking.
            pl_module.log(key, value, logger=False, on_step=on_step, on_epoch=not on_step, sync_dist=True, batch_size=1)

    def _values(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> dict[str, float]:
        start = time.perf_counter()
        values: dict[str, float] = {}
        landscape = self.landscape(trainer, pl_module)
        with landscape.measurement():
            for name, metric in self.metrics.items():
                if self._is_measured(name, metric.to(landscape.device), landscape):
                    values |= self._named_values(name, metric)
        if landscape.engine == "finite_difference":
            self.engine = "finite_difference"  # what "auto" came down to, so that it warns once
        sharpness, edge = self._sharpness_at_the_edge(trainer), stability_edge(trainer.optimizers)
        if sharpness in values and not math.isnan(edge):
            values |= {"stability_edge": edge, "edge_of_stability": values[sharpness] / edge}
        values["gradient_evaluations"] = landscape.cost.gradient_evaluations
        values["seconds"] = seconds = time.perf_counter() - start
        if self._epoch_start is not None and not on_step:
            values["share_of_epoch_time"] = seconds / (start - self._epoch_start - self._seconds_in_epoch)
        self._seconds_in_epoch += seconds
        return {f"{self.log_key_prefix}{name}": value for name, value in values.items()}

    def _is_measured(self, name: str, metric: FlatnessMetric, landscape: LossLandscape) -> bool:
        """Measure, unless there is nothing to measure: yet, or for this module in a named set of metrics."""
        try:
            metric.update(landscape)
        except MissingOptimizerStateError:
            return False
        except UndefinedMeasureError as error:
            if self.preset is None:
                raise
            if name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(f"FlatnessMonitor: '{self.log_key_prefix}{name}' is left out. {error}")
            return False
        return True

    def _named_values(self, name: str, metric: FlatnessMetric) -> dict[str, float]:
        named: dict[str, float] = {}
        for suffix, value, error in metric.scalars():
            key = f"{name.removesuffix('_max')}{suffix}" if suffix else name
            named |= {key: value, f"{key}_{metric.error_name}": error}
        if not metric.converged and name not in self._warned:
            self._warned.add(name)
            num_products, cost = int(metric.num_products), float(metric.gradient_evaluations)
            spent = f"{num_products} Hessian-vector products" if num_products else f"{cost:.0f} gradient evaluations"
            reached = ", ".join(f"{key} {value:.2g}" for key, value in named.items())
            rank_zero_warn(
                f"FlatnessMonitor: '{self.log_key_prefix}{name}' did not converge within {spent}: "
                f"{reached}. Its curves show by how much. HINT: raise its `{metric.effort}` or `tol`."
            )
        return named

    def _sharpness_at_the_edge(self, trainer: Trainer) -> str:
        """Return the name of the metric whose lambda_max is to be held against the edge; empty if there is none."""
        geometry = OptimizerGeometry if is_preconditioned(trainer.optimizers) else Euclidean
        for name, metric in self.metrics.items():
            if not isinstance(metric, TopEigenvalues) or (metric.which, metric.operator) != ("LA", "hessian"):
                continue
            if isinstance(metric.geometry, geometry):
                return name
        return ""

    def _charts(self, trainer: Trainer) -> dict[str, list[str]]:
        """Return what belongs into one chart: the eigenvalues of a metric, and lambda_max with its edge."""
        charts: dict[str, list[str]] = {}
        for name, metric in self.metrics.items():
            if isinstance(metric, TopEigenvalues) and metric.k > 1:
                keys = [name, *(f"{name.removesuffix('_max')}_{i}" for i in range(2, metric.k + 1))]
                charts[f"{keys[0]} … {keys[-1]}"] = [self.log_key_prefix + key for key in keys]
        sharpness = self._sharpness_at_the_edge(trainer)
        if sharpness and not math.isnan(stability_edge(trainer.optimizers)):
            charts[f"edge of stability: {sharpness}"] = [
                self.log_key_prefix + key for key in (sharpness, "stability_edge")
            ]
        return charts


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(
            f"Expected `metrics` to be a non-empty dict of names and flatness metrics, got {metrics!r}. "
            "Leave it out for the default ones."
        )
    for name, metric in metrics.items():
        if not isinstance(metric, FlatnessMetric):
            raise ValueError(
                f"Expected `metrics[{name!r}]` to be a flatness metric such as TopEigenvalues(), got "
                f"{type(metric).__name__}."
            )
