"""Trace a module's ``forward``, and list the operations between layers that keep units separate.

The tables hold operations that commute with a positive factor on one unit and do not mix units. Tracing runs the user's
code on symbolic tensors, isolated like every other evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_flatness.geometry.base import UndefinedGeometryError
from lightning_flatness.module.twin import twin_of

PATH_HINT = (
    "Use the geometry 'euclidean', 'layer', 'filter' or 'element', or name the part of the module that is such a "
    "chain: PathGeometry(submodule=...)."
)

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
POOLS: dict[type[nn.Module], int] = {
    getattr(nn, f"{kind}Pool{n}d"): n for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for n in (1, 2, 3)
}
PADS: dict[type[nn.Module], int] = {
    getattr(nn, f"{kind}Pad{n}d"): n for kind in ("Zero", "Reflection", "Replication", "Circular") for n in (1, 2, 3)
}
ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
KNOWN_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Flatten,
    *CONVOLUTIONS,
    *POOLS,
    *PADS,
    *ELEMENTWISE,
)

CONVOLUTION_FUNCTIONS: dict[Any, int] = {getattr(F, f"conv{n}d"): n for n in (1, 2, 3)}
POOL_FUNCTIONS: dict[Any, int] = {
    getattr(space, f"{kind}_pool{n}d"): n
    for space in (F, torch)
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for n in (1, 2, 3)
    if hasattr(space, f"{kind}_pool{n}d")
}
ELEMENTWISE_FUNCTIONS = {
    *(F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu),
    *(F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(torch.dropout, torch.clone),
}
ELEMENTWISE_METHODS = {"relu", "relu_", "prelu", "contiguous", "clone", "float", "double", "to"}
PRELU_FUNCTIONS = {F.prelu, torch.prelu, "prelu"}
SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "get_device"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "is_cuda"}
SPATIAL_REDUCTIONS = {"mean", "sum", "amax", "amin"}


def known_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the listed class whose ``forward`` this module runs, also for subclasses; None if there is none."""
    for known in KNOWN_CLASSES:
        if isinstance(module, known) and type(module).forward is known.forward:
            return known
    return None


class _Tracer(fx.Tracer):
    """Traces into all modules except torch's own, and through compiled ones."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return known_class(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(original := getattr(m, "_orig_mod", None), nn.Module):
            return original(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def trace(module: nn.Module) -> fx.Graph:
    """Return the operations of a module's ``forward`` in order. The module is not changed.

    Raises:
        UndefinedGeometryError: If the module cannot be traced.
    """
    mode: Literal["eval", "train"] = "train" if module.training else "eval"
    with twin_of(module, list(module.parameters()), mode, seed=0) as twin, twin.forward_pass(0):
        try:
            return _Tracer().trace(twin.module)
        except Exception as error:
            raise UndefinedGeometryError(
                f"Expected a module whose forward torch.fx can trace for the geometry 'path', got "
                f"{type(module).__name__}, with which tracing failed ({error}). Take control flow that depends on data "
                f"or shapes out of its forward. {PATH_HINT}"
            ) from error


def reachable(roots: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return the roots and all nodes reachable from them."""
    found = set(roots)
    pending = list(found)
    while pending:
        for node in neighbours(pending.pop()):
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


def is_shape(node: fx.Node) -> bool:
    """Return whether a node reads the shape of a tensor rather than its values."""
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def is_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Return whether an operation overwrites its input."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    return node.kwargs.get("inplace") is True or "out" in node.kwargs or function_name(node).endswith("_")


def function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)


def bound_arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a call by name, given the names of the positional ones."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
