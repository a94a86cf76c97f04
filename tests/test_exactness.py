"""Every eigenvalue equals the dense Hessian's, in float64, in every geometry, on the table of problems."""

from __future__ import annotations

import pytest
import torch
from problems import all_problems, make_problem, wanted
from torch import Tensor

from lightning_flatness import LossLandscape, TopEigenvalues

GEOMETRIES = ("euclidean", "layer", "filter", "element")


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    """Dense Hessians, each computed once."""
    return {}


@all_problems
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_top_five_equal_the_dense_hessian(dense, name, geometry, which):
    problem = make_problem(name)
    if name not in dense:
        dense[name] = problem.dense_hessian()
    scale = problem.scale(geometry)
    exact = torch.linalg.eigvalsh(scale[:, None] * dense[name] * scale)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)
    metric = TopEigenvalues(k=5, geometry=geometry, which=which, tol=1e-9)
    metric.update(landscape)
    values, expected = metric.compute(), wanted(exact, which, 5)
    if which == "LM":  # of +x and -x either may come first
        values, expected = values.abs(), expected.abs()
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-10 * exact.abs().max())
    assert metric.converged


@all_problems
def test_loss_gradient_and_product_equal_torch_func(name):
    problem = make_problem(name)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)
    flat = torch.cat([p.detach().reshape(-1) for p in problem.parameters])
    v = torch.randn(problem.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hessian = problem.dense_hessian()
    torch.testing.assert_close(landscape.loss(), problem.mean_loss(flat).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(landscape.gradient(), torch.func.grad(problem.mean_loss)(flat), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(landscape.hvp(v), hessian @ v, rtol=1e-10, atol=1e-12)
    with landscape.measurement():  # the second product reuses the graph of the first
        landscape.hvp(v)
        torch.testing.assert_close(landscape.hvp(v), hessian @ v, rtol=1e-10, atol=1e-12)
