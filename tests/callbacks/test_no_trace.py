"""Watching a run changes nothing in it, bit for bit; nor does a measurement that fails."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.modules import Augmented, Busy, Classifier, loader, trainer
from helpers.training import Recorder
from lightning.pytorch.callbacks import LearningRateMonitor, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_flatness import FlatnessMonitor, LossLandscape, LossSurfaceMonitor, TopEigenvalues


class ExponentialMovingAverage(pl.Callback):
    """Averages the weights beside the run."""

    average: tuple[Tensor, ...] = ()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = tuple(p.detach().clone() for p in pl_module.parameters())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for a, p in zip(self.average, pl_module.parameters(), strict=True):
            a.lerp_(p.detach(), 0.1)


def left_behind(
    path: Path, monitors: list[pl.Callback], *, num_workers: int = 0, fails: bool = False, **options: Any
) -> dict[str, Any]:
    """Train for three epochs and return everything that a measurement could have touched."""
    pl.seed_everything(7, verbose=False)
    module, average, recorder = Busy(), ExponentialMovingAverage(), Recorder()
    callbacks = [*monitors, average, StochasticWeightAveraging(0.02, 2), LearningRateMonitor("step")]
    run = trainer(path, *callbacks, logger=recorder, accumulate_grad_batches=2, **options)
    generator = torch.Generator().manual_seed(5)
    shuffled = loader(Augmented(), generator=generator, num_workers=num_workers)
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            run.fit(module, shuffled, loader(Augmented(16), shuffle=False))
    else:
        run.fit(module, shuffled, loader(Augmented(16), shuffle=False))
    logged = [(step, metrics) for step, metrics in recorder.records if not all("flatness" in k for k in metrics)]
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizer": run.optimizers[0].state_dict(),
        "gradients": [p.grad for p in module.parameters()],
        "average": average.average,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],  # noqa: NPY002
        "python": random.getstate(),
        "shuffle": generator.get_state(),
        "generator": module.generator.get_state(),
        "rng": module.rng.bit_generator.state,
        "logged": logged,
        "modes": [m.training for m in module.modules()],
        "metric": {k: getattr(module.accuracy, k) for k in module.accuracy._defaults},
        "plain": (
            module.step,
            module.history,
            list(module.recent),
            module.total,
            vars(module.meter),
            len(module.losses),
        ),
        "global_step": run.global_step,
    }


def assert_identical(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_identical(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{path}/{i}")
    else:
        assert one == other or (one != one and other != other), path


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_three_epochs_with_and_without_the_monitor_are_bit_identical(tmp_path, num_workers, mode):
    monitor = FlatnessMonitor(top_k=3, every_n_steps=2, mode=mode, probe_size=32, probe_batch_size=10)
    watched = left_behind(tmp_path, [monitor], num_workers=num_workers)
    assert monitor.metrics["lambda_max"].compute()[0] > 0
    assert_identical(watched, left_behind(tmp_path, [], num_workers=num_workers))


def test_val_split_and_every_geometry_leave_no_trace(tmp_path):
    metrics = {g: TopEigenvalues(k=2, geometry=g, which="LM") for g in ("euclidean", "layer", "filter", "element")}
    watched = left_behind(tmp_path, [FlatnessMonitor(metrics, split="val", probe_size=12)])
    assert_identical(watched, left_behind(tmp_path, []))


@pytest.mark.filterwarnings("ignore:LossSurfaceMonitor. no logger")
def test_budgets_leave_no_trace(tmp_path):
    monitor = FlatnessMonitor(budget=1.0, every_n_steps=1, probe_size=2, metrics={"lambda_max": TopEigenvalues()})
    pictures = LossSurfaceMonitor(budget=0.5, num_points=3, probe_size=8)
    watched = left_behind(tmp_path, [monitor, pictures])
    assert 2 < len(monitor.run.history) < watched["global_step"]
    assert_identical(watched, left_behind(tmp_path, []))


def test_finite_differences_leave_no_trace(tmp_path):
    watched = left_behind(tmp_path, [FlatnessMonitor(engine="finite_difference", probe_size=12)])
    assert_identical(watched, left_behind(tmp_path, []))


class FailingLoss:
    """The mean loss, until it is called for the n-th time after a number of training steps."""

    def __init__(self, num_steps: int, num_calls: int) -> None:
        self.num_steps = num_steps
        self.remaining = num_calls

    def __call__(self, module: Busy, batch: Any) -> Tensor:
        loss = module.training_step(batch, 0)["loss"]
        if module.trainer.global_step >= self.num_steps:
            self.remaining -= 1
            if self.remaining < 0:
                raise RuntimeError("on purpose")
        return loss


class Stop(pl.Callback):
    """Fails in the same place of the run as the measurement does."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= self.num_steps:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("num_steps", [0, 3, 6])
