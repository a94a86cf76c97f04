"""The path geometry: the promises of its definition over random chains, which modules are chains, and errors."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from helpers.chains import Chain, LayerSpec, chains, example_chain, finish, flat_weights, landscape_of, net_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import LossLandscape, PathGeometry, TopEigenvalues
from lightning_flatness.geometry import PathChart
from lightning_flatness.geometry.path.reader import trace_chain

property_test = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
few_examples = settings(property_test, max_examples=7)
seeds = st.integers(0, 2**16)


def chart_of(module: nn.Module, dtype: torch.dtype = torch.float64, submodule: str | None = None) -> PathChart:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return PathGeometry(submodule).chart(module, parameters, dtype)


def output_at(chain: Chain, weights: Tensor) -> Tensor:
    landscape = landscape_of(chain)
    names = [name for name, _ in chain.module.named_parameters()]
    pieces = dict(zip(names, landscape.unflatten(weights), strict=True))
    return torch.func.functional_call(chain.module, pieces, (chain.x,)).detach()


# ------------------------------------------------------------------------------------------ what the definition says


@property_test
@given(chains())
def test_number_of_coordinates_is_edges_less_hidden_units(chain):
    chart = chart_of(chain.module)
    assert chart.num_coordinates == chain.num_edges - chain.num_hidden == len(chart.values)
    assert chart.num_hidden_units == chain.num_hidden


@property_test
@given(chains())
def test_values_are_those_of_the_definition(chain):
    torch.testing.assert_close(chart_of(chain.module).values, chain.reference_values(), rtol=1e-12, atol=0)


@property_test
@given(chains())
def test_network_rebuilt_from_its_values_gives_the_same_outputs(chain):
    chart = chart_of(chain.module)
    expected = chain.module(chain.x).detach()
    rebuilt = output_at(chain, chart.rebuilt_weights(chart.values))
    torch.testing.assert_close(rebuilt, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    by_definition = torch.func.functional_call(chain.module, chain.inverse_map()(chart.values), (chain.x,)).detach()
    torch.testing.assert_close(by_definition, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@property_test
@given(chains(), seeds)
def test_values_do_not_change_when_units_are_rescaled(chain, seed):
    before, output = chart_of(chain.module).values, chain.module(chain.x).detach()
    chain.rescale_units(torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        chain.module(chain.x).detach(), output, rtol=1e-10, atol=1e-10 * float(output.abs().max())
    )
    torch.testing.assert_close(chart_of(chain.module).values, before, rtol=1e-12, atol=0)


@few_examples
@given(chains(max_units=4))
def test_hessian_equals_the_dense_second_derivative(chain):
    exact = chain.dense_hessian()
    assume(float(exact.detach().abs().max()) > 1e-6)
    landscape = landscape_of(chain)
    with landscape.measurement():
        chart = landscape.chart("path")
        rows = [chart.hvp(landscape.hvp, e, gradient=landscape.gradient) for e in torch.eye(len(exact)).double()]
    torch.testing.assert_close(torch.stack(rows), exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))


@few_examples
@given(chains(max_units=4), seeds)
def test_eigenvalues_equal_the_dense_ones_and_do_not_change_when_units_are_rescaled(chain, seed):
    exact = torch.linalg.eigvalsh(chain.dense_hessian())
    scale = float(exact.abs().max())
    assume(scale > 1e-6)
    k = min(3, len(exact))
    for which, wanted in (("LA", exact.flip(0)[:k]), ("SA", exact[:k])):
        for rescaled in (False, True):
            if rescaled:
                chain.rescale_units(torch.Generator().manual_seed(seed))
            metric = TopEigenvalues(k=k, geometry="path", which=which, tol=1e-9)
            metric.update(landscape_of(chain))
            assert metric.converged
            torch.testing.assert_close(metric.compute().reshape(-1), wanted, rtol=1e-8, atol=1e-8 * scale)


@property_test
@given(chains(), seeds)
def test_displaced_weights_are_the_network_with_those_values(chain, seed):
    chart = chart_of(chain.module)
    assert not chart.displacement(torch.zeros_like(chart.values)).any()  # passes through the current weights exactly
    direction = torch.randn(chart.num_coordinates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = 0.5 * chart.radius * direction / direction.norm()
    displaced = flat_weights(chain.module) + chart.displacement(z)
    weights = dict(zip(dict(chain.module.named_parameters()), landscape_of(chain).unflatten(displaced), strict=True))
    actual = torch.func.functional_call(chain.module, weights, (chain.x,)).detach()
    expected = torch.func.functional_call(chain.module, chain.inverse_map()(chart.values + z), (chain.x,)).detach()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    recovered = chart.coordinates(chart.displacement(z))
    torch.testing.assert_close(recovered, z, rtol=1e-9, atol=1e-12 * float(chart.values.abs().max()))


@property_test
@given(chains(), seeds)
def test_gradients_are_pulled_back_at_any_coordinates(chain, seed):
    landscape, loss = landscape_of(chain), chain.loss_of_values()
    chart = landscape.chart("path")
    direction = torch.randn(chart.num_coordinates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for z in (torch.zeros_like(direction), 0.5 * chart.radius * direction / direction.norm()):
        with landscape.displaced(chart.displacement(z)):
            gradient = landscape.gradient()
        exact = torch.func.grad(loss)(chart.values + z).detach()
        scale = 1e-9 * float(exact.abs().max())
        torch.testing.assert_close(chart.pull_back_at(z, gradient), exact, rtol=1e-9, atol=scale)
        if not z.any():
            torch.testing.assert_close(chart.pull_back(gradient), exact, rtol=1e-9, atol=scale)


def test_push_forward_is_the_derivative_of_the_displacement_and_pull_back_its_transpose():
    chain = example_chain()
    chart = chart_of(chain.module)
    jacobian = torch.func.jacrev(chart.displacement)(torch.zeros(chart.num_coordinates, dtype=torch.float64))
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(chart.num_coordinates, generator=generator, dtype=torch.float64)
    g = torch.randn(len(jacobian), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(chart.push_forward(v), jacobian @ v, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(chart.pull_back(g), jacobian.T @ g, rtol=1e-12, atol=1e-10)


def test_hvp_without_a_gradient_leaves_the_curvature_of_the_chart_out():
    chain = example_chain()
    landscape = landscape_of(chain)
    chart = landscape.chart("path")
    v = torch.ones(chart.num_coordinates, dtype=torch.float64)
    expected = chart.pull_back(landscape.hvp(chart.push_forward(v)))
    torch.testing.assert_close(chart.hvp(landscape.hvp, v, gradient=None), expected, rtol=0, atol=0)
    full = chart.hvp(landscape.hvp, v, gradient=landscape.gradient)
    assert (full - expected).abs().max() > 1e-3 * expected.abs().max()


def test_charts_and_gradients_at_displaced_weights_are_those_of_the_displaced_weights():
    chain = example_chain()
    landscape = landscape_of(chain)
    with landscape.measurement():
        chart, gradient = landscape.chart("path"), landscape.gradient()
        with landscape.displaced(0.1 * flat_weights(chain.module)):
            assert not torch.equal(landscape.gradient(), gradient)
            assert not torch.equal(landscape.chart("path").values, chart.values)
        assert landscape.chart("path") is chart
        assert torch.equal(landscape.gradient(), gradient)


def test_float32_agrees_with_float64_and_stays_put_under_rescaling():
    chain = example_chain()
    values = []
    exact = TopEigenvalues(geometry="path", tol=1e-8)
    exact.update(landscape_of(chain))
    chain.module.float()
    chain.x, chain.y = chain.x.float(), chain.y.float()
    for _ in range(2):
        metric = TopEigenvalues(geometry="path", tol=1e-5)
        metric.update(landscape_of(chain))
        assert metric.compute().dtype == torch.float32
        values.append(metric.compute().double())
        chain.rescale_units(torch.Generator().manual_seed(5))
    torch.testing.assert_close(values[0], exact.compute(), rtol=1e-4, atol=0)
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=0)


def test_one_layer_is_euclidean():
    module = nn.Linear(3, 2).double()
    chart = chart_of(module)
    z = torch.arange(8.0, dtype=torch.float64)
    assert chart.num_coordinates == 8
    assert chart.radius == float("inf")
    torch.testing.assert_close(chart.displacement(z), z, rtol=0, atol=0)
    torch.testing.assert_close(chart.values, flat_weights(module), rtol=0, atol=0)


def test_weights_are_infinite_from_a_pole_on():
    chain = example_chain()
    chart = chart_of(chain.module)
    places = (chart.values.abs() == chart.radius).nonzero().flatten()
    assert len(places) == 1
    z = torch.zeros_like(chart.values)
    for factor, finite in ((0.99, True), (1.0, False), (1.5, False)):
        z[places[0]] = -factor * chart.values[places[0]]
        displacement = chart.displacement(z)
        assert bool(torch.isfinite(displacement).all()) is finite
        assert not bool(torch.isnan(displacement).any())


def test_coordinates_of_other_weights():
    chain = example_chain()
    chart = chart_of(chain.module)
    original = flat_weights(chain.module)
    chain.rescale_units(torch.Generator().manual_seed(0))
    z = chart.coordinates(flat_weights(chain.module) - original)
    assert float(z.abs().max()) < 1e-12 * float(chart.values.abs().max())  # the same network
    with pytest.raises(ValueError, match=r"other signs of weights along the skeleton.*Use the geometry 'euclidean'"):
        chart.coordinates(-2 * original)


# --------------------------------------------------------------------------------------------- which modules are chains


class Functional(pl.LightningModule):
    """As in many tutorials: layers are attributes, everything else is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding="same", padding_mode="reflect")
        self.conv2 = nn.Conv2d(2, 3, 2, stride=2, bias=False)
        self.fc = nn.ModuleList([nn.Linear(3 * 4, 4), nn.Linear(4, 3)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.1) / 0.3  # before the first layer anything goes
        x = F.max_pool2d(F.relu(self.conv1(x)), kernel_size=(2, 2))
        x = F.avg_pool2d(F.leaky_relu(self.conv2(x), 0.1), 1)
        x = F.adaptive_avg_pool2d(F.dropout(x, 0.2, self.training), (2, 2))
        x = self.drop(self.fc[0](torch.flatten(x, 1)).relu())
        return F.log_softmax(self.fc[1](x), dim=-1)  # and after the last one, too


class Viewed(nn.Module):
    """Subclasses and nested containers, weights as parameters, shapes asked for."""

    def __init__(self) -> None:
        super().__init__()

        class Conv(nn.Conv2d):
            pass

        self.features = nn.Sequential(nn.Sequential(Conv(1, 4, 3), nn.PReLU()), nn.Sequential(nn.AdaptiveMaxPool2d(2)))
        self.weight = nn.Parameter(torch.randn(5, 16))
        self.bias = nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        h = h.view(h.size(0), -1) if self.training else h.reshape(h.shape[0], -1)
        h = F.linear(h, self.weight, bias=self.bias)
        F.relu(h, inplace=True)
        return self.head(h)


class Pooled(nn.Module):
    """Global pooling by a mean; a linear layer at every position of a sequence."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "clamp":
            return self.head(F.adaptive_max_pool2d(self.conv(x).clamp(min=0), 1).squeeze(-1).squeeze(-1))
        h = torch.relu(self.conv(x))
        if self.how == "mean":
            return self.head(h.mean(dim=(2, 3)))
        if self.how == "mean twice":
            return self.head(h.mean(-1).mean(-1))
        return self.head(torch.amax(h, dim=[-2, -1]))


class OnlyTrainingStep(pl.LightningModule):
    """No forward: the chain is a submodule that the training step calls."""

    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.ReLU(), nn.Linear(3, 2))
        self.net = torch.compile(net) if compiled else net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()


class WithHistory(OnlyTrainingStep):
    """Its forward changes the module: counts, and keeps what it saw."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        self.last = x
        return self.net(x)


MODULES = {
    "functional": (Functional, 2 + 3 + 4),
    "viewed": (Viewed, 4 + 5),
    **{how: (lambda how=how: Pooled(how), 3) for how in ("mean", "mean twice", "clamp", "amax")},
    "training step only": (OnlyTrainingStep, 3),
    "compiled": (lambda: OnlyTrainingStep(compiled=True), 3),
    "with history": (WithHistory, 3),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_any_forward_that_is_a_chain_will_do(name, mode):
    build, num_hidden = MODULES[name]
    torch.manual_seed(0)
    module = build().double().train(mode == "train")
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64)

    def loss_fn(module, x):
        net = module.net if isinstance(module, OnlyTrainingStep) else module
        return net(x).square().sum(dim=1).mean() + net(x)[:, 0].mean()

    with torch.compiler.set_stance("force_eager"):
        landscape = LossLandscape(module, [x], loss_fn, mode=mode)
        with landscape.measurement():
            chart = landscape.chart("path")
            loss = landscape.loss()
            rebuilt = chart.rebuilt_weights(chart.values) - flat_weights(module)
            with landscape.displaced(rebuilt):
                torch.testing.assert_close(landscape.loss(), loss, rtol=1e-12, atol=1e-12)
    assert chart.num_hidden_units == num_hidden
    num_slopes = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.PReLU))
    assert chart.num_coordinates == landscape.num_parameters - num_slopes - num_hidden


