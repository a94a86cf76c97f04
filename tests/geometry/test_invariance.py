"""Each geometry's numbers stay put under the rescalings that the design's table names, while lambda_max moves."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import InvariantSharpness, LossLandscape, TopEigenvalues
from lightning_flatness.module.modes import Mode

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
factors = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)


def relu_mlp(dtype: torch.dtype, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7, bias=bias), nn.ReLU(), nn.Linear(7, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias)]
    return nn.Sequential(*layers).to(dtype)


def normalized_net(dtype: torch.dtype) -> nn.Sequential:
    """A convolution whose filters stand in front of BatchNorm, with next to no epsilon, in batch statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-30), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).to(dtype)


def data(dtype: torch.dtype, *shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, *shape, generator=generator).to(dtype), torch.randint(3, (n,), generator=generator))
        for n in (9, 6)
    ]


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def measure(module: nn.Module, geometry: str, mode: Mode = "eval", shape: tuple[int, ...] = (5,)) -> Tensor:
    dtype = next(module.parameters()).dtype
    landscape = LossLandscape(module, data(dtype, *shape), loss_fn, mode=mode)
    metric = TopEigenvalues(k=1, geometry=geometry, which="LM", tol=1e-12 if dtype == torch.float64 else 1e-5)
    metric.update(landscape)
    assert metric.converged
    return metric.compute()


def assert_unchanged(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    """The rescaled network is the same function, so a change of a number would be the number's fault."""
    one, other = before(x).detach(), after(x).detach()
    tolerance = 100 * torch.finfo(x.dtype).eps * one.abs().max().item()
    torch.testing.assert_close(one, other, rtol=0, atol=max(tolerance, 1e-12))


@dtypes
@given(scales=st.tuples(factors, factors))
@settings(max_examples=15, deadline=None)
def test_layer_rescaling(dtype, scales):
    before = relu_mlp(dtype)
    after = copy.deepcopy(before)
    factors_ = [*scales, 1 / (scales[0] * scales[1])]
    running = 1.0
    with torch.no_grad():
        for layer, factor in zip((after[0], after[2], after[4]), factors_, strict=True):
            layer.weight *= factor
            running *= factor
            layer.bias *= running
    assert_unchanged(before, after, data(dtype, 5)[0][0])
    for geometry in ("layer", "filter", "element"):
        torch.testing.assert_close(measure(after, geometry), measure(before, geometry), rtol=TOLERANCE[dtype], atol=0)


@dtypes
def test_lambda_max_moves_under_layer_rescaling_and_invariant_sharpness_does_not(dtype):
    before = relu_mlp(dtype, bias=False)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].weight *= 100
        after[4].weight /= 100
    assert measure(after, "euclidean") > 50 * measure(before, "euclidean")
    values = []
    for module in (before, after):
        metric = InvariantSharpness()  # at its default tolerance, too
        metric.update(LossLandscape(module, data(dtype, 5), loss_fn))
        values.append(metric.compute())
    torch.testing.assert_close(*values, rtol=TOLERANCE[dtype], atol=0)


@dtypes
@given(scales=st.lists(factors, min_size=4, max_size=4))
@settings(max_examples=15, deadline=None)
def test_filter_rescaling_in_front_of_a_normalization_layer(dtype, scales):
    before = normalized_net(dtype).train()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].weight *= torch.tensor(scales, dtype=dtype).view(-1, 1, 1, 1)
    assert_unchanged(copy.deepcopy(before), copy.deepcopy(after), data(dtype, 1, 6, 6)[0][0])
    for geometry in ("filter", "element"):
        one, other = (measure(m, geometry, "train", (1, 6, 6)) for m in (before, after))
        torch.testing.assert_close(other, one, rtol=TOLERANCE[dtype], atol=0)


@dtypes
@given(scales=st.lists(factors, min_size=13, max_size=13))
@settings(max_examples=15, deadline=None)
def test_single_unit_rescaling(dtype, scales):
    before = relu_mlp(dtype)
    after = copy.deepcopy(before)
    first, second = (torch.tensor(s, dtype=dtype) for s in (scales[:7], scales[7:]))
    with torch.no_grad():
        after[0].weight *= first[:, None]
        after[0].bias *= first
        after[2].weight /= first
        after[2].weight *= second[:, None]
        after[2].bias *= second
        after[4].weight /= second
    torch.testing.assert_close(measure(after, "element"), measure(before, "element"), rtol=TOLERANCE[dtype], atol=0)


def test_single_unit_rescaling_moves_the_geometries_that_are_not_invariant_to_it():
    before = relu_mlp(torch.float64)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].weight[2] *= 30
        after[0].bias[2] *= 30
        after[2].weight[:, 2] /= 30
    assert_unchanged(before, after, data(torch.float64, 5)[0][0])
    for geometry in ("euclidean", "layer", "filter"):
        assert abs(measure(after, geometry) / measure(before, geometry) - 1) > 0.01


@pytest.mark.parametrize("geometry", ["layer", "filter", "element"])
def test_blocks_of_zero_norm_contribute_nothing_and_are_no_nan(geometry):
    module = relu_mlp(torch.float64)
    with torch.no_grad():
        module[4].weight.zero_()
        module[2].bias.zero_()
    landscape = LossLandscape(module, data(torch.float64, 5), loss_fn)
    metric = TopEigenvalues(k=3, geometry=geometry)
    metric.update(landscape)
    assert torch.isfinite(metric.compute()).all()
    chart = landscape.chart(geometry)
    pieces = landscape.unflatten(chart.displacement(torch.ones(landscape.num_parameters, dtype=torch.float64)))
    assert not pieces[4].any()
    assert not pieces[3].any()


def test_filters_of_transposed_convolutions_are_their_outputs():
    """Scaling one output channel of a transposed convolution, BatchNorm behind it, changes nothing."""
    torch.manual_seed(0)
    for groups in (1, 2):
        module = nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, groups=groups, bias=False),
            nn.BatchNorm2d(4, eps=1e-30),
            nn.Flatten(),
            nn.Linear(256, 3),
        ).double()
        scaled = copy.deepcopy(module)
        with torch.no_grad():
            if groups == 1:
                scaled[0].weight[:, 3] *= 50
            else:
                scaled[0].weight[1:, 1] *= 50
        one, other = (measure(m, "filter", "train", (2, 6, 6)) for m in (module, scaled))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
