"""Loss surfaces: their values, that they leave no trace, their pictures, and bad input."""

from __future__ import annotations

import copy
import random
import re
import warnings
from typing import Any

import lightning.pytorch as pl
import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers.chains import example_chain, flat_weights, landscape_of
from helpers.modules import Augmented
from helpers.problems import make_problem
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_flatness import (
    FlatnessMonitor,
    LossLandscape,
    LossSurface,
    LossSurfaceMonitor,
    TopEigenvalues,
    compare_surfaces,
    loss_surface,
)

GEOMETRIES = ("euclidean", "layer", "filter", "element", "path")


def landscape(name: str = "relu_convnet") -> LossLandscape:
    problem = make_problem(name)
    return LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)


def parabola(curvature: float = 2.0) -> LossLandscape:
    """``L(w) = curvature / 2 · ‖w‖²`` in two weights, at 0."""
    module = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    return LossLandscape(module, [torch.zeros(3, 1)], lambda m, x: curvature / 2 * m.weight.square().sum())


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("directions", ["random", "eigenvectors"])
@pytest.mark.parametrize("num_directions", [1, 2])
def test_value_at_the_centre_is_the_loss(geometry, directions, num_directions):
    at = landscape()
    surface = loss_surface(at, directions, geometry, num_directions=num_directions, radius=1e-7, num_points=3)
    assert surface.losses.shape == (3,) * num_directions
    assert surface.x[1] == 0
    assert surface.loss == float(at.loss())
    assert float(surface.losses[1] if num_directions == 1 else surface.losses[1, 1]) == surface.loss
    assert surface.directions.shape[0] == num_directions == len(surface.labels)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_second_difference_along_a_top_eigenvector_is_the_eigenvalue(geometry):
    at = landscape()
    metric = TopEigenvalues(k=2, geometry=geometry, tol=1e-8)
    metric.update(at)
    top, second = metric.compute()
    step = 3e-5 / float(top) ** 0.5
    surface = loss_surface(at, "eigenvectors", geometry, radius=step, num_points=3)
    torch.testing.assert_close(second_difference(surface.losses[1], step), top, rtol=2e-3, atol=0)
    step = 3e-5 / float(second) ** 0.5  # the two can be decades apart
    line = loss_surface(at, surface.directions[1], geometry, radius=step, num_points=3)
    torch.testing.assert_close(second_difference(line.losses, step), second, rtol=2e-3, atol=0)


def second_difference(line: Tensor, step: float) -> Tensor:
    return (line[0] - 2 * line[1] + line[2]) / step**2


def test_every_point_of_the_grid_is_the_loss_there():
    at = landscape("tanh_mlp")
    surface = loss_surface(at, "random", "layer", radius=0.5, num_points=5)
    chart = at.chart("layer")
    assert surface.y is not None
    for i, y in enumerate(surface.y.tolist()):
        for j, x in enumerate(surface.x.tolist()):
            with at.displaced(chart.displacement(x * surface.directions[0] + y * surface.directions[1])):
                assert float(surface.losses[i, j]) == pytest.approx(float(at.loss()), rel=1e-12)


def test_random_directions_are_orthonormal_and_depend_on_the_seed_alone():
    first, again, other = (loss_surface(landscape(), "random", radius=0.1, num_points=3, seed=s) for s in (1, 1, 2))
    torch.testing.assert_close(first.directions @ first.directions.T, torch.eye(2).double(), rtol=0, atol=1e-12)
    assert torch.equal(first.directions, again.directions)
    assert torch.equal(first.losses, again.losses)
    assert not torch.equal(first.directions, other.directions)