def test_tracing_leaves_the_module_as_it_was():
    module = WithHistory().train()
    before = dict(module.__dict__)
    rng = torch.get_rng_state()
    chart_of(module, torch.float32)
    assert module.__dict__ == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(m.training for m in module.modules())


def test_a_named_submodule_is_enough():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, affine=False)
            self.body = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))})

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.body["net"](self.norm(x) if x.sum() > 0 else x))

    model = Model()
    with pytest.raises(ValueError, match=r"whose forward torch\.fx can trace.*got Model.*submodule="):
        chart_of(model)
    assert chart_of(model, submodule="body.net").num_coordinates == 19 - 3
    with pytest.raises(ValueError, match=r"Expected `submodule` to be one of .*'body.net'.*, got 'nett'"):
        chart_of(model, submodule="nett")
    with pytest.raises(TypeError, match="Expected `submodule` to be the name of a submodule, got Linear"):
        PathGeometry(nn.Linear(1, 1))


def test_a_linear_layer_over_positions_of_a_sequence():
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    layers = [LayerSpec("0", 2, 3, 1, True), LayerSpec("3", 3, 2, 4, True, by_position=True)]
    chain = finish(module, layers, seed=0)
    chain.x = torch.randn(7, 4, 3, dtype=torch.float64)
    output, before = module(chain.x).detach(), chart_of(module).values
    torch.testing.assert_close(before, chain.reference_values(), rtol=1e-12, atol=0)
    chain.rescale_units(torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(chain.x).detach(), output, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(chart_of(module).values, before, rtol=1e-12, atol=0)


def test_slopes_of_prelu_are_held_fixed():
    module = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2), nn.PReLU())
    chart = chart_of(module, torch.float32)
    assert chart.num_coordinates == 16 + 10 - 4
    displacement = chart.displacement(0.5 * chart.radius / 22 * torch.ones(22))
    assert not displacement[16:20].any()
    assert not displacement[-1].any()
    slope_only = torch.zeros(31)
    slope_only[16] = 0.1
    with pytest.raises(ValueError, match="other slopes of PReLU"):
        chart.coordinates(slope_only)


