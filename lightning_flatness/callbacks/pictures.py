"""Pictures for loggers: images of spectral densities, and TensorBoard's charts of several curves in one.

Only loggers with TensorBoard's writer get them: it is recognised by its methods, so that both packages of Lightning
and both writers (torch's and tensorboardX's) count. Nothing here touches pyplot, which has state of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        {'flatness': {'edge': ['Multiline', ['flatness/lambda_max', 'flatness/stability_edge']]}}
    """
    return {title: {name: ["Multiline", list(keys)] for name, keys in charts.items() if keys}}


def log_layout(trainer: Trainer, layout: Layout) -> None:
    """Write a layout of charts to the loggers that know them.

    Args:
        trainer: Whose loggers to write to; ranks other than the first write nothing.
        layout: See :func:`custom_scalars_layout`.
    """
    for writer in _writers(trainer, "add_custom_scalars"):
        writer.add_custom_scalars(layout)


def log_figure(trainer: Trainer, key: str, figure: Figure) -> None:
    """Write a figure as an image, at the current step, to the loggers that take images.

    Args:
        trainer: Whose loggers to write to; ranks other than the first write nothing.
        key: Name of the image.
        figure: Drawn without pyplot.
    """
    for writer in _writers(trainer, "add_image"):
        writer.add_image(key, pixels(figure), trainer.global_step, dataformats="HWC")


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


def _writers(trainer: Trainer, method: str) -> Iterable[Any]:
    """Yield the TensorBoard writers of the trainer's loggers."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if any("TensorBoard" in base.__name__ for base in type(logger).__mro__):
                writer = getattr(logger, "experiment", None)
                if callable(getattr(writer, method, None)):
                    yield writer
