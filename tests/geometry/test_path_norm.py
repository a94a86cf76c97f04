"""The geometry of path norms: kappa against sums over all explicit paths, invariance, networks and errors."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.chains import net_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import (
    SAM,
    AverageCaseSharpness,
    FlatnessMonitor,
    HessianTrace,
    LossLandscape,
    SharpnessAwareMinimization,
    TopEigenvalues,
    WorstCaseSharpness,
    loss_surface,
)
from lightning_flatness.geometry import FirstBatch, PathNormGeometry


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def landscape_of(module: nn.Module, x: Tensor, mode: Any = "eval") -> LossLandscape:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        out = copy.deepcopy(module).eval()(x)
    y = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    return LossLandscape(module, [(x, y)], squared_error, mode=mode)


def kappas(module: nn.Module, x: Tensor, mode: Any = "eval") -> dict[str, Tensor]:
    landscape = landscape_of(module, x, mode)
    chart: Any = landscape.chart("path_norm")
    scale = chart.scale
    kappa = torch.where(scale > 0, scale**-2, 0.0)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    return dict(zip(names, landscape.unflatten(kappa), strict=True))


# --------------------------------------------------------------------------------------- against all explicit paths


def path_sums(edges: list[tuple[str, str, str, float]]) -> dict[str, float]:
    """For each weight, the sum over all paths through it of the product of the other squared weights.

    Args:
        edges: Start, end, the name of the weight and its value. Nodes "in..." start paths, "out..." end them.
    """
    leaving: dict[str, list[tuple[str, str, float]]] = {}
    for start, end, name, value in edges:
        leaving.setdefault(start, []).append((end, name, value))
    sums: dict[str, float] = {}

    def follow(node: str, passed: list[tuple[str, float]]) -> None:
        if node.startswith("out"):
            for i, (name, _) in enumerate(passed):
                product = 1.0
                for k, (_, value) in enumerate(passed):
                    product *= value**2 if k != i else 1.0
                sums[name] = sums.get(name, 0.0) + product
        for end, name, value in leaving.get(node, []):
            follow(end, [*passed, (name, value)])

    for start in {start for start, *_ in edges if start.startswith("in")}:
        follow(start, [])
    return sums


def dense_edges(layer: nn.Linear, name: str, start: str, end: str) -> list[tuple[str, str, str, float]]:
    edges = [
        (f"{start}{i}", f"{end}{j}", f"{name}.weight[{j},{i}]", layer.weight[j, i].item())
        for j, i in itertools.product(range(layer.out_features), range(layer.in_features))
    ]
    if layer.bias is not None:
        edges += [("in bias", f"{end}{j}", f"{name}.bias[{j}]", layer.bias[j].item()) for j in range(len(layer.bias))]
    return edges


def assert_sums(found: dict[str, Tensor], sums: dict[str, float]) -> None:
    for name, kappa in found.items():
        for index in itertools.product(*map(range, kappa.shape)):
            expected = sums.get(f"{name}[{','.join(map(str, index))}]", 0.0)
            assert float(kappa[index]) == pytest.approx(expected, rel=1e-10), (name, index)


class Residual(nn.Module):
    """A sum with what came before, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 3, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(torch.cat([h + F.leaky_relu(self.b(h), 0.1), h], dim=1))


def test_kappa_is_the_sum_over_all_paths_of_a_residual_network():
    torch.manual_seed(0)
    net = Residual().double()
    one = "a node for each sum"
    edges = dense_edges(net.a, "a", "in", "h")
    edges += [(f"h{i}", f"s{i}", one, 1.0) for i in range(3)]
    edges += dense_edges(net.b, "b", "h", "s")
    for j, i in itertools.product(range(2), range(3)):
        edges.append((f"s{i}", f"out{j}", f"c.weight[{j},{i}]", net.c.weight[j, i].item()))
        edges.append((f"h{i}", f"out{j}", f"c.weight[{j},{i + 3}]", net.c.weight[j, i + 3].item()))
    edges += [("in bias", f"out{j}", f"c.bias[{j}]", net.c.bias[j].item()) for j in range(2)]
    assert_sums(kappas(net, torch.randn(4, 2).double()), path_sums(edges))


