r"""The geometry of basis paths: coordinates in which a ReLU network has no rescaling left.

Multiplying the incoming weights of a hidden unit by ``c > 0`` and dividing its outgoing weights by ``c`` changes the
weights but not the network. Products of weights along paths from the input to the output do not change with it, and
a basis of them describes the network. Every hidden unit ``j`` gets one incoming and one outgoing edge of a skeleton;
``P_j`` is the product of the in-edges along the skeleton from the inputs to ``j``, ``S_j`` that of the out-edges from
``j`` to the outputs, and the basis path through the edge ``e = (i -> j)`` has the value ``v_e = P_i w_e S_j``. The
path through a unit's in-edge is the path through its out-edge, so of ``m`` edges ``m - H`` values are independent.

The chart here runs through the current weights: it holds every in-edge at its weight, so that every ``P`` is constant,
and reads ``S_j = v_t / P_j`` off the path ``t = t(j)`` that leaves ``j`` by out-edges only. With ``z = v - v0``

    w_e(z) = (w0_e + z_e / (P_i S_j)) / (1 + r_j),   r_j = z_t(j) / v0_t(j)     (j hidden),
    w_e(z) =  w0_e + z_e / P_i                                                  (j an output).

Any other choice of the in-edges gives the same network, hence the same function of ``v``; this one needs the gradient
and the Hessian only where the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_flatness.geometry.base import Chart, Geometry
from lightning_flatness.geometry.chain import Chain, not_a_chain, trace_chain
from lightning_flatness.geometry.skeleton import Products, Skeleton


class PathGeometry(Geometry):
    r"""``z`` = the change of the values of the basis paths of a ReLU chain.

    Invariant under every positive rescaling of ReLU units. The geometry of PSI-flatness (arXiv 1903.02237, on the path
    space of arXiv 1802.03713). The full text of the former was not at hand: the definition, in the module's
    docstring, is ours in its spirit, and holds for any widths, bottlenecks included.

    A chain is what the module's ``forward`` makes of it, found by tracing: linear layers and convolutions (groups = 1)
    in sequence, with ReLU, LeakyReLU or PReLU, max, average and adaptive pooling, zero, reflection and replication
    padding, flatten, mean over positions, dropout and identity between them, as modules or as functions. A channel of
    a convolution is one unit; a bias is an edge from a constant input. The skeleton's edges join unit ``j`` of a layer
    to unit ``j mod h`` of the layer before and of the one after it; in a convolution by the kernel's centre tap, in a
    linear layer after a flattened convolution by the middle position of the channel. Slopes of PReLU are no edges and
    have no path: they are held fixed.

    Args:
        submodule: Name of the part of the module that is the chain, as in ``module.get_submodule(name)``. Default: the
            module itself. All trainable parameters have to be in it.

    Raises:
        TypeError: If ``submodule`` is neither a name nor None.

    Example:
        >>> chain = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
        >>> chain[0].weight.data, chain[2].weight.data = torch.tensor([[2.0]]), torch.tensor([[3.0], [5.0]])
        >>> chart = PathGeometry().chart(chain, list(chain.parameters()), torch.float32)
        >>> chart.values  # two paths through three weights
        tensor([ 6., 10.])
        >>> chart.displacement(torch.tensor([6.0, 10.0]))  # the in-edge stays
        tensor([0., 3., 5.])
    """

    name = "path"

    def __init__(self, submodule: str | None = None) -> None:
        if submodule is not None and not isinstance(submodule, str):
            raise TypeError(
                f"Expected `submodule` to be the name of a submodule, got {type(submodule).__name__}. Pass e.g. 'net'."
            )
        self.submodule = submodule

    def chart(self, module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> PathChart:
        """Freeze the basis paths at the current values of ``parameters``.

        Args:
            module: The module, traced to find its chain of layers.
            parameters: The trainable tensors of ``module``, each once, in the order of flat vectors.
            dtype: The dtype of flat vectors.

        Returns:
            The chart around the current weights.

        Raises:
            ValueError: If the module is not a chain, a trainable parameter is not in it or a frozen one is, or a
                weight of the skeleton is zero.
        """
        chain = trace_chain(self._chain_module(module), self.submodule or "")
        _check_parameters(module, parameters, chain)
        with torch.no_grad():
            return PathChart(chain, parameters, dtype)

    def _chain_module(self, module: nn.Module) -> nn.Module:
        if self.submodule is None:
            return module
        names = [name for name, _ in module.named_modules() if name]
        if self.submodule not in names:
            raise ValueError(f"Expected `submodule` to be one of {names}, got {self.submodule!r}.")
        return module.get_submodule(self.submodule)

    def __repr__(self) -> str:
        return f"PathGeometry(submodule={self.submodule!r})" if self.submodule is not None else "PathGeometry()"


@dataclass(frozen=True)
class _Block:
    """A parameter of a layer in flat vectors; its rows are the edges into one unit each.

    Attributes:
        start: Where it starts.
        stop: Where it ends.
        layer: The layer of units that its edges lead to, from 1.
        sources: The unit of the layer before that each column comes from; None for a bias.
        units: Which hidden units these are, counted through all layers; None for outputs.
    """

    start: int
    stop: int
    layer: int
    sources: Tensor | None
    units: slice | None

    def rows(self, flat: Tensor, num_units: int) -> Tensor:
        """Return the view of a flat vector that belongs to this block, one row per unit."""
        return flat[self.start : self.stop].view(num_units, -1)


class PathChart(Chart):
    """Values of basis paths as coordinates of the weights; see the module's docstring for the formula.

    A product with the Hessian costs, beside that with the Hessian in the weights, a few passes over vectors of the
    size of the weights, and one gradient per measurement. The chart holds seven such vectors.

    Args:
        chain: The layers.
        parameters: The trainable tensors, in the order of flat vectors.
        dtype: Of flat vectors.

    Attributes:
        num_coordinates: Edges less hidden units.
        num_hidden_units: Hidden units.
        values: The values of the basis paths at the current weights, shape (num_coordinates,): the origin of ``z``.
        radius: Smallest modulus of the paths made of skeleton edges. Where one of them is zero the chart ends: weights
            go to infinity.

    Raises:
        ValueError: If a weight of the skeleton is zero, or a path's value is beyond the range of ``dtype``.
    """

    def __init__(self, chain: Chain, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._weights = torch.cat([p.detach().reshape(-1).to(dtype) for p in parameters])
        sizes = [p.numel() for p in parameters]
        starts = dict(zip(map(id, parameters), accumulate(sizes, initial=0), strict=False))
        self._layer_sizes = [layer.num_units for layer in chain.layers]
        self._blocks = list(_blocks(chain, starts))
        self._skeleton = Skeleton(chain.layers, starts)
        self._products = self._skeleton.products(self._weights)
        self._skeleton.check(self._weights)
        self.num_hidden_units = len(self._products.hidden)
        self._number_coordinates()
        factors = self._factors(self._products)
        self.values = self._values(self._weights, factors)
        self._scale = self._checked_scale(factors)
        self._movable = self._weights * self._hidden_mask
        self._along_skeleton = self._products.hidden.to(dtype).to(self._weights.device)
        self.radius = float(self._products.hidden.abs().min()) if self.num_hidden_units else float("inf")

    # ------------------------------------------------------------------------------------------------ the chart

    def displacement(self, z: Tensor) -> Tensor:
        """Return ``w(z) - w0``: zero on in-edges and slopes, ``(s_e z_e - w0_e r_j) / (1 + r_j)`` into hidden units.

        Infinite for the weights into a unit whose skeleton path has reached zero or passed it: no way leads there.
        """
        change = self._scale * self._scattered(z)
        r = z[self._terminals] / self._along_skeleton
        for edges, base, r_j in self._hidden_rows(r, change, self._movable):
            edges.addcmul_(base, r_j, value=-1).div_(1 + r_j).masked_fill_(r_j <= -1, float("inf"))
        return change

    def push_forward(self, v: Tensor) -> Tensor:
        """Return ``J v``: ``s_e v_e - w0_e rho_j`` into hidden units, ``s_e v_e`` into outputs."""
        change = self._scale * self._scattered(v)
        for edges, base, rho in self._hidden_rows(v[self._terminals] / self._along_skeleton, change, self._movable):
            edges.addcmul_(base, rho, value=-1)
        return change

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return ``Jᵀ g``."""
        return self._pull_back(gradient, self._movable)

    def pull_back_at(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return ``J(z)ᵀ g``."""
        shrunk = gradient.clone()
        for edges, r_j in self._hidden_rows(z[self._terminals] / self._along_skeleton, shrunk):
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
        for edges, g_j, rho in self._hidden_rows(v[self._terminals] / self._along_skeleton, product, g):
            edges.addcmul_(g_j, rho, value=-1)
        return self._pull_back(product, self._movable, g * velocity)

    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return the change of the basis paths' values that a change of the weights makes.

        ``displacement`` of it leads to the same network as the given change, though not always to the same weights:
        those may differ by a rescaling of units.

        Raises:
            ValueError: If the new weights have other signs along the skeleton, or other slopes: no change of paths
                alone leads there.
        """
        weights = self._weights + displacement
        products = self._skeleton.products(weights)
        same_signs = all(torch.equal(a, b) for a, b in zip(products.signs, self._products.signs, strict=True))
        if not same_signs or not bool((displacement[self._is_slope] == 0).all()):
            what = "slopes of PReLU" if same_signs else "signs of weights along the skeleton of basis paths"
            raise ValueError(
                f"Expected weights that a change of the basis paths leads to, got some with other {what}. Use the "
                "geometry 'euclidean', whose straight lines lead everywhere."
            )
        return self._values(weights, self._factors(products)) - self.values

    def rebuilt_weights(self, values: Tensor) -> Tensor:
        """Return weights of the network that has these values of basis paths: the inverse map, up to rescaling.

        In-edges of hidden units are 1 or -1, as the signs at the current weights say; these signs are all that is used
        of them beside ``values`` (and slopes of PReLU, which are returned as they are).

        Args:
            values: Shape (num_coordinates,), e.g. ``chart.values``.

        Returns:
            Flat vector of weights.
        """
        weights = torch.where(self._is_slope, self._weights, self._scattered(values))
        signs = [sign.to(values) for sign in self._products.signs]
        along_skeleton = values[self._terminals]
        for block in self._blocks:
            edges = block.rows(weights, self._layer_sizes[block.layer - 1])
            if block.units is not None:
                edges.mul_((signs[block.layer] / along_skeleton[block.units])[:, None])
            if block.sources is not None:
                edges.mul_(signs[block.layer - 1][block.sources])
        for l, in_edges in enumerate(self._skeleton.in_edges):
            parent = signs[l][torch.arange(len(in_edges)) % len(signs[l])]
            weights[in_edges.to(weights.device)] = parent * signs[l + 1]
        return weights

    # ------------------------------------------------------------------------------------------------- the parts

    def _pull_back(self, gradient: Tensor, movable: Tensor, extra: Tensor | None = None) -> Tensor:
        """Return ``Jᵀ g``, with ``extra`` added to what flows to the paths along the skeleton."""
        pulled = (self._scale * gradient)[self._coordinates]
        flow = movable * gradient
        if extra is not None:
            flow += extra
        sums = torch.zeros_like(self._along_skeleton)
        for edges, total in self._hidden_rows(sums, flow):
            total += edges.sum(dim=1, keepdim=True)
        sums /= self._along_skeleton
        first = 0
        for size in self._layer_sizes[:-1]:  # units of one layer never share a path, so nothing is added twice at once
            pulled[self._terminals[first : first + size]] -= sums[first : first + size]
            first += size
        return pulled

    def _hidden_rows(self, per_unit: Tensor, *flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Walk through the blocks of edges into hidden units: their rows of flat vectors, and a column of per_unit."""
        for block in self._blocks:
            if block.units is not None:
                num_units = self._layer_sizes[block.layer - 1]
                yield (*(block.rows(f, num_units) for f in flat), per_unit[block.units, None])

    def _scattered(self, z: Tensor) -> Tensor:
        """Return the flat vector with ``z`` on the edges that have a coordinate and zero on the others."""
        return torch.zeros_like(self._weights).index_copy_(0, self._coordinates, z)

    def _number_coordinates(self) -> None:
        """Number the edges that are no in-edge of a hidden unit, in the order of flat vectors."""
        device = self._weights.device
        self._is_slope = torch.ones_like(self._weights, dtype=torch.bool)
        self._hidden_mask = torch.zeros_like(self._is_slope)
        for block in self._blocks:
            self._is_slope[block.start : block.stop] = False
            self._hidden_mask[block.start : block.stop] = block.units is not None
        has_coordinate = ~self._is_slope
        for in_edges in self._skeleton.in_edges:
            has_coordinate[in_edges.to(device)] = False
            self._hidden_mask[in_edges.to(device)] = False
        self._coordinates = has_coordinate.nonzero().squeeze(1)
        self.num_coordinates = len(self._coordinates)
        terminals = torch.cat([torch.empty(0, dtype=torch.int64), *self._skeleton.terminals]).to(device)
        self._terminals = torch.searchsorted(self._coordinates, terminals)

    def _factors(self, products: Products) -> Tensor:
        """Return ``P_i S_j`` of all edges ``i -> j`` as a flat vector in float64, and 1 for slopes."""
        device = self._weights.device
        exact = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        factors = torch.ones(len(self._weights), dtype=torch.float64, device=exact)
        for block in self._blocks:
            edges = block.rows(factors, self._layer_sizes[block.layer - 1])
            edges *= products.outgoing[block.layer].to(exact)[:, None]
            if block.sources is not None:
                edges *= products.incoming[block.layer - 1][block.sources].to(exact)
        return factors

    def _values(self, weights: Tensor, factors: Tensor) -> Tensor:
        values = weights.to(factors.device).double() * factors
        return values.to(self._weights.dtype).to(self._weights.device)[self._coordinates]

    def _checked_scale(self, factors: Tensor) -> Tensor:
        """Return how much a weight changes with its path, ``1 / (P_i S_j)``, where it has one and 0 elsewhere."""
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


def _check_parameters(module: nn.Module, parameters: Sequence[Tensor], chain: Chain) -> None:
    """Check that the trainable parameters are those of the chain, slopes aside."""
    names = {id(p): name for name, p in module.named_parameters()}
    edges = {id(p): p for layer in chain.layers for p in (layer.weight, layer.bias) if p is not None}
    trainable = {id(p) for p in parameters}
    if frozen := [names[key] for key in edges if key not in trainable]:
        raise not_a_chain(f"frozen parameters in the chain: {frozen}")
    known = edges.keys() | {id(p) for p in chain.slopes}
    if outside := [names[key] for key in (id(p) for p in parameters) if key not in known]:
        raise not_a_chain(f"trainable parameters outside the chain: {outside}")
