"""The source of a checkpoint's samples: the DataModule, the module, or the data that the user named."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from lightning_flatness.callbacks.transfer import overrides
from lightning_flatness.measuring.building import Built
from lightning_flatness.measuring.loading import CheckpointError

Split = Literal["train", "val"]


def loader_of(built: Built, split: Split) -> tuple[Iterable[Any], float]:
    """Return the loader of a split, and how many batches of it an epoch has: infinitely many if nothing limits them.

    Raises:
        CheckpointError: If there is none.
    """
    hook = f"{split}_dataloader"
    owner = built.data
    if owner is None and overrides(built.module, hook):
        owner = built.module
    if owner is None:
        raise CheckpointError(
            "Expected data to measure on, got none: neither a config of LightningCLI nor the checkpoint says which "
            "DataModule it was, and the module has no loader of its own. Pass --data package.mod:DataModule."
        )
    loader = getattr(owner, hook)() if hasattr(owner, hook) else owner
    if split == "val" and isinstance(loader, list | tuple):
        loader = loader[0]
    if isinstance(loader, list | tuple | dict) and not _holds_batches(loader):
        loader = (batch for batch, _, _ in CombinedLoader(loader, "max_size_cycle"))
    limit = getattr(built.trainer, f"limit_{split}_batches", 1.0)
    if isinstance(limit, float):
        limit = math.inf if limit == 1.0 or not hasattr(loader, "__len__") else int(limit * len(loader))
    return loader, limit if split == "train" else math.inf


def _holds_batches(loaders: Any) -> bool:
    return isinstance(loaders, list | tuple) and any(
        isinstance(value, Tensor | list | tuple | dict) for value in loaders
    )
