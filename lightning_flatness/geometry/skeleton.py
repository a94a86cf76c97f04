"""The skeleton of a chain: which edges carry the products that every basis path is made of.

Each hidden unit has one incoming and one outgoing edge in it, chosen by position and not by value, so that training
and rescaling do not move it. Only the edges of the skeleton enter products; there are at most two per hidden unit, so
the products are formed in float64 on the CPU whatever the weights are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from lightning_flatness.geometry.chain import ChainLayer

_TINY = 1e-5
"""A skeleton weight that is this much smaller than the largest of its unit is warned of."""

_REMEDY = "Use the geometry 'element', which needs no skeleton."


@dataclass(frozen=True)
class Products:
    """Products of skeleton weights, for each layer of units from the inputs (0) to the outputs.

    Attributes:
        incoming: ``P_j``, the product of the in-edges along the skeleton from the inputs to unit ``j``.
        outgoing: ``S_j``, the product of the out-edges along the skeleton from unit ``j`` to the outputs.
    """

    incoming: list[Tensor]
    outgoing: list[Tensor]

    @cached_property
    def hidden(self) -> Tensor:
        """``P_j S_j`` of all hidden units, layer after layer: the values of the paths along the skeleton."""
        hidden = zip(self.incoming[1:-1], self.outgoing[1:-1], strict=True)
        return torch.cat([torch.empty(0, dtype=torch.float64), *(p * s for p, s in hidden)])

    @cached_property
    def signs(self) -> list[Tensor]:
        """The signs of ``P_j``, with 1 for the outputs."""
        return [p.sign() for p in self.incoming]


class Skeleton:
    """The edges of the skeleton, as places in flat vectors.

    Args:
        layers: The chain.
        starts: Where each parameter starts in flat vectors, by its ``id``.

    Attributes:
        in_edges: For each layer but the last, the in-edges of its units.
        out_edges: For each layer but the last, the out-edges of its units.
        terminals: For each layer but the last, the edge whose path is that through its units' in-edges and that is not
            an in-edge itself; units of one layer never share one.
    """

    def __init__(self, layers: Sequence[ChainLayer], starts: dict[int, int]) -> None:
        self._layers = layers
        self._starts = starts
        self._sizes = [layers[0].num_inputs, *(layer.num_units for layer in layers)]
        pairs = list(pairwise(layers))
        self.in_edges = [self._edges(a, torch.arange(a.num_units) % a.num_inputs, to=None) for a, _ in pairs]
        self.out_edges = [
            self._edges(b, torch.arange(a.num_units), to=torch.arange(a.num_units) % b.num_units) for a, b in pairs
        ]
        self.terminals = self._follow_out_edges()

    def _edges(self, layer: ChainLayer, units: Tensor, to: Tensor | None) -> Tensor:
        """Return the places of the skeleton's edges from ``units`` of the layer before, to units of ``layer``."""
        rows = torch.arange(layer.num_units) if to is None else to
        row_length = layer.weight[0].numel()
        return self._starts[id(layer.weight)] + rows * row_length + layer.skeleton_columns[units]

    def _follow_out_edges(self) -> list[Tensor]:
        terminals: list[Tensor] = []
        for layer in reversed(range(len(self.out_edges))):
            out = self.out_edges[layer]
            if terminals:  # an out-edge that is the in-edge of the next unit belongs to that unit's path
                unit = torch.arange(len(out)) % self._sizes[layer + 2]
                out = torch.where(out == self.in_edges[layer + 1][unit], terminals[0][unit], out)
            terminals.insert(0, out)
        return terminals

    def products(self, flat: Tensor) -> Products:
        """Return the products at the weights ``flat``.

        Args:
            flat: Flat vector of all parameters.

        Returns:
            Float64 tensors on the CPU.
        """
        edges = [*self.in_edges, *self.out_edges]
        places = torch.cat([torch.empty(0, dtype=torch.int64), *edges])
        weights = flat[places.to(flat.device)].cpu().double()
        values = torch.split(weights, [len(e) for e in edges])
        w_in, w_out = values[: len(self.in_edges)], values[len(self.in_edges) :]
        ones = [torch.ones(n, dtype=torch.float64) for n in self._sizes]
        incoming, outgoing = [ones[0]], [ones[-1]]
        for w in w_in:
            incoming.append(incoming[-1][torch.arange(len(w)) % len(incoming[-1])] * w)
        for w in reversed(w_out):
            outgoing.insert(0, outgoing[0][torch.arange(len(w)) % len(outgoing[0])] * w)
        return Products([*incoming, ones[-1]], [ones[0], *outgoing])

    def check(self, flat: Tensor) -> None:
        """Look for weights of the skeleton that no path can be divided by.

        Args:
            flat: Flat vector of all parameters.

        Raises:
            ValueError: If a weight is zero or not finite.

        Warns:
            UserWarning: If a weight is tiny beside the largest one of the same unit, with all units brought to the
                same scale first: rescaling units does not change the verdict.
        """
        tiny: list[tuple[float, str]] = []
        for direction, edges, ratios in (
            ("in", self.in_edges, self._in_ratios),
            ("out", self.out_edges, self._out_ratios),
        ):
            for l, weights in enumerate(flat[e.to(flat.device)].cpu().double() for e in edges):
                bad = ((weights == 0) | ~torch.isfinite(weights)).nonzero().flatten().tolist()
                if bad:
                    raise ValueError(
                        "Expected weights other than zero along the skeleton of basis paths, got "
                        f"{float(weights[bad[0]]):g} in {self._place(direction, l, bad[0])}. {_REMEDY}"
                    )
            for l, ratio in enumerate(ratios(flat)):
                small = (ratio < _TINY).nonzero().flatten().tolist()
                tiny += [(float(ratio[unit]), self._place(direction, l, unit)) for unit in small]
        if tiny:
            ratio_of_worst, place = min(tiny)
            others = f", and {len(tiny) - 1} more such weights" if len(tiny) > 1 else ""
            warnings.warn(
                f"The skeleton of basis paths has a tiny weight, {place}: {ratio_of_worst:.1e} of the largest one of "
                f"that unit{others}. Curvature in basis paths grows with its inverse square and then says little about "
                f"the rest of the network. {_REMEDY}",
                stacklevel=2,
            )

    def _in_ratios(self, flat: Tensor) -> Iterator[Tensor]:
        """Yield the in-edges of each layer over the largest weights into the units."""
        gain = flat.new_ones(self._sizes[0])
        for layer, edges in zip(self._layers, self.in_edges, strict=False):
            paths = self._rows(layer, flat) * gain[layer.sources.to(flat.device)]
            gain = paths.amax(dim=1)
            yield paths.flatten()[self._within(layer, edges)] / gain
            gain = gain / gain.max()

    def _out_ratios(self, flat: Tensor) -> list[Tensor]:
        """Return the out-edges of each layer over the largest weights out of the units."""
        ratios: list[Tensor] = []
        gain = flat.new_ones(self._sizes[-1])
        for layer, edges in zip(reversed(self._layers), reversed(self.out_edges), strict=False):
            paths = self._rows(layer, flat) * gain[:, None]
            sources = layer.sources.to(flat.device)
            gain = flat.new_zeros(layer.num_inputs).scatter_reduce_(0, sources, paths.amax(dim=0), "amax")
            ratios.insert(0, paths.flatten()[self._within(layer, edges)] / gain)
            gain = gain / gain.max()
        return ratios

    def _rows(self, layer: ChainLayer, flat: Tensor) -> Tensor:
        start = self._starts[id(layer.weight)]
        return flat[start : start + layer.weight.numel()].view(layer.num_units, -1).abs()

    def _within(self, layer: ChainLayer, edges: Tensor) -> Tensor:
        return (edges - self._starts[id(layer.weight)]).to(layer.weight.device)

    def _place(self, direction: str, l: int, unit: int) -> str:
        """Name an edge: the weight, and the hidden unit of layer ``l`` whose in- or out-edge it is."""
        layer = self._layers[l if direction == "in" else l + 1]
        edge = (self.in_edges if direction == "in" else self.out_edges)[l][unit]
        index = torch.unravel_index(edge - self._starts[id(layer.weight)], layer.weight.shape)
        weight = f"weight{[int(i) for i in index]} of the layer {layer.name!r}"
        return f"{weight} (the {direction}-edge of unit {unit} of {self._layers[l].name!r})"
