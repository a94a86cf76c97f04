"""Presets of metrics in the monitor, the right edge for each optimizer, and what TensorBoard shows beside curves."""

from __future__ import annotations

import re
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Classifier, loader, loaders, trainer
from helpers.training import Recorder, fit
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import FlatnessMonitor, MinimumSharpness, SpectralDensity, TopEigenvalues
from lightning_flatness.callbacks.loggers.tensorboard import custom_scalars_layout, pixels
from lightning_flatness.estimators import UndefinedMeasureError
from lightning_flatness.metrics import preset_metrics


class Relu(Classifier):
    """A ReLU chain, for which every measure is defined, and an optimizer of choice."""

    def __init__(self, make: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.make = make or (lambda p: torch.optim.SGD(p, lr=0.1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def records(recorder: Recorder) -> list[dict[str, float]]:
    return [m for _, m in recorder.records if any(k.startswith("flatness/") for k in m)]


@pytest.mark.filterwarnings("ignore:FlatnessMonitor. .* did not converge")
def test_all_logs_every_measure_with_its_error(tmp_path):
    recorder = fit(tmp_path, FlatnessMonitor("all", top_k=2), module=Relu(), data=loaders(), max_epochs=1).logger
    for i, logged in enumerate(records(recorder)):
        for name, metric in preset_metrics("all", top_k=2).items():
            if metric.follows_update and i == 0:  # before the first step
                assert f"flatness/{name}" not in logged
            elif name == "spectral_density":
                for suffix in ("negative_share", "mean", "mean_square"):
                    assert f"flatness/{name}_{suffix}" in logged
                    assert f"flatness_errors/{name}_{suffix}_{metric.error_name}" in logged
                assert f"flatness/{name}" not in logged
            else:
                assert f"flatness/{name}" in logged
                assert f"flatness_errors/{name}_{metric.error_name}" in logged
        assert logged["flatness/lambda_max"] >= logged["flatness/lambda_2"] > logged["flatness/lambda_min"]


@pytest.mark.filterwarnings("ignore:FlatnessMonitor. .* did not converge")
def test_all_leaves_out_what_is_not_defined_and_says_so_once(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(tmp_path, FlatnessMonitor("all"), module=Classifier(), data=loaders(), max_epochs=2)  # tanh
    recorder = run.logger
    messages = [str(w.message) for w in caught if "is left out" in str(w.message)]
    assert len(messages) == 2
    assert "'flatness/minimum_sharpness' is left out. Expected a chain of linear layers" in messages[0]
    assert "'flatness/psi_sharpness' is left out. Expected a network of positively homogeneous units" in messages[1]
    for name in ("minimum_sharpness", "psi_sharpness"):
        assert all(f"flatness/{name}" not in logged for logged in records(recorder))


def test_what_was_asked_for_by_name_is_not_left_out(tmp_path):
    monitor = FlatnessMonitor({"minimum_sharpness": MinimumSharpness()}, on_error="raise")
    with pytest.raises(UndefinedMeasureError, match="Expected a chain of linear layers"):
        fit(tmp_path, monitor, data=loaders(), max_epochs=1)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"Expected `metrics` to be 'default', 'all' or a dict .* got 'everything'"):
        FlatnessMonitor("everything")
    assert list(FlatnessMonitor("default").metrics) == list(FlatnessMonitor().metrics)


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), 20.0, "lambda_max"),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 38.0, "lambda_max"),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), 3.8 / 0.28, "lambda_max"),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), 3800.0, "preconditioned_sharpness"),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.99)), 1800.0 - 0.09, "preconditioned_sharpness"),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_edge_of_stability_is_that_of_the_optimizer(tmp_path, name):
    make, edge, sharpness = OPTIMIZERS[name]
    run = fit(tmp_path, FlatnessMonitor(), module=Relu(make), data=loaders(), max_epochs=1)
    recorder = run.logger
    last = records(recorder)[-1]
    assert last["flatness/stability_edge"] == pytest.approx(edge)
    assert last["flatness/edge_of_stability"] == pytest.approx(last[f"flatness/{sharpness}"] / edge)
    assert "flatness/edge_of_stability" in run.callback_metrics
    first = records(recorder)[0]
    assert ("flatness/edge_of_stability" in first) == (sharpness == "lambda_max")  # Adam has no state before training


