"""TensorBoard's charts of several curves in one, and figures as pixels, without pyplot, which has state of its own."""

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
    """Return what ``SummaryWriter.add_custom_scalars`` takes to draw the curves of a group in charts of several.

    Args:
        charts: Titles of charts and the keys of the curves in each; charts without a curve are left out.
        title: Title of the group of charts.

    Example:
        >>> custom_scalars_layout({"edge": ["flatness/lambda_max", "flatness/stability_edge"]})
        {'flatness': {'edge': ['Multiline', ['flatness/lambda_max$', 'flatness/stability_edge$']]}}
    """
    # TensorBoard takes them for patterns that a curve's name begins with, and would draw the residuals, too.
    patterns = {name: [f"{re.escape(key)}$" for key in keys] for name, keys in charts.items() if keys}
    return {title: {name: ["Multiline", tags] for name, tags in patterns.items()}}


def log_layout(trainer: Trainer, layout: Layout) -> None:
    """Write a layout of charts (:func:`custom_scalars_layout`) to TensorBoard's loggers, on the first rank."""
    for logger in tensorboard_loggers(trainer) if trainer.is_global_zero else []:
        if callable(getattr(logger.experiment, "add_custom_scalars", None)):  # tensorboardX has it, too
            logger.experiment.add_custom_scalars(layout)


def tensorboard_loggers(trainer: Trainer) -> list[Any]:
    """Return the Trainer's loggers that write for TensorBoard, known by their name: of both packages of Lightning."""
    return [
        logger
        for logger in trainer.loggers
        if any("TensorBoard" in base.__name__ for base in type(logger).__mro__) and hasattr(logger, "experiment")
    ]


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return a figure as an image, shape (height, width, 3)."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
