"""Traces and eigenvalues of layers against the blocks of dense Hessians, and their errors over seeds."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.once_differentiable import once_differentiable_twin
from helpers.problems import Problem, classification, cross_entropy, make_problem
from torch import Tensor, nn

from lightning_flatness import HessianTrace, LossLandscape, TopEigenvalues
from lightning_flatness.estimators import UndefinedMeasureError, hessian_trace, layer_eigenvalues, stochastic_trace
from lightning_flatness.estimators.layers import layers_in
from lightning_flatness.landscape.sampling import SampleLosses


def landscape_of(problem: Problem) -> LossLandscape:
    return LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)


def dense_blocks(problem: Problem, geometry: str) -> dict[str, Tensor]:
    """The diagonal blocks of the dense Hessian, by the module that holds the weights."""
    scale = problem.scale(geometry)
    hessian = scale[:, None] * problem.dense_hessian() * scale
    places: dict[str, list[int]] = {}
    start = 0
    for name, p in problem.module.named_parameters():
        if p.requires_grad:
            places.setdefault(name.rpartition(".")[0] or name, []).extend(range(start, start + p.numel()))
            start += p.numel()
    return {name: hessian[indices][:, indices] for name, indices in places.items()}


SOME = pytest.mark.parametrize(
    ("name", "geometry"),
    [("tanh_mlp", "euclidean"), ("relu_convnet", "filter"), ("batchnorm_eval", "layer"), ("tied_weights", "euclidean")],
)


@SOME
def test_traces_of_layers_are_those_of_the_dense_blocks(name, geometry):
    problem = make_problem(name)
    blocks = dense_blocks(problem, geometry)
    exact = torch.stack([block.trace() for block in blocks.values()])
    metric = HessianTrace(geometry, num_products=problem.num_parameters, per_layer=True)
    metric.update(landscape_of(problem))
    assert metric.layers == tuple(blocks)
    torch.testing.assert_close(metric.compute()[1:], exact, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(metric.compute()[0], exact.sum(), rtol=1e-9, atol=1e-10)


@SOME
def test_eigenvalues_of_layers_are_those_of_the_dense_blocks(name, geometry):
    problem = make_problem(name)
    eigenvalues = {name: torch.linalg.eigvalsh(b) for name, b in dense_blocks(problem, geometry).items()}
    landscape = landscape_of(problem)
    metric = TopEigenvalues(geometry=geometry, tol=1e-7, per_layer=True)
    metric.update(landscape)
    expected = torch.stack([values[-1] for values in eigenvalues.values()])
    assert metric.converged
    assert metric.layers == tuple(eigenvalues)
    torch.testing.assert_close(metric.compute()[1:], expected, rtol=1e-8, atol=1e-12)
    assert (metric.compute()[1:] <= metric.compute()[0] * (1 + 1e-8)).all()
    least = layer_eigenvalues(landscape, geometry, which="SA", tol=1e-6, seed=1)
    expected = torch.stack([values[0] for values in eigenvalues.values()])
    torch.testing.assert_close(least.eigenvalues, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_layers_add_up_to_the_whole_which_is_what_it_is_without_them(method):
    problem = make_problem("relu_convnet")
    for num_products in (8, 24):
        whole = hessian_trace(landscape_of(problem), method=method, num_products=num_products)
        layered = hessian_trace(landscape_of(problem), method=method, num_products=num_products, per_layer=True)
        torch.testing.assert_close(layered.value[1:].sum(), layered.value[0], rtol=1e-12, atol=0)
        assert torch.equal(layered.value[0], whole.value)
        assert torch.equal(layered.error[0], whole.error)
        assert layered.num_products == whole.num_products == num_products


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_errors_of_blocks_are_calibrated_over_200_seeds(method):
    problem = make_problem("relu_convnet")
    matrix = problem.dense_hessian()
    with (landscape := landscape_of(problem)).measurement():
        blocks = list(layers_in(landscape, landscape.chart("euclidean")).values())
    results = [
        stochastic_trace(
            lambda v: matrix @ v,
            len(matrix),
            method=method,
            num_products=32,
            seed=seed,
            dtype=torch.float64,
            blocks=blocks,
        )
        for seed in range(200)
    ]
    exact = torch.stack([matrix.trace(), *(matrix[block, block].trace() for block in blocks)])
    deviations = torch.stack([r.value for r in results]) - exact
    errors = torch.stack([r.error for r in results])
    ratios = deviations.square().mean(dim=0).sqrt() / errors.square().mean(dim=0).sqrt()
    assert ((ratios > 0.85) & (ratios < 1.15)).all()
    assert (deviations.mean(dim=0).abs() < 4 * deviations.std(dim=0) / math.sqrt(200)).all()


def sampled() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return module, torch.randn(60, 4).double(), torch.randint(3, (60,))


def test_standard_errors_are_those_of_the_blocks_of_single_samples():
    module, x, y = sampled()
    landscape = LossLandscape(module, [(x[:25], y[:25]), (x[25:], y[25:])], cross_entropy, num_total=200)
    hessians = torch.stack(
        [Problem(module, [(x[i : i + 1], y[i : i + 1])], cross_entropy).dense_hessian() for i in range(60)]
    )
    factor = math.sqrt((1 - 60 / 200) / 60)

    top = TopEigenvalues(tol=1e-8, per_layer=True)
    top.update(landscape)
    vectors = torch.stack(list(layer_eigenvalues(landscape, tol=1e-8).vectors()))
    forms = torch.einsum("li,nij,lj->nl", vectors, hessians, vectors)
    torch.testing.assert_close(top.standard_error[1:], forms.std(dim=0) * factor, rtol=2e-2, atol=0)

    u = torch.randn(43, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with landscape.measurement():
        found = SampleLosses(landscape).second_derivatives_by_tensor(u)
    terms = u * (hessians @ u)  # (samples, weights), of the tensors of 20, 5, 15 and 3 entries
    torch.testing.assert_close(found.T, torch.stack([t.sum(dim=1) for t in terms.split([20, 5, 15, 3], dim=1)], dim=1))

    trace, whole = HessianTrace(num_products=60, per_layer=True), HessianTrace(num_products=60)
    trace.update(landscape)
    whole.update(landscape)
    traces = torch.stack(
        [h.diagonal(dim1=1, dim2=2).sum(dim=1) for h in (hessians, hessians[:, :25, :25], hessians[:, 25:, 25:])]
    )
    expected = traces.std(dim=1) * factor
    # Eight random directions on 43 weights scatter more than samples do; half of that is taken out at most.
    assert ((trace.standard_error > 0.7 * expected) & (trace.standard_error < 3 * expected)).all()
    assert 0.6 < trace.standard_error[0] / whole.standard_error < 1.6


def test_a_second_measurement_starts_from_the_eigenvectors_of_the_first():
    module, x, y = sampled()
    landscape = LossLandscape(module, [(x, y)], cross_entropy)
    metric = TopEigenvalues(tol=1e-4, per_layer=True)
    metric.update(landscape)
    first, values = int(metric.num_products), metric.compute()
    metric.update(landscape)
    assert metric.num_products < first
    torch.testing.assert_close(metric.compute(), values, rtol=1e-6, atol=0)
    metric.reset()
    metric.update(landscape)
    assert metric.num_products == first


class Bare(nn.Module):
    """Weights of its own, and two layers that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(6))
        self.inner = nn.ModuleDict({"first": nn.Linear(6, 6), "last": nn.Linear(6, 6)})
        self.inner["last"].weight = self.inner["first"].weight
        self.inner["last"].bias.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.inner["last"](self.inner["first"](x + self.shift).tanh())
        return out


