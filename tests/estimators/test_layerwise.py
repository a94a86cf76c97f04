"""Relative flatness against the double sum over rows, minimum sharpness against direct minimisation over scales."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.problems import Problem, classification, cross_entropy, make_problem
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import LossLandscape, MinimumSharpness, OutputLoss, RelativeFlatness
from lightning_flatness.estimators import UndefinedMeasureError, minimum_sharpness, relative_flatness
from lightning_flatness.estimators.minimum import minimizing_log_scales


def landscape_of(problem: Problem) -> LossLandscape:
    return LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)


def chain(*widths: int, bias: bool, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    data = [(x.double(), y) for x, y in classification((9, 6), (widths[0],), widths[-1])]
    return Problem(nn.Sequential(*layers[:-1]).double(), data, cross_entropy)


def double_sum(problem: Problem, name: str) -> float:
    """sum_(s,s') <w_s, w_s'> Tr(H_ss'), term by term."""
    weight = dict(problem.module.named_modules())[name].weight.detach()
    start = 0
    for p in problem.parameters:
        if p.data_ptr() == weight.data_ptr():
            break
        start += p.numel()
    rows, columns = weight.shape
    hessian = problem.dense_hessian()
    kappa = 0.0
    for s in range(rows):
        for t in range(rows):
            i, j = start + s * columns, start + t * columns
            block = hessian[i : i + columns, j : j + columns]
            kappa += float(weight[s] @ weight[t]) * float(block.trace())
    return kappa


@pytest.mark.parametrize(
    ("name", "layer"),
    [("tanh_mlp", "0"), ("tanh_mlp", "2"), ("relu_convnet", "6"), ("batchnorm_eval", "0"), ("tied_weights", "encoder")],
)
def test_relative_flatness_equals_the_double_sum(name, layer):
    problem = make_problem(name)
    exact = double_sum(problem, layer)
    metric = RelativeFlatness(layer, num_products=100)
    metric.update(landscape_of(problem))
    assert float(metric.compute()) == pytest.approx(exact, rel=1e-9)
    for seed in range(5):
        estimate = relative_flatness(landscape_of(problem), layer, num_products=12, seed=seed)
        assert abs(float(estimate.value) - exact) <= 5 * float(estimate.error)


def test_relative_flatness_has_the_expectation_of_the_papers_probe():
    problem = make_problem("tanh_mlp")
    weight, hessian = problem.module[0].weight.detach(), problem.dense_hessian()[:24, :24]
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(4, 20000, dtype=torch.float64, generator=generator)
    z = torch.randint(0, 2, (4, 20000), generator=generator).double() * 2 - 1
    v = torch.einsum("sk,jk->ksj", weight @ r, z).flatten(1)
    samples = ((v @ hessian) * v).sum(dim=1)
    assert abs(float(samples.mean()) - double_sum(problem, "0")) < 4 * float(samples.std()) / math.sqrt(20000)


def test_standard_error_of_relative_flatness_is_calibrated_over_200_seeds():
    problem = chain(6, 8, 5, bias=True)
    exact = double_sum(problem, "2")
    landscape = landscape_of(problem)
    with landscape.measurement():
        results = [relative_flatness(landscape, "2", num_products=14, seed=seed) for seed in range(200)]
    deviations = torch.stack([r.value for r in results]) - exact
    errors = torch.stack([r.error for r in results])
    assert 0.8 < deviations.square().mean().sqrt() / errors.square().mean().sqrt() < 1.2


def test_relative_flatness_stays_put_when_layers_are_rescaled():
    problem = chain(4, 6, 5, 3, bias=False)
    before = float(relative_flatness(landscape_of(problem), "2", num_products=200).value)
    with torch.no_grad():
        problem.module[0].weight.mul_(1e3)
        problem.module[2].weight.mul_(1e-2)
        problem.module[4].weight.mul_(1e-1)
    assert float(relative_flatness(landscape_of(problem), "2", num_products=200).value) == pytest.approx(
        before, rel=1e-9
    )


def test_relative_flatness_takes_the_last_linear_layer_by_default():
    problem = make_problem("tanh_mlp")
    values = [relative_flatness(landscape_of(problem), layer).value for layer in (None, "2")]
    assert values[0] == values[1]


def test_relative_flatness_of_the_gauss_newton_matrix_of_a_linear_model_is_that_of_the_hessian():
    problem = make_problem("logistic_regression")
    landscape = LossLandscape(problem.module, problem.batches, OutputLoss(F.cross_entropy))
    values = [float(relative_flatness(landscape, operator=o).value) for o in ("hessian", "ggn")]
    assert values[0] == pytest.approx(values[1], rel=1e-10)


def test_a_layer_that_is_not_there_lists_those_that_are():
    problem = make_problem("relu_convnet")
    with pytest.raises(ValueError, match=r"one of \['6'\], got 'head', no module of that name"):
        RelativeFlatness("head").update(landscape_of(problem))
    with pytest.raises(ValueError, match=r"one of \['6'\], got '0', a Conv2d"):
        RelativeFlatness("0").update(landscape_of(problem))
    frozen = make_problem("frozen_parameters")
    with pytest.raises(ValueError, match=r"one of \['2'\], got '0', a Linear"):
        RelativeFlatness("0").update(landscape_of(frozen))
    convolution = LossLandscape(nn.Conv1d(1, 1, 1), [torch.ones(1, 1, 1)], lambda m, x: m(x).square().mean())
    with pytest.raises(UndefinedMeasureError, match=r"Expected a module with a trainable nn.Linear layer, got Conv1d"):
        RelativeFlatness().update(convolution)
    with pytest.raises(ValueError, match=r"Expected `layer` to be the name of a layer or None, got int"):
        RelativeFlatness(layer=3)


# --------------------------------------------------------------------------------------------- minimum sharpness


def rescaled_trace(problem: Problem, alphas: list[float]) -> float:
    """The trace of the dense Hessian at really rescaled weights."""
    layers = [m for m in problem.module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    saved = [p.clone() for p in problem.parameters]
    running = 1.0
    with torch.no_grad():
        for layer, alpha in zip(layers, alphas, strict=True):
            running *= alpha
            layer.weight.mul_(alpha)
            if layer.bias is not None:
                layer.bias.mul_(running)
    trace = float(problem.dense_hessian().trace())
    with torch.no_grad():
        for p, value in zip(problem.parameters, saved, strict=True):
            p.copy_(value)
    return trace


def minimum_by_search(problem: Problem) -> float:
    num_layers = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in problem.module.modules())

    def objective(x: Tensor) -> float:
        logs = [*x, -sum(x)]
        return rescaled_trace(problem, [math.exp(v) for v in logs])

    return float(minimize(objective, [0.0] * (num_layers - 1), method="Nelder-Mead", tol=1e-9).fun)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(3, 4, 2), (3, 4, 3, 2)])
