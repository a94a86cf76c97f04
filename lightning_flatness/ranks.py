"""Sums over the ranks of a process group, so that all ranks return, raise and fall back together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_flatness.second_derivatives import NotTwiceDifferentiableError, Operators
from lightning_flatness.sharding import is_distributed


def rank_and_world_size() -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def total_count(count: int, device: torch.device) -> int:
    """Return the sum of a count over all ranks."""
    if not is_distributed():
        return count
    total = torch.tensor([count], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def sum_over_ranks(
    add: Callable[[Tensor], None], size: int, operators: Operators, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the sum over all ranks of what each adds to a vector of zeros, with one all-reduce.

    Three more entries tell the other ranks what all of them have to react to: a failure, an operator without a
    second derivative, a custom function. Without them one rank would leave the others waiting.

    Args:
        add: Adds this rank's part to a vector of shape (size,), in place; what it raises, all ranks raise.
        size: Length of the vector.
        operators: Gets to know what other ranks have found.
        dtype: Of the vector.
        device: Of the vector.

    Returns:
        The sum, shape (size,), the same on all ranks.
    """
    total = torch.zeros(size + 3, dtype=dtype, device=device)
    failure: Exception | None = None
    try:
        add(total[:size])
    except Exception as error:
        failure = error
        total[size + int(isinstance(error, NotTwiceDifferentiableError))] = 1
    if is_distributed():
        total[size + 2] = operators.has_custom_functions
        dist.all_reduce(total)
        *num_failures, num_custom = total[size:].tolist()
        failure = _common_failure(failure, num_failures)
        operators.has_custom_functions = num_custom > 0
    if failure is not None:
        raise failure
    return total[:size]


def _common_failure(own: Exception | None, counts: list[float]) -> Exception | None:
    """Return what this rank is to raise, so that all ranks raise, or fall back, together."""
    num_failed, num_without_second_derivative = counts
    if num_failed:
        is_own = own is not None and not isinstance(own, NotTwiceDifferentiableError)
        return own if is_own else RuntimeError("Evaluating the loss failed on another rank; see its error.")
    if num_without_second_derivative:
        return own or NotTwiceDifferentiableError("An operator on another rank has no second derivative.")
    return None
