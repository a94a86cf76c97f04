"""What ``converged`` and the error of eigenvalues promise, in low precision, too; eigenvalues that change places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import LossLandscape
from lightning_flatness.estimators import EigenResult, lanczos, top_eigenvalues


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def network(activation: type[nn.Module], seed: int, steps: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    layers = [nn.Linear(10, 20), activation(), nn.Linear(20, 20), activation(), nn.Linear(20, 4)]
    module, x, y = nn.Sequential(*layers), torch.randn(128, 10), torch.randint(4, (128,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module, (x, y)).backward()
        optimizer.step()
    return module, x, y


def true_eigenvalues(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """All eigenvalues of the Hessian at the same weights, dense and in float64, in ascending order."""
    landscape = LossLandscape(copy.deepcopy(module).double(), [(x.double(), y)], cross_entropy)
    with landscape.measurement():
        hessian = torch.stack([landscape.hvp(v) for v in torch.eye(landscape.num_parameters, dtype=torch.float64)])
    return torch.linalg.eigvalsh(hessian)


def is_honest(result: EigenResult, truth: float, tol: float) -> bool:
    """Whether the error covers the difference, and is within the tolerance where the result says so."""
    value, error = float(result.eigenvalues[0]), float(result.residuals[0])
    return abs(value - truth) <= error * (1 + 1e-5) and result.converged == (error <= tol * abs(value))


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e10])
def test_float32_beside_much_larger_eigenvalues(scale):
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(120, 120, generator=generator, dtype=torch.float64))[0]
    spectrum = -torch.cat([torch.tensor([1.0]), torch.logspace(0.5, float(torch.tensor(scale).log10()), 119)]).double()
    matrix = ((q * spectrum) @ q.T).float()
    truth = float(torch.linalg.eigvalsh(matrix.double())[-1])
    result = lanczos(lambda v: matrix @ v, 120, tol=0.1, max_products=200)
    assert is_honest(result, truth, 0.1)
    assert result.converged == (scale == 1e2)


def test_a_zero_among_larger_ones_counts_as_known():
    spectrum = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert lanczos(lambda v: spectrum * v, 6, k=3, tol=1e-3).converged


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_finite_differences(activation, seed):
    module, x, y = network(activation, seed, 40 * seed)
    truth = float(true_eigenvalues(module, x, y)[-1])
    landscape = LossLandscape(module, [(x, y)], cross_entropy, engine="finite_difference")
    result = top_eigenvalues(landscape, tol=0.02)
    assert is_honest(result, truth, 0.02)
    if activation is nn.ReLU:  # kinks within the step
        assert not result.converged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_of_low_precision(dtype, activation, seed):
    module, x, y = network(activation, seed, 40 * seed)
    module, x = module.to(dtype), x.to(dtype)
    truth = float(true_eigenvalues(module, x, y)[-1])
    for tol in (1e-3, 0.05):
        result = top_eigenvalues(LossLandscape(module, [(x, y)], cross_entropy), tol=tol)
        assert is_honest(result, truth, tol)
        assert result.converged == (tol == 0.05)


@pytest.mark.parametrize(("share", "tol"), [(0.02, 1e-2), (0.04, 4e-2), (0.06, 4e-2), (0.08, 4e-2)])
@pytest.mark.parametrize("seed", range(3))
def test_a_start_that_is_nearly_an_eigenvector_of_what_is_now_the_second_eigenvalue(share, tol, seed):
    """The residual is small at the first products: the new first eigenvector is a small part of the start."""
    spectrum = torch.cat([torch.tensor([1.282, 1.633]), torch.linspace(0, 0.3, 2000)]).double()
    start = torch.zeros(len(spectrum), dtype=torch.float64)
    start[0], start[1] = 1.0, share
    result = lanczos(lambda v: spectrum * v, len(spectrum), tol=tol, start=start, seed=seed, dtype=torch.float64)
    assert float(result.eigenvalues) == pytest.approx(1.633, rel=1e-3)
    assert result.num_products <= 6
