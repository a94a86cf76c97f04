"""The module that a measurement evaluates: the twin of the user's module, with sharded weights put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.landscape.ranks import check_ranks, rank_check
from lightning_flatness.module.batches import copy_batch
from lightning_flatness.module.loss import LossFunction, check_loss, loss_in
from lightning_flatness.module.modes import Mode
from lightning_flatness.module.sharded_twin import ShardedTwin
from lightning_flatness.module.sharding import gathered
from lightning_flatness.module.shards import standing_in
from lightning_flatness.module.twin import Twin, twin_of


@contextmanager
def measured_module(module: nn.Module, parameters: Sequence[Tensor], mode: Mode, seed: int) -> Iterator[Twin]:
    """Make the module of one measurement, whose parameters have all entries on this rank.

    Args:
        module: The user's module.
        parameters: Those of its parameters that are measured.
        mode: Which layers act as in training.
        seed: Seed of the random numbers of every forward pass.

    Yields:
        The twin. Where an optimizer holds another tensor in the place of one of its parameters,
        ``module.sharding.sharded_form`` returns it.
    """
    check_ranks(parameters[0].device)
    with gathered(module, parameters) as whole_parameters, twin_of(module, whole_parameters, mode, seed) as twin:
        twin.differentiate_measured()
        yield twin


@contextmanager
def sharded_module(module: nn.Module, parameters: Sequence[Tensor], mode: Mode, seed: int) -> Iterator[Twin]:
    """Make the module of one measurement, of whose parameters this rank has slices; see :func:`measured_module`."""
    check = rank_check(parameters[0].device)
    check()
    with (
        standing_in(module, parameters, check) as stand_ins,
        twin_of(module, stand_ins, mode, seed, ShardedTwin) as twin,
    ):
        twin.differentiate_measured()
        yield twin


def plain_loss(module: nn.Module, loss_fn: LossFunction, batch: Any, seed: int) -> Tensor:
    """Return the loss on a batch in evaluation mode, with weights sharded or gathered as they are."""
    with twin_of(module, list(module.parameters()), "eval", seed) as twin, torch.no_grad(), twin.forward_pass(0):
        return check_loss(loss_in(twin.rebound(loss_fn)(twin.module, copy_batch(batch))), allow_non_finite=True)