def test_the_chain_is_read_in_the_order_of_execution():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2)
            self.first = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    assert [layer.name for layer in trace_chain(Reversed()).layers] == ["first", "last"]


# -------------------------------------------------------------------------------------------------- which ones are not


def residual(self, x):
    h = F.relu(self.a(x))
    return self.c(h + self.b(h))


def leaking(self, x):
    h = F.relu(self.a(x))
    return self.b(h), h.mean(dim=1)


def two_heads(self, x):
    h = F.relu(self.a(x))
    return self.b(h), self.c(h)


def in_place(self, x):
    h = self.a(x)
    h.sigmoid_()
    return self.b(h)


def assigned(self, x):
    h = self.a(x)
    h[:, 0] = 1.0
    return self.b(h)


def part_in_place(self, x):
    h = self.a(x)
    h[:, 0].add_(1.0)
    return self.b(h)


def linears(**names: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(3, 3) for name in names} if names else {n: nn.Linear(3, 3) for n in "abc"}


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[0].bias.requires_grad_(False)
    return net


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    nn.utils.prune.l1_unstructured(net[2], "weight", amount=1)
    return net


NOT_CHAINS = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        r"got BatchNorm1d \('1'\)",
    ),
    "batch norm last": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), r"got BatchNorm1d \('1'\)"),
    "layer norm first": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 4)), r"got LayerNorm \('0'\)"),
    "sigmoid": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)), r"got Sigmoid \('1'\)"),
    "tanh function": (lambda: net_of(lambda s, x: s.b(torch.tanh(s.a(x))), **linears()), "got the operation 'tanh'"),
    "relu6": (lambda: net_of(lambda s, x: s.b(F.relu6(s.a(x))), **linears()), "got the operation 'relu6'"),
    "gelu": (lambda: net_of(lambda s, x: s.b(F.gelu(s.a(x))), **linears()), "got the operation 'gelu'"),
    "clamp": (lambda: net_of(lambda s, x: s.b(s.a(x).clamp(0, 6)), **linears()), "got the operation 'clamp'"),
    "alpha dropout": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout(), nn.Linear(4, 2)),
        r"got AlphaDropout \('1'\)",
    ),
    "residual sum": (
        lambda: net_of(residual, **linears()),
        r"got the operation 'add' in the forward of Net.*Linear \('b'\)",
    ),
    "nested residual": (
        lambda: nn.Sequential(nn.Linear(3, 3), net_of(residual, **linears())),
        r"got the operation 'add' in the forward of Net \('1'\)",
    ),
    "skip from the input": (
        lambda: net_of(lambda s, x: s.b(s.a(x).relu() + x), **linears()),
        "got the operation 'add'",
    ),
    "concatenation": (
        lambda: net_of(lambda s, x: s.b(torch.cat([s.a(x), x], 1)), a=nn.Linear(3, 3), b=nn.Linear(6, 1)),
        "got the operation 'cat'",
    ),
    "doubled": (lambda: net_of(lambda s, x: s.b(s.a(x) * 2), **linears()), "got the operation 'mul'"),
    "hidden units as output": (
        lambda: net_of(leaking, **linears()),
        "got the operation 'relu'.* used beside the chain",
    ),
    "two heads": (lambda: net_of(two_heads, **linears()), r"got Linear \('c'\), which takes"),
    "second input branch": (
        lambda: net_of(lambda s, x: s.c(s.a(x).relu()) + s.b(x), **linears()),
        r"got Linear \('b'\), which takes what the input returns",
    ),
    "reused layer": (
        lambda: net_of(lambda s, x: s.b(s.a(s.a(x).relu()).relu()), **linears()),
        "got the layer 'a' used twice",
    ),
    "tied weights": (tied, "got the layer '2' that shares a tensor with '0'"),
    "transposed weights": (
        lambda: net_of(lambda s, x: F.linear(s.a(x).relu(), s.a.weight.t()), a=nn.Linear(3, 3)),
        "got the operation 't' in the forward of Net with the parameter 'a.weight'",
    ),
    "in place": (lambda: net_of(in_place, **linears()), "got the operation 'sigmoid_'"),
    "in place, a part": (lambda: net_of(part_in_place, **linears()), "got the operation 'add_'"),
    "assignment": (lambda: net_of(assigned, **linears()), r"can trace.*got Net, .*item assignment"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)),
        r"got Conv2d \('0'\) with groups=2",
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.Conv2d(2, 1, 3)),
        r"got ConvTranspose2d \('1'\)",
    ),
    "pooling over units": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.MaxPool1d(2), nn.Linear(2, 2)),
        r"got MaxPool1d \('2'\)",
    ),
    "mean over units": (
        lambda: net_of(lambda s, x: s.b(s.a(x).mean(dim=(1, 2))), a=nn.Conv2d(1, 3, 3), b=nn.Linear(4, 2)),
        "got the operation 'mean'",
    ),
    "not flattened": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Linear(8, 2)),
        r"got Linear \('2'\) on an input that is not flattened",
    ),
    "flattened with the batch": (
        lambda: net_of(lambda s, x: s.b(torch.flatten(s.a(x))), a=nn.Conv1d(1, 1, 1), b=nn.Linear(4, 2)),
        "got the operation 'flatten'",
    ),
    "linear layer flattened with the batch": (
        lambda: net_of(lambda s, x: s.b(torch.flatten(s.a(x))), a=nn.Linear(3, 3), b=nn.Linear(6, 4)),
        "got the operation 'flatten'",
    ),
    "unflattened": (
        lambda: nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 1, 2)),
        r"got Unflatten \('1'\)",
    ),
    "padding with ones": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConstantPad2d(1, 1.0), nn.Conv2d(2, 1, 3)),
        r"got ConstantPad2d \('1'\)",
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)),
        r"got ParametrizedLinear \('0'\) whose weight or bias is not a parameter itself",
    ),
    "pruning": (pruned, r"got Linear \('2'\) whose weight or bias is not a parameter itself"),
    "attention": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2)),
        r"got Transformer|can trace",
    ),
    "recurrence": (lambda: nn.Sequential(nn.LSTM(3, 4)), r"got LSTM \('0'\)"),
    "frozen": (frozen, r"got frozen parameters in the chain: \['0.bias'\]"),
    "outside": (
        lambda: net_of(lambda s, x: s.b(s.a(x).relu()), **linears()),
        r"got trainable parameters outside the chain: \['c.weight', 'c.bias'\]",
    ),
    "no layers": (lambda: nn.Sequential(nn.PReLU()), "got Sequential without any"),
    "control flow": (
        lambda: net_of(lambda s, x: s.b(s.a(x) if x.sum() > 0 else x), **linears()),
        r"whose forward torch\.fx can trace.*got Net",
    ),
    "no forward": (lambda: net_of(nn.Module.forward, **linears()), "no single submodule|can trace"),
}


