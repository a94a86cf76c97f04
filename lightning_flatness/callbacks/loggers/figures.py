"""Figures to loggers: one adapter for each kind of logger that takes images, in one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from lightning_flatness.callbacks.loggers.tensorboard import pixels

Adapter = Callable[[Any, str, Figure, int], None]
"""Takes the logger, the name of the image, the figure and the step."""


def _tensorboard(logger: Any, key: str, figure: Figure, step: int) -> None:
    logger.experiment.add_image(key, pixels(figure), step, dataformats="HWC")


def _wandb(logger: Any, key: str, figure: Figure, step: int) -> None:
    logger.log_image(key=key, images=[pixels(figure)], step=step)


def _mlflow(logger: Any, key: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{key}/step={step:08d}.png")


def _comet(logger: Any, key: str, figure: Figure, step: int) -> None:
    logger.experiment.log_image(pixels(figure), name=key, step=step)


def _neptune(logger: Any, key: str, figure: Figure, step: int) -> None:
    from neptune.types import File

    logger.experiment[key].append(File.as_image(figure), step=step)


def _litlogger(logger: Any, key: str, figure: Figure, step: int) -> None:
    folder = Path(logger.log_dir or mkdtemp()) / key
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step={step:08d}.png"
    figure.savefig(path)
    logger.log_file(str(path))


ADAPTERS: dict[str, Adapter] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
    "NeptuneLogger": _neptune,
    "LitLogger": _litlogger,
}
"""By the name of the class, or of one that it inherits from: both packages of Lightning have these."""


def adapter_for(logger: Any) -> Adapter | None:
    """Return what gives a figure to a logger; loggers of other names are asked for the methods of the first two.

    Args:
        logger: Any logger.

    Returns:
        The adapter; None if the logger takes no images, or its class has not the method that the adapter calls.
    """
    found = (ADAPTERS[base.__name__] for base in type(logger).__mro__ if base.__name__ in ADAPTERS)
    adapter = next(found, None)
    if adapter is _litlogger and not hasattr(logger, "log_file"):
        return None  # of an earlier version of Lightning
    if adapter is None and hasattr(logger, "log_image"):
        return _wandb
    if adapter is None and hasattr(getattr(logger, "experiment", None), "add_image"):
        return _tensorboard
    return adapter


def log_figure(trainer: Trainer, key: str, figure: Figure) -> bool:
    """Log a figure as an image, at the current step, to every logger that takes images.

    Args:
        trainer: Whose loggers. On ranks other than zero nothing is drawn or logged.
        key: Name of the image.
        figure: Drawn without pyplot, so that the user's backend and open figures are left alone.

    Returns:
        Whether a logger took it, or this is not rank zero.
    """
    if not trainer.is_global_zero:
        return True
    adapters = [(logger, adapter) for logger in trainer.loggers if (adapter := adapter_for(logger)) is not None]
    for logger, adapter in adapters:
        adapter(logger, key, figure, trainer.global_step)
    return bool(adapters)
