"""The twin of a module whose weights stay sharded: derivatives are those of this rank's slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_flatness.module.modes import Mode
from lightning_flatness.module.shards import Shard, StandIn
from lightning_flatness.module.twin import Twin


class ShardedTwin(Twin):
    """A copy of a module with stand-ins for its weights; made by :func:`twin_of` inside :func:`standing_in`.

    Args:
        module: The module of the run, with stand-ins for its weights.
        parameters: Those that are measured.
        mode: See :func:`twin_of`.
        seed: Seed of the random numbers of every forward pass.
        options: Other arguments of :class:`Twin`.

    Attributes:
        stand_ins: Those that are measured; the copy shares them with the module.
        shards: Their slices.
        parameters: This rank's entries of them, flat.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], mode: Mode, seed: int, **options: Any) -> None:
        super().__init__(module, parameters, mode, seed, **options)
        self.stand_ins = [p for p in parameters if isinstance(p, StandIn)]
        self.shards: list[Shard] = [p.shard for p in self.stand_ins]
        self.parameters = self._originals = [shard.leaf for shard in self.shards]
        self._home = self._originals

    def differentiate_measured(self) -> None:
        """Let autograd follow the slices that are measured, and no others."""
        measured = set(map(id, self.stand_ins))
        for p in self.module.parameters():
            self._requires_grad[id(p)] = id(p) in measured
            p.requires_grad_(id(p) in measured)
            if isinstance(p, StandIn):
                p.shard.leaf.requires_grad_(id(p) in measured)
