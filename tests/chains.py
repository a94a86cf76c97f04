"""Random ReLU chains, and basis paths written down once more with plain loops over units, as in the definition.

Nothing here knows of the package: edges are listed one by one, products are taken along the skeleton by recursion, and
the inverse map is the textbook one, with in-edges of 1 or -1. Its second derivative is the oracle of the chart, which
runs through the current weights instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class LayerSpec:
    """A layer as the definition sees it: an edge for every (target, source, tap), in the order of the weight."""

    name: str
    num_units: int
    num_sources: int
    num_taps: int
    centre: int
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

    def in_edge(self, l: int, j: int) -> tuple[int, int, int]:
        return (j, j % self.layers[l].num_sources, self.layers[l].centre)

    def out_edge(self, l: int, j: int) -> tuple[int, int, int]:
        following = self.layers[l + 1]
        return (j % following.num_units, j, following.centre)

    def incoming(self, l: int, j: int, weights: list) -> float:
        """P of unit j of layer l; layer -1 are the inputs."""
        if l < 0:
            return 1.0
        edge = self.in_edge(l, j)
        return self.incoming(l - 1, edge[1], weights) * weights[l][edge]

    def outgoing(self, l: int, j: int, weights: list) -> float:
        """S of unit j of layer l."""
        if l == len(self.layers) - 1:
            return 1.0
        edge = self.out_edge(l, j)
        return weights[l + 1][edge] * self.outgoing(l + 1, edge[0], weights)

    def values(self) -> dict[tuple[int, tuple[int, int | None, int]], float]:
        """The value of the basis path through every edge."""
        weights = self.weights()
        values = {}
        for l, layer in enumerate(self.layers):
            for j, i, t in layer.edges():
                before = 1.0 if i is None else self.incoming(l - 1, i, weights)
                values[l, (j, i, t)] = before * weights[l][j, i, t] * self.outgoing(l, j, weights)
        return values

    def coordinates(self) -> list[tuple[int, tuple[int, int | None, int]]]:
        """The edges that are no in-edge of a hidden unit."""
        last = len(self.layers) - 1
        return [
            (l, e)
            for l, layer in enumerate(self.layers)
            for e in layer.edges()
            if l == last or e != self.in_edge(l, e[0])
        ]

    def inverse_map(self) -> Callable[[Tensor], dict[str, Tensor]]:
        """The map from values to weights, with the signs of P at the current weights held fixed."""
        weights, place = self.weights(), {e: n for n, e in enumerate(self.coordinates())}
        last = len(self.layers) - 1

        def sign(l: int, j: int) -> float:
            return 1.0 if self.incoming(l, j, weights) > 0 else -1.0

        def along(l: int, j: int) -> int:
            """Place of the path through the in-edge of unit j: follow out-edges until one is a coordinate."""
            edge = self.out_edge(l, j)
            return place[l + 1, edge] if (l + 1, edge) in place else along(l + 1, edge[0])

        def rebuild(v: Tensor) -> dict[str, Tensor]:
            rebuilt = {}
            for l, layer in enumerate(self.layers):
                entries = []
                for e in layer.edges():
                    j, i, _ = e
                    of_source = 1.0 if i is None else sign(l - 1, i)
                    if l == last:
                        entries.append(of_source * v[place[l, e]])
                    elif e == self.in_edge(l, j):
                        entries.append(v.new_tensor(of_source * sign(l, j)))
                    else:
                        entries.append(of_source * sign(l, j) * v[place[l, e]] / v[along(l, j)])
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
            layers.append(
                LayerSpec(str(len(modules) - 1), units, sources, kernel**2, (kernel // 2) * (kernel + 1), bias)
            )
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
            layers.append(LayerSpec(str(len(modules) - 1), widths[l + 1], widths[l], taps, taps // 2, bias))
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
