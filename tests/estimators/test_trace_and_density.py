"""Trace and spectral density against dense Hessians, their standard errors, and a second library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.problems import all_problems, make_problem
from hessian_eigenthings import HessianOperator, hutch_plus_plus
from hessian_eigenthings import spectral_density as their_density
from torch import Tensor

from lightning_flatness import HessianTrace, LossLandscape, SpectralDensity
from lightning_flatness.estimators import spectral_density, stochastic_trace
from lightning_flatness.estimators.density import quadrature, tridiagonalize

GEOMETRIES = ("euclidean", "layer", "filter", "element")


def landscape_of(name: str) -> tuple[LossLandscape, Tensor]:
    problem = make_problem(name)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)
    return landscape, problem.dense_hessian()


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * eigenvalues) @ q.T


DECAYING = 10 * torch.arange(1, 121, dtype=torch.float64) ** -1.5 - 0.02
"""Like a Hessian's: a few large eigenvalues, a crowd of small ones, some of them negative."""


@all_problems
@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace_is_within_four_standard_errors_of_the_dense_one(name, method):
    problem = make_problem(name)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)
    diagonal = problem.dense_hessian().diagonal()
    for geometry in GEOMETRIES:
        exact = (problem.scale(geometry) ** 2 * diagonal).sum()
        for num_products in (16, 48):
            metric = HessianTrace(geometry, method=method, num_products=num_products)
            metric.update(landscape)
            assert abs(metric.compute() - exact) <= 4 * metric.error, (geometry, num_products)


@all_problems
def test_trace_is_exact_where_every_coordinate_is_probed(name):
    landscape, hessian = landscape_of(name)
    metric = HessianTrace(num_products=landscape.num_parameters)
    metric.update(landscape)
    torch.testing.assert_close(metric.compute(), hessian.trace(), rtol=1e-10, atol=1e-10)
    assert metric.error <= 1e-10
    assert metric.num_products == landscape.num_parameters


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_standard_error_of_the_trace_is_calibrated_over_200_seeds(method):
    matrix = symmetric(DECAYING)
    options = {"method": method, "num_products": 32, "dtype": torch.float64}
    results = [stochastic_trace(lambda v: matrix @ v, 120, seed=seed, **options) for seed in range(200)]
    deviations = torch.stack([r.value for r in results]) - DECAYING.sum()
    errors = torch.stack([r.error for r in results])
    assert 0.85 < deviations.square().mean().sqrt() / errors.square().mean().sqrt() < 1.15
    assert abs(deviations.mean()) < 4 * deviations.std() / math.sqrt(200)
    assert (deviations.abs() > 2 * errors).double().mean() < 0.1


def test_standard_error_of_the_trace_of_a_network_is_calibrated_over_200_seeds():
    matrix = make_problem("relu_convnet").dense_hessian()
    results = [
        stochastic_trace(lambda v: matrix @ v, len(matrix), num_products=48, seed=s, dtype=torch.float64)
        for s in range(200)
    ]
    deviations = torch.stack([r.value for r in results]) - matrix.trace()
    errors = torch.stack([r.error for r in results])
    assert 0.85 < deviations.square().mean().sqrt() / errors.square().mean().sqrt() < 1.15


def test_hutch_plus_plus_beats_hutchinson_on_a_decaying_spectrum():
    matrix = symmetric(DECAYING)

    def error(method: str) -> float:
        options: dict[str, Any] = {"method": method, "num_products": 48, "dtype": torch.float64}
        values = [stochastic_trace(lambda v: matrix @ v, 120, seed=s, **options).value for s in range(40)]
        return float((torch.stack(values) - DECAYING.sum()).square().mean().sqrt())

    assert error("hutch++") < error("hutchinson") / 4


def test_trace_of_a_low_rank_operator_is_exact_with_hutch_plus_plus():
    eigenvalues = torch.zeros(200, dtype=torch.float64)
    eigenvalues[:3] = torch.tensor([5.0, -2.0, 1.0])
    matrix = symmetric(eigenvalues)
    result = stochastic_trace(lambda v: matrix @ v, 200, dtype=torch.float64)
    assert result.converged
    assert abs(result.value - 4) <= 1e-10
    zero = stochastic_trace(torch.zeros_like, 200)
    assert (zero.value, zero.error) == (0, 0)