def test_preconditioned_sharpness_in_the_monitor_is_that_of_the_running_optimizer(tmp_path):
    class Check(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            (optimizer,) = trainer.optimizers
            scales = []
            for p in pl_module.parameters():
                state = optimizer.state[p]
                hat = state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))
                scales.append((hat.sqrt() + 1e-8).rsqrt().flatten())
            self.scale = torch.cat(scales)
            data = loader(shuffle=False, batch_size=1000)
            x, y = next(iter(data))
            flat = torch.cat([p.detach().double().flatten() for p in pl_module.parameters()])

            def loss(w: Tensor) -> Tensor:
                a, b, c, d = w.split([48, 8, 24, 3])
                return F.cross_entropy(F.linear(torch.relu(F.linear(x.double(), a.view(8, 6), b)), c.view(3, 8), d), y)

            hessian = torch.autograd.functional.hessian(loss, flat)
            self.dense = float(torch.linalg.eigvalsh(self.scale[:, None] * hessian * self.scale)[-1])

    check, recorder = Check(), Recorder()
    metrics = {"sharpness": TopEigenvalues(geometry="optimizer", tol=1e-5)}
    run = trainer(tmp_path, FlatnessMonitor(metrics, probe_size=1000), check, logger=recorder, max_epochs=1)
    run.fit(Relu(lambda p: torch.optim.Adam(p, lr=0.01)), *loaders())
    assert records(recorder)[-1]["flatness/sharpness"] == pytest.approx(check.dense, rel=1e-3)


def test_an_optimizer_without_a_known_edge_gets_none(tmp_path):
    module = Relu(lambda p: torch.optim.NAdam(p, lr=0.01))
    recorder = fit(tmp_path, FlatnessMonitor(), module=module, data=loaders(), max_epochs=1).logger
    assert all("flatness/edge_of_stability" not in m and "flatness/stability_edge" not in m for m in records(recorder))


# ----------------------------------------------------------------------------------------------------- pictures


def test_density_is_an_image_each_time_it_is_measured(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    monitor = FlatnessMonitor({"density": SpectralDensity(num_runs=2, num_steps=4)})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FlatnessMonitor: .* did not converge")
        fit(tmp_path, monitor, module=Relu(), data=loaders(), logger=logger, max_epochs=2)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    images = events.Images("flatness/density")
    assert [image.step for image in images] == [0, 5, 10]
    assert images[0].width > 300
    assert images[0].encoded_image_string != images[-1].encoded_image_string
    assert [e.step for e in events.Scalars("flatness/density_negative_share")] == [0, 5, 10]


@pytest.mark.parametrize(("name", "sharpness"), [("sgd", "lambda_max"), ("adam", "preconditioned_sharpness")])
def test_custom_scalars_put_eigenvalues_in_one_chart_and_lambda_max_with_its_edge_in_another(tmp_path, name, sharpness):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    module = Relu(OPTIMIZERS[name][0])
    fit(tmp_path, FlatnessMonitor(top_k=3), module=module, data=loaders(), logger=logger, max_epochs=1)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    expected = {
        "lambda_max … lambda_3": ["flatness/lambda_max$", "flatness/lambda_2$", "flatness/lambda_3$"],
        f"edge of stability: {sharpness}": [f"flatness/{sharpness}$", "flatness/stability_edge$"],
        "invariant_sharpness": ["flatness/invariant_sharpness$"],
    }
    assert charts == expected | ({} if name == "sgd" else {"lambda_max": ["flatness/lambda_max$"]})
    assert next(iter(charts.values()))[0] == "flatness/lambda_max$"
    for pattern in (tag for tags in charts.values() for tag in tags):  # each is one curve: no residuals beside it
        assert len([tag for tag in events.Tags()["scalars"] if re.match(pattern, tag)]) == 1


def test_loggers_without_images_are_left_alone(tmp_path):
    monitor = FlatnessMonitor({"density": SpectralDensity(num_runs=2, num_steps=4, tol=10.0)})
    fit(tmp_path, monitor, module=Relu(), data=loaders(), logger=CSVLogger(tmp_path), max_epochs=1)
    assert "flatness/density_mean" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_pixels_and_layout():
    image = pixels(Figure(figsize=(2, 1), dpi=100))
    assert image.shape == (100, 200, 3)
    assert custom_scalars_layout({"empty": [], "a": ["b"]}, "mine") == {"mine": {"a": ["Multiline", ["b$"]]}}


@pytest.mark.filterwarnings("ignore:FlatnessMonitor. .* did not converge")
def test_training_with_all_measures_is_bit_identical_to_training_without(tmp_path):
    def weights(*callbacks: pl.Callback) -> list[Tensor]:
        torch.manual_seed(0)
        module = Relu(lambda p: torch.optim.Adam(p, lr=0.01))
        run = trainer(tmp_path, *callbacks, logger=TensorBoardLogger(tmp_path), max_epochs=2)
        run.fit(module, *loaders())
        return [*module.parameters(), torch.rand(3)]

    for with_monitor, without in zip(weights(FlatnessMonitor("all")), weights(), strict=True):
        assert torch.equal(with_monitor, without)
