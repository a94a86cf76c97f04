"""The hooks of the batch transfer, between DataLoader and training step, run once on the probe.

The user's hooks ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer`` may count,
cache and draw random numbers. Copies of their owners run them.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_flatness.module.batches import Probe, map_tensors
from lightning_flatness.module.copying import Copier
from lightning_flatness.module.rng import preserved_rng, seed_all

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def transferred(trainer: Trainer | None, pl_module: LightningModule, batches: list[Any], seed: int) -> list[Any]:
    """Return batches as the training step gets them, but on the host.

    A copy of the module, or of the DataModule, runs their hooks, with random numbers of this seed. The batches may be
    written to. Without a ``trainer`` the module's own hooks are used.
    """
    owners = [_owner(trainer, pl_module, hook) for hook in _HOOKS]
    if any(owner is not None for owner in owners):
        # Parameters are shared: the hooks run without gradients, and at most read them.
        copier = Copier({id(p): p for p in pl_module.parameters()})
        before, move, after = [pl_module if owner is None else copier.copy(owner) for owner in owners]

    def transfer(batch: Any) -> Any:
        if trainer is not None:
            batch = trainer.precision_plugin.convert_input(batch)
        if not any(owner is not None for owner in owners):
            move_all = move_data_to_device if trainer is None else trainer.strategy.batch_to_device
            return move_all(batch, device)
        batch = before.on_before_batch_transfer(batch, 0)
        batch = move.transfer_batch_to_device(batch, device, 0)
        return after.on_after_batch_transfer(batch, 0)

    done = []
    device = pl_module.device if trainer is None else trainer.strategy.root_device
    with preserved_rng(device), torch.inference_mode(False), torch.no_grad():
        for index, batch in enumerate(batches):
            seed_all(seed + index, device)
            done.append(map_tensors(host_copy, transfer(batch)))
    return Probe(done, getattr(batches, "num_total", None))


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the host, without history."""
    copied = tensor.detach().to("cpu", copy=True)
    return copied.requires_grad_() if tensor.requires_grad else copied


def _owner(trainer: Trainer | None, pl_module: LightningModule, hook: str) -> Any:
    """Return who overrides a hook; Lightning asks the DataModule first."""
    owners = (getattr(trainer, "datamodule", None), pl_module)
    return next((owner for owner in owners if overrides(owner, hook)), None)


def overrides(instance: Any, *hooks: str) -> bool:
    """Return whether one of some hooks of Lightning is defined by the user."""
    own = [c for c in type(instance).__mro__ if not c.__module__.startswith(("lightning.", "pytorch_lightning."))]
    return any(hook in vars(c) for c in own for hook in hooks)
