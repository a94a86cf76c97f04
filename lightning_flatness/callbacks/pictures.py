"""Pictures for loggers: figures as images, and TensorBoard's charts of several curves in one.

Loggers are recognised by what they can do, and those that cannot show pictures are passed over. Nothing here touches
pyplot, which has state of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch import Trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Layout = dict[str, dict[str, list[Any]]]


def custom_scalars_layout(charts: Mapping[str, Sequence[str]], title: str = "flatness") -> Layout:
    """Return the layout of TensorBoard's "Custom Scalars" page that draws several curves in one chart.

    Args:
        charts: Titles of charts and the keys of the curves in each; charts without a curve are left out.
        title: Title of the group of charts.

    Returns:
        What ``SummaryWriter.add_custom_scalars`` takes.

    Example:
        >>> custom_scalars_layout({"edge": ["flatness/lambda_max", "flatness/stability_edge"]})
        {'flatness': {'edge': ['Multiline', ['flatness/lambda_max$', 'flatness/stability_edge$']]}}
    """
    # TensorBoard takes them for patterns that a curve's name begins with, and would draw the residuals, too.
    patterns = {name: [f"{re.escape(key)}$" for key in keys] for name, keys in charts.items() if keys}
    return {title: {name: ["Multiline", tags] for name, tags in patterns.items()}}


def log_layout(trainer: Trainer, layout: Layout) -> None:
    """Write a layout of charts to the loggers that know them, which are TensorBoard's.

    Args:
        trainer: Whose loggers to write to; ranks other than the first write nothing.
        layout: See :func:`custom_scalars_layout`.
    """
    for logger in tensorboard_loggers(trainer) if trainer.is_global_zero else []:
        if callable(getattr(logger.experiment, "add_custom_scalars", None)):  # tensorboardX has it, too
            logger.experiment.add_custom_scalars(layout)


def tensorboard_loggers(trainer: Trainer) -> list[Any]:
    """Return those of a Trainer's loggers that write for TensorBoard.

    Args:
        trainer: Whose loggers.

    Returns:
        Loggers known by their name, so that those of both packages of Lightning count.
    """
    return [
        logger
        for logger in trainer.loggers
        if any("TensorBoard" in base.__name__ for base in type(logger).__mro__) and hasattr(logger, "experiment")
    ]


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
    loggers: list[Any] = [logger for logger in trainer.loggers if hasattr(logger, "log_image") or _takes_images(logger)]
    image = pixels(figure) if loggers else None
    for logger in loggers:
        if hasattr(logger, "log_image"):  # Weights and Biases
            logger.log_image(key=key, images=[image], step=trainer.global_step)
        else:
            logger.experiment.add_image(key, image, trainer.global_step, dataformats="HWC")
    return bool(loggers)


def _takes_images(logger: Any) -> bool:
    return hasattr(getattr(logger, "experiment", None), "add_image")


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return a figure as an image.

    Args:
        figure: Drawn without pyplot.

    Returns:
        Shape (height, width, 3).
    """
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
