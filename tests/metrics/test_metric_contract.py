"""What every metric promises as a torchmetric, whatever it measures; see ``registry.py`` for the metrics."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks
from helpers.registry import METRICS, make_landscape
from torch import Tensor
from torchmetrics import MetricCollection

import lightning_flatness
from lightning_flatness import (
    BasisPathBalance,
    FisherTrace,
    GradientNoise,
    InvariantSharpness,
    LossLandscape,
    NoiseCurvatureRatio,
    SpectralDensity,
    TopEigenvalues,
)
from lightning_flatness.metrics import FlatnessMetric

NO_STANDARD_ERROR = (BasisPathBalance, SpectralDensity)

all_metrics = pytest.mark.parametrize("make", list(METRICS.values()), ids=list(METRICS))


def measured(make: Callable[[], FlatnessMetric]) -> FlatnessMetric:
    metric = make()
    metric.update(make_landscape())
    return metric


def states(metric: FlatnessMetric) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in metric._defaults}


def assert_same_states(a: FlatnessMetric, b: FlatnessMetric) -> None:
    torch.testing.assert_close(states(a), states(b), equal_nan=True, rtol=0, atol=0)


def test_every_public_metric_is_in_the_registry():
    public = [getattr(lightning_flatness, name) for name in lightning_flatness.__all__]
    classes = {c for c in public if inspect.isclass(c) and issubclass(c, FlatnessMetric)}
    assert classes == {type(make()) for make in METRICS.values()}


@all_metrics
def test_pickle_and_clone_keep_settings_and_values(make):
    for metric in (make(), measured(make)):
        for twin in (pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric)):
            assert_same_states(twin, metric)
            twin.update(make_landscape())
            metric_again = metric.clone()
            metric_again.update(make_landscape())
            assert_same_states(twin, metric_again)


@all_metrics
def test_state_dict_is_empty_and_the_module_is_not_kept(make):
    metric = measured(make)
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == []
    assert list(metric.children()) == []


@all_metrics
def test_forward_is_update_and_compute(make):
    landscape = make_landscape()
    metric = make()
    value = metric(landscape)
    other = measured(make)
    torch.testing.assert_close(value, other.compute(), rtol=0, atol=0)
    torch.testing.assert_close(metric.compute(), other.compute(), rtol=0, atol=0)


@all_metrics
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_values_are_the_same_without_gradients(make, context):
    with context():
        inside = measured(make)
        value = inside.compute()
    torch.testing.assert_close(value.clone(), measured(make).compute(), rtol=0, atol=0)


@all_metrics
def test_values_errors_and_costs_are_finite_tensors_without_a_graph(make):
    metric = measured(make)
    value = metric.compute()
    assert isinstance(value, Tensor)
    assert not value.requires_grad
    assert torch.isfinite(value).all()
    assert metric.error.numel() == metric.standard_error.numel() == value.numel()
    has_few_parts = metric.settings.get("num_samples") is not None
    if type(metric) not in NO_STANDARD_ERROR and metric.settings.get("operator") != "ggn" and not has_few_parts:
        assert (metric.standard_error > 0).all()
    assert torch.isfinite(metric.error).all()
    assert (metric.error >= 0).all()
    assert metric.gradient_evaluations > 0 or not evaluates_the_loss(metric)
    assert all(np.isfinite([v, e]).all() for _, v, e, _ in metric.curves("m"))
    assert metric.error_name in ("residual", "numerical_error", "first_order_gap")
    efforts = {*inspect.signature(make().__init__).parameters, "probe_size"}
    assert metric.effort in efforts or not evaluates_the_loss(metric)


@all_metrics
def test_costs_are_those_that_the_landscape_counts(make):
    landscape = make_landscape()
    metric = make()
    metric.update(landscape)
    assert float(metric.gradient_evaluations) == pytest.approx(landscape.cost.gradient_evaluations, rel=1e-5)
    of_standard_error = landscape.cost.num_products - int(metric.num_products)
    assert of_standard_error in (0, 1)  # one where forward mode is checked


@all_metrics
def test_same_value_alone_and_beside_others_in_one_measurement(make):
    landscape = make_landscape()
    with landscape.measurement():
        for other in METRICS.values():
            other().update(landscape)
        metric = make()
        metric.update(landscape)
    torch.testing.assert_close(metric.compute(), measured(make).compute(), rtol=1e-10, atol=1e-14)


@all_metrics
def test_repr_shows_every_setting_and_settings_can_be_changed(make):
    metric = make()
    for name in inspect.signature(type(metric)).parameters:
        assert f"{name}=" in repr(metric)
    assert "geometry=Filter(), which='LA'" in repr(TopEigenvalues(k=3, geometry="filter"))
    if "tol" in metric.settings:
        metric.tol = 0.5
        assert metric.settings["tol"] == 0.5
        assert "tol=0.5" in repr(metric)


@all_metrics
def test_settings_are_the_arguments_of_the_estimator(make):
    metric = make()
    assert set(metric.settings) <= set(inspect.signature(metric.estimator).parameters)


@all_metrics
def test_curves_headline_and_charts_agree(make):
    metric = measured(make)
    names = [curve.name for curve in metric.curves("m_max")]
    assert len(set(names)) == len(names)
    assert metric.headline("m_max") in (names[0], None)
    sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for keys in metric.charts("m_max", [sgd]).values():
        assert set(keys) <= {*names, "stability_edge", *metric.references("m_max", [sgd])}
        assert keys


def test_curves_of_several_eigenvalues():
    metric = measured(METRICS["TopEigenvalues(k=3)"])
    assert [curve.name for curve in metric.curves("lambda_max")] == ["lambda_max", "lambda_2", "lambda_3"]
    assert [curve.value for curve in metric.curves("sharpest")] == metric.compute().tolist()
    assert metric.charts("lambda_max", []) == {
        "lambda_max": ["lambda_max"],
        "lambda_max … lambda_3": ["lambda_max", "lambda_2", "lambda_3"],
    }


def test_the_edge_is_that_of_lambda_max_in_the_optimizers_own_geometry():
    sgd, adam = torch.optim.SGD([torch.zeros(1)], lr=0.1), torch.optim.Adam([torch.zeros(1)], lr=0.01)
    assert TopEigenvalues().stability_edge([sgd]) == pytest.approx(20)
    assert TopEigenvalues(geometry="optimizer").stability_edge([adam]) == pytest.approx(3800)
    for metric, optimizer in [
        (TopEigenvalues(), adam),
        (TopEigenvalues(geometry="optimizer"), sgd),
        (TopEigenvalues(which="SA"), sgd),
        (TopEigenvalues(operator="ggn"), sgd),
        (InvariantSharpness(), sgd),
    ]:
        assert np.isnan(metric.stability_edge([optimizer]))
        assert metric.charts("m", [optimizer]) == {"m": ["m"]}


@all_metrics
def test_reset_forgets_the_value(make):
    metric = measured(make)
    metric.reset()
    assert_same_states(metric, make())


def snapshot(landscape: LossLandscape) -> dict[str, Any]:
    module = landscape.module
    return {
        "weights": [p.clone() for p in module.parameters()],
        "pointers": [p.data_ptr() for p in module.parameters()],
        "grads": [p.grad is not None for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "rng": torch.get_rng_state(),
        "generators": [hash(random.getstate()), hash(np.random.get_state()[1].tobytes())],  # noqa: NPY002
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules()],
        "optimizer": copy.deepcopy(landscape.optimizer.state_dict()),
        "enabled": torch.is_grad_enabled(),
    }


@all_metrics
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_no_trace_after_success(make, mode):
    if mode == "train" and type(make()) in (FisherTrace, GradientNoise, NoiseCurvatureRatio):
        pytest.skip("gradients of single samples are not defined under dropout")
    landscape = make_landscape(mode=mode)
    landscape.module.train()
    before = snapshot(landscape)
    make().update(landscape)
    torch.testing.assert_close(snapshot(landscape), before, rtol=0, atol=0)


def evaluates_the_loss(metric: FlatnessMetric) -> bool:
    """Whether it is not a function of the weights alone."""
    return not isinstance(metric, lightning_flatness.BasisPathBalance)


@all_metrics
@pytest.mark.parametrize("calls", [1, 4])
def test_no_trace_and_the_old_value_after_an_exception(make, calls):
    landscape = make_landscape()
    metric = measured(make)
    if not evaluates_the_loss(metric):
        pytest.skip("nothing of the user's is called")
    old = states(metric)
    loss_fn, left = landscape.loss_fn, [calls]

    def count(outputs: Tensor, targets: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] <= 0:
            raise ArithmeticError("the user's")
        return loss_fn.loss(outputs, targets)

    landscape.loss_fn = lightning_flatness.OutputLoss(count)
    before = snapshot(landscape)

    def update() -> None:
        for _ in range(4):  # some metrics need no more than three losses
            metric.update(landscape)

    with pytest.raises(ArithmeticError, match="the user's"):
        update()
    torch.testing.assert_close(snapshot(landscape), before, rtol=0, atol=0)
    if calls == 1:
        torch.testing.assert_close(states(metric), old, equal_nan=True, rtol=0, atol=0)
    landscape.loss_fn = loss_fn
    metric = make()
    metric.update(landscape)
    torch.testing.assert_close(metric.compute(), measured(make).compute(), rtol=1e-10, atol=1e-14)


def test_a_metric_collection_keeps_all_of_them_apart():
    names = [f"m{i}" for i in range(len(METRICS))]
    collection = MetricCollection(dict(zip(names, (make() for make in METRICS.values()), strict=True)))
    for _ in range(2):
        collection.update(make_landscape())
    assert len(collection.compute_groups) == len(METRICS)
    values = collection.compute()
    for name, make in zip(names, METRICS.values(), strict=True):
        metric = make()
        for _ in range(2):
            metric.update(make_landscape())
        torch.testing.assert_close(values[name], metric.compute(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["TopEigenvalues", "TopEigenvalues(k=3)", "SpectralDensity", "GradientNoise"])
def test_plot_draws_the_latest_and_a_sequence_of_values(name):
    import matplotlib

    matplotlib.use("Agg")
    metric = measured(METRICS[name])
    figure, ax = metric.plot()
    assert figure is not None
    if name != "SpectralDensity":
        metric.plot([metric.compute(), metric.compute() * 2])
    metric.plot(ax=ax)
    matplotlib.pyplot.close("all")


@all_metrics
def test_what_is_not_a_landscape_is_refused(make):
    with pytest.raises(TypeError, match="Expected a LossLandscape, got Linear"):
        make().update(torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_two_ranks_have_the_values_of_one(tmp_path):
    for values in run_ranks("metrics", tmp_path):
        assert set(values) == set(METRICS)
        for name, make in METRICS.items():
            metric = measured(make)
            expected = [metric.compute().flatten().tolist(), metric.error.flatten().tolist()]
            np.testing.assert_allclose(values[name][0], expected[0], rtol=1e-6, atol=1e-12, err_msg=name)
            np.testing.assert_allclose(values[name][1], expected[1], rtol=1e-3, atol=1e-9, err_msg=name)
            standard_error = metric.standard_error.flatten().tolist()
            np.testing.assert_allclose(values[name][2], standard_error, rtol=1e-4, atol=1e-12, err_msg=name)
