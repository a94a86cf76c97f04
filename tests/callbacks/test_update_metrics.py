"""Critical and directional sharpness in the monitor: the update is the run's own, and the run stays as it is."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Busy, Classifier, loader
from helpers.training import everything, fit
from torch import Tensor
from torch.nn import functional as F

from lightning_flatness import (
    CriticalSharpness,
    DirectionalSharpness,
    FlatnessMonitor,
    SharpnessAwareMinimization,
)
from lightning_flatness.metrics import FlatnessMetric


def flat(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Steps(pl.Callback):
    """Keeps the weights before and after every step that changes them, and its learning rate: a plain reference."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, Tensor, float]] = {}
        self.before: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = flat(pl_module) if self.before is None else self.before
        self.lr = max(group["lr"] for each in trainer.optimizers for group in each.param_groups)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not torch.equal(self.before, flat(pl_module)):
            self.found[trainer.global_step] = self.before, flat(pl_module), self.lr
            self.before = None


def monitor(**options: Any) -> FlatnessMonitor:
    metrics: dict[str, FlatnessMetric] = {"critical": CriticalSharpness(), "directional": DirectionalSharpness()}
    return FlatnessMonitor(metrics, probe_size=24, on_error="raise", **options)


def check(found: FlatnessMonitor, steps: Steps, module: Any) -> list[int]:
    """Compare each measurement with the dense quotient at the weights before the step; return the steps measured."""
    shapes = [p.shape for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    batches = found.run.probe
    x, y = (torch.cat([batch[i] for batch in batches]).double() for i in (0, 1))

    def loss(w: Tensor) -> Tensor:
        pieces = w.split([s.numel() for s in shapes])
        weights = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module, weights, (x,)), y.long())

    for step, measured in found.run.history:
        if not measured.values:
            continue
        before, after, lr = steps.found[step]
        u, here = (before - after).double() / lr, before.double()
        bend = u @ torch.autograd.functional.hessian(loss, here) @ u
        slope = torch.func.grad(loss)(here) @ u
        assert measured.values["directional_curvature"] == pytest.approx(float(bend / (u @ u)), rel=1e-3)
        assert measured.values["critical_edge"] == pytest.approx(2 / lr)
        if slope <= 0:
            assert math.isnan(measured.values["directional"])
            continue
        assert measured.values["directional"] == pytest.approx(float(bend / slope), rel=1e-3)
        value, error = measured.values["critical"], measured.errors["critical"]["numerical_error"]
        for sign, end in [(1, value - 1.1 * error), (-1, value + 1.1 * error)]:  # beyond both ends of the bracket
            assert sign * (loss(here - 2 / end * u) - loss(here)) > 0
    return [step for step, measured in found.run.history if measured.values]


def adamw(module: Classifier) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


@pytest.mark.parametrize(
    ("options", "others", "expected"),
    [
        ({}, [], [5, 10]),
        ({"accumulate_grad_batches": 2}, [], [3, 6]),
        ({}, [SharpnessAwareMinimization(rho=0.1)], [5, 10]),
        ({"gradient_clip_val": 0.1, "max_steps": 8}, [], [5, 8]),
        ({"limit_train_batches": 3}, [], [3, 6]),
    ],
)
def test_the_update_is_that_of_the_step_before_the_measurement(tmp_path, monkeypatch, options, others, expected):
    monkeypatch.setattr(Classifier, "configure_optimizers", adamw)
    torch.manual_seed(0)
    module, steps, found = Classifier(), Steps(), monitor()
    fit(tmp_path, found, *others, steps, module=module, max_epochs=2, **options)
    assert check(found, steps, module) == expected  # and none before the first step


def test_after_every_second_step(tmp_path):
    torch.manual_seed(0)
    module, steps, found = Classifier(), Steps(), monitor(every_n_epochs=None, every_n_steps=2)
    fit(tmp_path, found, steps, module=module, max_epochs=2)
    assert check(found, steps, module) == [2, 4, 6, 8, 10]


