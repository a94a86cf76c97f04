"""The network of squared weights as a list of operations, to be evaluated at any weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ref:
    """Stands for the result of a node among the arguments of another one."""

    node: int


@dataclass(frozen=True)
class Node:
    """An operation.

    Attributes:
        function: Takes squares and sums over paths.
        args: Positional arguments; ``Ref`` where a tensor comes from another node.
        kwargs: Keyword arguments.
        index: Which of several results is meant.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    index: int | None = None

    def part(self, index: int) -> Node:
        """Return the node of one of several results."""
        return replace(self, index=index)

    def parents(self) -> Iterator[int]:
        """Yield the numbers of the nodes that this one needs."""
        pending = [self.args, self.kwargs]
        while pending:
            item = pending.pop()
            if isinstance(item, Ref):
                yield item.node
            elif isinstance(item, dict):
                pending += item.values()
            elif isinstance(item, list | tuple):
                pending += item


@dataclass
class Program:
    """Operations in the order in which they ran. Every one is run when it is added, and again for other weights.

    Attributes:
        outputs: Numbers of the nodes whose sum is the network's output.
        num_samples: Samples of the batch, the divisor of the sum.
    """

    outputs: set[int] = field(default_factory=set)
    num_samples: int = 1
    _nodes: list[Node] = field(default_factory=list)
    _weights: dict[int, Tensor] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _results: dict[int, Tensor] = field(default_factory=dict)
    _needed: list[int] = field(default_factory=list)

    def add(self, node: Node) -> int:
        """Run an operation, append it and return its number."""
        self._results[len(self._nodes)] = self._run(node, self._results)
        self._nodes.append(node)
        return len(self._nodes) - 1

    def parameter(self, parameter: Tensor) -> int:
        """Return the number of the square of a parameter."""
        if id(parameter) not in self._numbers:
            self._numbers[id(parameter)] = len(self._nodes)
            self._weights[len(self._nodes)] = parameter
            self._results[len(self._nodes)] = _square_leaf(parameter)
            self._nodes.append(Node(_square_leaf, (), {}))
        return self._numbers[id(parameter)]

    def finish(self, num_samples: int) -> None:
        """Keep what leads to outputs that lead to no further outputs, for a mean over samples."""
        self.num_samples = num_samples
        inner: set[int] = set()
        for output in sorted(self.outputs, reverse=True):
            if output not in inner:
                inner |= self._ancestors([output]) - {output}
        self.outputs -= inner
        self._needed = sorted(self._ancestors(self.outputs))

    def kappa(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative of the outputs' mean over samples by the square of each weight; zero without a path.

        Args:
            parameters: The weights, at whose present values everything is computed.

        Raises:
            ValueError: If a sum over paths overflows.
        """
        with torch.inference_mode(False), torch.enable_grad():
            results, self._results = self._results, {}
            if not results:
                for number in self._needed:
                    weight = self._weights.get(number)
                    results[number] = (
                        self._run(self._nodes[number], results) if weight is None else _square_leaf(weight)
                    )
            total = torch.stack([results[number].sum() for number in sorted(self.outputs)]).sum() / self.num_samples
            leaves = [results.get(self._numbers.get(id(p), -1)) for p in parameters]
            used = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(torch.autograd.grad(total, used, allow_unused=True) if total.requires_grad and used else ())
        derivatives = []
        for p, leaf in zip(parameters, leaves, strict=True):
            derivative = next(found, None) if leaf is not None and leaf.requires_grad else None
            derivatives.append(torch.zeros_like(p, dtype=total.dtype) if derivative is None else derivative)
        if not all(bool(torch.isfinite(d).all()) for d in derivatives):
            raise ValueError(
                f"Expected sums over paths within the range of {total.dtype} for the geometry 'path_norm', got one "
                "beyond. Use the geometry 'element', which needs no products."
            )
        return derivatives

    def _ancestors(self, nodes: Sequence[int] | set[int]) -> set[int]:
        found, pending = set(nodes), list(nodes)
        while pending:
            new = set(self._nodes[pending.pop()].parents()) - found
            found |= new
            pending += new
        return found

    @staticmethod
    def _run(node: Node, results: dict[int, Tensor]) -> Tensor:
        with torch.enable_grad():
            result: Any = node.function(*_resolved(node.args, results), **_resolved(node.kwargs, results))
        chosen: Tensor = result if node.index is None else result[node.index]
        return chosen


def _square_leaf(parameter: Tensor) -> Tensor:
    dtype = torch.float32 if parameter.device.type == "mps" else torch.float64  # MPS has no float64
    return parameter.detach().to(dtype).square().requires_grad_(parameter.requires_grad)


def _resolved(data: Any, results: dict[int, Tensor]) -> Any:
    if isinstance(data, Ref):
        return results[data.node]
    if isinstance(data, dict):
        return {key: _resolved(item, results) for key, item in data.items()}
    if isinstance(data, list | tuple) and not isinstance(data, torch.Size):
        return type(data)(_resolved(item, results) for item in data)
    return data
