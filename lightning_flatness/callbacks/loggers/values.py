"""What a measurement has found, for every logger and for ``trainer.callback_metrics``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure

from lightning_flatness.callbacks.loggers.figures import log_figure


def log_values(
    trainer: Trainer,
    pl_module: LightningModule | None,
    values: Mapping[str, float],
    figures: Mapping[str, Figure],
    *,
    on_step: bool,
) -> None:
    """Log values and figures at the current ``global_step``.

    Args:
        trainer: With its loggers.
        pl_module: The module in training; None once training is over, when its ``log`` is no longer allowed.
        values: By the names of their curves.
        figures: By name.
        on_step: Whether they belong to a step, not to an epoch.
    """
    if pl_module is not None:
        # The loggers have it; this is for callback_metrics. Ranks agree: sync_dist keeps Lightning from asking.
        options: dict[str, Any] = {"on_step": on_step, "on_epoch": not on_step, "sync_dist": True, "batch_size": 1}
        for key, value in values.items():
            pl_module.log(key, value, logger=False, **options)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
    for name, figure in figures.items():
        log_figure(trainer, name, figure)