def test_minimum_sharpness_equals_direct_minimisation_over_layer_scales(widths, bias):
    problem = chain(*widths, bias=bias)
    exact = minimum_by_search(problem)
    metric = MinimumSharpness(num_products=300)
    metric.update(landscape_of(problem))
    assert float(metric.compute()) == pytest.approx(exact, rel=1e-6)
    assert metric.converged
    result = minimum_sharpness(landscape_of(problem), num_products=300)
    assert rescaled_trace(problem, result.scales.tolist()) == pytest.approx(exact, rel=1e-6)
    assert float(result.scales.prod()) == pytest.approx(1, rel=1e-9)


def test_minimum_sharpness_without_biases_is_the_geometric_mean():
    problem = chain(4, 5, 4, 3, bias=False)
    hessian = problem.dense_hessian().diagonal()
    traces = [float(t.sum()) for t in hessian.split([p.numel() for p in problem.parameters])]
    result = minimum_sharpness(landscape_of(problem), num_products=300)
    assert float(result.value) == pytest.approx(3 * math.prod(traces) ** (1 / 3), rel=1e-8)
    assert result.layers == ("0", "2", "4")


def test_minimum_sharpness_of_convolutions():
    problem = make_problem("relu_convnet")
    problem.module[6].bias = None
    exact = minimum_by_search(problem)
    result = minimum_sharpness(landscape_of(problem), num_products=1000)
    assert float(result.value) == pytest.approx(exact, rel=1e-5)


