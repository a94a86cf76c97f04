"""PSISharpness and BasisPathBalance: their numbers, alone, in a collection and in the monitor."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.chains import chains, example_chain, landscape_of
from helpers.modules import Augmented
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from lightning_flatness import (
    BasisPathBalance,
    FlatnessMonitor,
    InvariantSharpness,
    LossLandscape,
    PSISharpness,
    TopEigenvalues,
    WorstCaseSharpness,
)
from lightning_flatness.estimators import UndefinedMeasureError
from lightning_flatness.estimators.balance import balance

property_test = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def measured(metric, landscape: LossLandscape) -> Tensor:
    metric.update(landscape)
    return metric.compute()


@property_test
@given(chains(max_units=4), st.integers(0, 2**16))
def test_psi_sharpness_is_the_dense_spectral_norm_and_does_not_change_when_units_are_rescaled(chain, seed):
    exact = torch.linalg.eigvalsh(chain.dense_hessian()).abs().max()
    assume(float(exact) > 1e-6)
    torch.testing.assert_close(
        measured(PSISharpness(geometry="path", tol=1e-9), landscape_of(chain)), exact, rtol=1e-8, atol=0
    )
    chain.rescale_units(torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        measured(PSISharpness(geometry="path", tol=1e-9), landscape_of(chain)), exact, rtol=1e-8, atol=0
    )


def test_psi_sharpness_is_a_modulus_with_its_residual():
    chain = example_chain()
    metric = PSISharpness(geometry="path", tol=1e-6)
    value = measured(metric, landscape_of(chain))
    most_negative = measured(TopEigenvalues(geometry="path", which="LM", tol=1e-6), landscape_of(chain))
    torch.testing.assert_close(value, most_negative.abs(), rtol=1e-9, atol=0)
    assert value.shape == metric.error.shape == ()
    assert 0 <= metric.error <= 1e-6 * value
    assert metric.converged
    assert metric.num_products > 0


@property_test
@given(chains(), st.integers(0, 2**16))
def test_balance_is_largest_over_smallest_path_and_does_not_change_when_units_are_rescaled(chain, seed):
    moduli = chain.reference_values().abs()
    expected = moduli.max() / moduli.min()
    torch.testing.assert_close(measured(BasisPathBalance(), landscape_of(chain)), expected, rtol=1e-12, atol=0)
    chain.rescale_units(torch.Generator().manual_seed(seed))
    torch.testing.assert_close(measured(BasisPathBalance(), landscape_of(chain)), expected, rtol=1e-11, atol=0)
    logarithm = measured(BasisPathBalance(log10=True), landscape_of(chain))
    torch.testing.assert_close(logarithm, expected.log10(), rtol=1e-11, atol=1e-12)


def test_a_bias_of_zero_makes_the_balance_infinite_unless_zeros_are_ignored():
    chain = example_chain()
    nn.init.zeros_(chain.module[0].bias)
    landscape = landscape_of(chain)
    assert measured(BasisPathBalance(), landscape) == math.inf
    assert measured(BasisPathBalance(log10=True), landscape) == math.inf
    moduli = chain.reference_values().abs()
    expected = moduli.max() / moduli[moduli > 0].min()
    torch.testing.assert_close(measured(BasisPathBalance(ignore_zeros=True), landscape), expected, rtol=1e-12, atol=0)
    assert balance(torch.tensor([3e38, 1e-38])) > 1e75  # beyond float32


@property_test
@given(chains(), st.integers(0, 2**16))
def test_numbers_do_not_change_when_units_are_permuted(chain, seed):
    """They moved over seven decades with the first skeleton."""
    exact = torch.linalg.eigvalsh(chain.dense_hessian()).abs().max()
    assume(float(exact) > 1e-6)
    metrics = [lambda: PSISharpness(geometry="path", tol=1e-10), lambda: PSISharpness(tol=1e-10)]
    metrics += [BasisPathBalance, lambda: BasisPathBalance(quantile=0.1)]
    before = [measured(metric(), landscape_of(chain)) for metric in metrics]
    generator = torch.Generator().manual_seed(seed)
    chain.permute_units(generator)
    chain.rescale_units(generator, decades=1.0)
    for metric, value in zip(metrics, before, strict=True):
        torch.testing.assert_close(measured(metric(), landscape_of(chain)), value, rtol=1e-9, atol=1e-12)


def test_quantiles_of_the_balance():
    values = torch.tensor([1e-9, 1.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0, 8.0, 1e9])
    assert balance(values) == pytest.approx(1e18, rel=1e-6)
    assert balance(values, quantile=0.1) == 8
    assert balance(values, quantile=0.25) == 7 / 2


def test_where_the_network_is_not_homogeneous_presets_leave_it_out():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    landscape = LossLandscape(net, [torch.randn(5, 3)], lambda m, x: m(x).square().mean())
    for geometry in ("path", "path_norm"):
        with pytest.raises(UndefinedMeasureError, match=r"Tanh \('1'\)"):
            PSISharpness(geometry=geometry).update(landscape)


def test_worst_case_in_a_ball_of_paths_does_not_change_when_units_are_rescaled():
    chain = example_chain()
    radius = landscape_of(chain).chart("path").radius
    value = measured(WorstCaseSharpness(rho=0.3 * radius, geometry="path"), landscape_of(chain))
    chart, at = landscape_of(chain).chart("path"), landscape_of(chain)
    loss, generator = float(at.loss()), torch.Generator().manual_seed(0)
    for _ in range(50):
        z = torch.randn(chart.num_coordinates, generator=generator, dtype=torch.float64)
        with at.displaced(chart.displacement(0.3 * radius * z / z.norm())):
            assert float(at.loss()) - loss <= float(value)
    chain.rescale_units(torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        measured(WorstCaseSharpness(rho=0.3 * radius, geometry="path"), landscape_of(chain)), value, rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="Expected a `rho` whose ball stays within"):  # the chart ends there
        measured(WorstCaseSharpness(rho=2 * radius, geometry="path"), landscape_of(chain))


@pytest.mark.parametrize("graph_memory", [2**30, 0])
def test_one_gradient_serves_all_products_of_a_measurement(graph_memory):
    chain = example_chain()
    options = {"graph_memory": graph_memory, "num_total": 1}  # all samples are seen: no standard error to measure
    landscape = LossLandscape(chain.module, chain.batches, chain.loss, **options)
    metric = PSISharpness(geometry="path")
    metric.update(landscape)
    assert metric.num_products > 2
    # The gradient to start from leaves its graph to the products; where graphs are not kept each one builds its own.
    expected = 1 if graph_memory else 1 + int(metric.num_products)
    beside_products = landscape.cost.gradient_evaluations - 2 * landscape.cost.num_products
    assert beside_products == pytest.approx(expected)


def test_in_a_collection_each_metric_keeps_its_own_value():
    chain = example_chain()
    collection = MetricCollection(
        {
            "psi": PSISharpness(geometry="path"),
            "invariant": InvariantSharpness(),
            "balance": BasisPathBalance(),
            "log10": BasisPathBalance(log10=True),
        }
    )
    for _ in range(2):
        collection.update(landscape_of(chain))
    values = collection.compute()
    torch.testing.assert_close(values["log10"], values["balance"].log10(), rtol=1e-12, atol=0)
    assert len({float(v) for v in values.values()}) == 4


def test_in_a_collection_metrics_of_equal_values_stay_apart():
    chain = example_chain()
    collection = MetricCollection({"all": BasisPathBalance(), "without": BasisPathBalance(ignore_zeros=True)})
    collection.update(landscape_of(chain))  # no zeros: the same value
    nn.init.zeros_(chain.module[0].bias)
    collection.update(landscape_of(chain))
    values = collection.compute()
    assert values["all"] == math.inf
    assert values["without"] < math.inf


@pytest.mark.parametrize(
    "metric", [PSISharpness(geometry="path"), BasisPathBalance(), BasisPathBalance(log10=True)], ids=repr
)
def test_contract_of_metrics(metric):
    chain = example_chain()
    before = copy.deepcopy(chain.module.state_dict())
    landscape = landscape_of(chain)
    assert metric.state_dict() == {}
    with torch.no_grad():
        value = measured(metric, landscape)
    with torch.inference_mode():
        torch.testing.assert_close(measured(metric.clone(), landscape), value, rtol=1e-3, atol=0)
    other = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(other.compute(), value, rtol=0, atol=0)
    other.reset()
    torch.testing.assert_close(other(landscape), value, rtol=1e-3, atol=0)  # forward is update and compute
    assert not any(isinstance(m, nn.Sequential) for m in metric.modules())  # does not keep the module
    for name, tensor in chain.module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_module_that_is_no_chain_is_an_error_and_leaves_no_trace():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    landscape = LossLandscape(module, [torch.randn(5, 3)], lambda m, x: m(x).square().mean())
    before = copy.deepcopy(module.state_dict())
    for metric in (PSISharpness(geometry="path"), BasisPathBalance()):
        with pytest.raises(ValueError, match=r"got BatchNorm1d \('1'\).*'element'"):
            metric.update(landscape)
    assert all(m.training for m in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


THREE: Any = 3


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: PSISharpness(submodule=THREE),
            TypeError,
            "Expected `submodule` to be the name of a submodule, got int",
        ),
        (lambda: BasisPathBalance(submodule=THREE), TypeError, "Expected `submodule` to be the name of a submodule"),
        (lambda: PSISharpness(tol=-1.0), ValueError, "Expected `tol` to be >= 0, got -1.0"),
        (lambda: PSISharpness(geometry=THREE), ValueError, "Expected `geometry` to be 'path' or 'path_norm', got 3"),
        (
            lambda: PSISharpness("net", geometry="path_norm"),
            ValueError,
            "Expected `submodule` for the geometry 'path' only, got 'net'",
        ),
        (lambda: BasisPathBalance(quantile=0.5), ValueError, "Expected `quantile` to be >= 0 and < 0.5, got 0.5"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


class Chain(pl.LightningModule):
    """The chain is a submodule; a frozen teacher stands beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.teacher = nn.Linear(6, 3).requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y) + 0.1 * F.mse_loss(self.net(x), self.teacher(x))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_the_monitor_with_their_keys():
    pl.seed_everything(0, verbose=False)
    module = Chain()
    metrics = {
        "psi_sharpness": PSISharpness(submodule="net"),
        "balance": BasisPathBalance(submodule="net"),
        "log10_balance": BasisPathBalance(submodule="net", log10=True),
    }
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FlatnessMonitor(metrics=metrics, probe_size=32)],
    )
    trainer.fit(module, DataLoader(Augmented(), batch_size=16))
    logged = trainer.callback_metrics
    for key in ("psi_sharpness", "balance", "log10_balance"):
        assert torch.isfinite(logged[f"flatness/{key}"])
    assert math.log10(float(logged["flatness/balance"])) == pytest.approx(
        float(logged["flatness/log10_balance"]), rel=1e-5
    )
    assert float(logged["flatness_errors/balance_residual"]) == 0
