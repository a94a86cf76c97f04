r"""The chart of basis paths: coordinates that no rescaling of ReLU units changes.

Multiplying the incoming weights of a hidden unit by ``c > 0`` and dividing its outgoing weights by ``c`` changes the
weights but not the network. Products of weights along paths from the input to the output stay the same, and a basis
of them describes the network. Every hidden unit ``j`` gets one incoming and one outgoing edge of a skeleton;
``P_j`` is the product of the in-edges along the skeleton from the inputs to ``j``, ``S_j`` that of the out-edges from
``j`` to the outputs, and the basis path through the edge ``e = (i -> j)`` has the value ``v_e = P_i w_e S_j``. The
path through a unit's in-edge is the path through its out-edge, so of ``m`` edges ``m - H`` values are independent.

The chart passes through the current weights: in-edges stay at their weights, so every ``P`` is constant, and
``S_j = v_t / P_j`` follows from the path ``t = t(j)`` that leaves ``j`` by out-edges only. With ``z = v - v0``

    w_e(z) = (w0_e + z_e / (P_i S_j)) / (1 + r_j),   r_j = z_t(j) / v0_t(j)     (j hidden),
    w_e(z) =  w0_e + z_e / P_i                                                  (j an output).

Any other choice of the in-edges gives the same network, hence the same function of ``v``. This one needs gradient and
Hessian only at the current weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_flatness.geometry.base import Chart
from lightning_flatness.geometry.path.chain import Chain
from lightning_flatness.geometry.path.skeleton import Products, Skeleton


@dataclass(frozen=True)
class _Block:
    """A parameter of a layer in flat vectors; its rows are the edges into one unit each.

    Attributes:
        start: First index.
        stop: Index behind the last.
        layer: The layer of units that its edges enter, from 1.
        sources: The source unit of each column in the previous layer; None for a bias.
        units: The hidden units, counted through all layers; None for outputs.
    """

    start: int
    stop: int
    layer: int
    sources: Tensor | None
    units: slice | None

    def rows(self, flat: Tensor, num_units: int) -> Tensor:
        """Return this block of a flat vector as a view, one row per unit."""
        return flat[self.start : self.stop].view(num_units, -1)


class PathChart(Chart):
    """Values of basis paths as coordinates of the weights; see the module's docstring for the formula.

    Beside the Hessian-vector product in the weights, a product costs a few passes over vectors of the size of the
    weights, and one gradient per measurement. The chart holds eight such vectors.

    Args:
        chain: The layers.
        parameters: The trainable tensors, in the order of flat vectors.
        dtype: Of flat vectors.

    Attributes:
        num_coordinates: Number of edges between units that are not dead, minus ``num_hidden_units``.
        num_hidden_units: Number of hidden units that are not dead: some path leads through them.
        values: The values of the basis paths at the current weights, shape (num_coordinates,): the origin of ``z``.
        radius: Smallest modulus of the paths along the skeleton. The chart ends where one of them is zero: weights go
            to infinity.

    Raises:
        ValueError: If a weight is not finite, or a path's value is beyond the range of ``dtype``.
    """

    def __init__(self, chain: Chain, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._weights = torch.cat([p.detach().reshape(-1).to(dtype) for p in parameters])
        sizes = [p.numel() for p in parameters]
        starts = dict(zip(map(id, parameters), accumulate(sizes, initial=0), strict=False))
        self._layer_sizes = [layer.num_units for layer in chain.layers]
        self._blocks = list(_blocks(chain, starts))
        self._skeleton = Skeleton(chain.layers, starts, self._weights)
        self._products = self._skeleton.products(self._weights)
        alive = torch.cat([torch.empty(0, dtype=torch.bool, device="cpu"), *self._skeleton.alive[1:-1]])
        self._units = alive.nonzero().flatten().to(self._weights.device)
        self.num_hidden_units = len(self._units)
        self._number_coordinates()
        factors = self._factors(self._products)
        self._all_values = self._edge_values(self._weights, factors)
        self.values = self._all_values[self._coordinates]
        self._scale = self._checked_scale(factors)
        self._movable = self._weights * self._hidden_mask
        self._along_skeleton = self._products.hidden.to(dtype).to(self._weights.device)
        self.radius = float(self._products.hidden[alive].abs().min()) if self.num_hidden_units else float("inf")

    # ------------------------------------------------------------------------------------------------ the chart

    def displacement(self, z: Tensor) -> Tensor:
        """Return ``w(z) - w0``: zero on in-edges and slopes, ``(s_e z_e - w0_e r_j) / (1 + r_j)`` into hidden units.

        Infinite for the weights into a unit whose skeleton path has reached or passed zero.
        """
        change = self._scale * self._scattered(z)
        for edges, base, r_j in self._hidden_rows(self._along(z), change, self._movable):
            edges.addcmul_(base, r_j, value=-1).div_(1 + r_j).masked_fill_(r_j <= -1, float("inf"))
        return change

    def push_forward(self, v: Tensor) -> Tensor:
        """Return ``J v``: ``s_e v_e - w0_e rho_j`` into hidden units, ``s_e v_e`` into outputs."""
        change = self._scale * self._scattered(v)
        for edges, base, rho in self._hidden_rows(self._along(v), change, self._movable):
            edges.addcmul_(base, rho, value=-1)
        return change

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return ``Jᵀ g``."""
        return self._pull_back(gradient, self._movable)

    def pull_back_at(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return ``J(z)ᵀ g``."""
        shrunk = gradient.clone()
        for edges, r_j in self._hidden_rows(self._along(z), shrunk):
            edges.div_(1 + r_j)
        return self._pull_back(shrunk, self._movable + self.displacement(z) * self._hidden_mask)

    def hvp(
        self, weight_hvp: Callable[[Tensor], Tensor], v: Tensor, *, gradient: Callable[[], Tensor] | None
    ) -> Tensor:
        """Return ``Jᵀ H J v + sum_k g_k d²w_k[v, .]``, the second part in closed form."""
        velocity = self.push_forward(v)
        product = weight_hvp(velocity)
        if gradient is None:
            return self.pull_back(product)
        g = gradient()
        product = product.clone()
        for edges, g_j, rho in self._hidden_rows(self._along(v), product, g):
            edges.addcmul_(g_j, rho, value=-1)
        return self._pull_back(product, self._movable, g * velocity)

    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return the change of the basis paths' values for a change of the weights.

        ``displacement`` of the result gives the same network as the given change. The weights may differ by a rescaling
        of units.

        Raises:
            ValueError: If signs along the skeleton, slopes or weights of dead units would change: basis paths cannot
                express that.
        """
        weights = self._weights + displacement
        products = self._skeleton.products(weights)
        same_signs = all(torch.equal(a, b) for a, b in zip(products.signs, self._products.signs, strict=True))
        values = self._edge_values(weights, self._factors(products))
        held = self._is_slope | self._is_dead
        if not same_signs or not torch.allclose(values[held], self._all_values[held], rtol=1e-5, atol=0):
            what = "signs of weights along the skeleton of basis paths"
            if same_signs:
                what = "slopes of PReLU, or weights of units that no path leads through"
            raise ValueError(
                f"Expected weights that a change of the basis paths leads to, got some with other {what}. Use the "
                "geometry 'euclidean', which reaches all weights."
            )
        return values[self._coordinates] - self.values

    def rebuilt_weights(self, values: Tensor) -> Tensor:
        """Return weights of the network that has these values of basis paths: the inverse map, up to rescaling.

        In-edges of hidden units become 1 or -1 with the signs of the current weights. Beside ``values`` the map uses
        only these signs, the slopes of PReLU and weights of dead units.
        """
        weights = self._all_values.index_copy(0, self._coordinates, values)
        signs = [sign.to(values) for sign in self._products.signs]
        along_skeleton = torch.ones_like(self._along_skeleton)
        along_skeleton[self._units] = values[self._terminals]
        for block in self._blocks:
            edges = block.rows(weights, self._layer_sizes[block.layer - 1])
            if block.units is not None:
                edges.mul_((signs[block.layer] / along_skeleton[block.units])[:, None])
            if block.sources is not None:
                edges.mul_(signs[block.layer - 1][block.sources])
        for l, (in_edges, parents) in enumerate(zip(self._skeleton.in_edges, self._skeleton.parents, strict=True)):
            alive = in_edges >= 0
            in_signs = (signs[l][parents.to(values.device)] * signs[l + 1])[alive.to(values.device)]
            weights[in_edges[alive].to(weights.device)] = in_signs
        return weights

    # ------------------------------------------------------------------------------------------------- the parts

    def _pull_back(self, gradient: Tensor, movable: Tensor, extra: Tensor | None = None) -> Tensor:
        """Return ``Jᵀ g``, with ``extra`` added to the flow to the paths along the skeleton."""
        pulled = (self._scale * gradient)[self._coordinates]
        flow = movable * gradient
        if extra is not None:
            flow += extra
        sums = torch.zeros_like(self._along_skeleton)
        for edges, total in self._hidden_rows(sums, flow):
            total += edges.sum(dim=1, keepdim=True)
        sums = (sums / self._along_skeleton)[self._units]
        first = 0
        for alive in self._skeleton.alive[1:-1]:  # units of one layer never share a path
            stop = first + int(alive.sum())
            pulled[self._terminals[first:stop]] -= sums[first:stop]
            first = stop
        return pulled

    def _along(self, z: Tensor) -> Tensor:
        """Return the relative change of the path along the skeleton of each hidden unit; 0 for dead ones."""
        change = torch.zeros_like(self._along_skeleton)
        return change.index_copy_(0, self._units, z[self._terminals] / self._along_skeleton[self._units])

    def _hidden_rows(self, per_unit: Tensor, *flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield, per block of edges into hidden units, the rows of flat vectors and a column of ``per_unit``."""
        for block in self._blocks:
            if block.units is not None:
                num_units = self._layer_sizes[block.layer - 1]
                yield (*(block.rows(f, num_units) for f in flat), per_unit[block.units, None])

    def _scattered(self, z: Tensor) -> Tensor:
        """Return a flat vector with ``z`` on the edges that are coordinates and zero elsewhere."""
        return torch.zeros_like(self._weights).index_copy_(0, self._coordinates, z)

    def _number_coordinates(self) -> None:
        """Number the coordinates: edges of units that are not dead except their in-edges, as in flat vectors."""
        device = self._weights.device
        self._is_slope = torch.ones_like(self._weights, dtype=torch.bool)
        self._is_dead = torch.zeros_like(self._is_slope)
        self._hidden_mask = torch.zeros_like(self._is_slope)
        alive = [units.to(device) for units in self._skeleton.alive]
        for block in self._blocks:
            self._is_slope[block.start : block.stop] = False
            targets = alive[block.layer][:, None]
            rows = block.rows(self._is_dead, len(targets))
            rows |= ~targets if block.sources is None else ~(targets & alive[block.layer - 1][block.sources.to(device)])
            block.rows(self._hidden_mask, len(targets))[:] = targets & (block.units is not None)
        has_coordinate = ~(self._is_slope | self._is_dead)
        for in_edges in self._skeleton.in_edges:
            living = in_edges[in_edges >= 0].to(device)
            has_coordinate[living] = False
            self._hidden_mask[living] = False
        self._coordinates = has_coordinate.nonzero().squeeze(1)
        self.num_coordinates = len(self._coordinates)
        terminals = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *self._skeleton.terminals])
        terminals = terminals[terminals >= 0].to(device)
        self._terminals = torch.searchsorted(self._coordinates, terminals)

    def _factors(self, products: Products) -> Tensor:
        """Return ``P_i S_j`` of all edges ``i -> j`` as a flat vector in float64, and 1 for slopes."""
        device = self._weights.device
        exact = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        factors = torch.ones(len(self._weights), dtype=torch.float64, device=exact)
        for block in self._blocks:
            edges = block.rows(factors, self._layer_sizes[block.layer - 1])
            edges *= products.outgoing[block.layer].to(exact)[:, None]
            if block.sources is not None:
                edges *= products.incoming[block.layer - 1][block.sources.cpu()].to(exact)
        return factors

    def _edge_values(self, weights: Tensor, factors: Tensor) -> Tensor:
        """Return the values of the paths through all edges; what has none keeps its weight."""
        values = weights.to(factors.device).double() * factors
        return values.to(self._weights.dtype).to(self._weights.device)

    def _checked_scale(self, factors: Tensor) -> Tensor:
        """Return ``1 / (P_i S_j)`` for edges that are coordinates and 0 elsewhere."""
        dtype = self._weights.dtype
        scale = (1 / factors).to(dtype).to(self._weights.device)
        if not bool((torch.isfinite(scale) & (scale != 0)).all()):
            raise ValueError(
                f"Expected products of weights along the chain within the range of {dtype}, got moduli from "
                f"{float(factors.abs().min()):.1e} to {float(factors.abs().max()):.1e}. Measure in float64 "
                "(module.double()), or use the geometry 'element', which needs no products."
            )
        edges = torch.zeros_like(scale)
        edges[self._coordinates] = scale[self._coordinates]
        return edges


def _blocks(chain: Chain, starts: dict[int, int]) -> Iterator[_Block]:
    first = 0
    for l, layer in enumerate(chain.layers, 1):
        units = slice(first, first + layer.num_units) if l < len(chain.layers) else None
        for p, sources in ((layer.weight, layer.sources), (layer.bias, None)):
            if p is not None:
                start = starts[id(p)]
                yield _Block(start, start + p.numel(), l, sources, units)
        first += layer.num_units
