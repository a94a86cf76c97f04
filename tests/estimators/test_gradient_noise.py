"""Gradient noise against gradients of single samples taken one by one, with vmap and without."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import pytest
import torch
from helpers.problems import Problem, classification, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import FisherTrace, GradientNoise, LossLandscape, NoiseCurvatureRatio
from lightning_flatness.estimators import UndefinedMeasureError, gradient_noise, hessian_trace
from lightning_flatness.module.batches import map_tensors


def landscape_of(problem: Problem) -> LossLandscape:
    return LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)


def dense_gradients(problem: Problem) -> Tensor:
    problem.module.eval()
    rows = []
    for batch in problem.batches:
        size = len(batch) if isinstance(batch, Tensor) else len(next(iter(_flat(batch))))
        for i in range(size):
            loss = problem.loss_fn(problem.module, map_tensors(itemgetter(slice(i, i + 1)), batch))
            grads = torch.autograd.grad(loss, problem.parameters)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def _flat(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


NAMES = ["linear_regression", "tanh_mlp", "relu_convnet", "batchnorm_eval", "tied_weights", "frozen_parameters"]


@pytest.mark.parametrize("name", [*NAMES, "dict_batches", "zero_bias", "dropout"])
@pytest.mark.parametrize("geometry", ["euclidean", "layer", "element"])
def test_trace_of_the_covariance_equals_the_dense_one(name, geometry):
    problem = make_problem(name)
    z = dense_gradients(problem) * problem.scale(geometry)
    landscape = landscape_of(problem)
    result = gradient_noise(landscape, geometry)
    assert float(result.value) == pytest.approx(float(z.var(dim=0).sum()), rel=1e-9)
    squares = (z - z.mean(dim=0)).square().sum(dim=1)
    n = len(z)
    error = float(squares.std()) / math.sqrt(n) * n / (n - 1)
    assert float(result.standard_error) == pytest.approx(error, rel=1e-9)
    assert landscape.cost.gradient_evaluations == pytest.approx(2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("geometry", ["euclidean", "layer"])
def test_fisher_trace_is_the_mean_of_the_squared_norms(name, geometry):
    problem = make_problem(name)
    squares = (dense_gradients(problem) * problem.scale(geometry)).square().sum(dim=1)
    metric = FisherTrace(geometry)
    metric.update(landscape_of(problem))
    assert float(metric.compute()) == pytest.approx(float(squares.mean()), rel=1e-9)
    assert float(metric.standard_error) == pytest.approx(float(squares.std()) / math.sqrt(len(squares)), rel=1e-9)
    assert float(metric.gradient_evaluations) == pytest.approx(2)


def test_fisher_trace_of_least_squares_in_closed_form():
    module = nn.Linear(1, 1, bias=False).double()
    x = torch.arange(1.0, 8.0, dtype=torch.float64)[:, None]
    metric = FisherTrace()  # the loss (w x)² has the gradient 2 w x²
    metric.update(LossLandscape(module, x.split(3), lambda m, x: m(x).square().mean()))
    expected = 4 * module.weight.detach() ** 2 * (x**4).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-12)


def test_the_same_in_small_chunks_and_without_vmap(monkeypatch):
    problem = make_problem("relu_convnet")
    expected = float(gradient_noise(landscape_of(problem)).value)
    monkeypatch.setattr("lightning_flatness.landscape.per_sample._CHUNK_BYTES", 3 * 8 * problem.num_parameters)
    assert float(gradient_noise(landscape_of(problem)).value) == pytest.approx(expected, rel=1e-12)
    calls: list[bool] = []

    def refuse(*args: Any) -> Tensor:
        calls.append(True)
        raise RuntimeError("vmap: no batching rule")

    monkeypatch.setattr("lightning_flatness.landscape.per_sample._gradients_by_vmap", refuse)
    assert float(gradient_noise(landscape_of(problem)).value) == pytest.approx(expected, rel=1e-12)
    assert len(calls) == 1


class Branching(nn.Module):
    """A branch on data, which vmap does not allow, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(x)[0][:, -1]
        return self.head(h * 2 if h.sum() > 0 else h)


@pytest.mark.filterwarnings("ignore:TF32")  # torch, of oneDNN
def test_modules_that_vmap_cannot_do_are_taken_sample_by_sample():
    torch.manual_seed(0)
    module = Branching().double()
    batches = [(torch.randn(n, 5, 3).double(), torch.randint(2, (n,))) for n in (4, 3)]

    def loss_fn(m: nn.Module, b: Any) -> Tensor:  # a mean over samples even though the branch looks at all of them
        return torch.stack([F.cross_entropy(m(x[None]), y[None]) for x, y in zip(*b, strict=True)]).mean()

    problem = Problem(module, batches, loss_fn)
    result = gradient_noise(landscape_of(problem))
    assert float(result.value) == pytest.approx(float(dense_gradients(problem).var(dim=0).sum()), rel=1e-9)