def test_trace_agrees_with_hessian_eigenthings():
    problem = make_problem("relu_convnet")
    landscape = LossLandscape(problem.module, problem.batches[:1], problem.loss_fn)
    theirs = hutch_plus_plus(HessianOperator(problem.module, problem.batches[:1], problem.loss_fn), num_matvecs=99)
    metric = HessianTrace(num_products=99)
    metric.update(landscape)
    assert abs(metric.compute() - theirs.estimate) <= 4 * math.hypot(float(metric.error), theirs.stderr)


@all_problems
@pytest.mark.parametrize("geometry", ["euclidean", "element"])
def test_moments_of_the_density_are_those_of_the_dense_hessian(name, geometry):
    problem = make_problem(name)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)
    scale = problem.scale(geometry)
    eigenvalues = torch.linalg.eigvalsh(scale[:, None] * problem.dense_hessian() * scale)
    moments = torch.stack([(eigenvalues**p).mean() for p in range(1, 5)])
    result = spectral_density(landscape, geometry, num_runs=10, num_steps=3)  # by quadrature, for all but the smallest
    # Six, not four: higher moments of ten runs are skewed. Their errors' calibration is another test.
    assert ((result.moments - moments).abs() <= 6 * result.moment_errors + 1e-12).all()
    exact = spectral_density(landscape, geometry)
    assert exact.num_runs == 0
    torch.testing.assert_close(exact.moments, moments, rtol=1e-8, atol=1e-12)
    is_negative = eigenvalues < -1e-10 * eigenvalues.abs().max()
    assert exact.negative_share == pytest.approx(float(is_negative.double().mean()), abs=1e-12)


def operator_landscape(matrix: Tensor) -> LossLandscape:
    """A landscape with a given Hessian: ``wᵀ A w / 2``."""

    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(len(matrix), dtype=torch.float64))

    return LossLandscape(Quadratic(), [torch.zeros(1)], lambda m, _: 0.5 * m.w @ (matrix @ m.w))


def test_moments_of_single_runs_are_unbiased_and_their_errors_calibrated_over_200_seeds():
    landscape = operator_landscape(symmetric(DECAYING))
    exact = torch.stack([(DECAYING**p).mean() for p in range(1, 5)])
    results = [spectral_density(landscape, num_runs=8, num_steps=5, num_points=8, seed=seed) for seed in range(200)]
    deviations = torch.stack([r.moments for r in results]) - exact
    errors = torch.stack([r.moment_errors for r in results])
    ratio = deviations.square().mean(dim=0).sqrt() / errors.square().mean(dim=0).sqrt()
    assert ((ratio > 0.8) & (ratio < 1.2)).all()
    assert (deviations.mean(dim=0).abs() < 4 * deviations.std(dim=0) / math.sqrt(200)).all()


def test_errors_of_moments_and_of_the_negative_share_hold_on_the_spectrum_of_a_trained_network():
    """Few outliers and a crowd around zero: without the outliers' part, sd of z was up to 3."""
    positive, negative = 10 * 0.5 ** torch.arange(10).double(), -0.3 * 0.9 ** torch.arange(60).double()
    eigenvalues = torch.cat([positive, negative, 0.05 * 0.97 ** torch.arange(330).double()])
    landscape = operator_landscape(symmetric(eigenvalues))
    exact = torch.stack([(eigenvalues**p).mean() for p in range(1, 5)])
    with landscape.measurement():
        results = [spectral_density(landscape, num_steps=20, num_points=8, seed=seed) for seed in range(60)]
    z = torch.stack([(r.moments - exact) / r.moment_errors for r in results])
    assert ((z.square().mean(dim=0).sqrt() > 0.6) & (z.square().mean(dim=0).sqrt() < 1.3)).all()
    share = float((eigenvalues < 0).double().mean())
    assert all(abs(float(r.negative_share) - share) <= float(r.negative_share_error) for r in results)


def test_density_is_the_smoothed_spectrum_and_integrates_to_one():
    landscape = operator_landscape(symmetric(DECAYING))
    result = spectral_density(landscape, num_runs=4, num_steps=25, width=0.03, seed=1)
    kernel = (result.grid[:, None] - DECAYING) / result.width
    dense = (torch.exp(-0.5 * kernel**2) / (result.width * math.sqrt(2 * math.pi))).mean(dim=1)
    spacing = result.grid[1] - result.grid[0]
    assert float(result.value.sum() * spacing) == pytest.approx(1, abs=1e-3)
    assert float((result.value - dense).abs().sum() * spacing) < 0.05
    assert abs(result.negative_share - (DECAYING < 0).double().mean()) <= 4 * result.negative_share_error


