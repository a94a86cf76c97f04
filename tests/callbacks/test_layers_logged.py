"""Values of layers in a run: their curves, in the log and in comparisons, and adapters beside frozen weights."""

from __future__ import annotations

import pytest
import torch
from helpers.modules import Adapted, Plain, loader
from helpers.registry import make_landscape
from helpers.training import fit, fit_with_tensorboard
from torch import Tensor
from torch.nn import functional as F

from lightning_flatness import FlatnessMonitor, HessianTrace, OutputLoss, TopEigenvalues, compare_runs
from lightning_flatness.compare.reading import read_runs
from lightning_flatness.compare.tags import error_of
from lightning_flatness.metrics.measurement import measure_metrics

LAYERS = ("net.0", "net.2")


def test_a_curve_per_layer_that_compare_reads_with_its_error(tmp_path):
    metrics = {"lambda_max": TopEigenvalues(per_layer=True), "trace": HessianTrace(tol=1.0, per_layer=True)}
    monitor = FlatnessMonitor(metrics=metrics)
    run = fit_with_tensorboard(tmp_path / "runs", monitor, max_epochs=2)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    for name, metric in metrics.items():
        assert metric.layers == LAYERS
        values, errors = metric.compute().tolist(), metric.standard_error.tolist()
        for curve, value, error in zip([name, *(f"{name}/{layer}" for layer in LAYERS)], values, errors, strict=True):
            assert logged[f"flatness/{curve}"] == pytest.approx(value)
            assert logged[f"flatness_errors/{curve}_standard_error"] == pytest.approx(error)
            assert f"flatness_errors/{curve}_{metric.error_name}" in logged
    summary = monitor.summary()
    assert "  trace: " in summary
    assert "net.0" not in summary
    compared = compare_runs([tmp_path / "runs"])
    assert "flatness/trace" in compared.metrics
    assert not any("net." in tag for tag in compared.metrics)  # a network may have hundreds
    asked = compare_runs([tmp_path / "runs"], metrics=["trace/*"])
    assert list(asked.metrics) == [f"flatness/trace/{layer}" for layer in LAYERS]
    (layers_run,), _ = read_runs([tmp_path / "runs"])
    for tag, kind in [("flatness/trace/net.0", "standard_error"), ("flatness/lambda_max/net.2", "residual")]:
        error = error_of(layers_run, tag, kind)
        assert error is not None
        expected = logged[f"{tag.replace('flatness/', 'flatness_errors/')}_{kind}"]
        assert error.values[-1] == pytest.approx(expected, rel=1e-6)


def test_a_diverged_run_has_not_a_number_for_every_layer_and_one_that_has_not_converged_names_the_worst():
    metrics = {"lambda_max": TopEigenvalues(per_layer=True, tol=1e-9, max_products=2)}
    landscape = make_landscape()
    measured = measure_metrics(metrics, landscape)
    names = list(measured.values)
    assert "did not converge" in measured.remarks["lambda_max"]
    assert measured.remarks["lambda_max"].count("lambda_max/") == 2  # its value and its residual
    landscape.loss_fn = OutputLoss(lambda outputs, targets: F.cross_entropy(outputs, targets) * torch.inf)
    diverged = measure_metrics(metrics, landscape, allow_non_finite=True)
    assert list(diverged.values) == names
    assert all(value != value for value in diverged.values.values())


def test_sharpness_in_the_space_of_the_adapters_and_in_the_full_one_in_one_run(tmp_path):
    torch.manual_seed(0)
    module = Adapted().double()
    data = Plain()
    data.x = data.x.double()
    adapters = FlatnessMonitor(metrics={"lambda_max": TopEigenvalues(tol=1e-6, per_layer=True)})
    full = FlatnessMonitor(
        metrics={"lambda_max": TopEigenvalues(tol=1e-6)}, parameters="*", log_key_prefix="full_flatness/"
    )
    run = fit(tmp_path, adapters, full, module=module, data=(loader(data),), max_epochs=2)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}

    values = {name: p.detach() for name, p in module.named_parameters()}

    def dense(*names: str) -> Tensor:
        def loss(w: Tensor) -> Tensor:
            pieces = w.split([values[name].numel() for name in names])
            chosen = {name: piece.view_as(values[name]) for name, piece in zip(names, pieces, strict=True)}
            return F.cross_entropy(torch.func.functional_call(module, values | chosen, (data.x,)), data.y)

        hessian = torch.autograd.functional.hessian(loss, torch.cat([values[name].flatten() for name in names]))
        return torch.linalg.eigvalsh(hessian)[-1]

    expected = {
        "flatness/lambda_max": dense("down.weight", "up.weight"),
        "flatness/lambda_max/down": dense("down.weight"),
        "flatness/lambda_max/up": dense("up.weight"),
        "full_flatness/lambda_max": dense(*values),
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-6), name
    assert logged["flatness/lambda_max"] < logged["full_flatness/lambda_max"]