class Manual(Classifier):
    """Two optimizers, two steps in a batch, one of them without Lightning's knowledge."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        for optimizer in (first, second.optimizer):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = self.net[0], self.net[2]
        return [torch.optim.SGD(layer.parameters(), lr=lr) for layer, lr in zip(layers, (0.05, 0.2), strict=True)]


def test_of_manual_optimization_it_is_what_the_batch_has_done(tmp_path):
    torch.manual_seed(0)
    module, steps = Manual(), Steps()
    found = monitor(loss_fn=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]))
    fit(tmp_path, found, steps, module=module, max_epochs=2)
    assert check(found, steps, module) == [5, 10]


class Skipping(Classifier):
    """Leaves out the last step of every epoch, as a loss scaler does after an overflow."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx == 4:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def test_a_step_that_was_skipped_is_left_out_without_a_warning(tmp_path):
    found = monitor()
    fit(tmp_path, found, module=Skipping(), max_epochs=2)
    assert all(not measured.values for _, measured in found.run.history)


@pytest.mark.parametrize(("lr", "name"), [(math.inf, "critical"), (1e30, "directional")])
def test_of_a_run_that_diverges_it_is_not_a_number(tmp_path, monkeypatch, lr, name):
    def bare(module: Classifier) -> Any:
        module.net[2].bias.requires_grad_(False)
        return torch.optim.SGD(module.parameters(), lr=lr)

    monkeypatch.setattr(Classifier, "configure_optimizers", bare)
    found = monitor()
    found.on_error = "warn"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, found, max_epochs=1, limit_train_batches=1)
    assert not any("failed" in str(w.message) for w in caught)
    assert math.isnan(found.run.history[-1][1].values[name])


@pytest.mark.parametrize("others", [[], [SharpnessAwareMinimization(rho=0.1)]], ids=["plain", "sam"])
def test_the_run_is_the_same_bit_for_bit(tmp_path, others):
    left = []
    for callbacks in ([], [monitor(every_n_steps=3)]):
        pl.seed_everything(0, verbose=False)
        module = Busy()
        run = fit(tmp_path, *callbacks, *others, module=module, max_epochs=2)
        state = everything(module, run)
        state["metrics"] = {k: v for k, v in state["metrics"].items() if not k.startswith("flatness")}
        left.append(state)
    torch.testing.assert_close(left[1], left[0], rtol=0, atol=0)


def test_weights_are_copied_only_where_a_measurement_may_follow(tmp_path, monkeypatch):
    from lightning_flatness.landscape import OptimizerStep

    copies: list[int] = []
    begin = OptimizerStep.begin
    monkeypatch.setattr(OptimizerStep, "begin", lambda self: (copies.append(1), begin(self))[1])
    found = monitor(every_n_epochs=2)
    fit(tmp_path, found, max_epochs=4)
    assert len(copies) == 2
    assert found.run.step.update is None
    fit(tmp_path, FlatnessMonitor(probe_size=8), max_epochs=1)
    assert len(copies) == 2


def test_a_resumed_run_measures_what_the_uninterrupted_one_does(tmp_path):
    def run(epochs: int, **options: Any) -> Any:
        torch.manual_seed(0)
        found = FlatnessMonitor({"critical": CriticalSharpness()}, probe_size=20, budget=1.0, on_error="raise")
        whole_batches = (loader(batch_size=40, shuffle=False),)
        return fit(tmp_path, found, max_epochs=epochs, data=whole_batches, **options), found.run.history

    whole = dict(run(10)[1])
    half = run(5)[0]
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = run(10, ckpt_path=tmp_path / "half.ckpt")[1]
    assert len(second) >= 2
    for step, measured in second:
        assert measured.values == whole[step].values
        assert measured.costs["gradient_evaluations"] == whole[step].costs["gradient_evaluations"]
