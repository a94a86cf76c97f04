"""Which strategies the callbacks refuse, and why: one table for measurements and for SAM."""

from __future__ import annotations

from lightning.pytorch import Trainer

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