def test_minimum_sharpness_stays_put_when_layers_are_rescaled_and_finds_the_order_in_which_they_run():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(5, 3)  # registered in another order than they run
            self.first = nn.Linear(4, 6)
            self.middle = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.middle(F.relu(self.first(x)))))

    torch.manual_seed(0)
    module = Chain().double()
    data = [(x.double(), y) for x, y in classification((9, 6), (4,))]
    landscape = LossLandscape(module, data, cross_entropy)
    before = minimum_sharpness(landscape, num_products=500)
    assert before.layers == ("first", "middle", "last")
    with torch.no_grad():
        for layer, alpha, running in [(module.first, 1e3, 1e3), (module.middle, 1e-2, 10), (module.last, 0.1, 1)]:
            layer.weight.mul_(alpha)
            layer.bias.mul_(running)
    assert float(minimum_sharpness(landscape, num_products=500).value) == pytest.approx(float(before.value), rel=1e-8)


def test_standard_error_of_minimum_sharpness_is_calibrated_over_200_seeds():
    problem = chain(6, 8, 6, bias=True)
    landscape = landscape_of(problem)
    exact = float(minimum_sharpness(landscape, num_products=1000).value)
    with landscape.measurement():
        results = [
            minimum_sharpness(landscape, method="hutchinson", num_products=26, seed=seed) for seed in range(0, 2000, 10)
        ]
    deviations = torch.stack([r.value for r in results]) - exact
    errors = torch.stack([r.error for r in results])
    assert 0.8 < deviations.square().mean().sqrt() / errors.square().mean().sqrt() < 1.25


def test_deviations_of_minimum_sharpness_from_few_products_have_the_length_of_its_errors():
    landscape = landscape_of(chain(6, 12, 8, bias=True))
    exact = float(minimum_sharpness(landscape, num_products=1000).value)
    with landscape.measurement():
        results = [minimum_sharpness(landscape, num_products=24, seed=seed) for seed in range(0, 300, 10)]
    z = torch.stack([(r.value - exact) / r.error for r in results])
    assert z.square().mean().sqrt() < 1.5
    assert (z.abs() < 2).double().mean() >= 0.9


def test_a_dead_layer_brings_the_minimum_to_zero_without_a_nan():
    problem = chain(3, 4, 2, bias=False)
    nn.init.zeros_(problem.module[0].weight)
    result = minimum_sharpness(landscape_of(problem), num_products=100)
    assert abs(float(result.value)) < 1e-6
    assert torch.isfinite(result.scales).all()
    assert torch.equal(minimizing_log_scales(torch.zeros(3), torch.zeros(3)), torch.zeros(3).double())


def test_a_negative_trace_leaves_no_minimum():
    module = chain(3, 4, 1, bias=False).module
    landscape = LossLandscape(module, [torch.randn(6, 3).double()], lambda m, x: -m(x).square().mean())
    result = minimum_sharpness(landscape, num_products=100)
    assert result.value == -math.inf
    assert not result.converged


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + F.relu(self.a(x)))


def test_modules_that_are_no_chain_are_refused_by_name():
    data = [(x.double(), y) for x, y in classification((9, 6), (4,))]
    for module in (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), Residual()):
        landscape = LossLandscape(module.double(), data, cross_entropy)
        with pytest.raises(UndefinedMeasureError, match=rf"got {type(module).__name__}, whose loss moves from"):
            MinimumSharpness().update(landscape)
    with pytest.raises(UndefinedMeasureError, match=r"got '1.bias' of a BatchNorm1d"):
        MinimumSharpness().update(landscape_of(make_problem("batchnorm_eval")))