def test_the_estimate_is_unbiased_and_its_error_calibrated_over_200_seeds():
    torch.manual_seed(0)
    module = nn.Linear(3, 1, bias=False).double()
    deviations, errors = [], []
    for seed in range(200):  # of x ~ N(0, I) the gradient of mean m(x) is mean x: tr C = 3
        x = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        result = gradient_noise(LossLandscape(module, [x[:40], x[40:]], lambda m, x: m(x).mean()))
        deviations.append(float(result.value) - 3)
        errors.append(float(result.standard_error))
    d, e = torch.tensor(deviations), torch.tensor(errors)
    assert abs(d.mean()) < 4 * d.std() / math.sqrt(200)
    assert 0.85 < d.square().mean().sqrt() / e.square().mean().sqrt() < 1.15


def test_ratio_to_the_curvature_is_that_of_the_dense_traces():
    problem = make_problem("tanh_mlp")
    ratio = float(dense_gradients(problem).var(dim=0).sum() / problem.dense_hessian().trace())
    metric = NoiseCurvatureRatio(num_products=60)
    metric.update(landscape_of(problem))
    assert float(metric.compute()) == pytest.approx(ratio, rel=1e-9)
    noise = gradient_noise(landscape_of(problem))
    trace = hessian_trace(landscape_of(problem), num_products=60)
    for error, parts in [
        (metric.error, (noise.error / noise.value, trace.error / trace.value)),
        (metric.standard_error, (noise.standard_error / noise.value, trace.standard_error / trace.value)),
    ]:
        assert float(error) == pytest.approx(ratio * math.hypot(*map(float, parts)), rel=1e-6)
    rough = NoiseCurvatureRatio(num_products=16)
    rough.update(landscape_of(problem))
    assert rough.error > metric.error


def test_no_trace_of_the_gradients_of_samples():
    problem = make_problem("batchnorm_eval")
    before = {n: t.clone() for n, t in problem.module.state_dict().items()}
    state = torch.get_rng_state()
    GradientNoise().update(landscape_of(problem))
    assert all(torch.equal(t, before[n]) for n, t in problem.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in problem.module.parameters())


def test_losses_that_are_no_mean_over_samples_are_refused():
    weights = torch.tensor([1.0, 5.0, 1.0], dtype=torch.float64)
    problem = make_problem("tanh_mlp")
    weighted = LossLandscape(
        problem.module, problem.batches, lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=weights)
    )
    with pytest.raises(UndefinedMeasureError, match="Expected a loss that is the mean of the losses of single samples"):
        GradientNoise().update(weighted)
    one = LossLandscape(problem.module, classification((1,), (4,)), lambda m, b: m(b[0].double()).mean())
    with pytest.raises(UndefinedMeasureError, match=r"Expected two or more samples .* got one"):
        GradientNoise().update(one)
    with pytest.raises(ValueError, match="Expected `tol` to be >= 0"):
        GradientNoise(tol=-1)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True])
def test_batch_norm_has_no_gradients_of_single_samples(scripted):
    layer = torch.jit.script(nn.BatchNorm1d(4)) if scripted else nn.BatchNorm1d(4)
    module = nn.Sequential(layer, nn.Linear(4, 3))
    landscape = LossLandscape(module, classification((8,), (4,)), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(
        UndefinedMeasureError, match="got one without: Expected more than 1 value per channel when training"
    ):
        GradientNoise().update(landscape)


def test_a_users_error_comes_through():
    problem = make_problem("tanh_mlp")
    calls: list[int] = []

    def loss_fn(m: nn.Module, b: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyError("mine")
        return F.cross_entropy(m(b[0]), b[1])

    with pytest.raises(KeyError, match="mine"):
        GradientNoise().update(LossLandscape(problem.module, problem.batches, loss_fn))


class TwoNames(nn.Module):
    """A layer and a module that stand under two names each, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.backbone = self.encoder
        self.body = nn.Sequential(self.encoder, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.body[1].weight = self.body[3].weight
        self.head = self.body[3]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body[1:3](self.backbone(x)))


def test_layers_under_two_names_stay_in_the_module_that_is_measured():
    torch.manual_seed(0)
    module = TwoNames().double()
    batches = [(torch.randn(16, 4, dtype=torch.float64), torch.randint(4, (16,)))]
    problem = Problem(module, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    landscape, direction = landscape_of(problem), torch.ones(4 * 4 + 4 + 4 * 4 + 2 * 4, dtype=torch.float64)
    with landscape.measurement():
        before = landscape.hvp(direction)
        noise = gradient_noise(landscape)
        hessian_trace(landscape)  # whose standard error takes second derivatives of samples
        torch.testing.assert_close(landscape.hvp(direction), before, rtol=1e-12, atol=0)
    assert float(noise.value) == pytest.approx(float(dense_gradients(problem).var(dim=0).sum()), rel=1e-9)
