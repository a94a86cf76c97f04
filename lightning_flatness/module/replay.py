"""A pass of training that can be run once more from where it started, without a trace (SAM)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatness.module.copying import is_plain
from lightning_flatness.module.copying_lightning import mute, silent
from lightning_flatness.module.kinds import DICT, MARKS, TENSOR
from lightning_flatness.module.rng import remember_rng
from lightning_flatness.module.snapshot import Snapshot, exchange
from lightning_flatness.module.undo import undone


class ReplayedPass:
    """A pass of training that can be run once more, from where it started and without a trace.

    Make it right before the pass. Inside :meth:`again` the generators, the buffers, the plain attributes of the module
    and of its Trainer, optimizers and schedulers are as they were then, so that the second pass evaluates the same
    function of the weights (the same dropout mask, the same queue of a contrastive loss, the same count of calls). On
    leaving, all of it is as it was when ``again`` was entered: statistics, metrics and counters have seen the first
    pass only.

    Parameters that are not trained by ``optimizers`` (momentum encoders, averaged models) are covered, too. The frozen
    backbone of a fine-tuning run, which takes more memory than the trained parameters, is not copied, but watched:
    what a pass moves in it is put back after the second pass, and copied before all later ones. Trained parameters and
    gradients are the caller's. Autocast is left as it is.

    Args:
        module: The module whose state is guarded.
        device: Where the module's parameters are.
        optimizers: Those that train the module.
    """

    def __init__(self, module: nn.Module, device: torch.device | None, optimizers: Sequence[Optimizer] = ()) -> None:
        self._trainer = trainer = attached_trainer(module)
        schedulers = [] if trainer is None else [config.scheduler for config in trainer.lr_scheduler_configs]
        self._restore_rng = remember_rng(device)
        self._device = device
        self._start = Snapshot(
            [module, *optimizers, *schedulers], _around(trainer), without=[optimizer.state for optimizer in optimizers]
        )
        if trainer is not None:
            self._start.add(vars(trainer), DICT)
        held = chain.from_iterable(m._parameters.values() for m in self._start.modules)  # what `parameters` looks at
        parameters: dict[int, Tensor] = {id(p): p for p in held if p is not None}
        self._trained = {id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
        for parameter in parameters.values():
            self._start.add(parameter, MARKS)
        others = [p for p in parameters.values() if not (p.requires_grad and id(p) in self._trained)]
        budget = sum(p.nbytes for p in parameters.values()) - (size := sum(p.nbytes for p in others))
        has_room = size <= budget
        copied = [p for p in others if has_room or p.nbytes <= _MAX_SMALL_BYTES or id(p) in _moving]
        self._moved = [(p, TENSOR.copy(p), TENSOR) for p in copied]
        known = {id(p) for p in copied}
        self._watched = [p for p in others if id(p) not in known and is_plain(p)]
        self._versions, self._entries = [p._version for p in self._watched], _entries(self._watched)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Guard the second pass. Nothing is logged inside."""
        for p in self._newly_moved():
            _moving[id(p)] = p
            self._moved.append((p, TENSOR.copy(p), TENSOR))
        # The pass may have unfrozen some of the trained ones; those are the caller's now, who may have moved them.
        moved = [entry for entry in self._moved if not (entry[0].requires_grad and id(entry[0]) in self._trained)]
        back, forth = exchange(self._start, moved)
        restore_rng = remember_rng(self._device)
        with undone(lambda: (forth(), restore_rng())):
            back()
            self._restore_rng()
            for module in self._start.modules:
                mute(module, module)
            if self._trainer is not None:
                self._trainer.loggers = [silent(logger) for logger in self._trainer.loggers]
            yield

    def _newly_moved(self) -> list[Tensor]:
        """Return the watched parameters that the pass has written to, also through ``.data``."""
        differs = (self._entries != _entries(self._watched)).any(1).tolist()
        pairs = zip(self._watched, self._versions, differs, strict=True)
        return [p for p, version, has_moved in pairs if has_moved or p._version != version]


def attached_trainer(module: nn.Module) -> Any:
    """Return the Trainer that runs a module, None if there is none."""
    try:
        trainer = getattr(module, "trainer", None)
    except RuntimeError:  # what a LightningModule raises that no Trainer runs
        return None
    return trainer if hasattr(trainer, "loggers") else None


def _around(trainer: Any) -> list[Any]:
    """Return what ``training_step`` can reach through its Trainer and count in: callbacks, data."""
    if trainer is None:
        return []
    callbacks = [vars(c) if type(c).__module__.startswith(_LIGHTNING) else c for c in trainer.callbacks]
    return [trainer.callbacks, *callbacks, trainer.datamodule, trainer.train_dataloader]


_LIGHTNING = ("lightning.", "pytorch_lightning.")


_moving: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
"""Watched parameters that a pass was seen to move."""

_MAX_SMALL_BYTES = 2**16
"""Smaller ones are copied in any case."""

_NUM_ENTRIES = 8


def _entries(parameters: list[Tensor]) -> Tensor:
    """Return a few entries of each of some parameters, in a table that costs a device no waiting."""
    rows = [p.detach().as_strided((_NUM_ENTRIES,), (p.numel() // _NUM_ENTRIES,)).float() for p in parameters]
    return torch.stack(rows) if rows else torch.empty(0, _NUM_ENTRIES, device="cpu")
