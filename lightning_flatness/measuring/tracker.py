"""Flatness of a module outside of a Trainer: once, or at the steps of any training loop."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec

from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_flatness.callbacks.probe import MAX_DEFAULT_BATCH_SIZE, draw_probe
from lightning_flatness.callbacks.transfer import transferred
from lightning_flatness.estimators import TOLERANCE
from lightning_flatness.landscape import LossLandscape, OptimizerStep
from lightning_flatness.landscape.options import EngineName, check_options
from lightning_flatness.landscape.ranks import rank_and_world_size
from lightning_flatness.measuring.recipes import is_a
from lightning_flatness.measuring.report import FlatnessReport
from lightning_flatness.metrics.measurement import measure_metrics
from lightning_flatness.metrics.named import Metrics, chosen
from lightning_flatness.module.loss import LossFunction
from lightning_flatness.module.modes import Mode, uses_batch_statistics
from lightning_flatness.module.replay import attached_trainer
from lightning_flatness.module.rng import device_of

Data = Iterable[Any] | Dataset[Any] | LightningDataModule
Log = Callable[[dict[str, float], int], Any]
_P = ParamSpec("_P")
_Measure = Callable[_P, FlatnessReport]


class FlatnessTracker:
    """What :class:`FlatnessMonitor` measures, in a loop without a Trainer: plain PyTorch, Fabric, Hugging Face.

    The samples are drawn once, the same as the monitor's for the same data and ``seed``. Each measurement starts from
    the directions that the last one found, leaves no trace in the module, and costs what the monitor's does: see
    :func:`preset_metrics`.

    Args:
        module: What is trained: an ``nn.Module``, wrapped in DDP or not, or a LightningModule.
        data: A DataLoader, a dataset, a DataModule (its training data; it is set up if no run has), or batches, which
            are used as they come: those of :func:`draw_probe`, say.
        metrics: ``"default"``, ``"all"``, names of metrics, or metrics by name.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of a batch. Default: the module's ``training_step``.
        optimizer: What trains the module, or several; for its edge of stability.
        log: ``log(values, step)`` takes what :meth:`measure` finds, under the names of the monitor: ``wandb.log``,
            ``fabric.log_dict``, ``writer.add_scalars`` in a lambda.
        top_k: How many eigenvalues the default metrics have.
        geometry: Measure in this geometry what is defined in any; its name is put behind those of the metrics.
        probe_size: Number of samples to measure on, over all ranks.
        probe_batch_size: Samples per forward pass; see :class:`FlatnessMonitor`.
        mode: How to run the module; see :class:`LossLandscape`.
        tol: Tolerance of the default metrics.
        log_key_prefix: Put before every name.
        engine: How Hessian-vector products are made; see :class:`LossLandscape`.
        parameters: The weights to measure, by name; see :class:`LossLandscape`.
        seed: Seed of the choice of samples and of all random numbers of a measurement.
        on_evaluation: Called after every loss, gradient and product, e.g. to show progress.

    Raises:
        ValueError: If an argument is out of range, or there are no samples.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        >>> data = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
        >>> tracker = FlatnessTracker(module, data, loss_fn=lambda module, x: module(x).square().mean(),
        ...                           optimizer=optimizer, log=lambda values, step: print(step, len(values) > 4))
        >>> round(tracker.measure(step=0).values["lambda_max"], 3)  # of 2 · mean x²
        0 True
        9.333
    """

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        metrics: Metrics = "default",
        *,
        loss_fn: LossFunction | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        log: Log | None = None,
        top_k: int = 1,
        geometry: str | None = None,
        probe_size: int = 512,
        probe_batch_size: int | None = None,
        mode: Mode = "batch_statistics",
        tol: float = TOLERANCE,
        log_key_prefix: str = "flatness/",
        engine: EngineName = "auto",
        parameters: str | Sequence[str] | None = None,
        seed: int = 0,
        on_evaluation: Callable[[], None] | None = None,
    ) -> None:
        check_options(mode, engine)
        self.module = module
        self.loss_fn = loss_fn
        self.optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else [*optimizer]
        self.log = log
        self.mode: Mode = mode
        self.log_key_prefix = log_key_prefix
        self.engine: EngineName = engine
        self.parameters = parameters
        self.seed = seed
        self.on_evaluation = on_evaluation
        self.is_preset = not isinstance(metrics, dict)
        self.metrics = chosen(metrics, top_k=top_k, tol=tol, seed=seed, geometry=geometry, optimizers=self.optimizers)
        self.probe = _probe(module, data, probe_size, probe_batch_size, mode, seed)

    def measure(self, step: int | None = None, update: OptimizerStep | None = None) -> FlatnessReport:
        """Measure at the current weights, and log.

        Args:
            step: Optimizer steps behind the weights; without it nothing is logged.
            update: The last of them, for measures along its update, which are left out without it.

        Returns:
            Values, errors and cost.
        """
        start = time.perf_counter()
        landscape = LossLandscape(
            self.module,
            self.probe,
            self.loss_fn,
            mode=self.mode,
            engine=self.engine,
            seed=self.seed,
            optimizer=self.optimizers,
            parameters=self.parameters,
            update=update,
        )
        landscape.on_evaluation = self.on_evaluation
        found = measure_metrics(self.metrics, landscape, self.optimizers, skips_undefined=self.is_preset)
        found = replace(found, costs=found.costs | {"seconds": time.perf_counter() - start})
        report = FlatnessReport(found, landscape.num_samples, self.mode, step)
        if self.log is not None and step is not None:
            self.log(report.logged(self.log_key_prefix), step)
        return report


def _as(constructor: Callable[_P, FlatnessTracker]) -> Callable[[Callable[..., FlatnessReport]], _Measure[_P]]:
    """Give a function the signature of a constructor, at run time, too."""

    def decorate(function: Callable[..., FlatnessReport]) -> Callable[_P, FlatnessReport]:
        untyped: Any = function
        untyped.__signature__ = inspect.signature(constructor).replace(return_annotation="FlatnessReport")
        return function

    return decorate


@_as(FlatnessTracker)
def measure(*args: Any, **settings: Any) -> FlatnessReport:
    """Measure the flatness of one module at its current weights, which stay as they are.

    Args:
        *args: Module, data and metrics, as :class:`FlatnessTracker` takes them.
        **settings: Its other arguments.

    Returns:
        Values, errors and cost.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> data = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
        >>> report = measure(module, data, "lambda_max", loss_fn=lambda module, x: module(x).square().mean())
        >>> round(report.values["lambda_max"], 3)
        9.333
    """
    return FlatnessTracker(*args, **settings).measure()


def _probe(module: Any, data: Data, size: int, batch_size: int | None, mode: Mode, seed: int) -> list[Any]:
    """Draw the samples, and bring them into the form in which the training step gets them."""
    loader: Iterable[Any] = data  # type: ignore[assignment]
    if is_a(type(data), "LightningDataModule"):
        datamodule: Any = data
        if datamodule.trainer is None:  # no run has prepared it
            datamodule.prepare_data()
            datamodule.setup("fit")
        loader = datamodule.train_dataloader()
    elif isinstance(data, Dataset):
        loader = DataLoader(data, batch_size=batch_size or MAX_DEFAULT_BATCH_SIZE)
    rank, world_size = rank_and_world_size()
    batches = draw_probe(
        loader,
        size,
        batch_size=batch_size,
        uses_batch_statistics=uses_batch_statistics(module, mode),
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device_of(module),
    )
    if isinstance(module, LightningModule) or hasattr(module, "transfer_batch_to_device"):  # of either package
        trainer = attached_trainer(module)  # under Fabric something else that has loggers
        batches = transferred(trainer if hasattr(trainer, "precision_plugin") else None, module, batches, seed)
    return batches
