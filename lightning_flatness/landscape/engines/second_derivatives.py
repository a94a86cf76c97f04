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

from lightning_flatness.module.cross_entropy import is_own
from lightning_flatness.module.loss import graph_nodes

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
    """Return the error that names the operators without a second derivative, and a remedy."""
    return NotTwiceDifferentiableError(
        f"Expected operators with a second derivative, got one without: {reason} Replace the operator, or pass "
        "engine='finite_difference' to differentiate the gradient numerically."
    )


@dataclass
class Operators:
    """The operators of a loss whose second derivatives may be missing or wrong.

    Attributes:
        is_inspected: Whether the graph of the loss has been searched.
        has_custom_functions: Whether there is a ``torch.autograd.Function``. The derivative of its ``backward`` can be
            missing without an error (even where it is marked as ``once_differentiable``, autograd skips the node that
            would raise); built-in operators have it or raise.
        is_verified: Whether a product has been compared with finite differences, if there are custom functions.
        differentiates: Whether the loss takes gradients itself, so that it has no value without them.
        has_weight_norm: The fused operator has a wrong second derivative and is replaced.
        product_error: Estimated relative error of products; above zero where finite differences are used.
    """

    is_inspected: bool = False
    has_custom_functions: bool = False
    is_verified: bool = False
    has_weight_norm: bool = False
    differentiates: bool = False
    product_error: float = 0.0

    def must_rewrite(self, loss: Tensor) -> bool:
        """Search the graph of a loss, once; return whether an operator in it has to be replaced."""
        if self.is_inspected:
            return False
        nodes = graph_nodes([loss])
        self.is_inspected = True
        self.has_custom_functions = has_custom_functions(nodes)
        self.has_weight_norm = any(node.name() == "WeightNormInterfaceBackward0" for node in nodes)
        return self.has_weight_norm


def has_custom_functions(nodes: Iterable[Any]) -> bool:
    """Return whether a custom ``torch.autograd.Function``, none of ours, is among the nodes of a graph."""
    return any(isinstance(node, BackwardCFunction) and not is_own(node) for node in nodes)


@contextmanager
def counted_bytes(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Yield the bytes, by address, of the storages that graphs made inside the block keep, parameters left out."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in parameters}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
        # Autograd restores the history; an output kept with it by its own node would never be freed.
        return tensor.detach()

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield storages
