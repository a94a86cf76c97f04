"""Standard errors for the whole training set: formulas, costs, and what happens where they cannot be known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.modules import Classifier, Plain
from helpers.problems import cross_entropy, make_problem
from helpers.training import fit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_flatness import (
    AverageCaseSharpness,
    FlatnessMonitor,
    GradientNoise,
    HessianTrace,
    InvariantSharpness,
    LossLandscape,
    TopEigenvalues,
    draw_probe,
)
from lightning_flatness.estimators import top_eigenvalues
from lightning_flatness.landscape.sampling import SampleLosses
from lightning_flatness.metrics import FlatnessMetric


def problem(num_samples: int = 48) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return module, torch.randn(num_samples, 4).double(), torch.randint(3, (num_samples,))


def measured(metric: FlatnessMetric, module: nn.Module, batches: list[Any], **options: Any) -> LossLandscape:
    landscape = LossLandscape(module, batches, cross_entropy, **options)
    metric.update(landscape)
    return landscape


def forms_of_samples(module: nn.Module, x: Tensor, y: Tensor, vectors: Tensor, scale: Tensor) -> Tensor:
    """``vᵀ S H_n S v`` of every sample, shape (samples, vectors), by autograd."""
    rows = []
    for i in range(len(x)):
        one = LossLandscape(module, [(x[i : i + 1], y[i : i + 1])], cross_entropy)
        with one.measurement():
            rows.append(torch.stack([torch.dot(scale * v, one.hvp(scale * v)) for v in vectors]))
    return torch.stack(rows)


@pytest.mark.parametrize(("geometry", "num_total"), [("euclidean", None), ("layer", 100), ("filter", None)])
def test_of_eigenvalues_is_that_of_the_quadratic_forms_of_samples(geometry, num_total):
    module, x, y = problem()
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    metric = TopEigenvalues(k=2, geometry=geometry, tol=1e-8)
    landscape = measured(metric, module, batches, num_total=num_total)
    found = top_eigenvalues(landscape, geometry, k=2, tol=1e-8)
    scale = landscape.chart(geometry).displacement(torch.ones(landscape.num_parameters, dtype=torch.float64))
    forms = forms_of_samples(module, x, y, found.eigenvectors, scale)
    torch.testing.assert_close(forms.mean(dim=0), found.eigenvalues)
    unseen = 1.0 if num_total is None else 1 - len(x) / num_total
    expected = forms.std(dim=0) / math.sqrt(len(x)) * math.sqrt(unseen)
    torch.testing.assert_close(metric.standard_error, expected, rtol=2e-2, atol=0)


def test_costs_at_most_one_and_a_half_gradients_for_the_first_eigenvalue():
    module, x, y = problem()
    alone, with_error = TopEigenvalues(tol=1e-3), TopEigenvalues(tol=1e-3)
    measured(alone, module, [(x, y)], num_total=len(x))  # all samples are seen, and there is nothing to do
    measured(with_error, module, [(x, y)])
    assert alone.standard_error == 0
    assert with_error.gradient_evaluations - alone.gradient_evaluations <= 1.5


def test_few_samples_and_low_precision_have_none():
    module, x, y = problem(7)
    metric = TopEigenvalues()
    measured(metric, module, [(x, y)])
    assert metric.standard_error.isnan().all()
    module, x, y = problem()
    metric = TopEigenvalues()
    measured(metric, module.bfloat16(), [(x.bfloat16(), y)])
    assert metric.standard_error.isnan().all()
    assert not metric.value.isnan().any()


def test_of_a_mean_over_samples_with_random_probes_holds_both_parts():
    module, x, y = problem(400)
    trace = HessianTrace(num_products=1000)  # exact for these samples
    measured(trace, module, [(x, y)])
    identity = torch.eye(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    traces = forms_of_samples(module, x[:100], y[:100], identity, torch.ones_like(identity[0])).sum(dim=1)
    assert float(trace.standard_error) == pytest.approx(float(traces.std()) / math.sqrt(400), rel=0.6)
    rough = HessianTrace(num_products=8, method="hutchinson")
    measured(rough, module, [(x, y)])
    assert rough.standard_error > max(rough.error, 0.9 * trace.standard_error)
    noise = GradientNoise()
    measured(noise, module, [(x, y)], num_total=500)
    whole = GradientNoise()
    measured(whole, module, [(x, y)])
    assert float(noise.standard_error) == pytest.approx(float(whole.standard_error) * math.sqrt(0.2), rel=1e-6)
    assert noise.error < 1e-12 * noise.value
    average = AverageCaseSharpness(num_draws=200)
    measured(average, module, [(x, y)])
    relative = float((average.standard_error.square() - average.error.square()).sqrt() / average.value)
    assert relative == pytest.approx(float(traces.std()) / math.sqrt(400) / float(trace.value), rel=0.6)


class Weighted(nn.Module):
    """A loss that is no mean over samples: classes have weights."""

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 0.2]).double())


@pytest.mark.parametrize("kind", ["batchnorm", "weights of classes", "branches on data"])
def test_groups_of_samples_where_single_ones_have_no_loss(kind):
    module, x, y = problem(512)
    if kind == "batchnorm":
        module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()

    def branching(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) * (1.0 if float(batch[0].sum()) > -1e9 else 2.0)

    loss_fn: Any = {"batchnorm": cross_entropy, "weights of classes": Weighted(), "branches on data": branching}[kind]
    errors, values = [], []
    for i in range(4):
        part = [(a, b) for a, b in zip(x[i * 128 :][:128].split(64), y[i * 128 :][:128].split(64), strict=True)]
        metric = InvariantSharpness(tol=1e-4)
        landscape = LossLandscape(module, part, loss_fn)
        metric.update(landscape)
        errors.append(float(metric.standard_error))
        values.append(float(metric.value))
    scatter = float(torch.tensor(values).std())
    assert all(0.25 * scatter < error < 4 * scatter for error in errors)
    if kind == "branches on data":
        plain = InvariantSharpness(tol=1e-4)
        plain.update(LossLandscape(module, part, cross_entropy))
        assert errors[-1] == pytest.approx(float(plain.standard_error), rel=0.5)


def test_groups_without_a_loss_have_none():
    """A group of samples that are all left out has a loss of 0/0; that of all samples is fine."""
    module, x, y = problem(32)
    y[::2] = y[1::2]  # a group is two samples
    landscape = LossLandscape(module, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=0))
    for metric in (TopEigenvalues(tol=1e-6), InvariantSharpness(tol=1e-6)):
        metric.update(landscape)
        assert metric.converged
        assert metric.standard_error.isnan().all()


def test_batches_that_cannot_be_split_have_none():
    class Sums:
        """A batch that says its size and cannot be sliced."""

        batch_size = 16

        def __init__(self, x: Tensor) -> None:
            self.x = x

    module = nn.Linear(3, 1)
    landscape = LossLandscape(module, [Sums(torch.randn(16, 3)) for _ in range(3)], lambda m, b: m(b.x).square().mean())
    metric = TopEigenvalues()
    metric.update(landscape)
    assert metric.standard_error.isnan().all()


def test_the_monitor_logs_them_and_the_probe_knows_the_size_of_the_training_set(tmp_path):
    data: Any = DataLoader(Plain(60), batch_size=10, shuffle=True)
    assert draw_probe(data, 20).num_total == 60
    run = fit(tmp_path, FlatnessMonitor(probe_size=30), module=Classifier(), data=(data,), max_epochs=1)
    last = run.logger.records[-1][1]
    for name in ("lambda_max", "invariant_sharpness"):
        assert 0 < last[f"flatness_errors/{name}_standard_error"] < last[f"flatness/{name}"]
    everything = fit(tmp_path, FlatnessMonitor(probe_size=60), module=Classifier(), data=(data,), max_epochs=1)
    assert everything.logger.records[-1][1]["flatness_errors/lambda_max_standard_error"] == 0


def test_dropout_and_recurrent_networks():
    relu = make_problem("relu_convnet")
    metric = TopEigenvalues()
    metric.update(LossLandscape(relu.module, relu.batches, relu.loss_fn))
    assert metric.standard_error > 0
    cell, head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)
    module = nn.ModuleDict({"cell": cell, "head": head})
    batch = torch.randn(16, 5, 3), torch.randint(3, (16,))
    metric = TopEigenvalues()

    def loss_fn(m: Any, b: Any) -> Tensor:
        return F.cross_entropy(m["head"](m["cell"](b[0])[0][:, -1]), b[1])

    metric.update(LossLandscape(module, [batch], loss_fn))
    assert metric.standard_error > 0


def test_kinks_of_relu_units_do_not_disturb_the_error_of_a_trace_with_batch_norm():
    """Differences of the losses gave ten times the scatter here."""
    torch.manual_seed(0)
    x, y = torch.randn(2048, 12), torch.randint(4, (2048,))
    hidden = [nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU()]
    module = nn.Sequential(*hidden, nn.Linear(24, 4))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(200):
        rows = torch.randint(2048, (64,))
        optimizer.zero_grad()
        cross_entropy(module, (x[rows], y[rows])).backward()
        optimizer.step()
    values, errors = [], []
    for part in torch.arange(2048).split(512):
        metric = HessianTrace(num_products=100)
        metric.update(LossLandscape(module, [(x[rows], y[rows]) for rows in part.split(128)], cross_entropy))
        values.append(float(metric.value))
        errors.append(float(metric.standard_error))
    scatter = float(torch.tensor(values).std())
    assert all(scatter / 2 < error < 4 * scatter for error in errors), (scatter, errors)


LAYERS = {
    "layer norm": lambda: nn.LayerNorm([4, 3]),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "frozen batch norm": lambda: nn.BatchNorm1d(4).eval(),
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "max pool": lambda: nn.Sequential(nn.Tanh(), nn.MaxPool1d(2)),
    "encoder": lambda: nn.TransformerEncoderLayer(3, 1, 5, activation="gelu", batch_first=True),
}
LOSSES = {
    "squared error": lambda out, y: F.mse_loss(out, F.one_hot(y, 3).double()),
    "label smoothing": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", [*LAYERS, *LOSSES])
def test_second_derivatives_of_samples_add_up_to_that_of_the_loss(name):
    """Nested forward mode of torch is wrong for LayerNorm and InstanceNorm, and missing for SiLU and squared error."""
    torch.manual_seed(0)
    layer = LAYERS.get(name, nn.Tanh)()
    module = nn.Sequential(nn.Conv1d(2, 4, 2), layer, nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(24, 2, 4), torch.randint(3, (24,))
    module(x)
    module.double()
    loss_fn: Any = LOSSES.get(name, F.cross_entropy)
    landscape = LossLandscape(module, [(x.double(), y)], lambda m, b: loss_fn(m(b[0]), b[1]))
    with landscape.measurement():
        losses = SampleLosses(landscape)
        for _ in range(2):
            velocity = torch.randn(landscape.num_parameters, dtype=torch.float64)
            acceleration = torch.randn(landscape.num_parameters, dtype=torch.float64)
            found = losses.second_derivatives(velocity, acceleration)
            assert found is not None
            mean = float((losses.sizes * found).sum() / losses.sizes.sum())
            expected = torch.dot(velocity, landscape.hvp(velocity)) + torch.dot(acceleration, landscape.gradient())
            assert mean == pytest.approx(float(expected), rel=1e-9)
            assert len(found) == losses.num_groups >= 8


def test_groups_have_two_samples_at_least():
    """BatchNorm refuses a single one, which once ended a measurement of batches of three."""
    module, x, y = problem(48)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    metric = TopEigenvalues()
    metric.update(LossLandscape(module, list(zip(x.split(3), y.split(3), strict=True)), cross_entropy))
    assert float(metric.standard_error) > 0


def test_the_losses_of_samples_are_evaluated_once_in_a_measurement_of_several_metrics():
    module, x, y = problem()
    costs, errors = {}, {}
    for names in (("first",), ("second",), ("first", "second")):
        metrics: dict[str, FlatnessMetric] = {"first": TopEigenvalues(tol=1e-6), "second": InvariantSharpness(tol=1e-6)}
        landscape = LossLandscape(module, [(x, y)], cross_entropy)
        with landscape.measurement():
            for name in names:
                metrics[name].update(landscape)
        costs[names] = landscape.cost.gradient_evaluations
        errors |= {(name, len(names)): float(metrics[name].standard_error.flatten()[0]) for name in names}
    together = costs["first", "second"]
    assert together == pytest.approx(costs["first",] + costs["second",] - 1 - 2 / 3)  # the gradient, and the losses
    for name in ("first", "second"):
        assert errors[name, 2] == pytest.approx(errors[name, 1], rel=1e-6)
