"""Whether a loss can be differentiated twice, what its graph is made of, and how many bytes it holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
        "differentiation='finite_difference' to differentiate the gradient numerically."
    )


def graph_nodes(loss: Tensor) -> set[Any]:
    """Return the nodes of the graph of a loss."""
    nodes: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return nodes


@contextmanager
def counted_bytes() -> Iterator[dict[int, int]]:
    """Yield the bytes of the storages that graphs made inside the block keep, by address."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield storages
