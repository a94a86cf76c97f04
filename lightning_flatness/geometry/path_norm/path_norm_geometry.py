"""Geometry ``"path_norm"``: scales from the sums over all paths of the network of squared weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.geometry.base import Chart, FirstBatch, LinearChart, LinearGeometry
from lightning_flatness.geometry.path_norm.program import Program
from lightning_flatness.geometry.path_norm.trace import Trace, not_homogeneous
from lightning_flatness.module.batches import copy_batch, tensors_in
from lightning_flatness.module.loss import graph_nodes, loss_in
from lightning_flatness.module.twin import twin_of


class PathNormGeometry(LinearGeometry):
    r"""``w = w0 + kappa^(-1/2) z``: the metric of Path-SGD (arXiv 1506.02617), for any positively homogeneous network.

    ``kappa_e`` is the sum over all paths from the inputs to the outputs through the weight ``e`` of the product of the
    other squared weights: the derivative by ``w_e²`` of the network of squared weights on an input of ones, summed over
    the outputs. Invariant under every positive rescaling of units and every permutation of them that leaves the
    function alone. A weight without a path has the scale 0.

    Watching what the loss function does with the first batch finds the network, whatever its class: linear layers,
    embeddings, convolutions of all kinds, ReLU, LeakyReLU, PReLU, max, average and adaptive pooling, residual sums,
    concatenations, and BatchNorm with its running variance, or with that of the first batch where it uses batch
    statistics: ``gamma²/(sigma² + eps)``. Biases are edges from a constant input. A maximum lets all its paths pass, a
    mean multiplies by 1/n² (arXiv 2310.01225). Anything may come behind the network. Costs about one gradient of the
    first batch in float64 per chart.

    Raises:
        ValueError: In ``chart``, if the network has something else than positively homogeneous units (attention,
            sigmoid, LayerNorm), which the error names.
        TypeError: In ``chart``, if there is no loss to watch; a landscape and SAM give theirs.

    Example:
        >>> from lightning_flatness import LossLandscape, TopEigenvalues
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
        >>> net[0].weight.data, net[2].weight.data = torch.tensor([[2.0]]), torch.tensor([[3.0], [5.0]])
        >>> landscape = LossLandscape(net, [torch.ones(4, 1)], lambda net, x: net(x).square().mean())
        >>> landscape.chart("path_norm").scale ** -2  # 3² + 5², and twice 2²
        tensor([34.0000,  4.0000,  4.0000])
    """

    name = "path_norm"
    follows_loss = True
    needs_whole_weights = True

    def __init__(self) -> None:
        self._first: FirstBatch | None = None
        self._programs: weakref.WeakKeyDictionary[nn.Module, Program] = weakref.WeakKeyDictionary()

    def for_loss(self, first: FirstBatch | None) -> PathNormGeometry:
        """Return the geometry of the network that a loss uses."""
        bound = PathNormGeometry()
        bound._first = first
        return bound

    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return ``kappa^(-1/2)``, and 0 where there is no path."""
        return [_scale(kappa) for kappa in self._kappas(module, parameters)]

    def chart(self, module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> Chart:
        """Return the chart at the current weights; with several ranks, for the mean of their ``kappa``.

        Ranks differ where a normalisation uses statistics of its batch. All ranks have to call this together.

        Raises:
            ValueError: If the sums over paths of one rank are not known.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return super().chart(module, parameters, dtype)
        with torch.no_grad():
            total = torch.zeros(1 + sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
            error: Exception | None = None
            try:
                if self._first is not None:
                    kappas = self._kappas(module, parameters)
                    total = torch.cat([total.new_ones(1), *(k.to(dtype).reshape(-1) for k in kappas)])
            except Exception as raised:  # all ranks take part in what follows
                total, error = total.fill_(torch.nan), raised
            torch.distributed.all_reduce(total)
        if error is not None:
            raise error
        if not bool(torch.isfinite(total).all()) or float(total[0]) == 0:
            raise ValueError("Expected sums over paths on all ranks, got none from one of them. See its error.")
        return LinearChart(_scale(total[1:] / total[0]), len(total) - 1)

    def _kappas(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
        if module not in self._programs:
            self._programs[module] = self._traced(module)
        return self._programs[module].kappa(parameters)

    def _traced(self, module: nn.Module) -> Program:
        if self._first is None:
            raise TypeError(
                "Expected a loss whose network the geometry 'path_norm' can follow, got none. Take it from a "
                "LossLandscape or SharpnessAwareMinimization, or bind it with for_loss."
            )
        first = self._first
        if first.guard is not None:
            own: dict[int, Tensor] = {id(p): p for p in module.parameters()}
            with first.guard():
                return _follow(module, own, {}, first, first.loss_fn)
        originals = list(module.parameters())
        with twin_of(module, originals, "eval", seed=0) as twin, twin.forward_pass(0):
            parameters: dict[int, Tensor] = dict(zip(map(id, twin.parameters), originals, strict=True))
            buffers = {id(c): o for m, t in twin.modules for o, c in _pairs(m, t)}
            return _follow(twin.module, parameters, buffers, first, twin.rebound(first.loss_fn))

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PathNormGeometry.__init__(self)


def _scale(kappa: Tensor) -> Tensor:
    return torch.where(kappa > 0, kappa.rsqrt(), 0.0)


def _pairs(module: nn.Module, copied: nn.Module) -> list[tuple[Tensor, Tensor]]:
    copies = dict(copied.named_buffers(recurse=False))
    return [(b, copies[n]) for n, b in module.named_buffers(recurse=False) if n in copies]


def _follow(
    module: nn.Module, parameters: dict[int, Tensor], buffers: dict[int, Tensor], first: FirstBatch, loss_fn: Any
) -> Program:
    """Return what a loss function does with a module, given the tensors to read for its parameters and buffers."""
    batch = copy_batch(first.batch)
    with Trace(module, parameters, buffers) as trace:
        trace.mark_data(tensors_in(batch))
        loss = loss_in(loss_fn(module, batch))
    variables = {id(getattr(node, "variable", None)) for node in graph_nodes(tensors_in(loss))}
    names = {id(p): name for name, p in module.named_parameters()}
    if hidden := [name for p, name in names.items() if p in variables and p not in trace.seen]:
        raise not_homogeneous(f"{hidden}, used by what is no function of torch (TorchScript, a kernel of its own)")
    program = trace.finish(loss, first.num_samples)
    if not program.outputs:
        raise not_homogeneous(f"{type(module).__name__} without any")
    return program
