"""Finite differences of the gradient are as wrong as they say, at little cost."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.problems import Problem, all_problems, cross_entropy, make_problem
from torch import Tensor, nn

from lightning_flatness import LossLandscape
from lightning_flatness.landscape.engines.finite_difference import relative_length

NUM_PRODUCTS = 5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def numeric(problem: Problem) -> LossLandscape:
    return LossLandscape(
        problem.module, problem.batches, problem.loss_fn, mode=problem.mode, engine="finite_difference"
    )


def in_float64(problem: Problem) -> LossLandscape:
    """The same loss, differentiated exactly."""
    batches = [(x.double(), y.double() if y.is_floating_point() else y) for x, y in problem.batches]
    module = copy.deepcopy(problem.module).double()
    return LossLandscape(module, batches, problem.loss_fn, mode=problem.mode, engine="exact")


def assert_honest(problem: Problem) -> float:
    """Compare products of vectors of very different lengths; return the error reported in the end."""
    landscape, exact = numeric(problem), in_float64(problem)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    with landscape.measurement(), exact.measurement():
        for i in range(NUM_PRODUCTS):
            v = 10.0 ** (2 * i - 4) * torch.randn(landscape.num_parameters, generator=generator).to(landscape.dtype)
            product, expected = landscape.hvp(v).double(), exact.hvp(v.double())
            largest = max(largest, float(product.norm() / v.norm()))
            error = float((product - expected).norm() / v.norm())
            assert error <= 3 * landscape.product_error * largest + 1e-14 * largest, (i, error, landscape.product_error)
    return landscape.product_error


TABLE = ["logistic_regression", "linear_regression", "tanh_mlp", "relu_convnet", "batchnorm_train", "zero_bias"]


@DTYPES
@pytest.mark.parametrize("name", TABLE)
def test_the_error_is_the_one_reported(name, dtype):
    assert assert_honest(make_problem(name, dtype)) < (1e-3 if dtype == torch.float32 else 1e-8)


BADLY_SCALED = [
    (name, norm, dtype)
    for name in ("tanh_mlp", "relu_convnet", "batchnorm_train")
    for norm in (1e-3, 1e3)
    for dtype in (torch.float32, torch.float64)
    if (name, norm, dtype) != ("tanh_mlp", 1e3, torch.float32)  # saturated: no curvature that float32 can hold
]


@pytest.mark.parametrize(("name", "norm", "dtype"), BADLY_SCALED)
def test_badly_scaled_weights(name, norm, dtype):
    problem = make_problem(name, dtype)
    with torch.no_grad():
        factor = norm / math.hypot(*(float(p.norm()) for p in problem.parameters))
        for p in problem.parameters:
            p.mul_(factor)
    error = assert_honest(problem)
    assert dtype == torch.float32 or error < 1e-6


@DTYPES
def test_layers_of_very_different_size(dtype):
    problem = make_problem("tanh_mlp", dtype)
    with torch.no_grad():
        problem.module[0].weight.mul_(1e-3)
        problem.module[2].weight.mul_(1e3)
    assert assert_honest(problem) < (1e-2 if dtype == torch.float32 else 1e-8)


@DTYPES
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_small_and_large_gradients(factor, dtype):
    problem = make_problem("tanh_mlp", dtype)
    problem.loss_fn = lambda m, b: factor * cross_entropy(m, b)
    assert assert_honest(problem) < (1e-3 if dtype == torch.float32 else 1e-8)


def relu_network(dtype: torch.dtype) -> Problem:
    """So many kinks nearby that only tiny steps cross none: too tiny for float32."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 5)).to(dtype)
    x, y = torch.randn(100, 30, dtype=dtype), torch.randint(5, (100,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(module, (x, y)).backward()
        optimizer.step()
    return Problem(module, [(x, y)], cross_entropy)


def test_kinks():
    assert assert_honest(relu_network(torch.float64)) < 1e-4
    assert assert_honest(relu_network(torch.float32)) > 0.05


def test_bfloat16():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 5)).bfloat16()

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = m(batch[0].to(m[0].weight.dtype))
        return cross_entropy(nn.Identity(), (logits.to(torch.promote_types(logits.dtype, torch.float32)), batch[1]))

    batches = [(torch.randn(64, 8), torch.randint(5, (64,)))]
    assert assert_honest(Problem(module, batches, loss_fn)) < 0.3


def test_a_zero_vector_costs_nothing():
    landscape = numeric(make_problem("tanh_mlp"))
    assert not landscape.hvp(torch.zeros(landscape.num_parameters, dtype=torch.float64)).any()
    assert landscape.cost.gradient_evaluations == 0


def test_a_loss_that_is_linear_has_a_zero_product_without_an_error():
    landscape = LossLandscape(nn.Linear(3, 1), [torch.ones(4, 3)], lambda m, x: m(x).mean(), engine="finite_difference")
    assert not landscape.hvp(torch.ones(4)).any()
    assert landscape.product_error == 0


@all_problems
def test_cost_is_two_gradients_after_a_few_for_the_step(name):
    landscape = numeric(make_problem(name))
    costs = []
    for _ in range(2):  # the second measurement keeps the step, after a look
        with landscape.measurement():
            for seed in range(8):
                before = landscape.cost.gradient_evaluations
                landscape.hvp(_vector(landscape, seed))
                costs.append(landscape.cost.gradient_evaluations - before)
    assert costs[0] <= (24 if name == "linear_regression" else 12)  # a quadratic allows ever larger steps
    assert sorted(costs[1:])[: len(costs) // 2] == pytest.approx([2] * (len(costs) // 2))
    if name != "linear_regression":
        assert costs[1:] == pytest.approx([4, 2, 4, 2, 2, 2, 4, 4, 4, 2, 4, 2, 2, 2, 4])


def test_a_step_that_fits_no_more_is_chosen_anew():
    problem = make_problem("tanh_mlp")
    landscape = numeric(problem)
    landscape.hvp(_vector(landscape))
    with torch.no_grad():
        for p in problem.parameters:
            p.mul_(200)
    exact = LossLandscape(problem.module, problem.batches, cross_entropy, engine="exact")
    v = _vector(landscape)
    before = landscape.cost.gradient_evaluations
    product, expected = landscape.hvp(v), exact.hvp(v)
    assert landscape.cost.gradient_evaluations - before > 8
    assert (product - expected).norm() <= 3 * landscape.product_error * product.norm()
    assert landscape.product_error < 1e-4


def test_length_of_a_step_relative_to_the_tensors():
    weights = torch.tensor([5.0, 0.1])
    assert relative_length(weights, torch.tensor([1.0, 0.0]), [2, 1]) == pytest.approx(5)
    assert relative_length(weights, torch.tensor([0.0, 2.0]), [2, 1]) == pytest.approx(0.05)
    assert relative_length(torch.zeros(1), torch.tensor([5.0]), [3]) == pytest.approx(math.sqrt(3) / 5)


def _vector(landscape: LossLandscape, seed: int = 0) -> Any:
    return torch.randn(landscape.num_parameters, dtype=landscape.dtype, generator=torch.Generator().manual_seed(seed))