def test_kappa_of_unused_and_dead_units():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    net.unused = nn.Linear(2, 2).double()
    nn.init.zeros_(net[0].weight[1])
    nn.init.zeros_(net[0].bias[1])
    nn.init.zeros_(net[2].weight[:, 2])
    net.forward = lambda x: net[2](net[1](net[0](x)))
    edges = dense_edges(net[0], "0", "in", "h") + dense_edges(net[2], "2", "h", "out")
    found = kappas(net, torch.randn(4, 2).double())
    assert_sums(found, path_sums(edges))
    assert not found["unused.weight"].any()
    assert not found["2.weight"][:, 1].any()  # nothing comes in
    assert not found["0.weight"][2].any()  # nothing goes out
    assert found["0.weight"][1].all()


def test_kappa_of_a_convolution_with_pooling_is_that_of_the_written_out_network():
    """Each position of each channel is a unit: tap by tap, max pooling with weight 1 and mean with 1/n per path."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.Flatten())
    net = net.append(nn.Linear(3, 2)).double()
    conv, last = net[0], net[5]
    edges: list[tuple[str, str, str, float]] = []
    for c, p in itertools.product(range(3), range(5)):  # four inputs, padded to six, five positions
        unit, pooled = f"u{c},{p}", f"m{c},{p // 2}"
        edges.append(("in bias", unit, f"0.bias[{c}]", conv.bias[c].item()))
        for i, t in itertools.product(range(2), range(2)):
            if 0 <= p + t - 1 < 4:
                edges.append((f"in{i},{p + t - 1}", unit, f"0.weight[{c},{i},{t}]", conv.weight[c, i, t].item()))
        if p < 4:
            edges.append((unit, pooled, "max", 1.0))
    edges += [(f"m{c},{p}", f"h{c}", "mean", 0.5) for c in range(3) for p in range(2)]
    edges += dense_edges(last, "5", "h", "out")
    assert_sums(kappas(net, torch.randn(3, 2, 4).double()), path_sums(edges))


def test_kappa_with_batch_normalisation_is_that_of_the_folded_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[1].running_var.uniform_(0.2, 3)
        net[1].weight.normal_()
        net[1].bias.normal_()
    inverse = (net[1].running_var + net[1].eps).rsqrt()
    edges = dense_edges(net[0], "0", "in", "n") + dense_edges(net[3], "3", "h", "out")
    for i in range(3):
        edges.append((f"n{i}", f"g{i}", "sigma", float(inverse[i])))
        edges.append((f"g{i}", f"h{i}", f"1.weight[{i}]", net[1].weight[i].item()))
        edges.append(("in bias", f"h{i}", f"1.bias[{i}]", net[1].bias[i].item()))
    assert_sums(kappas(net, torch.randn(4, 2).double()), path_sums(edges))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.AdaptiveMaxPool2d((None, 2)),
        nn.ConvTranspose2d(2, 4, 3, 2, groups=2, bias=False),
        nn.Conv2d(2, 4, 3, dilation=2, groups=2, padding="same"),
        nn.Upsample(scale_factor=2),
        nn.ZeroPad2d(1),
        nn.PixelShuffle(1),
    ],
    ids=repr,
)
def test_operations_square_the_weights_of_their_edges(pool):
    """For operations without maxima: the squared Jacobian, summed over outputs, is kappa of weights at the inputs."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 5, 5, dtype=torch.float64))
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.w * x)

    pool.double().requires_grad_(False)
    x = torch.randn(3, 2, 5, 5).double()
    jacobian = torch.func.jacrev(lambda w: pool(w[None]))(torch.ones(2, 5, 5).double())
    expected = jacobian.square().flatten(0, -4).sum(0)
    if isinstance(pool, nn.MaxPool2d | nn.AdaptiveMaxPool2d):  # of each window of ones one entry is the largest
        reaching = [pool(F.one_hot(torch.tensor(i), 25).view(1, 1, 5, 5).double()).sum() for i in range(25)]
        expected = torch.stack(reaching).view(5, 5).expand(2, 5, 5)
    torch.testing.assert_close(kappas(Scaled(), x)["w"], expected, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- invariance


class Block(nn.Module):
    """A basic block, with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        h += self.skip(x)
        return F.relu(h)


def resnet() -> nn.Sequential:
    stem = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*stem, Block(4, 4), Block(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def plain_cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(5, 6), nn.LeakyReLU(0.2), nn.Linear(6, 3)),
    )


@torch.no_grad()
def rescale_cnn(net: Any, generator: torch.Generator) -> None:
    layers: list[Any] = [net[0], net[3], net[7], net[9]]
    for layer, following in itertools.pairwise(layers):
        c = factors(len(layer.weight), generator).to(layer.weight.dtype)
        order = torch.randperm(len(c), generator=generator)
        layer.weight.mul_(c.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.mul_(c)
        following.weight.div_(c.view(-1, *[1] * (following.weight.dim() - 2)))
        layer.weight.copy_(layer.weight[order])
        layer.bias.copy_(layer.bias[order])
        following.weight.copy_(following.weight[:, order])


@torch.no_grad()
def rescale_resnet(net: Any, generator: torch.Generator) -> None:
    """Units that a skip joins share their factor: the stem's and the first block's."""

    def out(norm: Any, c: Tensor) -> None:
        norm.weight.mul_(c)
        norm.bias.mul_(c)

    def into(conv: Any, c: Tensor) -> None:
        conv.weight.div_(c.view(1, -1, 1, 1))

    stream, last = factors(4, generator), factors(6, generator)
    c1, c2 = factors(4, generator), factors(6, generator)
    dtype = next(net.parameters()).dtype
    stream, last, c1, c2 = (c.to(dtype) for c in (stream, last, c1, c2))
    first, second = net[4], net[5]
    out(net[1], stream)
    into(first.conv1, stream)
    out(first.bn1, c1)
    into(first.conv2, c1)
    out(first.bn2, stream)
    into(second.conv1, stream)
    into(second.skip, stream)
    out(second.bn1, c2)
    into(second.conv2, c2)
    out(second.bn2, last)
    second.skip.weight.mul_(last.view(-1, 1, 1, 1))
    second.skip.bias.mul_(last)
    net[8].weight.div_(last)
    for norm, conv in ((net[1], net[0]), (first.bn1, first.conv1)):  # and filters in front of a normalisation
        c = factors(4, generator).to(dtype)
        conv.weight.mul_(c.view(-1, 1, 1, 1))
        norm.running_mean.mul_(c)
        norm.running_var.mul_(c**2).add_(norm.eps * (c**2 - 1))


def factors(n: int, generator: torch.Generator) -> Tensor:
    return 10 ** (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1)


def trained_statistics(net: nn.Module, x: Tensor) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    net.train()
    for _ in range(30):
        net(x)
    return net.eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], Callable[..., None]]] = {
    "cnn": (plain_cnn, rescale_cnn),
    "resnet": (resnet, rescale_resnet),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NETWORKS)
def test_rescaling_and_permuting_units_changes_no_number(name, dtype, tolerance):
    torch.manual_seed(1)
    build, rescale = NETWORKS[name]
    x = torch.randn(12, 1, 8, 8, dtype=dtype)
    before = trained_statistics(build().to(dtype), x)
    after = copy.deepcopy(before)
    rescale(after, torch.Generator().manual_seed(0))
    scale = before(x).abs().max().item()
    torch.testing.assert_close(after(x), before(x), rtol=0, atol=30 * torch.finfo(dtype).eps * scale)
    assert not torch.allclose(before[0].weight, after[0].weight, rtol=0.1)
    numbers = []
    for net in (before, after):
        landscape = landscape_of(before, x)
        landscape = LossLandscape(net, landscape.samples.batches, squared_error, mode="eval")
        metric = TopEigenvalues(geometry="path_norm", which="LM", tol=tolerance**0.5 / 3)
        metric.update(landscape)
        assert metric.converged
        numbers.append(metric.compute())
        assert torch.isfinite(numbers[-1]).all()
    torch.testing.assert_close(numbers[1], numbers[0], rtol=tolerance, atol=0)


def test_filters_in_front_of_batch_statistics():
    """With statistics of the batch a filter may be rescaled alone, whatever the running ones are."""
    torch.manual_seed(1)
    before = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-30), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    before = before.double().train()
    after, x = copy.deepcopy(before), torch.randn(9, 1, 6, 6).double()
    after[0].weight.data.mul_(factors(4, torch.Generator().manual_seed(0)).view(-1, 1, 1, 1))
    numbers = []
    for net in (before, after):
        metric = TopEigenvalues(geometry="path_norm", tol=1e-8)
        net[0].bias.data.zero_()
        metric.update(landscape_of(net, x, mode="train"))
        numbers.append(metric.compute())
    torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-10, atol=0)


# --------------------------------------------------------------------------------------------------- what is followed


class ControlFlow(nn.Module):
    """Values decide what runs; weights are used twice, joined with the input, and pruned."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
        self.shift = nn.Parameter(torch.randn(3))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(2 if float(x.sum()) > -1e9 else 0):
            h = (self.a(h).clamp(min=0) + x) / 2 - self.shift
        h *= self.mask
        return self.b(torch.maximum(h, F.relu(self.a(h))).view(h.size(0), -1))


def test_any_python_code_is_followed():
    torch.manual_seed(0)
    net = ControlFlow().double()
    found = kappas(net, torch.randn(4, 3).double())
    a, b, s = (p.detach().square() for p in (net.a.weight, net.b.weight, net.shift))
    bias = net.a.bias.detach().square().requires_grad_()
    a.requires_grad_()
    s.requires_grad_()
    h = torch.ones(3).double()
    for _ in range(2):
        h = (a @ h + bias + 1) / 4 + s
    h = h * net.mask
    out = (b @ (h + a @ h + bias)).sum()
    for name, gradient in zip(("a.weight", "a.bias", "shift"), torch.autograd.grad(out, (a, bias, s)), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=0)


class Text(nn.Module):
    """A maximum with indices over positions; a constant of the shape of a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.conv, self.head = nn.Embedding(5, 2), nn.Conv1d(2, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(self.tokens(x).transpose(1, 2)))
        best = (h * torch.ones_like(h)).max(dim=2)
        return self.head(best.values)


def test_maxima_with_indices_let_all_paths_pass():
    torch.manual_seed(0)
    net = Text().double()
    landscape = LossLandscape(net, [torch.tensor([[0, 1, 2, 1]])], lambda m, x: m(x).square().mean())
    chart: Any = landscape.chart("path_norm")
    found = landscape.unflatten(chart.scale**-2)
    leaving = net.head.weight.detach().square().sum(0)
    entering = net.tokens.weight.detach().square().sum(0)
    torch.testing.assert_close(found[1][:, :, 0], 4 * leaving[:, None] * entering, rtol=1e-10, atol=0)
    torch.testing.assert_close(found[2], 4 * leaving, rtol=1e-10, atol=0)


def test_tokens_enter_all_at_once():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2, bias=False)).double()
    landscape = LossLandscape(net, [torch.tensor([[0, 1], [3, 3]])], lambda m, x: m(x).square().mean())
    kappa = landscape.unflatten(landscape.chart("path_norm").scale ** -2)
    into = net[2].weight.detach().square().sum(0).view(2, 3).sum(0)
    torch.testing.assert_close(kappa[0], into.expand(5, 3), rtol=1e-10, atol=0)
    through = net[0].weight.detach().square().sum(0).repeat(2)
    torch.testing.assert_close(kappa[1], through.expand(2, 6), rtol=1e-10, atol=0)


def test_batch_size_loss_and_metrics_beside_it_do_not_matter():
    torch.manual_seed(0)
    net, x, y = plain_cnn(), torch.randn(6, 1, 8, 8), torch.randint(3, (6,))

    def with_metrics(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        logits = module(batch[0])
        accuracy = (logits.argmax(1) == batch[1]).float().mean()
        penalty = sum(p.square().sum() for p in module.parameters())
        return {"loss": F.nll_loss(logits.log_softmax(1), batch[1]) + 1e-4 * penalty, "accuracy": accuracy}

    one = LossLandscape(net, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1])).chart("path_norm")
    two = LossLandscape(net, [(x[:2], y[:2]), (x[2:], y[2:])], with_metrics).chart("path_norm")
    torch.testing.assert_close(one.scale, two.scale, rtol=1e-6, atol=0)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(linear(), nn.ReLU(), linear()))


NOT_HOMOGENEOUS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sigmoid": (lambda: nn.Sequential(linear(), nn.Sigmoid(), linear()), r"'sigmoid' in Sigmoid \('1'\)"),
    "gelu": (lambda: nn.Sequential(linear(), nn.GELU(), linear()), r"'gelu' in GELU \('1'\)"),
    "tanh": (lambda: net_of(lambda s, x: s.b(s.a(x).tanh()), a=linear(), b=linear()), "'tanh' in Net"),
    "layer norm": (lambda: nn.Sequential(linear(), nn.LayerNorm(4)), r"'layer_norm' in LayerNorm \('1'\)"),
    "group norm": (lambda: nn.Sequential(linear(), nn.GroupNorm(2, 4), linear()), "'group_norm' in GroupNorm"),
    "attention": (lambda: nn.Sequential(linear(), nn.TransformerEncoderLayer(4, 2)), "'multi_head_attention_forward'"),
    "product": (lambda: net_of(lambda s, x: s.b(s.a(x) * s.a(x)), a=linear(), b=linear()), "'mul' in Net"),
    "manual relu": (lambda: net_of(lambda s, x: s.b(s.a(x) * (s.a(x) > 0)), a=linear(), b=linear()), "'gt' in Net"),
    "softplus": (lambda: nn.Sequential(linear(), nn.Softplus(), linear()), "'softplus'"),
    "relu6": (lambda: nn.Sequential(linear(), nn.ReLU6(), linear()), "'relu6'|'hardtanh'"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(linear()), nn.ReLU(), linear()),
        "weights that are computed from parameters by the operation 'weight_norm'",
    ),
    "recurrence": (lambda: net_of(lambda s, x: s.a(x)[0], a=nn.LSTM(4, 4)), "'lstm' in LSTM"),
    "in place": (lambda: net_of(in_place, a=linear(), b=linear()), "'setitem' in Net"),
}


def in_place(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h[:, 0] = 1.0
    return self.b(h)


@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_what_is_not_positively_homogeneous_is_named(name):
    build, message = NOT_HOMOGENEOUS[name]
    with pytest.raises(ValueError, match=f"Expected a network of positively homogeneous units.*{message}.*'element'"):
        kappas(build(), torch.randn(5, 4))


def test_weights_used_out_of_sight_are_named():
    with pytest.raises(ValueError, match=r"used by what is no function of torch|without any"):
        kappas(scripted(), torch.randn(5, 4))


def test_without_a_loss_there_is_nothing_to_follow():
    net = plain_cnn()
    with pytest.raises(TypeError, match="Expected a loss whose network the geometry 'path_norm' can follow, got none"):
        PathNormGeometry().scales(net, list(net.parameters()))


def test_sums_that_overflow_are_an_error():
    net = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(12)]).double()
    for layer in net:
        nn.init.constant_(layer.weight, 1e30)
    with pytest.raises(ValueError, match="Expected sums over paths within the range"):
        kappas(net, torch.ones(1, 1).double())


# ----------------------------------------------------------------------------------------------- everything works in it


def dense(landscape: LossLandscape) -> Tensor:
    eye = torch.eye(landscape.num_parameters, dtype=landscape.dtype)
    scale = landscape.chart("path_norm").scale
    with landscape.measurement():
        return torch.stack([scale * landscape.hvp(scale * e) for e in eye])


def test_measures_equal_dense_ones():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    landscape = landscape_of(net, torch.randn(9, 3).double())
    exact = dense(landscape)
    eigenvalues = torch.linalg.eigvalsh(exact).flip(0)
    top = TopEigenvalues(k=3, geometry="path_norm", tol=1e-8)
    top.update(landscape)
    torch.testing.assert_close(top.compute(), eigenvalues[:3], rtol=1e-8, atol=0)
    trace = HessianTrace("path_norm", num_products=300)
    trace.update(landscape)
    torch.testing.assert_close(trace.compute(), exact.trace(), rtol=1e-8, atol=0)
    for metric in (WorstCaseSharpness(0.01, "path_norm"), AverageCaseSharpness(0.01, "path_norm")):
        metric.update(landscape)
        assert torch.isfinite(metric.compute())
    surface = loss_surface(landscape, "random", "path_norm", radius=0.1, num_points=5)
    assert torch.isfinite(torch.as_tensor(surface.loss)).all()


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain_cnn()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())
        return F.cross_entropy(logits, batch[1])

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 1, 8, 8, generator=generator)
        data = torch.utils.data.TensorDataset(x, torch.randint(3, (32,), generator=generator))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(module: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **quiet
    )
    trainer.fit(module)
    return trainer


def test_in_the_monitor_and_with_sam():
    pl.seed_everything(0, verbose=False)
    metrics = {"path_norm": TopEigenvalues(geometry="path_norm")}
    trainer = fit(Lit(), FlatnessMonitor(metrics=metrics, probe_size=16), SharpnessAwareMinimization(0.1, "path_norm"))
    assert torch.isfinite(trainer.callback_metrics["flatness/path_norm"])
    assert trainer.callback_metrics["sam/perturbation_norm"] > 0


@pytest.mark.parametrize("geometry", ["path_norm", "attention"])
def test_sam_refuses_shards_of_weights_that_a_scale_needs_together(geometry, monkeypatch):
    monkeypatch.setattr("lightning_flatness.callbacks.sam_refusals.has_sharded_weights", lambda _: True)
    with pytest.raises(MisconfigurationException, match=f"needs whole weights for the geometry '{geometry}'.*HINT"):
        fit(Lit(), SharpnessAwareMinimization(0.1, geometry))


def test_a_step_of_sam_equals_the_dense_one():
    torch.manual_seed(0)
    net, rho, lr = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), 0.3, 0.1
    landscape = landscape_of(net, torch.randn(9, 3).double())
    batch, scale = landscape.samples.batches[0], landscape.chart("path_norm").scale
    g = landscape.gradient()
    change = rho * scale**2 * g / (scale * g).norm()
    with landscape.displaced(change):
        gradient = landscape.gradient()
    expected = torch.cat([p.detach().flatten() for p in net.parameters()]) - lr * gradient
    geometry = PathNormGeometry().for_loss(FirstBatch(squared_error, batch, 9))
    optimizer = SAM(torch.optim.SGD(net.parameters(), lr), rho, geometry, net)

    def closure() -> Tensor:
        loss = squared_error(net, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(
        torch.cat([p.detach().flatten() for p in net.parameters()]), expected, rtol=1e-12, atol=0
    )
    optimizer.step(closure)  # at other weights: the same program, other sums


def test_a_geometry_is_pickled_without_what_it_has_seen():
    geometry = PathNormGeometry().for_loss(FirstBatch(squared_error, torch.ones(2, 2), 2))
    assert repr(pickle.loads(pickle.dumps(geometry))) == repr(copy.deepcopy(geometry)) == "PathNormGeometry()"


# ------------------------------------------------------------------------------------------- the repository's ResNet-20


@torch.no_grad()
def rescale_resnet20(net: Any, generator: torch.Generator) -> None:
    """Factors of the units inside of blocks, and one per channel of each stage, which its skips share."""
    dtype = next(net.parameters()).dtype
    blocks = list(net[3:12])
    for block in blocks:
        c = factors(len(block.residual[1].weight), generator).to(dtype)
        block.residual[1].weight.mul_(c)
        block.residual[1].bias.mul_(c)
        block.residual[3].weight.div_(c.view(1, -1, 1, 1))
    for stage in range(3):
        own, following = blocks[3 * stage : 3 * stage + 3], blocks[3 * stage + 3 : 3 * stage + 4]
        into = [block.residual[0] for block in own[bool(stage) :] + following]
        into += [block.shortcut[0] for block in following] or [net[14]]
        out = [block.residual[4] for block in own] + [own[0].shortcut[1] if stage else net[1]]
        c = factors(len(out[0].weight), generator).to(dtype)
        for norm in out:
            norm.weight.mul_(c)
            norm.bias.mul_(c)
        for layer in into:
            layer.weight.div_(c.view(1, -1, *[1] * (layer.weight.dim() - 2)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_resnet20_gives_numbers_that_rescaling_does_not_change(dtype, tolerance, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks" / "peers"))
    resnet20 = importlib.import_module("workloads").resnet20
    torch.manual_seed(0)
    x = torch.randn(6, 1, 8, 8, dtype=dtype)
    before = trained_statistics(resnet20().to(dtype), x)
    with torch.no_grad():
        before[14].weight *= 1 / before(x).std()  # outputs of the size of one
    after = copy.deepcopy(before)
    rescale_resnet20(after, torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(x), before(x), rtol=0, atol=300 * torch.finfo(dtype).eps)
    shares, numbers = [], []
    for net in (before, after, before):
        landscape = LossLandscape(net, [(x, torch.zeros(6, 10, dtype=dtype))], squared_error, mode="eval")
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        chart: Any = landscape.chart("path_norm")
        shares.append(weights / chart.scale)  # w² kappa is the sum over paths: the same network has the same
        metric = TopEigenvalues(geometry="path_norm", which="LM", tol=tolerance**0.5 / 3)
        metric.update(landscape)
        numbers.append(metric.compute())
    assert torch.isfinite(numbers[0]).all()
    assert torch.equal(numbers[2], numbers[0])
    torch.testing.assert_close(shares[1], shares[0], rtol=10 * tolerance, atol=0)
    torch.testing.assert_close(numbers[1], numbers[0], rtol=tolerance, atol=0)
