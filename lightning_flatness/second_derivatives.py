"""Whether a loss can be differentiated twice, what its graph is made of, and how many bytes it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for .* is not implemented|differentiate twice|once_differentiable|double.?backward",
    re.IGNORECASE,
)


class NotTwiceDifferentiableError(RuntimeError):
    """An operator of the module has no second derivative."""


def from_autograd(error: RuntimeError) -> RuntimeError:
    """Return the error to raise when differentiating twice failed: ours if that is the reason, else the same."""
    return second_derivative_error(str(error)) if _NO_SECOND_DERIVATIVE.search(str(error)) else error


def second_derivative_error(reason: str) -> NotTwiceDifferentiableError:
    """Return the error that names what has no second derivative, and says what to do."""
    return NotTwiceDifferentiableError(
        f"Expected operators with a second derivative, got one without: {reason} Replace the operator, or pass "
        "engine='finite_difference' to differentiate the gradient numerically."
    )


@dataclass
class Operators:
    """What the graph of a loss was found to be made of, as far as second derivatives may be wrong.

    Attributes:
        is_inspected: Whether somebody has looked.
        has_custom_functions: The derivative of the ``backward`` of a ``torch.autograd.Function`` can be missing without
            an error (even where it is marked as ``once_differentiable``, autograd skips the node that would raise);
            built-in operators have it or raise.
        is_verified: Whether a product has been compared with finite differences, if there are custom functions.
        has_weight_norm: The fused operator has a wrong second derivative and is to be replaced.
    """

    is_inspected: bool = False
    has_custom_functions: bool = False
    is_verified: bool = False
    has_weight_norm: bool = False

    def must_rewrite(self, loss: Tensor) -> bool:
        """Look at the graph of a loss, once; return whether an operator in it is to be replaced."""
        if self.is_inspected:
            return False
        nodes = graph_nodes([loss])
        self.is_inspected = True
        self.has_custom_functions = has_custom_functions(nodes)
        self.has_weight_norm = any(node.name() == "WeightNormInterfaceBackward0" for node in nodes)
        return self.has_weight_norm


def has_custom_functions(nodes: Iterable[Any]) -> bool:
    """Return whether a ``torch.autograd.Function`` of somebody's own is among the nodes of a graph."""
    return any(isinstance(node, BackwardCFunction) for node in nodes)


def graph_nodes(outputs: Iterable[Tensor]) -> set[Any]:
    """Return the nodes of the graph of some tensors."""
    nodes: set[Any] = set()
    pending: list[Any] = [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return nodes


@contextmanager
def counted_bytes(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Yield the bytes of the storages, but those of parameters, that graphs made inside the block keep, by address."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in parameters}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
        # Without its history, which autograd gives back to it: an output kept by its own node would never be freed.
        return tensor.detach()

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield storages
