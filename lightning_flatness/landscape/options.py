"""Options of a landscape that are one of a few words."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning_flatness.module.modes import Mode

EngineName = Literal["auto", "exact", "kept", "rebuilt", "finite_difference"]
"""How Hessian-vector products are made; see :class:`LossLandscape`."""


def check_options(mode: Any, engine: Any) -> None:
    """Check the mode and the engine of a landscape.

    Raises:
        ValueError: If one is not among its words.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"Expected `mode` to be 'batch_statistics', 'eval' or 'train', got {mode!r}.")
    if engine not in get_args(EngineName):
        names = ", ".join(repr(name) for name in get_args(EngineName))
        raise ValueError(f"Expected `engine` to be one of {names}, got {engine!r}.")