@pytest.mark.parametrize("name", NOT_CHAINS)
def test_what_is_not_a_chain_is_named_with_the_geometries_that_work(name):
    build, message = NOT_CHAINS[name]
    with pytest.raises(ValueError, match=message) as error:
        chart_of(build(), torch.float32)
    for geometry in ("'euclidean'", "'layer'", "'filter'", "'element'"):
        assert geometry in str(error.value)


# ------------------------------------------------------------------------------ permutations, dead units, small weights


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.sign() * (0.5 + p.abs()))
    return net


def sharpness(chain: Chain) -> Tensor:
    metric = TopEigenvalues(geometry="path", which="LM", tol=1e-12)
    metric.update(landscape_of(chain))
    assert metric.converged
    return metric.compute()


@few_examples
@given(chains(max_units=4), seeds)
def test_rescaling_and_permuting_units_changes_no_number(chain, seed):
    """The same function of the data has the same number, to 1e-10; with the skeleton j mod h it moved by decades."""
    generator = torch.Generator().manual_seed(seed)
    output, before = chain.module(chain.x).detach(), chart_of(chain.module)
    number = sharpness(chain)
    assume(float(number.abs()) > 1e-6)
    for _ in range(2):
        chain.permute_units(generator)
        chain.rescale_units(generator, decades=1.0)
    torch.testing.assert_close(chain.module(chain.x).detach(), output, rtol=1e-9, atol=1e-9 * float(output.abs().max()))
    after = chart_of(chain.module)
    torch.testing.assert_close(after.values.sort().values, before.values.sort().values, rtol=1e-10, atol=0)
    assert after.radius == pytest.approx(before.radius, rel=1e-10)
    torch.testing.assert_close(sharpness(chain), number, rtol=1e-10, atol=0)


