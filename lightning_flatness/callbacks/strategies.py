"""Which strategies the callbacks refuse, and why: one table for measurements and for SAM."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_UNSUPPORTED = {
    "FSDPStrategy": "which keeps slices of flattened weights (FSDP1)",
    "DeepSpeedStrategy": "which partitions weights or optimizer states itself",
    "XLAStrategy": "whose ranks are no process group of torch.distributed",
    "SingleDeviceXLAStrategy": "which runs on an XLA device, whose generator torch cannot seed",
    "XLAFSDPStrategy": "which keeps slices of flattened weights, on XLA devices",
}
"""By name: the classes of `lightning` and of `pytorch_lightning` are different ones."""


def why_unsupported(trainer: Trainer) -> str | None:
    """Return why the Trainer's strategy, or one it derives from, is not supported, as a relative clause, or None."""
    names = [base.__name__ for base in type(trainer.strategy).__mro__]
    return next((_UNSUPPORTED[name] for name in names if name in _UNSUPPORTED), None)


def check_strategy(trainer: Trainer, monitor: str) -> None:
    """Check that a monitor can measure under the Trainer's strategy.

    Args:
        trainer: The Trainer.
        monitor: The name of the monitor's class.

    Raises:
        MisconfigurationException: If it cannot.
    """
    kind = type(trainer.strategy)
    reason = why_unsupported(trainer)
    if reason is None and trainer.world_size > 1 and not (dist.is_available() and dist.is_initialized()):
        reason = "whose ranks are no process group of torch.distributed"
    if reason is not None:
        raise MisconfigurationException(
            f"Expected one device, or a strategy under which {monitor} can put the weights together on every rank "
            f"(DDP; ModelParallelStrategy with FSDP2 or tensor parallelism), got {kind.__name__}, {reason}. HINT: "
            "use strategy='ddp', or ModelParallelStrategy with torch.distributed.fsdp.fully_shard, or measure "
            "checkpoints of this run with LossLandscape."
        )
