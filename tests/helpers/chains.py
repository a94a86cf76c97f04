"""Random ReLU chains, and basis paths written down once more with plain loops over units, as in the definition.

The oracle knows nothing of the package: edges are listed one by one, products are taken along the skeleton by
recursion, and the inverse map is the textbook one, with in-edges of 1 or -1. Its second derivative is the oracle of the
chart, which runs through the current weights instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import LossLandscape


@dataclass
class LayerSpec:
    """A layer as the definition sees it: an edge for every (target, source, tap), in the order of the weight."""

    name: str
    num_units: int
    num_sources: int
    num_taps: int
    bias: bool
    by_position: bool = False  # taps outside, sources inside: a linear layer over positions of a linear layer

    def edges(self) -> list[tuple[int, int | None, int]]:
        found: list[tuple[int, int | None, int]] = []
        for j in range(self.num_units):
            if self.by_position:
                found += [(j, i, t) for t in range(self.num_taps) for i in range(self.num_sources)]
            else:
                found += [(j, i, t) for i in range(self.num_sources) for t in range(self.num_taps)]
        return found + ([(j, None, 0) for j in range(self.num_units)] if self.bias else [])


@dataclass
class Chain:
    """A network, what the definition makes of it, and a problem for it."""

    module: nn.Module
    layers: list[LayerSpec]
    x: Tensor
    y: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def num_hidden(self) -> int:
        return sum(layer.num_units for layer in self.layers[:-1])

    @property
    def num_edges(self) -> int:
        return sum(len(layer.edges()) for layer in self.layers)

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(module(batch[0]), batch[1])

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.x[:4], self.y[:4]), (self.x[4:], self.y[4:])]

    # ------------------------------------------------------------------------------- the definition, edge by edge

    def weights(self) -> list[dict[tuple[int, int | None, int], float]]:
        """For each layer, the weight of every edge."""
        named = dict(self.module.named_parameters())
        found = []
        for layer in self.layers:
            entries = named[f"{layer.name}.weight"].detach().flatten().tolist()
            if layer.bias:
                entries += named[f"{layer.name}.bias"].detach().tolist()
            found.append(dict(zip(layer.edges(), entries, strict=True)))
        return found

    def largest(self, weights: list, l: int, j: int, *, forwards: bool) -> tuple[float, tuple]:
        """The largest product of absolute weights from the inputs to a unit, or on to the outputs, and its edge there.

        Layer -1 are the inputs. Ties have no place in random weights; without a path the product is zero.
        """
        if l < 0 if forwards else l == len(self.layers) - 1:
            return 1.0, ()
        if forwards:
            return max(
                (self.largest(weights, l - 1, e[1], forwards=True)[0] * abs(w), e)
                for e, w in weights[l].items()
                if e[0] == j and e[1] is not None
            )
        return max(
            (self.largest(weights, l + 1, e[0], forwards=False)[0] * abs(w), e)
            for e, w in weights[l + 1].items()
            if e[1] == j
        )

    def skeleton(self, weights: list) -> tuple[dict, dict]:
        """The in-edge and the out-edge of every hidden unit (l, j) that a path leads through."""
        units = [(l, j) for l, layer in enumerate(self.layers[:-1]) for j in range(layer.num_units)]
        before = {u: self.largest(weights, *u, forwards=True) for u in units}
        behind = {u: self.largest(weights, *u, forwards=False) for u in units}
        alive = [u for u in units if before[u][0] * behind[u][0] > 0]
        return {u: before[u][1] for u in alive}, {u: behind[u][1] for u in alive}

    def incoming(self, l: int, j: int, weights: list, in_edges: dict) -> float:
        """P of unit j of layer l; layer -1 are the inputs."""
        if l < 0:
            return 1.0
        edge = in_edges[l, j]
        return self.incoming(l - 1, edge[1], weights, in_edges) * weights[l][edge]

    def outgoing(self, l: int, j: int, weights: list, out_edges: dict) -> float:
        """S of unit j of layer l."""
        if l == len(self.layers) - 1:
            return 1.0
        edge = out_edges[l, j]
        return weights[l + 1][edge] * self.outgoing(l + 1, edge[0], weights, out_edges)

    def values(self) -> dict[tuple[int, tuple[int, int | None, int]], float]:
        """The value of the basis path through every edge between units that a path leads through."""
        weights = self.weights()
        in_edges, out_edges = self.skeleton(weights)
        last = len(self.layers) - 1
        values = {}
        for l, layer in enumerate(self.layers):
            for j, i, t in layer.edges():
                if (l < last and (l, j) not in in_edges) or (l > 0 and i is not None and (l - 1, i) not in in_edges):
                    continue
                before = 1.0 if i is None else self.incoming(l - 1, i, weights, in_edges)
                values[l, (j, i, t)] = before * weights[l][j, i, t] * self.outgoing(l, j, weights, out_edges)
        return values

    def coordinates(self) -> list[tuple[int, tuple[int, int | None, int]]]:
        """The edges that have a value and are no in-edge of a hidden unit."""
        in_edges, _ = self.skeleton(self.weights())
        return [(l, e) for l, e in self.values() if in_edges.get((l, e[0])) != e]

    def inverse_map(self) -> Callable[[Tensor], dict[str, Tensor]]:
        """The map from values to weights, with the signs of P at the current weights held fixed."""
        weights, place = self.weights(), {e: n for n, e in enumerate(self.coordinates())}
        in_edges, out_edges = self.skeleton(weights)
        last = len(self.layers) - 1

        def sign(l: int, j: int) -> float:
            return 1.0 if self.incoming(l, j, weights, in_edges) > 0 else -1.0

        def along(l: int, j: int) -> int:
            """Place of the path through the in-edge of unit j: follow out-edges until one is a coordinate."""
            edge = out_edges[l, j]
            return place[l + 1, edge] if (l + 1, edge) in place else along(l + 1, edge[0])

        def is_dead(l: int, j: int | None) -> bool:
            return j is not None and 0 <= l < last and (l, j) not in in_edges

        def rebuilt_edge(v: Tensor, l: int, e: tuple[int, int | None, int]) -> Tensor:
            j, i, _ = e
            if is_dead(l, j):  # what enters a dead unit stays, up to the scale of i
                scale = 1.0 if i is None or is_dead(l - 1, i) else abs(self.incoming(l - 1, i, weights, in_edges))
                return v.new_tensor(weights[l][e] * scale)
            of_source = 1.0 if i is None or is_dead(l - 1, i) else sign(l - 1, i)
            if l == last:
                return v.new_tensor(weights[l][e]) if is_dead(l - 1, i) else of_source * v[place[l, e]]
            if e == in_edges[l, j]:
                return v.new_tensor(of_source * sign(l, j))
            value = weights[l][e] * self.outgoing(l, j, weights, out_edges) if is_dead(l - 1, i) else v[place[l, e]]
            return of_source * sign(l, j) * value / v[along(l, j)]

        def rebuild(v: Tensor) -> dict[str, Tensor]:
            rebuilt = {}
            for l, layer in enumerate(self.layers):
                entries = [rebuilt_edge(v, l, e) for e in layer.edges()]
                shape = dict(self.module.named_parameters())[f"{layer.name}.weight"].shape
                rebuilt[f"{layer.name}.weight"] = torch.stack(entries[: shape.numel()]).view(shape)
                if layer.bias:
                    rebuilt[f"{layer.name}.bias"] = torch.stack(entries[shape.numel() :])
            return rebuilt

        return rebuild

    def reference_values(self) -> Tensor:
        values = self.values()
        return torch.tensor([values[e] for e in self.coordinates()], dtype=torch.float64)

    def loss_of_values(self) -> Callable[[Tensor], Tensor]:
        rebuild = self.inverse_map()
        return lambda v: F.mse_loss(torch.func.functional_call(self.module, rebuild(v), (self.x,)), self.y)

    def dense_hessian(self) -> Tensor:
        """The second derivative of L(w(v)), reverse over reverse."""
        return torch.func.jacrev(torch.func.grad(self.loss_of_values()))(self.reference_values()).detach()

    # -------------------------------------------------------------------------------------------------- rescaling

    @torch.no_grad()
    def rescale_units(self, generator: torch.Generator, decades: float = 3.0) -> None:
        """Multiply what goes into each hidden unit by 1e-decades ... 1e+decades, and divide what leaves it."""
        named = dict(self.module.named_parameters())
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            c = 10 ** ((2 * torch.rand(layer.num_units, generator=generator, dtype=torch.float64) - 1) * decades)
            c = c.to(named[f"{layer.name}.weight"].dtype)
            named[f"{layer.name}.weight"].mul_(c.view(-1, *[1] * (named[f"{layer.name}.weight"].dim() - 1)))
            if layer.bias:
                named[f"{layer.name}.bias"].mul_(c)
            weight = named[f"{following.name}.weight"].flatten(1)
            columns = c.repeat(following.num_taps) if following.by_position else c.repeat_interleave(following.num_taps)
            weight.div_(columns)

    @torch.no_grad()
    def permute_units(self, generator: torch.Generator) -> None:
        """Shuffle the hidden units of every layer: the same function."""
        named = dict(self.module.named_parameters())
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            order = torch.randperm(layer.num_units, generator=generator)
            for name in (f"{layer.name}.weight", f"{layer.name}.bias")[: 1 + layer.bias]:
                named[name].copy_(named[name][order])
            weight = named[f"{following.name}.weight"]
            shape = (layer.num_units, following.num_taps)
            columns = weight.reshape(-1, *(reversed(shape) if following.by_position else shape))
            columns = columns[..., order] if following.by_position else columns[:, order]
            weight.copy_(columns.reshape(weight.shape))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "prelu": nn.PReLU,
    "none": nn.Identity,
}


@st.composite
def chains(draw: st.DrawFn, max_units: int = 5, convolutions: bool = True) -> Chain:
    """Depth 2 to 6, any widths down to one unit, biases or not, with or without convolutions and pooling in front."""
    depth = draw(st.integers(2, 6))
    num_convolutions = draw(st.integers(0, min(2, depth - 1))) if convolutions else 0
    widths = draw(st.lists(st.integers(1, max_units), min_size=depth + 1, max_size=depth + 1))
    modules: list[nn.Module] = []
    layers: list[LayerSpec] = []
    size, taps = 6, 1
    activation = ACTIVATIONS[draw(st.sampled_from(list(ACTIVATIONS)))]
    for l in range(depth):
        bias = draw(st.booleans())
        if l < num_convolutions:
            units, sources = min(widths[l + 1], 3), min(widths[l], 3 if l else 2)
            fitting = [(3, 1, 1), (3, 2, 1), (1, 1, 0), (2, 2, 1), *([(2, 1, 0)] if size > 1 else [])]
            kernel, stride, padding = draw(st.sampled_from(fitting))
            modules.append(nn.Conv2d(sources, units, kernel, stride, padding, bias=bias))
            layers.append(LayerSpec(str(len(modules) - 1), units, sources, kernel**2, bias))
            modules.append(activation())
            size = (size + 2 * padding - kernel) // stride + 1
            if size >= 2 and (pool := draw(st.sampled_from([None, nn.MaxPool2d(2), nn.AvgPool2d(2)]))):
                modules.append(pool)
                size //= 2
            widths[l + 1] = units
        else:
            if l == num_convolutions and l > 0:
                modules.append(nn.Flatten())
                taps = size**2
            modules.append(nn.Linear(widths[l] * taps, widths[l + 1], bias=bias))
            layers.append(LayerSpec(str(len(modules) - 1), widths[l + 1], widths[l], taps, bias))
            taps = 1
            if l < depth - 1:
                modules.append(activation())
    return finish(nn.Sequential(*modules), layers, draw(st.integers(0, 2**16)), images=num_convolutions > 0)


def finish(module: nn.Module, layers: list[LayerSpec], seed: int, images: bool = False) -> Chain:
    """Draw weights away from zero, of both signs, and seven samples."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            modulus = 0.3 + 0.9 * torch.rand(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(modulus * (torch.rand(p.shape, generator=generator) < 0.6).double().mul(2).sub(1))
            if p.shape == (1,) and f"{name.removesuffix('.weight')}" not in [layer.name for layer in layers]:
                p.fill_(0.25)  # the slope of a PReLU
    shape = (layers[0].num_sources, 6, 6) if images else (layers[0].num_sources * layers[0].num_taps,)
    x = torch.randn(7, *shape, generator=generator, dtype=torch.float64)
    y = torch.randn(7, layers[-1].num_units, generator=generator, dtype=torch.float64)
    return Chain(module, layers, x, y)


def example_chain() -> Chain:
    """A convolution, pooling, a bottleneck of one unit, and widths that grow again."""
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(12, 1),
        nn.LeakyReLU(0.3),
        nn.Linear(1, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 2),
    )
    layers = [
        LayerSpec("0", 3, 2, 9, True),
        LayerSpec("4", 1, 3, 4, True),
        LayerSpec("6", 4, 1, 1, False),
        LayerSpec("8", 2, 4, 1, True),
    ]
    return finish(module, layers, seed=1, images=True)


def flat_weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def landscape_of(chain: Chain) -> LossLandscape:
    return LossLandscape(chain.module, chain.batches, chain.loss)


def net_of(forward: Callable[..., Tensor], **children: nn.Module) -> nn.Module:
    """A module with these children and this forward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    Net.forward = forward
    return Net()