def kill_units(chain: Chain) -> None:
    """One unit without incoming, one without outgoing weights."""
    with torch.no_grad():
        chain.module[0].weight[1] = 0
        chain.module[6].weight[2] = 0
        chain.module[8].weight[:, 1] = 0


def test_dead_units_stand_still_and_change_nothing_else():
    chain = example_chain()
    kill_units(chain)
    chart = chart_of(chain.module)
    assert chart.num_hidden_units == 5  # of 8
    torch.testing.assert_close(chart.values, chain.reference_values(), rtol=1e-12, atol=0)
    exact, landscape = chain.dense_hessian(), landscape_of(chain)
    with landscape.measurement():
        own = landscape.chart("path")
        rows = [own.hvp(landscape.hvp, e, gradient=landscape.gradient) for e in torch.eye(len(exact)).double()]
    torch.testing.assert_close(torch.stack(rows), exact, rtol=1e-8, atol=1e-9 * float(exact.abs().max()))
    moved = landscape.unflatten(chart.displacement(0.3 * chart.radius * torch.ones_like(chart.values) / 40))
    assert not moved[0][1].any()
    assert not moved[4][2].any()
    assert not moved[5][:, 1].any()
    assert moved[0][0].any()
    rebuilt = output_at(chain, chart.rebuilt_weights(chart.values))
    torch.testing.assert_close(rebuilt, chain.module(chain.x).detach(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="or weights of units that no path leads through"):
        chart.coordinates((torch.arange(len(flat_weights(chain.module))) == 20).double())
    number = sharpness(chain)
    generator = torch.Generator().manual_seed(3)
    chain.rescale_units(generator)
    chain.permute_units(generator)
    torch.testing.assert_close(sharpness(chain), number, rtol=1e-10, atol=0)


def test_a_network_without_any_path_has_the_output_biases_only():
    net = three_layers()
    nn.init.zeros_(net[2].weight)
    chart = chart_of(net)
    assert chart.num_coordinates == 3
    assert not chart.displacement(torch.ones(3, dtype=torch.float64))[:-3].any()


@pytest.mark.parametrize("tiny", [1e-9, 0.0])
def test_single_weights_that_are_tiny_or_zero_do_not_rule_the_number(tiny):
    chain = example_chain()
    number = sharpness(chain)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer, place in ((6, (0, 0)), (8, (0, 0)), (4, (0, 0)), (0, (0, 0, 1, 1))):
            chain.module[layer].weight[place] = tiny
        assert float(sharpness(chain).abs()) < 100 * float(number.abs())


def test_weights_that_are_not_finite_are_an_error():
    net = three_layers()
    net[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="Expected finite weights for the skeleton of basis paths"):
        chart_of(net)


def test_products_beyond_the_range_of_float32_are_an_error():
    net = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(12)])
    for layer in net:
        nn.init.constant_(layer.weight, 1e-4)
    with pytest.raises(ValueError, match=r"within the range of torch.float32.*module.double\(\)"):
        chart_of(net, torch.float32)
    chart = chart_of(copy.deepcopy(net).double())
    assert chart.num_coordinates == 1
    torch.testing.assert_close(chart.values, torch.tensor([1e-48], dtype=torch.float64), rtol=1e-6, atol=0)
