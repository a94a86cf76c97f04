"""The skeleton of a chain: the edges whose products make up every basis path.

Each hidden unit has one incoming and one outgoing edge in it: those on the paths with the largest product of absolute
weights, from the inputs to the unit and from the unit to the outputs. Rescaling units and permuting them carries these
edges along. There are at most two edges per hidden unit, so the products are computed in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_flatness.geometry.path.chain import ChainLayer


@dataclass(frozen=True)
class Products:
    """Products of skeleton weights, for each layer of units from the inputs (0) to the outputs; 1 for dead units.

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
        return torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *(p * s for p, s in hidden)])

    @cached_property
    def signs(self) -> list[Tensor]:
        """The signs of ``P_j``, with 1 for the outputs."""
        return [p.sign() for p in self.incoming]


class Skeleton:
    """The edges of the skeleton at some weights, as indices into flat vectors.

    With ``A_j`` and ``B_j`` the largest products of absolute weights from the inputs to unit ``j`` and from there to
    the outputs, the in-edge of ``j`` has the largest ``A_i |w_ij|`` and its out-edge the largest ``|w_jk| B_k``. A unit
    is dead if one of its products is zero: no path leads through it, and it has no edges in the skeleton. Biases are
    no edges of the skeleton.

    Args:
        layers: The chain.
        starts: First index of each parameter in flat vectors, by its ``id``.
        flat: Flat vector of all parameters.

    Attributes:
        alive: Per layer of units from the inputs to the outputs, whether a path leads through a unit.
        in_edges: The in-edges of the units, per hidden layer; of dead ones -1.
        out_edges: The out-edges of the units, per hidden layer; of dead ones -1.
        parents: The units where in-edges start.
        terminals: Per hidden layer, the edge of each unit that has the same path as its in-edge and is not an in-edge
            itself; -1 of dead ones. Units of one layer never share one.

    Raises:
        ValueError: If a weight is not finite.
    """

    def __init__(self, layers: Sequence[ChainLayer], starts: dict[int, int], flat: Tensor) -> None:
        self._layers = layers
        self._starts = starts
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(
                "Expected finite weights for the skeleton of basis paths, got some that are not. Flatness of a "
                "diverged network is not defined."
            )
        gains, in_edges, self.parents = self._in_edges(flat)
        reaches, out_edges, self._children = self._out_edges(flat)
        hidden = [(a > 0) & (b > 0) for a, b in zip(gains, reaches, strict=True)]
        first, last = (
            torch.ones(n, dtype=torch.bool, device="cpu") for n in (layers[0].num_inputs, layers[-1].num_units)
        )
        self.alive = [first, *hidden, last]
        self.in_edges = [edges.where(alive, -1) for edges, alive in zip(in_edges, hidden, strict=True)]
        self.out_edges = [edges.where(alive, -1) for edges, alive in zip(out_edges, hidden, strict=True)]
        self.terminals = self._follow_out_edges()

    def _in_edges(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return ``A_j`` up to a factor per layer, the in-edges, and the units where they start."""
        gains, edges, parents = [], [], []
        gain = flat.new_ones(self._layers[0].num_inputs)
        for layer in self._layers[:-1]:
            sources = layer.sources.to(flat.device)
            gain, columns = (self._rows(layer, flat) * gain[sources]).max(dim=1)
            rows = torch.arange(layer.num_units, device=flat.device)
            edges.append((self._starts[id(layer.weight)] + rows * len(sources) + columns).cpu())
            parents.append(sources[columns].cpu())
            gains.append(gain.cpu())
            gain = gain / gain.max().clamp_min(torch.finfo(gain.dtype).tiny)
        return gains, edges, parents

    def _out_edges(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return ``B_j`` up to a factor per layer, the out-edges, and the units where they end."""
        reaches: list[Tensor] = []
        edges: list[Tensor] = []
        children: list[Tensor] = []
        reach = flat.new_ones(self._layers[-1].num_units)
        for layer in reversed(self._layers[1:]):
            sources = layer.sources.to(flat.device)
            best, rows = (self._rows(layer, flat) * reach[:, None]).max(dim=0)
            reach = flat.new_zeros(layer.num_inputs).scatter_reduce_(0, sources, best, "amax")
            columns = torch.arange(len(sources), device=flat.device)
            is_best = best == reach[sources]
            first = torch.full((layer.num_inputs,), len(sources), device=flat.device)
            first.scatter_reduce_(0, sources[is_best], columns[is_best], "amin")
            edges.insert(0, (self._starts[id(layer.weight)] + rows[first] * len(sources) + first).cpu())
            children.insert(0, rows[first].cpu())
            reaches.insert(0, reach.cpu())
            reach = reach / reach.max().clamp_min(torch.finfo(reach.dtype).tiny)
        return reaches, edges, children

    def _rows(self, layer: ChainLayer, flat: Tensor) -> Tensor:
        start = self._starts[id(layer.weight)]
        return flat[start : start + layer.weight.numel()].view(layer.num_units, -1).abs()

    def _follow_out_edges(self) -> list[Tensor]:
        terminals: list[Tensor] = []
        for l in reversed(range(len(self.out_edges))):
            out = self.out_edges[l]
            if terminals:  # an out-edge that is the in-edge of the next unit belongs to that unit's path
                child = self._children[l]
                out = torch.where(out == self.in_edges[l + 1][child], terminals[0][child], out)
            terminals.insert(0, out.where(self.alive[l + 1], -1))
        return terminals

    def products(self, flat: Tensor) -> Products:
        """Return the products along this skeleton at the weights ``flat``, in float64 on the CPU."""
        edges = [*self.in_edges, *self.out_edges]
        places = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *edges])
        weights = flat[places.clamp_min(0).to(flat.device)].cpu().double().where(places >= 0, 1.0)
        values = torch.split(weights, [len(e) for e in edges])
        w_in, w_out = values[: len(self.in_edges)], values[len(self.in_edges) :]
        incoming = [torch.ones(len(self.alive[0]), dtype=torch.float64, device="cpu")]
        outgoing = [torch.ones(len(self.alive[-1]), dtype=torch.float64, device="cpu")]
        for w, parent, alive in zip(w_in, self.parents, self.alive[1:-1], strict=True):
            incoming.append((incoming[-1][parent] * w).where(alive, 1.0))
        backwards = zip(reversed(w_out), reversed(self._children), reversed(self.alive[1:-1]), strict=True)
        for w, child, alive in backwards:
            outgoing.insert(0, (outgoing[0][child] * w).where(alive, 1.0))
        return Products(
            [*incoming, torch.ones_like(outgoing[-1])],
            [torch.ones_like(incoming[0]), *outgoing],
        )
