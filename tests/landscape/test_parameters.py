"""Landscapes over some of the parameters, against dense Hessians of these alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import (
    GradientNoise,
    HessianTrace,
    InvariantSharpness,
    LossLandscape,
    OutputLoss,
    TopEigenvalues,
)


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, as LoRA has it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 5) / 2)
        self.b = nn.Parameter(torch.randn(6, 2) / 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x) + x @ self.a.T @ self.b.T))
        return out


NAMES = [name for name, _ in Adapted().named_parameters()]
CASES: dict[str, tuple[Any, list[str]]] = {
    "trainable": (None, ["a", "b", "head.weight", "head.bias"]),
    "adapter": ("a,b", ["a", "b"]),
    "frozen": ("body.*", ["body.weight", "body.bias"]),
    "list": (["head.bias", "?ody.weight"], ["body.weight", "head.bias"]),
    "all": ("*", NAMES),
}


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Adapted().double(), torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def loss_of(problem: tuple[nn.Module, Tensor, Tensor], names: list[str], index: slice = slice(None)) -> Any:
    """Return the loss as a function of the named parameters as one vector, written anew, and its argument here."""
    module, x, y = problem
    values = {name: p.detach() for name, p in module.named_parameters()}

    def loss(w: Tensor) -> Tensor:
        pieces = w.split([values[name].numel() for name in names])
        chosen = {name: piece.view_as(values[name]) for name, piece in zip(names, pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module, values | chosen, (x[index],)), y[index])

    return loss, torch.cat([values[name].flatten() for name in names])


def landscape_of(problem: tuple[nn.Module, Tensor, Tensor], patterns: Any, loss: Any = loss_fn) -> LossLandscape:
    module, x, y = problem
    return LossLandscape(module, [(x[:12], y[:12]), (x[12:], y[12:])], loss, parameters=patterns)


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_dense_hessian_of_the_named_parameters(problem, case):
    patterns, names = CASES[case]
    names = [name for name in NAMES if name in names]
    flags = [p.requires_grad for p in problem[0].parameters()]
    landscape = landscape_of(problem, patterns)
    loss, w = loss_of(problem, names)
    dense = torch.autograd.functional.hessian(loss, w)
    top, trace = TopEigenvalues(k=2, tol=1e-9), HessianTrace(num_products=200)
    top.update(landscape)
    trace.update(landscape)
    torch.testing.assert_close(top.compute(), torch.linalg.eigvalsh(dense).flip(0)[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close(trace.compute(), dense.trace(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(landscape.gradient(), torch.autograd.functional.jacobian(loss, w), rtol=1e-9, atol=1e-12)
    assert [p.requires_grad for p in problem[0].parameters()] == flags
    assert all(p.grad is None for p in problem[0].parameters())


@pytest.mark.parametrize("case", ["adapter", "frozen", "all"])
def test_gradients_of_single_samples_and_noise_are_about_the_named_parameters(problem, case):
    patterns, names = CASES[case]
    names = [name for name in NAMES if name in names]
    landscape = landscape_of(problem, patterns)
    gradients = [torch.autograd.functional.jacobian(*loss_of(problem, names, slice(i, i + 1))) for i in range(20)]
    noise = GradientNoise()
    noise.update(landscape)
    expected = torch.stack(gradients).var(dim=0).sum()
    torch.testing.assert_close(noise.compute(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", ["adapter", "frozen"])
def test_gauss_newton_products_are_about_the_named_parameters(problem, case):
    patterns, names = CASES[case]
    module, x, _ = problem
    values = {name: p.detach() for name, p in module.named_parameters()}
    landscape = landscape_of(problem, patterns, OutputLoss(F.cross_entropy))

    def outputs(*chosen: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, values | dict(zip(names, chosen, strict=True)), (x,))
        return out

    chosen = tuple(values[name] for name in names)
    jacobian = torch.cat([j.flatten(2) for j in torch.autograd.functional.jacobian(outputs, chosen)], dim=2)
    p = outputs(*chosen).softmax(dim=1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("nop,noq,nqr->pr", jacobian, curvature, jacobian) / len(x)
    v = torch.randn(landscape.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(landscape.ggnvp(v), dense @ v, rtol=1e-9, atol=1e-12)


def test_a_geometry_scales_the_named_parameters(problem):
    landscape = landscape_of(problem, "body.*")
    metric = InvariantSharpness(tol=1e-9)
    metric.update(landscape)
    loss, w = loss_of(problem, ["body.weight", "body.bias"])
    norms = torch.cat([p.detach().norm().expand(p.numel()) for p in problem[0].body.parameters()])
    scaled = norms[:, None] * torch.autograd.functional.hessian(loss, w) * norms
    assert float(metric.compute()) == pytest.approx(float(torch.linalg.eigvalsh(scaled).abs().max()), rel=1e-8)


def test_a_pattern_that_matches_nothing_names_the_nearest(problem):
    with pytest.raises(ValueError, match=r"got 'heads.weight', which matches none. Names near it: head.weight"):
        landscape_of(problem, "a,heads.weight")
    with pytest.raises(ValueError, match=r"patterns of `parameters` to match .* got '', which matches none"):
        landscape_of(problem, "")
