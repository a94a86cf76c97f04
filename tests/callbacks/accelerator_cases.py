"""What has to hold on an accelerator. ``test_accelerator.py`` runs it on a pretend one and, if there is one, on a GPU.

FLATNESS_DEVICE=fakegpu python -m pytest tests/callbacks/accelerator_cases.py
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from helpers import pretend_device
from helpers.registry import METRICS, make_landscape
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_flatness
from lightning_flatness import (
    AverageCaseSharpness,
    FlatnessMonitor,
    LossLandscape,
    LossSurfaceMonitor,
    SharpnessAwareMinimization,
    TopEigenvalues,
    WorstCaseSharpness,
)
from lightning_flatness.metrics import FlatnessMetric

DEVICE = os.environ["FLATNESS_DEVICE"]
PACKAGE = os.path.dirname(lightning_flatness.__file__)

if DEVICE == pretend_device.NAME:
    pretend_device.install()
pretended = pytest.mark.skipif(DEVICE != pretend_device.NAME, reason="counts what the pretend device counts")


class OneDevice(Accelerator):
    """The accelerator of the pretend device."""

    def setup_device(self, device: torch.device) -> None: ...
    def teardown(self) -> None: ...
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(DEVICE, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE


class Net(LightningModule):
    """With a normalisation layer and dropout, so that statistics and generators live on the device."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class OnTheDevice(TensorDataset):
    """Samples that lie on the device, with noise of its generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), y


def fit(
    device: str, *callbacks: Any, dropout: float = 0.2, default: str = "cpu", on_device: bool = False
) -> tuple[Trainer, LightningModule]:
    seed_everything(3, verbose=False)
    data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    if on_device:
        data = OnTheDevice(*(t.to(device) for t in data.tensors))
    options: dict[str, Any] = {"accelerator": "cpu"}
    if device == "cuda":
        options = {"accelerator": "cuda", "devices": 1}
    elif device != "cpu":
        options = {"strategy": SingleDeviceStrategy(torch.device(device, 0), accelerator=OneDevice())}
    trainer = Trainer(
        max_epochs=2,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(tempfile.mkdtemp()) if callbacks else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with torch.device(default):
        # A shuffling loader fails by itself where the default device is not the CPU.
        trainer.fit(Net(dropout), DataLoader(data, batch_size=16, shuffle=default == "cpu"))
    return trainer, trainer.lightning_module


def weights(module: nn.Module) -> list[Tensor]:
    return [t.detach().cpu() for t in module.state_dict().values()]


@pytest.mark.parametrize("make", list(METRICS.values()), ids=list(METRICS))
def test_a_metric_says_on_the_device_what_it_says_on_the_cpu(make):
    here, there = make(), make()
    here.update(make_landscape())
    there.update(make_landscape(device=DEVICE))
    value = there.compute()
    torch.testing.assert_close(there.cpu().compute(), here.compute(), rtol=1e-6, atol=1e-9)
    assert not isinstance(value, Tensor) or value.device.type in (DEVICE, "cpu")


def test_training_with_monitors_changes_nothing():
    plain = fit(DEVICE)[1]
    trainer, watched = fit(DEVICE, FlatnessMonitor(probe_size=32), LossSurfaceMonitor(num_points=3, probe_size=32))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched), strict=True))
    assert trainer.callback_metrics["flatness/lambda_max"].isfinite()


def test_a_default_device_changes_nothing():
    plain = fit(DEVICE, default=DEVICE)[1]
    monitors = FlatnessMonitor(probe_size=32), LossSurfaceMonitor(num_points=3, probe_size=32)
    watched = fit(DEVICE, *monitors, SharpnessAwareMinimization(rho=0.0), default=DEVICE)[1]
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched), strict=True))


def test_samples_of_the_device_change_nothing(monkeypatch):
    """No forked process can read them on a GPU: they are drawn in this one."""
    plain = fit(DEVICE, on_device=True)[1]
    monkeypatch.setattr("lightning_flatness.callbacks.probe.can_fork", lambda: False)
    trainer, watched = fit(DEVICE, FlatnessMonitor(probe_size=32), on_device=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched), strict=True))
    assert trainer.callback_metrics["flatness/lambda_max"].isfinite()


def test_curves_on_the_device_are_those_on_the_cpu():
    here, there = (
        fit(device, FlatnessMonitor(probe_size=32), dropout=0.0)[0].callback_metrics for device in ("cpu", DEVICE)
    )
    for name in ("flatness/lambda_max", "flatness/invariant_sharpness"):
        torch.testing.assert_close(there[name].cpu(), here[name], rtol=1e-2, atol=0)


def test_sam_on_the_device():
    plain = fit(DEVICE)[1]
    still = fit(DEVICE, SharpnessAwareMinimization(rho=0.0))[1]
    sam = fit(DEVICE, SharpnessAwareMinimization(rho=0.05))[1]
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(still), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(plain), weights(sam), strict=True))


@pretended
def test_a_model_on_another_device_than_the_current_one():
    """Its generator is not the one that ``torch.fakegpu.get_rng_state()`` means then."""
    expected = fit(DEVICE, FlatnessMonitor(probe_size=32, mode="train"))
    pretend_device.Backend.set_device(1)
    try:
        got = fit(DEVICE, FlatnessMonitor(probe_size=32, mode="train"))
        plain, again = fit(DEVICE)[1], fit(DEVICE)[1]
    finally:
        pretend_device.Backend.set_device(0)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(got[1]), strict=True))
    a, b = (run[0].callback_metrics["flatness/lambda_max"] for run in (expected, got))
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=0)


def _convex(**options: Any) -> LossLandscape:
    generator = torch.Generator("cpu").manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)).to(DEVICE)
    x = torch.randn(64, 20, generator=generator, device="cpu").to(DEVICE)
    y = torch.randint(3, (64,), generator=generator, device="cpu").to(DEVICE)
    return LossLandscape(module, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]), **options)


@pytest.mark.parametrize("engine", ["exact", "finite_difference"])
def test_tf32_is_off_while_measuring(engine):
    torch.manual_seed(0)
    if DEVICE == pretend_device.NAME:
        torch.fakegpu.has_tf32 = False
    torch.manual_seed(0)
    metric = TopEigenvalues(tol=1e-3)
    metric.update(_convex(engine=engine))
    expected = metric.compute().cpu()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    if DEVICE == pretend_device.NAME:
        torch.fakegpu.has_tf32 = True
    try:
        torch.manual_seed(0)
        metric = TopEigenvalues(tol=1e-3)
        metric.update(_convex(engine=engine))
    finally:
        torch.set_float32_matmul_precision(before)
        if DEVICE == pretend_device.NAME:
            torch.fakegpu.has_tf32 = False
    torch.testing.assert_close(metric.compute().cpu(), expected, rtol=2e-3, atol=0)


def syncs(log: pretend_device.Log) -> str:
    return "\n".join(f"{count} {kind} {where}" for count, kind, where in log.table())


@pretended
def test_no_synchronisation_in_a_later_product():
    landscape = _convex()
    v = torch.ones(landscape.num_parameters, device=DEVICE)
    with landscape.measurement():
        landscape.hvp(v)
        with pretend_device.record(PACKAGE) as log:
            landscape.hvp(v)
    assert log.blocking == 0, syncs(log)


@pretended
def test_one_synchronisation_for_a_lanczos_product():
    def run(num_products: int) -> int:
        metric = TopEigenvalues(tol=1e-12, max_products=num_products)
        with pretend_device.record(PACKAGE) as log:
            metric.update(_convex())
        return log.blocking

    assert run(14) - run(6) == 8


def waits(metric: FlatnessMetric) -> int:
    """Return how often the host waits for a number of the device in a measurement; copies to the device aside."""
    landscape = make_landscape(device=DEVICE)
    with pretend_device.record(PACKAGE) as log:
        metric.update(landscape)
    return sum(count for count, kind, _ in log.table() if kind != "h2d")


@pretended
def test_draws_of_the_average_case_do_not_wait_for_the_device():
    assert waits(AverageCaseSharpness(num_draws=20)) == waits(AverageCaseSharpness(num_draws=10))


@pretended
def test_the_worst_case_waits_eight_times_for_a_gradient_at_most():
    few, many = WorstCaseSharpness(num_steps=4, num_restarts=1), WorstCaseSharpness(num_steps=16, num_restarts=4)
    more = waits(many) - waits(few)
    assert more <= 8 * (float(many.gradient_evaluations) - float(few.gradient_evaluations)), more


@pretended
def test_one_synchronisation_for_a_step_of_sam():
    with pretend_device.record(PACKAGE) as log:
        fit(DEVICE, SharpnessAwareMinimization(rho=0.05))  # 8 steps
    ours = sum(count for count, kind, where in log.table() if not where.startswith("elsewhere") and "async" not in kind)
    assert ours <= 8 + 5 * 2, syncs(log)  # and a few at the end of each of two epochs
