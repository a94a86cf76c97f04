"""Sums over the ranks of a process group, so that all ranks return, raise and fall back together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_flatness.landscape.engines.second_derivatives import NotTwiceDifferentiableError, Operators
from lightning_flatness.module.loss import NonFiniteLossError
from lightning_flatness.module.sharding import is_distributed


class RankFailedError(RuntimeError):
    """Another rank has left a block of :func:`left_together` with an exception."""


_LEAVES_TOGETHER: ContextVar[bool] = ContextVar("leaves_together", default=False)


@contextmanager
def left_together(device: torch.device) -> Iterator[None]:
    """End a block on all ranks alike: an exception of one rank stops the others, too.

    An exception outside of a sum would leave the other ranks waiting in their next one. So inside the block every sum,
    and the block's end, begin with one number more to reduce: whether a rank has left. What stops the process
    (``KeyboardInterrupt``) is not announced, nor can a rank be helped that waits in a collective call of the user's.

    Args:
        device: Where ranks communicate.

    Raises:
        RankFailedError: If another rank has left the block with an exception.
    """
    if not is_distributed():
        yield
        return
    token = _LEAVES_TOGETHER.set(True)
    try:
        yield
        check_ranks(device)
    except RankFailedError:
        raise
    except Exception:
        dist.all_reduce(torch.ones((), device=device))
        raise
    finally:
        _LEAVES_TOGETHER.reset(token)


def check_ranks(device: torch.device) -> None:
    """Raise if another rank has left the block of :func:`left_together` that this one is in; outside nothing happens.

    Raises:
        RankFailedError: If one has.
    """
    if _LEAVES_TOGETHER.get():
        _check_ranks(device)


def rank_check(device: torch.device) -> Callable[[], None]:
    """Return :func:`check_ranks` for the block that this thread is in now, also for the threads of backward passes."""
    return partial(_check_ranks, device) if _LEAVES_TOGETHER.get() else lambda: None


def _check_ranks(device: torch.device) -> None:
    num_failed = torch.zeros((), device=device)
    dist.all_reduce(num_failed)
    if num_failed > 0:
        raise RankFailedError("Measuring failed on another rank; see its error.")


def rank_and_world_size() -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def total_count(count: int, device: torch.device) -> int:
    """Return the sum of a count over all ranks."""
    if not is_distributed():
        return count
    check_ranks(device)
    total = torch.tensor([count], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


@contextmanager
def sum_over_ranks(
    size: int,
    operators: Operators,
    dtype: torch.dtype,
    device: torch.device,
    on_evaluation: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """Yield a vector of zeros for each rank to add to, and sum it over all ranks in place, with one all-reduce.

    Three more entries carry what all ranks have to react to: a failure, an operator without a second derivative, a
    custom function. Without them one rank would leave the others waiting. (A loss that is not finite makes the number
    of failures not a number.)

    Args:
        size: Length of the vector.
        operators: Learns what other ranks have found.
        dtype: Of the vector.
        device: Of the vector.
        on_evaluation: Called when the sum is there.

    Yields:
        Shape (size,). After the block it is the same on all ranks.

    Raises:
        Exception: If the block raises one on any rank.
    """
    total = torch.zeros(size + 3, dtype=dtype, device=device)
    check_ranks(device)
    failure: Exception | None = None
    try:
        yield total[:size]
    except Exception as error:
        failure = error
        total[size + int(isinstance(error, NotTwiceDifferentiableError))] = (
            math.nan if isinstance(error, NonFiniteLossError) else 1
        )
    if is_distributed():
        total[size + 2] = operators.has_custom_functions
        dist.all_reduce(total)
        *num_failures, num_custom = total[size:].tolist()
        failure = _common_failure(failure, num_failures)
        operators.has_custom_functions = num_custom > 0
    if failure is not None:
        raise failure
    if on_evaluation is not None:
        on_evaluation()


def _common_failure(own: Exception | None, counts: list[float]) -> Exception | None:
    """Return what this rank is to raise, so that all ranks raise, or fall back, together."""
    num_failed, num_without_second_derivative = counts
    if num_failed:
        if own is not None and not isinstance(own, NotTwiceDifferentiableError):
            return own
        if math.isnan(num_failed):
            return NonFiniteLossError("Expected a finite loss, got one that is not on another rank; see its error.")
        return RuntimeError("Evaluating the loss failed on another rank; see its error.")
    if num_without_second_derivative:
        return own or NotTwiceDifferentiableError("An operator on another rank has no second derivative.")
    return None
