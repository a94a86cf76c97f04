"""What Lanczos may have missed: the bound against orthogonal polynomials, the chance against simulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_flatness.estimators import lanczos
from lightning_flatness.estimators.krylov.misses import chance_of_less, largest_hidden_component


def krylov_space(spectrum: Tensor, weights: Tensor, num_steps: int) -> tuple[Tensor, float]:
    """Return the projection of a diagonal operator onto a Krylov space, by QR, and the norm of what sticks out."""
    powers = weights.sqrt()[:, None] * spectrum[:, None] ** torch.arange(num_steps, dtype=torch.float64)
    q, _ = torch.linalg.qr(powers)
    q[:, 0] *= torch.sign(q[0, 0])
    product = spectrum * q[:, -1]
    return q.T @ (spectrum[:, None] * q), float(torch.linalg.vector_norm(product - q @ (q.T @ product)))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("mu", [1.3, 4.0])
def test_the_bound_is_the_christoffel_function(num_steps, mu):
    generator = torch.Generator().manual_seed(num_steps)
    spectrum = 2 * torch.rand(30, generator=generator, dtype=torch.float64) - 1
    weights = torch.rand(30, generator=generator, dtype=torch.float64)
    weights /= weights.sum()
    projection, norm = krylov_space(spectrum, weights, num_steps)
    first = torch.eye(num_steps, dtype=torch.float64)[0]
    bound = largest_hidden_component(projection, first, norm, mu)
    # 1 / sum of p_i(mu)² over the orthonormal polynomials up to the degree num_steps
    powers = torch.arange(num_steps + 1, dtype=torch.float64)
    moments = (spectrum[:, None] ** powers).T @ (weights[:, None] * spectrum[:, None] ** powers)
    at_mu = mu**powers
    assert bound**2 == pytest.approx(float(1 / (at_mu @ torch.linalg.solve(moments, at_mu))), rel=1e-8)


@pytest.mark.parametrize("weight", [1e-2, 1e-4, 1e-8])
def test_an_eigenvalue_that_is_there_hides_with_no_more_than_the_bound(weight):
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.cat([2 * torch.rand(40, generator=generator, dtype=torch.float64) - 1, torch.tensor([3.0])])
    weights = torch.full((41,), (1 - weight) / 40, dtype=torch.float64)
    weights[-1] = weight
    bounds = []
    for num_steps in range(1, 9):
        projection, norm = krylov_space(spectrum, weights, num_steps)
        first = torch.eye(num_steps, dtype=torch.float64)[0]
        bounds.append(largest_hidden_component(projection, first, norm, 3.0))
        assert bounds[-1] >= weight**0.5
    assert bounds[0] < 0.3


def test_a_ritz_value_beyond_hides_nothing():
    assert largest_hidden_component(torch.tensor([[5.0]]), torch.ones(1), 0.1, mu=3.0) == 1.0
    assert chance_of_less(1.0, 10) == 1.0


def test_an_invariant_space_shows_all_there_is():
    assert largest_hidden_component(torch.tensor([[1.0]]), torch.ones(1), 0.0, mu=3.0) == 0.0
    result = lanczos(lambda v: 0 * v, 500, k=5, tol=1e-3)
    assert result.converged
    assert result.num_products <= 10


@pytest.mark.parametrize("component", [1e-3, 1e-2])
def test_the_chance_bounds_how_often_a_random_vector_has_less(component):
    size, num = 400, 20_000
    vectors = torch.randn(num, size, generator=torch.Generator().manual_seed(0))
    share = float((vectors[:, 0].abs() / vectors.norm(dim=1) <= component).float().mean())
    chance = chance_of_less(component, size)
    assert share <= chance + 3 * (chance / num) ** 0.5
    assert share >= 0.8 * chance - 3 * (chance / num) ** 0.5


def test_a_copy_is_missed_in_one_of_ten_runs_at_most():
    spectrum = torch.cat([torch.tensor([6.0, 5.0, 5.0, 4.0]), torch.linspace(-1, 1, 496)])
    num_runs, num_missed = 100, 0
    for seed in range(num_runs):
        result = lanczos(lambda v: spectrum * v, len(spectrum), k=3, tol=1e-2, seed=seed)
        assert result.converged
        num_missed += int(result.eigenvalues[2] < 4.5)
    assert num_missed <= num_runs * 0.1 + 3 * (num_runs * 0.1 * 0.9) ** 0.5


def test_many_copies_of_one_eigenvalue_to_a_small_residual():
    """Every copy opens a space of its own: what was left for it is taken up again where it stands in the way."""
    spectrum = torch.cat([torch.full((7,), 9.0), torch.full((3,), 4.0), torch.linspace(0, 1, 390)]).double()
    result = lanczos(
        lambda v: spectrum * v, len(spectrum), k=5, tol=1e-10, max_basis=60, max_products=600, dtype=torch.float64
    )
    assert result.converged
    assert result.num_products <= 75  # many more, or never, if what was left is not taken up again
    torch.testing.assert_close(result.eigenvalues, torch.full((5,), 9.0).double(), rtol=1e-12, atol=0)
    y = result.eigenvectors
    true_residuals = torch.linalg.vector_norm(y * spectrum - result.eigenvalues[:, None] * y, dim=1)
    assert (true_residuals <= result.residuals + 1e-12).all()


def test_an_operator_may_return_its_argument_or_a_view():
    for operator in (lambda v: v, lambda v: v.sum().expand(len(v)), lambda v: torch.stack([v, v], dim=1)[:, 0]):
        expected = torch.linalg.eigvalsh(torch.stack([operator(row) for row in torch.eye(6)]))[-1]
        assert float(lanczos(operator, 6, tol=1e-5).eigenvalues) == pytest.approx(float(expected), rel=1e-5)
