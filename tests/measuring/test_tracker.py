"""Flatness without a Trainer: the numbers of the monitor, from `measure` and in plain loops."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Augmented, Busy, Classifier, Plain, loader
from helpers.training import fit, state_of
from lightning.fabric import Fabric
from torch.nn import functional as F

from lightning_flatness import FlatnessMonitor, FlatnessReport, FlatnessTracker, TopEigenvalues, draw_probe, measure
from lightning_flatness.metrics.named import chosen


def last_point(run) -> dict[str, float]:
    return [m for _, m in run.logger.records if "flatness/lambda_max" in m][-1]


@pytest.mark.parametrize("augmented", [False, True])
def test_measured_after_the_run_equals_the_last_point_of_the_curve_within_its_residual(tmp_path, augmented):
    module, data = Classifier(), loader(Augmented() if augmented else Plain(), batch_size=5)
    run = fit(tmp_path, FlatnessMonitor(top_k=2, probe_size=24), module=module, data=(data,), max_epochs=2)
    report = measure(module, data, top_k=2, probe_size=24, optimizer=run.optimizers)
    last = last_point(run)
    for name, errors in report.errors.items():
        residual = errors["residual"] + last[f"flatness_errors/{name}_residual"]
        assert report.values[name] == pytest.approx(last[f"flatness/{name}"], abs=residual), name
    assert report.values["stability_edge"] == pytest.approx(last["flatness/stability_edge"])
    names = {name.removeprefix("flatness/") for name in last}
    assert set(report.values) == {
        "lambda_max",
        "lambda_2",
        "invariant_sharpness",
        "stability_edge",
        "edge_of_stability",
    }
    assert set(report.values) <= names


def test_other_samples_give_another_number(tmp_path):
    module, data = Classifier(), loader(batch_size=5)
    run = fit(tmp_path, FlatnessMonitor(probe_size=24, tol=1e-4), module=module, data=(data,), max_epochs=1)
    report, last = measure(module, data, probe_size=24, seed=1, tol=1e-4), last_point(run)["flatness/lambda_max"]
    assert abs(report.values["lambda_max"] - last) > report.errors["lambda_max"]["residual"]


def test_the_public_probe_is_the_monitors(tmp_path):
    data = loader(Augmented(), batch_size=5)
    monitor = FlatnessMonitor(probe_size=20)
    run = fit(tmp_path, monitor, data=(data,), max_epochs=1)
    torch.testing.assert_close(draw_probe(data, 20, seed=0), monitor.run.probe, rtol=0, atol=0)
    by_probe = measure(run.lightning_module, draw_probe(data, 20), tol=1e-5).values["lambda_max"]
    assert by_probe == pytest.approx(measure(run.lightning_module, data, probe_size=20, tol=1e-5).values["lambda_max"])


class Prepared(pl.LightningDataModule):
    num_calls = 0

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.num_calls += 1
        self.loader = loader()

    def train_dataloader(self) -> Any:
        return self.loader


def test_a_datamodule_is_set_up_if_no_run_has(tmp_path):
    module, data = Classifier(), Prepared()
    assert measure(module, data).values == measure(module, loader()).values
    data = Prepared()
    fit(tmp_path, module=module, data=(data,), max_epochs=1)
    measure(module, data)
    assert data.num_calls == 1


def test_data_without_a_length_gives_its_first_samples():
    stream = (torch.full((4, 1), float(i)) for i in range(100))
    assert [batch[:, 0].tolist() for batch in draw_probe(stream, 6)] == [[0.0] * 4, [1.0] * 2]


def test_measuring_leaves_a_busy_module_as_it_is():
    module = Busy()
    before, rng = state_of(module), torch.get_rng_state()
    report = measure(module, loader(), metrics="all", probe_size=16)
    assert "hessian_trace" in report.values
    for name, value in state_of(module).items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), rng)
    assert (module.step, module.meter.count, module.losses) == (0, 0, [])


def test_tracker_in_a_plain_loop_logs_what_the_monitor_logs(tmp_path):
    """The same weights, samples and steps: every value within the residuals, the warm start included."""
    torch.manual_seed(0)
    module = Classifier()
    run = fit(tmp_path, FlatnessMonitor(), module=module, data=(loader(shuffle=False),), max_epochs=3)
    expected = {step: m for step, m in run.logger.records if "flatness/lambda_max" in m}

    torch.manual_seed(0)
    module = Classifier()
    optimizer = module.configure_optimizers()
    logged: dict[int, dict[str, float]] = {}
    tracker = FlatnessTracker(
        module,
        loader(shuffle=False),
        loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        optimizer=optimizer,
        log=lambda values, step: logged.update({step: values}),
    )
    tracker.measure(step=0)
    for epoch in range(3):
        for x, y in loader(shuffle=False):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        tracker.measure(step=5 * (epoch + 1))
    assert list(logged) == list(expected) == [0, 5, 10, 15]
    for step, values in logged.items():
        assert set(values) == set(expected[step]) - {"flatness_cost/share_of_epoch_time"}
        for name in ("lambda_max", "invariant_sharpness"):
            assert values[f"flatness/{name}"] == pytest.approx(expected[step][f"flatness/{name}"], rel=1e-5)
    assert logged[15]["flatness_cost/gradient_evaluations"] == expected[15]["flatness_cost/gradient_evaluations"]


def test_adaptive_optimizers_have_their_sharpness_and_edge():
    module = Classifier()
    optimizer = torch.optim.Adam(module.parameters())
    tracker = FlatnessTracker(module, loader(), optimizer=optimizer)
    assert "preconditioned_sharpness" not in tracker.measure().values  # before the first step
    x, y = next(iter(loader()))
    F.cross_entropy(module(x), y).backward()
    optimizer.step()
    assert {"preconditioned_sharpness", "edge_of_stability"} <= set(tracker.measure().values)


def test_metrics_by_name_and_geometry():
    module = Classifier()
    values = measure(module, loader(), "lambda_max,top_eigenvalues", geometry="layer", tol=1e-5).values
    metric = TopEigenvalues(geometry="layer", tol=1e-5)
    assert values["lambda_max_layer"] == pytest.approx(measure(module, loader(), {"mine": metric}).values["mine"])
    assert set(values) == {"lambda_max_layer", "top_eigenvalues_layer"}
    with pytest.raises(ValueError, match=r"got 'lamda_max'\. Did you mean 'lambda_max'"):
        measure(module, loader(), "lamda_max")


def test_in_a_preset_metrics_with_a_geometry_of_their_own_keep_it():
    optimizer = torch.optim.Adam([torch.ones(1, requires_grad=True)])
    assert list(chosen(geometry="layer")) == ["lambda_max_layer", "invariant_sharpness"]
    names = set(chosen("all", geometry="layer", optimizers=[optimizer]))
    assert {"hessian_trace_layer", "adaptive_sharpness", "psi_sharpness", "preconditioned_sharpness"} <= names
    assert list(chosen("adaptive_sharpness,psi_sharpness", geometry="path_norm"))[1] == "psi_sharpness_path_norm"
    with pytest.raises(ValueError, match="Expected `geometry` to be 'path' or 'path_norm', got"):
        chosen("psi_sharpness", geometry="layer")


def test_a_report_shows_itself(tmp_path):
    report = measure(Classifier(), loader(), top_k=2)
    assert isinstance(report, FlatnessReport)
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["name", "value"]
    assert lines[1].split()[1] == f"{report.values['lambda_max']:.4g}"
    assert "40 samples" in lines[-1]
    html = report._repr_html_()
    assert html.count("<tr>") == 1 + len(report.values)
    assert "<td>lambda_max</td>" in html
    report.figure().savefig(tmp_path / "report.png")
    pandas = pytest.importorskip("pandas", reason="`to_pandas` needs pandas")
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["lambda_max", "value"] == report.values["lambda_max"]


def test_to_pandas_says_what_is_missing():
    code = "import sys; sys.modules['pandas'] = None\n" + inspect.getsource(missing_pandas) + "missing_pandas()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install pandas" in done.stdout, done.stderr


def missing_pandas() -> None:
    from lightning_flatness.measuring.report import data_frame

    try:
        data_frame([])
    except ModuleNotFoundError as error:
        print(error)


@pytest.mark.parametrize("function", [measure, FlatnessTracker])
def test_defaults_are_the_monitors(function):
    monitor = inspect.signature(FlatnessMonitor).parameters
    own = inspect.signature(function).parameters
    for name in ("top_k", "probe_size", "probe_batch_size", "mode", "tol", "engine", "seed"):
        assert own[name].default == monitor[name].default, name


def test_named_parameters_are_measured_whether_they_are_trained_or_not():
    module = Classifier()
    expected = measure(module, loader(), "lambda_max", parameters="net.0.*").values
    module.net[0].requires_grad_(False)
    assert measure(module, loader(), "lambda_max", parameters="net.0.*").values == expected
    assert measure(module, loader(), "lambda_max").values != expected
    assert not module.net[0].weight.requires_grad


def test_a_lightning_module_under_fabric_is_measured():
    fabric = Fabric(accelerator="cpu")
    module = Classifier()
    fabric.setup(module, module.configure_optimizers())
    expected = measure(Classifier(), loader()).values.keys()
    assert measure(module, loader()).values.keys() == expected