def test_names_of_layers_and_their_weights():
    landscape = LossLandscape(Bare(), classification((8,), (6,), 6), cross_entropy)
    chart = landscape.chart("euclidean")
    # A weight of the network itself is a layer; a shared one belongs to the first layer; a frozen one to none.
    expected = {"shift": slice(0, 6), "scale": slice(6, 7), "inner.first": slice(7, 49)}
    assert layers_in(landscape, chart) == expected
    all_of_them = LossLandscape(Bare(), classification((8,), (6,), 6), cross_entropy, parameters="*")
    assert layers_in(all_of_them, chart) == expected | {"inner.last": slice(49, 55)}
    compiled = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})  # as torch.compile names what it wraps
    wrapped = LossLandscape(nn.ModuleDict({"net": compiled}), [torch.ones(2, 2)], lambda m, x: x.sum())
    assert list(layers_in(wrapped, chart)) == ["net"]


@pytest.mark.parametrize("make", [HessianTrace, TopEigenvalues])
def test_a_geometry_whose_coordinates_are_no_weights_has_no_layers(make):
    metric = make(geometry="path", per_layer=True)
    module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(UndefinedMeasureError, match=r"belong to single weights for per_layer=True, got a PathChart"):
        metric.update(LossLandscape(module, classification((8,), (6,), 3), cross_entropy))


@pytest.mark.parametrize("make", [HessianTrace, TopEigenvalues])
def test_per_layer_is_true_or_false(make):
    with pytest.raises(ValueError, match=r"Expected `per_layer` to be True or False, got 'fc'"):
        make(per_layer="fc")


@pytest.mark.filterwarnings("ignore:.*second derivative")
def test_without_second_derivatives_the_standard_errors_of_layers_are_unknown_but_not_that_of_the_whole():
    once, problem = once_differentiable_twin()
    exact, numeric = HessianTrace(per_layer=True), HessianTrace(per_layer=True)
    exact.update(landscape_of(problem))
    numeric.update(LossLandscape(once, problem.batches, problem.loss_fn))
    torch.testing.assert_close(numeric.compute(), exact.compute(), rtol=1e-4, atol=1e-5)
    assert numeric.standard_error.isnan().tolist() == [False, True, True]
    assert (exact.layers, numeric.layers) == (("0", "2"), ("first", "second"))