def test_density_agrees_with_hessian_eigenthings():
    problem = make_problem("relu_convnet")
    batches = problem.batches[:1]
    theirs = their_density(
        HessianOperator(problem.module, batches, problem.loss_fn), num_runs=30, lanczos_steps=20, sigma=0.05, seed=0
    )
    landscape = LossLandscape(problem.module, batches, problem.loss_fn)
    ours = spectral_density(landscape, num_runs=5, num_steps=20, seed=3)
    ours = spectral_density(landscape, num_runs=7, num_steps=20, width=0.01 * 0.05 / float(ours.width), seed=3)
    assert ours.num_runs == 7
    mean = (theirs.raw_eigenvalues * theirs.raw_weights).sum(dim=1)
    error = math.hypot(float(mean.std()) / math.sqrt(30), float(ours.moment_errors[0]))
    assert abs(float(mean.mean()) - float(ours.moments[0])) < 4 * error
    at = torch.searchsorted(theirs.grid, ours.grid.clamp(theirs.grid[0], theirs.grid[-1] - 1e-9))
    inside = (ours.grid > theirs.grid[0]) & (ours.grid < theirs.grid[-1])
    difference = (ours.value - theirs.density[at])[inside].abs()
    assert (difference <= 5 * ours.error[inside] + 0.15 * float(theirs.density.max())).all()


def test_quadrature_is_exact_for_polynomials_up_to_twice_the_steps():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(120, generator=generator, dtype=torch.float64)
    matrix = symmetric(DECAYING)
    nodes, weights = quadrature(*tridiagonalize(lambda v: matrix @ v, start, 4))
    unit = start / start.norm()
    for power in range(8):
        exact = unit @ torch.linalg.matrix_power(matrix, power) @ unit
        torch.testing.assert_close((weights * nodes**power).sum(), exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("eigenvalues", [torch.zeros(400), torch.full((400,), 3.0)], ids=["zero", "identity"])
def test_density_of_a_single_eigenvalue(eigenvalues):
    result = spectral_density(operator_landscape(torch.diag(eigenvalues.double())))
    torch.testing.assert_close(result.moments[0], eigenvalues[0].double())
    assert torch.isfinite(result.value).all()
    assert result.negative_share == 0
    assert result.converged


def test_density_figure_and_plot_touch_no_pyplot_state():
    landscape, _ = landscape_of("tanh_mlp")
    metric = SpectralDensity(num_runs=2, num_steps=3)
    metric.plot()  # before there is anything to draw
    metric.update(landscape)
    _, ax = metric.plot()
    assert ax.get_yscale() == "log"
    assert len(ax.lines[0].get_xdata()) == 256
    assert metric.figure().axes[0].get_title() == "2 runs of 3 steps"


def bad(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_arguments_say_what_was_expected():
    bad(lambda: HessianTrace(num_products=3), r"Expected `num_products` to be an integer >= 4 .* got 3")
    bad(lambda: HessianTrace(method="xtrace"), r"Expected `method` to be 'hutch\+\+' or 'hutchinson', got 'xtrace'")
    bad(lambda: HessianTrace(operator="fisher"), r"Expected `operator` to be 'hessian' or 'ggn', got 'fisher'")
    bad(lambda: HessianTrace(tol=-1), r"Expected `tol` to be >= 0, got -1")
    bad(lambda: HessianTrace("spherical"), r"Expected `geometry` to be one of .*, got 'spherical'")
    bad(lambda: SpectralDensity(num_runs=1), r"Expected `num_runs` to be an integer >= 2, got 1")
    bad(lambda: SpectralDensity(num_steps=2), r"Expected `num_steps` to be an integer >= 3, got 2")
    bad(lambda: SpectralDensity(num_points=1), r"Expected `num_points` to be an integer >= 2, got 1")
    bad(lambda: SpectralDensity(width=0.0), r"Expected `width` to be > 0, got 0.0")


def test_a_product_that_is_not_finite_is_an_error():
    for measure in (
        lambda: stochastic_trace(lambda v: v * torch.nan, 3),
        lambda: stochastic_trace(lambda v: v * torch.nan, 300),
        lambda: tridiagonalize(lambda v: v * torch.inf, torch.ones(9), 4),
    ):
        with pytest.raises(RuntimeError, match=r"Expected finite Hessian-vector products, got one that is not"):
            measure()