@pytest.mark.parametrize("num_calls", [0, 1])
def test_a_measurement_that_raises_puts_everything_back(tmp_path, num_steps, num_calls):
    monitor = FlatnessMonitor(
        loss_fn=FailingLoss(num_steps, num_calls), probe_size=32, probe_batch_size=8, on_error="raise"
    )
    failed = left_behind(tmp_path, [monitor], fails=True)
    assert failed["global_step"] == num_steps
    assert_identical(failed, left_behind(tmp_path, [Stop(num_steps)], fails=True))


def test_nothing_is_logged_when_a_measurement_raises(tmp_path):
    recorder = Recorder()
    monitor = FlatnessMonitor(loss_fn=FailingLoss(0, 3), probe_size=32, probe_batch_size=8, on_error="raise")
    run = trainer(tmp_path, monitor, logger=recorder)
    with pytest.raises(RuntimeError, match="on purpose"):
        run.fit(Busy(), loader())
    assert not any(key.startswith("flatness") for _, metrics in recorder.records for key in metrics)
    assert not any(key.startswith("flatness") for key in run.callback_metrics)


def test_loggers_are_back_after_a_measurement(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, FlatnessMonitor(), logger=recorder, max_epochs=1)
    run.fit(Classifier(), loader())
    assert run.loggers == [recorder]


def test_landscape_leaves_gradients_hooks_and_buffers_alone():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    calls: list[str] = []
    handles = [
        module[0].weight.register_hook(lambda g: calls.append("tensor")),
        module[2].register_full_backward_hook(lambda *args: calls.append("module")),
        module[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulate")),
    ]
    module[0].weight.grad = torch.ones(4, 3)
    buffers = {name: (b, b.clone(), b._version) for name, b in module.named_buffers()}
    landscape = LossLandscape(module, [torch.randn(8, 3)], lambda m, x: m(x).square().mean(), mode="train")
    with landscape.measurement():
        for _ in range(2):
            landscape.hvp(torch.ones(landscape.num_parameters))
    assert calls == []
    assert torch.equal(module[0].weight.grad, torch.ones(4, 3))
    for name, buffer in module.named_buffers():
        same, values, version = buffers[name]
        assert buffer is same
        assert buffer._version == version
        assert torch.equal(buffer, values)
    module(torch.randn(8, 3)).sum().backward()
    assert sorted(calls) == ["accumulate", "module", "tensor"]
    assert all(handle is not None for handle in handles)


def test_displacement_returns_the_same_storage():
    module = nn.Linear(3, 2)
    landscape = LossLandscape(module, [torch.randn(8, 3)], lambda m, x: m(x).square().mean())
    weight, pointer, version = module.weight.clone(), module.weight.data_ptr(), module.weight._version

    def fail() -> None:
        with landscape.displaced(torch.ones(landscape.num_parameters)):
            torch.testing.assert_close(landscape.module.weight, weight + 1)
            assert torch.equal(module.weight, weight)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(module.weight, weight)
    assert (module.weight.data_ptr(), module.weight._version) == (pointer, version)


def test_the_private_names_that_isolation_relies_on_still_work():
    """Fails when torch moves them: ``_backward_hooks``, ``_buffers``, ``_parameters``, ``_version``."""
    weight = nn.Parameter(torch.ones(2))
    weight.register_hook(lambda g: 2 * g)
    hooks = weight._backward_hooks
    weight._backward_hooks = None
    assert torch.equal(torch.autograd.grad(weight.sum(), weight)[0], torch.ones(2))
    weight._backward_hooks = hooks
    assert torch.equal(torch.autograd.grad(weight.sum(), weight)[0], 2 * torch.ones(2))
    norm = nn.BatchNorm1d(2)
    assert norm._buffers["running_mean"] is norm.running_mean
    assert norm._parameters["weight"] is norm.weight
    assert isinstance(norm._backward_hooks, dict)
    version = norm.running_mean._version
    norm.running_mean.add_(1)
    assert norm.running_mean._version == version + 1
