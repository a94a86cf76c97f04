"""Pictures in loggers: those that can show images get them as arrays of pixels, the others are passed over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(trainer: Trainer, key: str, figure: Figure) -> bool:
    """Log a figure to every logger that takes images, at the current ``global_step``.

    Args:
        trainer: Whose loggers. On ranks other than zero nothing is drawn or logged.
        key: Name of the image.
        figure: Drawn without pyplot, so that the user's backend and open figures are left alone.

    Returns:
        Whether a logger took it, or this is not rank zero.
    """
    if not trainer.is_global_zero:
        return True
    loggers: list[Any] = [lg for lg in trainer.loggers if hasattr(lg, "log_image") or _takes_images(lg)]
    pixels = rendered(figure) if loggers else None
    for logger in loggers:
        if hasattr(logger, "log_image"):  # Weights and Biases
            logger.log_image(key=key, images=[pixels], step=trainer.global_step)
        else:
            logger.experiment.add_image(key, pixels, trainer.global_step, dataformats="HWC")
    return bool(loggers)


def rendered(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the pixels of a figure, shape (height, width, 3).

    Args:
        figure: A figure outside pyplot.
    """
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _takes_images(logger: Any) -> bool:
    return hasattr(getattr(logger, "experiment", None), "add_image")
