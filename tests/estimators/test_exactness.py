"""Every eigenvalue equals the dense Hessian's, in float64, in every geometry, on the table of problems."""

from __future__ import annotations

import pytest
import torch
from helpers.problems import all_problems, make_problem, wanted
from hessian_eigenthings import HessianOperator
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


def with_intercept(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    x = torch.cat([x for x, _ in batches])
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def test_linear_regression_in_closed_form():
    """The mean over 13 samples and 2 outputs: H = Xᵀ X / 13, once per output."""
    problem = make_problem("linear_regression")
    x = with_intercept(problem.batches)
    once = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    metric = TopEigenvalues(k=5, tol=1e-10)
    metric.update(LossLandscape(problem.module, problem.batches, problem.loss_fn))
    torch.testing.assert_close(metric.compute(), once.repeat_interleave(2)[:5], rtol=1e-8, atol=0)


def test_logistic_regression_in_closed_form():
    """H = mean (diag(p) - p pᵀ) ⊗ x xᵀ."""
    problem = make_problem("logistic_regression")
    x = with_intercept(problem.batches)
    p = torch.cat([problem.module(x) for x, _ in problem.batches]).softmax(dim=1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nij,na,nb->iajb", curvature, x, x).reshape(18, 18) / len(x)
    metric = TopEigenvalues(k=5, tol=1e-10)
    metric.update(LossLandscape(problem.module, problem.batches, problem.loss_fn))
    torch.testing.assert_close(metric.compute(), torch.linalg.eigvalsh(hessian).flip(0)[:5], rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["tanh_mlp", "relu_convnet", "batchnorm_eval", "tied_weights", "frozen_parameters"])
def test_hessian_eigenthings_agrees(name):
    """The operator of another library, on one batch: it averages over batches whatever their size."""
    problem = make_problem(name)
    problem.module.eval()
    batch = problem.batches[0]
    trainable = {n for n, p in problem.module.named_parameters() if p.requires_grad}
    operator = HessianOperator(problem.module, [batch], problem.loss_fn, param_filter=lambda n, p: n in trainable)
    columns = [operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)]
    theirs = wanted(torch.linalg.eigvalsh(torch.stack(columns)), "LM", 3)
    metric = TopEigenvalues(k=3, which="LM", tol=1e-10)
    metric.update(LossLandscape(problem.module, [batch], problem.loss_fn, mode="eval"))
    torch.testing.assert_close(metric.compute().abs(), theirs.abs(), rtol=1e-8, atol=1e-12)
