"""Worst case against the solution of the trust-region problem, average case against the trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.problems import Problem, all_problems, make_problem
from scipy.optimize import brentq
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import AverageCaseSharpness, LossLandscape, OutputLoss, WorstCaseSharpness
from lightning_flatness.estimators import average_case_sharpness, top_eigenvalues, worst_case_sharpness
from lightning_flatness.landscape.derived import with_normalized_logits


def landscape_of(problem: Problem) -> LossLandscape:
    return LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)


def trust_region_maximum(hessian: Tensor, gradient: Tensor, rho: float) -> float:
    """Return max g·z + z·Hz/2 over ‖z‖ <= rho for positive semi-definite H, from the secular equation."""
    values, vectors = torch.linalg.eigh(hessian)
    b = vectors.T @ gradient

    def excess(mu: float) -> float:
        return float((b / (mu - values)).square().sum()) - rho**2

    top = float(values[-1])
    mu = brentq(excess, top * (1 + 1e-12) + 1e-12, top + 2 * float(gradient.norm()) / rho + 1, xtol=1e-14)
    z = b / (mu - values)
    return float(b @ z + 0.5 * (values * z.square()).sum())


@pytest.mark.parametrize("geometry", ["euclidean", "element"])
@pytest.mark.parametrize("rho", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_worst_case_of_a_quadratic_is_the_trust_region_maximum(geometry, rho, seed):
    problem = make_problem("linear_regression", seed=seed)
    landscape, scale = landscape_of(problem), problem.scale(geometry)
    gradient = scale * landscape.gradient()
    exact = trust_region_maximum(scale[:, None] * problem.dense_hessian() * scale, gradient, rho)
    result = worst_case_sharpness(landscape, rho, geometry, tol=1e-6, num_steps=100)
    assert float(result.value) == pytest.approx(exact, rel=1e-6)
    assert result.converged
    default = worst_case_sharpness(landscape, rho, geometry)
    assert float(default.value) == pytest.approx(exact, rel=1e-2)
    assert float(default.value) <= exact * (1 + 1e-12)


def at_the_minimum(problem: Problem) -> Problem:
    x, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    solution = torch.linalg.lstsq(design, y).solution
    problem.module.weight.data, problem.module.bias.data = solution[:-1].T.contiguous(), solution[-1].clone()
    return problem


@pytest.mark.parametrize("geometry", ["euclidean", "layer", "filter", "element"])
def test_at_the_minimum_of_a_quadratic_it_is_half_the_top_eigenvalue_times_rho_squared(geometry):
    problem = at_the_minimum(make_problem("linear_regression"))
    scale = problem.scale(geometry)
    top = torch.linalg.eigvalsh(scale[:, None] * problem.dense_hessian() * scale)[-1]
    result = worst_case_sharpness(landscape_of(problem), 0.3, geometry)
    assert float(result.value) == pytest.approx(0.5 * 0.3**2 * float(top), rel=1e-5)


@all_problems
@pytest.mark.parametrize("geometry", ["euclidean", "element"])
def test_never_below_the_rise_along_the_top_eigenvector_nor_below_zero(name, geometry):
    problem = make_problem(name)
    landscape = landscape_of(problem)
    eigenvector = top_eigenvalues(landscape, geometry, tol=1e-6).eigenvectors[0]
    for rho in (0.02, 0.5):
        value = worst_case_sharpness(landscape, rho, geometry, num_steps=5, num_restarts=0).value
        chart, centre = landscape.chart(geometry), landscape.loss()
        for end in (rho * eigenvector, -rho * eigenvector):
            with landscape.displaced(chart.displacement(end)):
                assert value >= landscape.loss() - centre - 1e-5 * abs(value)
        assert value >= 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_at_a_maximum_of_the_loss_it_is_zero_and_not_negative(norm):
    module = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    landscape = LossLandscape(module, [torch.randn(5, 3).double()], lambda m, x: -m(x).square().mean())
    result = worst_case_sharpness(landscape, 0.1, norm=norm)
    assert result.value == 0
    assert result.converged


def test_l_infinity_ball_of_a_linear_loss_is_rho_times_the_l1_norm():
    torch.manual_seed(0)
    module = nn.Linear(6, 1).double()
    landscape = LossLandscape(module, [torch.randn(5, 6).double()], lambda m, x: m(x).mean())
    result = worst_case_sharpness(landscape, 0.2, norm="linf")
    assert float(result.value) == pytest.approx(0.2 * float(landscape.gradient().abs().sum()), rel=1e-12)
    ball = worst_case_sharpness(landscape, 0.2)
    assert float(ball.value) == pytest.approx(0.2 * float(landscape.gradient().norm()), rel=1e-12)


def test_l_infinity_ball_of_a_small_quadratic_is_the_best_corner():
    problem = make_problem("linear_regression", seed=3)
    landscape = landscape_of(problem)
    hessian, gradient = problem.dense_hessian(), landscape.gradient()
    corners = torch.cartesian_prod(*[torch.tensor([-0.3, 0.3], dtype=torch.float64)] * problem.num_parameters)
    best = (corners @ gradient + 0.5 * ((corners @ hessian) * corners).sum(dim=1)).max()
    result = worst_case_sharpness(landscape, 0.3, norm="linf", num_restarts=4)
    assert float(result.value) == pytest.approx(float(best), rel=1e-6)


def test_m_sharpness_is_the_average_of_the_worst_cases_of_sub_batches():
    problem = make_problem("linear_regression")  # batches of 8 and 5: sub-batches of 4 reach from one into the other
    x, y = (torch.cat(parts) for parts in zip(*problem.batches, strict=True))
    parts = [LossLandscape(problem.module, [(x[i : i + 4], y[i : i + 4])], problem.loss_fn) for i in range(0, 13, 4)]
    exact = 0.0
    for part in parts:
        v = torch.eye(problem.num_parameters, dtype=torch.float64)
        hessian = torch.stack([part.hvp(e) for e in v])
        exact += part.num_samples / 13 * trust_region_maximum(hessian, part.gradient(), 0.5)
    result = worst_case_sharpness(landscape_of(problem), 0.5, num_samples=4, tol=1e-6, num_steps=100)
    assert float(result.value) == pytest.approx(exact, rel=1e-6)
    assert result.num_products == 0
    whole = worst_case_sharpness(landscape_of(problem), 0.5, num_samples=13, tol=1e-6, num_steps=100)
    assert float(whole.value) == pytest.approx(float(worst_case_sharpness(landscape_of(problem), 0.5).value), rel=1e-2)
    assert result.value >= whole.value


def test_cost_of_sub_batches_is_counted_in_gradients_of_the_whole():
    problem = make_problem("tanh_mlp")
    landscape = landscape_of(problem)
    worst_case_sharpness(landscape, 0.1, num_samples=4, num_steps=6, num_restarts=1, tol=0.0)
    assert landscape.cost.gradient_evaluations <= 13 + 1e-6


@pytest.mark.parametrize("measure", [worst_case_sharpness, average_case_sharpness])
def test_exact_zeros_among_the_weights_do_not_move_in_adaptive_geometry(measure):
    problem = make_problem("zero_bias")
    problem.module[0].weight.data[1] = 0
    landscape = landscape_of(problem)
    weights = [p.clone() for p in problem.parameters]
    result = measure(landscape, 0.5, "element")
    assert torch.isfinite(result.value)
    assert all(torch.equal(p, w) for p, w in zip(problem.parameters, weights, strict=True))


def test_adaptive_sharpness_stays_put_when_relu_units_are_rescaled():
    problem = make_problem("relu_convnet")
    before = worst_case_sharpness(landscape_of(problem), 0.1, "element", num_steps=60, tol=1e-5)
    factor = torch.tensor([100.0, 0.01, 7.0], dtype=torch.float64)
    with torch.no_grad():
        problem.module[0].weight.mul_(factor.view(-1, 1, 1, 1))
        problem.module[0].bias.mul_(factor)
        problem.module[3].weight.div_(factor.view(1, -1, 1, 1))
    after = worst_case_sharpness(landscape_of(problem), 0.1, "element", num_steps=60, tol=1e-5)
    assert float(after.value) == pytest.approx(float(before.value), rel=1e-4)


def test_average_case_of_a_quadratic_is_the_trace():
    problem = make_problem("linear_regression")
    for geometry in ("euclidean", "element"):
        exact = float((problem.scale(geometry) ** 2 * problem.dense_hessian().diagonal()).sum())
        result = average_case_sharpness(landscape_of(problem), 0.7, geometry, num_draws=400)
        assert abs(float(result.value) - 0.7**2 * exact / (2 * problem.num_parameters)) <= 4 * float(result.error)


def test_standard_error_of_the_average_case_is_calibrated_over_200_seeds():
    problem = make_problem("linear_regression")
    landscape = landscape_of(problem)
    exact = 0.7**2 * float(problem.dense_hessian().trace()) / (2 * problem.num_parameters)
    results = [average_case_sharpness(landscape, 0.7, num_draws=12, seed=seed) for seed in range(200)]
    deviations = torch.stack([r.value for r in results]) - exact
    errors = torch.stack([r.error for r in results])
    assert 0.85 < deviations.square().mean().sqrt() / errors.square().mean().sqrt() < 1.15
    assert abs(deviations.mean()) < 4 * deviations.std() / math.sqrt(200)


@pytest.mark.parametrize("metric", [WorstCaseSharpness, AverageCaseSharpness])
def test_normalised_logits_make_the_scale_of_the_last_layer_irrelevant(metric):
    problem = make_problem("tanh_mlp")
    loss = OutputLoss(F.cross_entropy)

    def measure(normalize: bool) -> float:
        landscape = LossLandscape(problem.module, problem.batches, loss)
        m = metric(rho=0.1, geometry="layer", normalize_logits=normalize)
        m.update(landscape)
        return float(m.compute())

    before = measure(True), measure(False)
    with torch.no_grad():
        problem.module[2].weight.mul_(10)
        problem.module[2].bias.mul_(10)
    assert measure(True) == pytest.approx(before[0], rel=1e-4)
    assert measure(False) != pytest.approx(before[1], rel=0.1)


def test_normalised_logits_are_those_of_the_paper():
    problem = make_problem("tanh_mlp")
    landscape = LossLandscape(problem.module, problem.batches, OutputLoss(F.cross_entropy))
    expected = 0.0
    for x, y in problem.batches:
        f = problem.module(x)
        deviation = ((f - f.mean(dim=1, keepdim=True)) ** 2).mean(dim=1, keepdim=True).sqrt()
        expected += F.cross_entropy(f / deviation, y, reduction="sum").item() / landscape.num_samples
    with landscape.measurement(), landscape.measurement():
        assert float(with_normalized_logits(landscape).loss()) == pytest.approx(expected, rel=1e-12)
    binary = LossLandscape(nn.Linear(4, 1).double(), problem.batches, OutputLoss(lambda f, t: f.mean()))
    with pytest.raises(ValueError, match=r"Expected logits of two or more classes .* got outputs of shape \(8, 1\)"):
        WorstCaseSharpness(normalize_logits=True).update(binary)


@pytest.mark.parametrize("rho", [0.0, -0.1, float("nan"), float("inf"), "0.1"])
def test_rho_has_to_be_positive(rho):
    for metric in (WorstCaseSharpness, AverageCaseSharpness):
        with pytest.raises(ValueError, match=r"Expected `rho` to be > 0 and finite, got"):
            metric(rho=rho)


def test_other_bad_arguments():
    for options, message in [
        ({"norm": "l1"}, "Expected `norm` to be 'l2' or 'linf', got 'l1'"),
        ({"num_steps": 0}, "Expected `num_steps` to be an integer >= 1, got 0"),
        ({"num_restarts": -1}, "Expected `num_restarts` to be an integer >= 0, got -1"),
        ({"num_samples": 0}, "Expected `num_samples` to be an integer >= 1, got 0"),
        ({"tol": -1.0}, "Expected `tol` to be >= 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            WorstCaseSharpness(**options)
    with pytest.raises(ValueError, match="Expected `num_draws` to be an integer >= 2"):
        AverageCaseSharpness(num_draws=1)


def test_batches_that_cannot_be_split_are_named():
    landscape = LossLandscape(
        nn.Linear(3, 1), [torch.randn(4, 3)], lambda m, x: m(x).mean(), batch_size_fn=lambda batch: 12
    )
    with pytest.raises(ValueError, match="Expected a batch of 12 samples that can be split, got Tensor"):
        WorstCaseSharpness(num_samples=5).update(landscape)


def test_weights_of_low_precision_do_not_pass_for_exact():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)).bfloat16()
    x, y = torch.randn(7, 3).bfloat16(), torch.randint(3, (7,))
    landscape = LossLandscape(module, [(x, y)], OutputLoss(F.cross_entropy))
    twin = LossLandscape(copy.deepcopy(module).float(), [(x.float(), y)], OutputLoss(F.cross_entropy))
    exact = float(average_case_sharpness(twin, 0.05).value)
    result = average_case_sharpness(landscape, 0.05)
    assert abs(float(result.value) - exact) <= 4 * float(result.error)
    assert not result.converged
    worst = worst_case_sharpness(landscape, 0.05)
    assert abs(float(worst.value) - float(worst_case_sharpness(twin, 0.05).value)) <= 4 * float(worst.error)


@pytest.mark.parametrize(("activation", "steps"), [(nn.ReLU, 1200), (nn.Tanh, 400)])
def test_on_a_trained_network_it_is_that_of_many_restarts(activation, steps):
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16 - 0.3
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10)
    )  # fmt: skip
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(steps):
        chosen = torch.randint(1400, (32,))
        optimizer.zero_grad()
        F.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
    landscape = LossLandscape(module, [(x[:128], y[:128])], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    result = worst_case_sharpness(landscape, 2.0)
    assert result.converged
    assert landscape.cost.gradient_evaluations <= 120
    best = worst_case_sharpness(landscape, 2.0, num_restarts=24, num_steps=30, seed=5)
    assert float(result.value) >= 0.98 * float(best.value)
