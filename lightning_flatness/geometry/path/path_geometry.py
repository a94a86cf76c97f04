"""Geometry ``"path"``: traces a module to its chain of layers and makes the chart of its basis paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_flatness.geometry.base import Geometry
from lightning_flatness.geometry.path.chain import Chain, not_a_chain
from lightning_flatness.geometry.path.chart import PathChart
from lightning_flatness.geometry.path.reader import trace_chain


class PathGeometry(Geometry):
    r"""``z`` is the change of the basis paths' values of a ReLU chain.

    Invariant under every positive rescaling of ReLU units and every permutation of them. The geometry of PSI-flatness
    (arXiv 1903.02237, on the path space of arXiv 1802.03713). We did not have the full text of the former: the
    definition in ``geometry/path/chart.py`` is ours, in its spirit. It holds for any widths, bottlenecks included.
    :class:`PathNormGeometry` has the same invariances, for more networks and without the choice of a basis.

    Tracing ``forward`` finds the chain: linear layers and convolutions (groups = 1) in sequence, with ReLU, LeakyReLU
    or PReLU, max, average and adaptive pooling, zero, reflection and replication padding, flatten, mean over
    positions, dropout and identity between them, as modules or as functions. A channel of a convolution is one unit;
    a bias is an edge from a constant input. The skeleton has the edges on the paths with the largest product of
    absolute weights: for each hidden unit one from the inputs and one to the outputs. It is chosen anew at every point
    at which a chart is made. Slopes of PReLU are not edges: they stay fixed. So do the weights into units through which
    no path leads (all weights into or out of them are zero).

    Args:
        submodule: Name of the submodule that is the chain, as in ``module.get_submodule(name)``. Default: the module
            itself. It must hold all trainable parameters.

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
        """Return the chart of the basis paths at the current values of ``parameters``, the trainable ones of it.

        Raises:
            ValueError: If the module is not a chain, a trainable parameter is not in it or a frozen one is, or a
                weight is not finite.
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
