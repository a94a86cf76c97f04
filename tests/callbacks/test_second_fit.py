"""A second ``fit`` with the same callback objects starts as new: one test per thing that a run may change."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.attributes import attributes, changed
from helpers.modules import Classifier, Plain, loader, trainer
from helpers.once_differentiable import OnceDifferentiable
from helpers.training import Recorder
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatness import (
    AverageCaseSharpness,
    FlatnessMonitor,
    GradientNoise,
    HessianTrace,
    LossSurfaceMonitor,
    SharpnessAwareMinimization,
    SpectralDensity,
    TopEigenvalues,
    WorstCaseSharpness,
)


class WithOptimizer(Classifier):
    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.make = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=0.01)


class Once(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net[2](OnceDifferentiable.apply(self.net[0](batch[0]))), batch[1])


def surface_monitor() -> LossSurfaceMonitor:
    return LossSurfaceMonitor(num_points=3, probe_size=8)


def fit(path: Path, callback: pl.Callback, module: pl.LightningModule | None = None, data: Any = None) -> pl.Trainer:
    torch.manual_seed(0)  # for the order of the samples
    run = trainer(path, callback, logger=False, max_epochs=1)
    run.fit(module or Classifier(), loader() if data is None else data)
    return run


def set_up_again(path: Path, callback: pl.Callback) -> None:
    callback.setup(trainer(path, callback, logger=False), Classifier(), "fit")


def test_preconditioned_sharpness_of_a_run_with_adam_is_not_measured_in_the_next(tmp_path):
    monitor = FlatnessMonitor()
    run = fit(tmp_path, monitor, WithOptimizer(torch.optim.Adam))
    assert "flatness/preconditioned_sharpness" in run.callback_metrics
    run = fit(tmp_path, monitor, WithOptimizer(torch.optim.SGD))
    assert "flatness/preconditioned_sharpness" not in run.callback_metrics
    assert list(monitor.metrics) == ["lambda_max", "invariant_sharpness"]
    fit(tmp_path, monitor, WithOptimizer(torch.optim.Adam))
    assert "preconditioned_sharpness" in monitor.metrics


@pytest.mark.filterwarnings("ignore:.*finite differences")
def test_the_engine_that_auto_came_down_to_is_forgotten(tmp_path):
    monitor = FlatnessMonitor()
    fit(tmp_path, monitor, Once())
    assert monitor.run.engine == "finite_difference"
    fit(tmp_path, monitor)
    assert monitor.run.engine == monitor.engine == "auto"
    with pytest.warns(UserWarning, match="finite differences"):
        fit(tmp_path, monitor, Once())


def test_what_one_run_has_warned_of_the_next_one_warns_of_again(tmp_path):
    monitor = FlatnessMonitor({"lambda_max": TopEigenvalues(tol=1e-9, max_products=3)})
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, monitor)
        assert len([w for w in caught if "did not converge" in str(w.message)]) == 1


def test_metrics_forget_values_and_start_vectors(tmp_path):
    monitor = FlatnessMonitor()
    module = Classifier()
    weights = copy.deepcopy(module.state_dict())
    fit(tmp_path, monitor, module)
    used = monitor.metrics["lambda_max"].compute().clone()
    module.load_state_dict(weights)
    fit(tmp_path, monitor, module)
    fresh = FlatnessMonitor()
    module.load_state_dict(weights)
    fit(tmp_path, fresh, module)
    assert torch.equal(monitor.metrics["lambda_max"].compute(), fresh.metrics["lambda_max"].compute())
    assert torch.isfinite(used).all()
    set_up_again(tmp_path, monitor)
    assert all(metric.value.isnan().all() for metric in monitor.metrics.values())


def test_the_probe_is_that_of_the_new_data_and_measured_at_step_zero(tmp_path):
    monitor = FlatnessMonitor()
    fit(tmp_path, monitor)
    probe, step = monitor.run.probe, monitor.run.last_step
    assert step == 5
    set_up_again(tmp_path, monitor)
    assert (monitor.run.probe, monitor.run.last_step) == (None, None)
    fit(tmp_path, monitor)
    assert monitor.run.probe is not probe


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.ones(6), 0)] * 16)


def test_samples_collected_from_a_stream_are_not_those_of_the_next_run(tmp_path):
    monitor = FlatnessMonitor(probe_size=8)
    fit(tmp_path, monitor, data=DataLoader(Stream(), batch_size=8))
    assert bool((monitor.run.probe[0][0] == 1).all())
    fit(tmp_path, monitor)
    assert not bool((monitor.run.probe[0][0] == 1).all())
    assert monitor.run.seen is None


def test_the_clock_and_the_hyperparameters_of_an_epoch(tmp_path):
    monitor = FlatnessMonitor()
    fit(tmp_path, monitor)
    assert monitor.run.clock.epoch_start is not None
    assert monitor.run.clock.seconds_in_epoch > 0
    assert monitor.run.has_logged_hyperparameters
    set_up_again(tmp_path, monitor)
    assert (monitor.run.clock.epoch_start, monitor.run.clock.seconds_in_epoch) == (None, 0.0)
    assert not monitor.run.has_logged_hyperparameters


@pytest.mark.filterwarnings("ignore:LossSurfaceMonitor. no logger")
def test_the_surface_and_its_colours(tmp_path):
    monitor = surface_monitor()
    fit(tmp_path, monitor)
    assert monitor.surface is not None
    assert monitor.run.scale is not None
    set_up_again(tmp_path, monitor)
    assert monitor.surface is None
    assert monitor.run.scale is None


@pytest.mark.filterwarnings("ignore:LossSurfaceMonitor. no logger")
@pytest.mark.parametrize("make", [FlatnessMonitor, surface_monitor])
def test_a_run_changes_nothing_but_what_setup_makes_anew(tmp_path, make):
    """Whatever a later attribute is called: it belongs to ``run``, or stays."""
    monitor = make()
    others = {"run", "_metrics", "log", "log_dict"}  # Lightning sets the last two
    before = {name: repr(value) for name, value in vars(monitor).items() if name not in others}
    fit(tmp_path, monitor, WithOptimizer(torch.optim.Adam))
    assert {name: repr(value) for name, value in vars(monitor).items() if name not in others} == before
    set_up_again(tmp_path, monitor)
    for field in dataclasses.fields(monitor.run):
        old, new = getattr(monitor.run, field.name), getattr(make().run, field.name)
        assert old == new or list(old) == list(new), field.name


class Interrupted(pl.Callback):
    """Ends a run in the middle of a step."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 2:
            raise KeyboardInterrupt