@pytest.mark.parametrize("num_points", [3, 11, 15, 21, 25, 49])
def test_zero_is_always_one_of_the_points(num_points):
    for radius in (0.1, 0.3, 1 / 3, 0.7, 1e-7, 123.4):
        surface = loss_surface(parabola(), "random", num_directions=1, radius=radius, num_points=num_points)
        assert float(surface.x[num_points // 2]) == 0
        assert float(surface.losses[num_points // 2]) == surface.loss
        assert surface.x[-1] == -surface.x[0] == radius


def test_between_two_sets_of_weights():
    at, other = landscape(), landscape().module
    other = copy.deepcopy(other)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    problem = make_problem("relu_convnet")
    there = float(LossLandscape(other, problem.batches, problem.loss_fn).loss())
    for geometry in ("euclidean", "layer", "element"):
        for given in (other, flat_weights(other), [flat_weights(other)]):
            surface = loss_surface(at, "between", geometry, other=given, num_points=9)
            positions = surface.x.tolist()
            assert float(surface.losses[positions.index(0.0)]) == surface.loss
            assert float(surface.losses[positions.index(1.0)]) == pytest.approx(there, rel=1e-9)


def test_between_two_networks_in_the_path_geometry():
    chain, there = example_chain(), example_chain()
    with torch.no_grad():
        for p in there.module.parameters():
            p.mul_(1.3)  # paths of the same signs all the way
    loss = float(landscape_of(there).loss())
    there.rescale_units(torch.Generator().manual_seed(0))  # which leads to the same network
    surface = loss_surface(landscape_of(chain), "between", "path", other=there.module, num_points=11)
    assert float(surface.losses[surface.x.tolist().index(1.0)]) == pytest.approx(loss, rel=1e-9)
    with pytest.raises(ValueError, match="other signs of weights along the skeleton"):
        loss_surface(landscape_of(chain), "between", "path", other=-flat_weights(chain.module))


def test_between_three_sets_of_weights_spans_a_plane():
    at = parabola()
    others = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    surface = loss_surface(at, "between", other=others, num_points=5)
    assert surface.y is not None
    expected = surface.x[None] ** 2 + 4 * surface.y[:, None] ** 2
    torch.testing.assert_close(surface.losses, expected, rtol=1e-12, atol=1e-12)


def test_given_directions_are_taken_as_they_are():
    surface = loss_surface(parabola(), torch.tensor([3.0, 4.0]), radius=2.0, num_points=5)
    torch.testing.assert_close(surface.losses, torch.tensor([100.0, 25.0, 0.0, 25.0, 100.0]).double())


@pytest.mark.parametrize("curvature", [1e-6, 2.0, 1e6])
def test_radius_is_chosen_so_that_the_loss_rises_by_one(curvature):
    surface = loss_surface(parabola(curvature), "random", num_points=3)
    assert 1 <= float(surface.losses[1, 2]) <= 4  # to a factor of two in the radius


def test_surface_in_the_path_geometry_does_not_change_when_units_are_rescaled():
    chain = example_chain()
    chart = landscape_of(chain).chart("path")
    surfaces = []
    for _ in range(2):
        surfaces.append(loss_surface(landscape_of(chain), "random", "path", radius=chart.radius, num_points=5))
        chain.rescale_units(torch.Generator().manual_seed(0))
    torch.testing.assert_close(surfaces[1].losses, surfaces[0].losses, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ no trace


@pytest.mark.parametrize("fails", [False, True])
def test_weights_buffers_and_random_numbers_are_untouched(fails):
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    calls = 0

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if fails and calls > 10:
            raise RuntimeError("no more")
        return F.cross_entropy(module(batch[0]), batch[1]) + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002

    at = LossLandscape(module, [(torch.randn(8, 4), torch.randint(3, (8,)))], loss_fn, mode="train")
    before = copy.deepcopy(module.state_dict())
    storages = [p.data_ptr() for p in module.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            loss_surface(at, radius=0.1, num_points=5)
    else:
        loss_surface(at, radius=0.1, num_points=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [p.data_ptr() for p in module.parameters()] == storages
    assert all(p.grad is None for p in module.parameters())
    assert all(m.training for m in module.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_figures_outside_pyplot():
    backend = mpl.rcParams._get("backend") if hasattr(mpl.rcParams, "_get") else None
    line = loss_surface(landscape(), "eigenvectors", "filter", num_directions=1, num_points=5)
    plane = loss_surface(landscape(), "random", "filter", num_points=5)
    for surface in (line, plane):
        figure = surface.figure("a title")
        assert isinstance(figure, Figure)
        figure.canvas.draw()
        assert figure.axes[0].get_title() == "a title"
        marked = [artist for artist in figure.axes[0].get_lines() if artist.get_marker() == "*"]
        assert len(marked) == 1  # the current weights
        assert float(np.ravel(marked[0].get_xdata())[0]) == 0
    if backend is not None:
        assert mpl.rcParams._get("backend") == backend


def test_two_models_are_drawn_side_by_side_on_one_scale():
    surfaces = [loss_surface(parabola(c), "random", radius=1.0, num_points=5) for c in (2.0, 8.0)]
    figure = compare_surfaces(surfaces, ["small batch", "large batch"])
    left, right = figure.axes[:2]
    assert [left.get_title(), right.get_title()] == ["small batch", "large batch"]
    contours = [next(c for c in axes.collections if hasattr(c, "levels") and c.filled) for axes in (left, right)]
    assert list(contours[0].levels) == list(contours[1].levels)
    assert (
        contours[0].norm is contours[1].norm
        or contours[0].norm.boundaries.tolist() == contours[1].norm.boundaries.tolist()
    )
    lines = [loss_surface(parabola(c), "random", num_directions=1, radius=1.0, num_points=5) for c in (2.0, 8.0)]
    left, right = compare_surfaces(lines).axes
    assert left.get_ylim() == right.get_ylim()


def test_losses_that_are_not_finite_are_reported_and_drawn_as_missing():
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(module.weight)
    at = LossLandscape(module, [torch.ones(2, 1).double()], lambda m, x: m(x).log().mean())  # nan below zero
    with pytest.warns(UserWarning, match=r"not finite at 2 of 5 points of the surface.*smaller `radius`"):
        surface = loss_surface(at, torch.ones(1), radius=2.0, num_points=5)
    assert surface.num_missing == 2  # log(-1) and log(0)... of 1 + (-2, -1, 0, 1, 2)
    assert torch.isfinite(surface.losses[2:]).all()
    figure = surface.figure()
    assert "2 points without a finite loss" in figure.axes[0].get_title()
    figure.canvas.draw()
    with pytest.raises(ValueError, match="Expected a finite loss"), at.displaced(torch.tensor([-2.0])):
        at.loss()  # elsewhere it stays an error


def test_beyond_a_pole_of_the_path_geometry_points_are_missing():
    chain = example_chain()
    chart = landscape_of(chain).chart("path")
    place = int((chart.values.abs() == chart.radius).nonzero()[0])
    direction = torch.zeros_like(chart.values)
    direction[place] = chart.values[place]
    with pytest.warns(UserWarning, match="not finite at 2 of 7 points"):
        surface = loss_surface(landscape_of(chain), direction, "path", radius=1.5, num_points=7)
    assert torch.isfinite(surface.losses).tolist() == [False, False, True, True, True, True, True]


def test_all_losses_missing_but_one_can_be_drawn():
    nan = torch.full((3, 3), torch.nan).double()
    nan[1, 1] = 2.0
    x = torch.linspace(-1, 1, 3).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = LossSurface(x, x, nan, 2.0, torch.eye(2), ("a", "b"), "layer").figure()
        figure.canvas.draw()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "gradient"}, r"one of \['random', 'eigenvectors', 'between'\] or a tensor, got 'gradient'"),
        ({"directions": torch.ones(3)}, r"of shape \(2,\), \(1, 2\) or \(2, 2\), got \(1, 3\)"),
        ({"directions": torch.ones(3, 2)}, r"Expected one or two directions .*got \(3, 2\)"),
        ({"directions": torch.ones(2, 2, 2)}, "Expected one or two directions"),
        ({"directions": torch.zeros(2)}, r"other than zero with finite entries, got norms \[0.0\]"),
        ({"directions": torch.tensor([1.0, torch.inf])}, r"other than zero with finite entries, got norms \[inf\]"),
        ({"directions": torch.ones(2, 2)}, "that span a plane, got parallel ones"),
        ({"num_directions": 3}, "Expected `num_directions` to be 1 or 2, got 3"),
        ({"radius": 0.0}, "Expected `radius` to be a positive number or None, got 0.0"),
        ({"radius": float("inf")}, "Expected `radius` to be a positive number or None, got inf"),
        ({"num_points": 10}, "Expected `num_points` to be an odd integer >= 3, .*got 10"),
        ({"num_points": 1}, "Expected `num_points` to be an odd integer >= 3, .*got 1"),
        ({"directions": "between"}, "Expected `other` weights with directions='between' and only then, got none"),
        ({"other": torch.ones(2)}, "Expected `other` weights with directions='between' and only then, got some"),
        ({"directions": "between", "other": torch.ones(3)}, r"weights of the same module, 2 .*got shape \(3,\)"),
        ({"directions": "between", "other": torch.zeros(2)}, "Expected directions other than zero"),
        ({"directions": "between", "other": []}, "Expected `other` to be one or two sets of weights, got 0"),
        ({"geometry": "round"}, "Expected `geometry` to be one of .*got 'round'"),
        ({"geometry": "path"}, "Expected a chain of linear layers"),
        ({"geometry": "layer", "directions": "between", "other": torch.ones(2)}, "whose scale is zero"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_expected(options, message):
    at = parabola()
    if options.get("geometry") == "path":
        at = LossLandscape(
            nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), [torch.ones(1, 2)], lambda m, x: m(x).sum()
        )
    with pytest.raises(ValueError, match=message):
        loss_surface(at, **options)


def test_more_directions_than_coordinates():
    one = LossLandscape(nn.Linear(1, 1, bias=False), [torch.ones(1, 1)], lambda m, x: m(x).square().mean())
    with pytest.raises(ValueError, match="at most the number of coordinates, 1, got 2"):
        loss_surface(one, "random")


def test_a_loss_that_is_not_finite_at_the_weights_is_an_error():
    at = parabola()
    at.module.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="Expected a finite loss, got nan"):
        loss_surface(at)


def test_surfaces_that_cannot_be_compared():
    line, plane = (loss_surface(parabola(), "random", num_directions=n, radius=1.0, num_points=3) for n in (1, 2))
    for surfaces, titles in (([], None), ([line, plane], None), ([plane], ["a", "b"])):
        with pytest.raises(ValueError, match="Expected one or more surfaces of the same number of directions"):
            compare_surfaces(surfaces, titles)


# --------------------------------------------------------------------------------------------------------- in training


class Net(pl.LightningModule):
    """BatchNorm, dropout and a log."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trained(logger, *callbacks: pl.Callback, max_epochs: int = 4) -> Net:
    pl.seed_everything(0, verbose=False)
    module = Net()
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(Augmented(), batch_size=16, shuffle=True))
    return module


def test_monitor_logs_a_picture_every_n_epochs_and_changes_nothing(tmp_path):
    monitor = LossSurfaceMonitor(every_n_epochs=2, num_points=5, probe_size=24)
    logger = TensorBoardLogger(tmp_path)
    module = trained(logger, monitor)
    logger.finalize("success")
    images = EventAccumulator(logger.log_dir).Reload().Images("flatness/loss_surface")
    assert [image.step for image in images] == [0, 6, 12]  # three steps an epoch
    assert all(image.width > 100 and image.height > 100 for image in images)
    plain = trained(False)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    assert monitor.surface is not None
    assert monitor.surface.losses.shape == (5, 5)


def test_monitor_keeps_its_radius_directions_and_colours(tmp_path, monkeypatch):
    radii: list[float | None] = []
    seen: list[LossSurface] = []

    def recorded(*args, radius, **kwargs):
        radii.append(radius)
        seen.append(loss_surface(*args, radius=radius, **kwargs))
        return seen[-1]

    monkeypatch.setattr("lightning_flatness.callbacks.loss_surface_monitor.loss_surface", recorded)
    scales: list[Any] = []
    figure = LossSurface.figure
    monkeypatch.setattr(LossSurface, "figure", lambda s, title, scale: scales.append(scale) or figure(s, title, scale))
    monitor = LossSurfaceMonitor(num_points=3, probe_size=8, geometry="layer")
    module = trained(TensorBoardLogger(tmp_path), monitor, max_epochs=2)
    num_tensors = sum(bool(p.any()) for p in module.parameters())
    assert len(radii) == 3
    assert radii[1:] == pytest.approx([0.5 * num_tensors**0.5] * 2)  # each tensor by half of its norm
    assert all(torch.equal(s.directions, seen[0].directions) for s in seen)
    assert scales == [(0.0, 2 * seen[0].loss)] * 3


def test_monitor_has_the_same_colours_after_a_resume(tmp_path):
    monitor = LossSurfaceMonitor(num_points=3, probe_size=8)
    trained(TensorBoardLogger(tmp_path), monitor, max_epochs=1)
    assert monitor.surface is not None
    resumed = LossSurfaceMonitor(num_points=3, probe_size=8)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.state_dict() == monitor.state_dict() == {"scale": monitor.run.scale}
    assert monitor.run.scale is not None


def test_monitor_says_which_point_it_is_at(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_flatness.callbacks.progress.FIRST_MESSAGE_AFTER", 0.0)
    with caplog.at_level("INFO"):
        trained(TensorBoardLogger(tmp_path), LossSurfaceMonitor(num_points=3, probe_size=8), max_epochs=1)
    said = [record.getMessage() for record in caplog.records]
    assert any(re.match(r"LossSurfaceMonitor: point \d of 9 after \d+ s", message) for message in said)


def test_default_costs_a_tenth_of_an_epoch_of_50000_samples(monkeypatch):
    monitor = LossSurfaceMonitor()
    costs: list[float] = []

    def recorded(landscape, *args, **kwargs):
        surface = loss_surface(landscape, *args, **kwargs)
        costs.append(landscape.cost.gradient_evaluations * landscape.num_samples)
        return surface

    monkeypatch.setattr("lightning_flatness.callbacks.loss_surface_monitor.loss_surface", recorded)
    with pytest.warns(UserWarning, match="no logger"):
        trained(False, monitor, max_epochs=1)
    assert max(costs) <= 5000


@pytest.mark.parametrize("is_first", [True, False])
def test_its_time_counts_in_the_share_that_the_flatness_monitor_logs(monkeypatch, is_first):
    """By a clock that moves with the measurements alone: one second for each, a hundred for a picture."""
    now = [0.0]
    monkeypatch.setattr("lightning_flatness.callbacks.landscape_monitor.time.perf_counter", lambda: now[0])

    def slow(*args: Any, **options: Any) -> LossSurface:
        now[0] += 100.0
        return loss_surface(*args, **options)

    class Epochs(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            now[0] += 1000.0

    class Second(FlatnessMonitor):
        def landscape(self, *args: Any, **options: Any) -> Any:
            now[0] += 1.0
            return super().landscape(*args, **options)

    monkeypatch.setattr("lightning_flatness.callbacks.loss_surface_monitor.loss_surface", slow)
    flatness, pictures = Second(), LossSurfaceMonitor(num_points=3, probe_size=8, num_directions=1)
    order = [pictures, flatness] if is_first else [flatness, pictures]
    with pytest.warns(UserWarning, match="no logger"):
        trained(False, *order, Epochs(), max_epochs=3)
    shares = [m.costs["share_of_epoch_time"] for _, m in flatness.run.history if "share_of_epoch_time" in m.costs]
    assert shares[1:] == pytest.approx([101 / 1000] * 2)


def test_two_monitors_in_one_trainer(tmp_path):
    monitors = [
        LossSurfaceMonitor(num_points=3, probe_size=8, geometry=g, log_key_prefix=f"{g}/")
        for g in ("filter", "element")
    ]
    logger = TensorBoardLogger(tmp_path)
    trained(logger, *monitors, max_epochs=1)
    logger.finalize("success")
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["images"]
    assert sorted(tags) == ["element/loss_surface", "filter/loss_surface"]
    assert monitors[0].state_key != monitors[1].state_key


def test_cli_builds_the_monitor(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n"
        "    - class_path: lightning_flatness.LossSurfaceMonitor\n"
        "      init_args: {every_n_epochs: 5, geometry: path, directions: eigenvectors, num_points: 9}\n"
    )
    cli = LightningCLI(Net, run=False, args=["--config", str(config)], save_config_callback=None)
    monitor = next(c for c in cli.trainer.callbacks if isinstance(c, LossSurfaceMonitor))
    assert (monitor.every_n_epochs, monitor.geometry.name, monitor.num_points) == (5, "path", 9)


def test_monitor_says_once_that_no_logger_takes_images(tmp_path):
    monitor = LossSurfaceMonitor(num_points=3, probe_size=8, num_directions=1)
    with pytest.warns(UserWarning, match="no logger of this Trainer takes images") as record:
        trained(CSVLogger(tmp_path), monitor, max_epochs=2)
    assert len([w for w in record if "takes images" in str(w.message)]) == 1
    assert monitor.surface is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "between"}, "Expected `directions` to be 'random' or 'eigenvectors', got 'between'"),
        ({"num_points": 4}, "Expected `num_points` to be an odd integer >= 3"),
        ({"geometry": "round"}, "Expected `geometry` to be one of"),
        ({"every_n_epochs": 0}, "Expected `every_n_epochs` to be an integer >= 1, got 0"),
    ],
)
def test_monitor_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LossSurfaceMonitor(**options)