@dataclasses.dataclass(frozen=True)
class Case:
    """Callbacks of one configuration, and a first run that leaves much behind."""

    make: Callable[[], pl.Callback]
    first: Callable[[], pl.LightningModule] = lambda: WithOptimizer(torch.optim.Adam)
    data: Callable[[], DataLoader[Any]] = lambda: DataLoader(Plain(24), batch_size=8)
    is_interrupted: bool = False


def measures() -> FlatnessMonitor:
    metrics = {
        "eigenvalues": TopEigenvalues(k=3, tol=1e-9, max_products=5),
        "trace": HessianTrace(num_products=8, method="hutchinson"),
        "density": SpectralDensity(num_runs=2, num_steps=4, num_points=8),
        "worst": WorstCaseSharpness(num_steps=3),
        "average": AverageCaseSharpness(num_draws=3),
        "noise": GradientNoise(),
    }
    return FlatnessMonitor(metrics, probe_size=16)


CASES = {
    "monitor": Case(FlatnessMonitor),
    "monitor of several measures": Case(measures),
    "engine given": Case(lambda: FlatnessMonitor(engine="rebuilt")),
    "engine finite_difference": Case(lambda: FlatnessMonitor(engine="finite_difference")),
    "fallback to finite differences": Case(FlatnessMonitor, first=Once),
    "every step, training mode": Case(lambda: FlatnessMonitor(every_n_steps=1, mode="train", top_k=2, probe_size=8)),
    "a stream first": Case(lambda: FlatnessMonitor(probe_size=8), data=lambda: DataLoader(Stream(), batch_size=8)),
    "interrupted monitor": Case(lambda: FlatnessMonitor(every_n_steps=1), is_interrupted=True),
    "surface": Case(surface_monitor),
    "surface of given radius": Case(lambda: LossSurfaceMonitor(num_directions=1, num_points=5, radius=0.5)),
    "surface along eigenvectors": Case(lambda: LossSurfaceMonitor(num_points=3, directions="eigenvectors")),
    "SAM": Case(SharpnessAwareMinimization),
    "SAM, start_epoch": Case(lambda: SharpnessAwareMinimization(start_epoch=1)),
    "SAM, interval": Case(lambda: SharpnessAwareMinimization(interval=2, geometry="element", rho=1.0)),
    "SAM, sync_perturbation=False": Case(lambda: SharpnessAwareMinimization(sync_perturbation=False)),
    "interrupted SAM": Case(SharpnessAwareMinimization, is_interrupted=True),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(finite differences|no logger|did not converge|Detected Keyboard)")
        yield request.param


def two_epochs(path: Path, callback: pl.Callback, module: pl.LightningModule, data: Any, *others: pl.Callback) -> Any:
    torch.manual_seed(0)
    run: Any = trainer(path, callback, *others, logger=Recorder(), max_epochs=2)
    run.fit(module, data)
    return run


def used(path: Path, case: Case) -> pl.Callback:
    callback = case.make()
    others = [Interrupted()] if case.is_interrupted else []
    try:
        two_epochs(path, callback, case.first(), case.data(), *others)
    except (KeyboardInterrupt, SystemExit):
        assert case.is_interrupted
    return callback


def seen(callback: pl.Callback) -> dict[str, str]:
    set_by_lightning = {"log", "log_dict"}
    return {path: value for path, value in attributes(callback).items() if path not in set_by_lightning}


def test_all_attributes_are_new_when_a_second_fit_is_set_up(tmp_path, case):
    """Found by comparison with a new object, metrics and all that they hold included: no list of names."""
    callback, fresh = used(tmp_path, case), case.make()
    assert changed(seen(fresh), seen(callback))
    set_up_again(tmp_path, callback)
    set_up_again(tmp_path, fresh)
    assert changed(seen(fresh), seen(callback)) == set()


def test_a_second_fit_logs_and_trains_as_with_new_callbacks(tmp_path, case):
    runs = []
    for callback in (case.make(), used(tmp_path, case)):
        torch.manual_seed(1)
        module = Classifier()
        run = two_epochs(tmp_path, callback, module, loader())
        records = [
            (step, {k: v for k, v in r.items() if not k.endswith(("seconds", "_time"))})
            for step, r in run.logger.records
        ]
        runs.append((records, [p.tolist() for p in module.parameters()], getattr(callback, "surface", None)))
    (new, weights, surface), (old, old_weights, old_surface) = runs
    assert repr(old) == repr(new)  # values that are not a number are equal, too
    assert old_weights == weights
    assert surface is None or torch.equal(old_surface.losses, surface.losses)
