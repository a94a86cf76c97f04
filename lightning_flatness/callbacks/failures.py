"""Exceptions in a measurement become warnings, and training goes on."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatness.landscape.ranks import left_together

OnError = Literal["warn", "raise"]


@dataclass
class Attempt:
    """Whether a block has come to its end, on all ranks."""

    succeeded: bool = False


@contextmanager
def survived(
    what: str, trainer: Trainer, on_error: OnError, warned: set[str], *, alone: bool = False
) -> Iterator[Attempt]:
    """Turn an exception of the block into a warning, one for each kind of exception.

    Of several ranks all end the block, if one fails. What stops the process, as ``KeyboardInterrupt`` does, passes, and
    so does the refusal of a Trainer that cannot be measured.

    Args:
        what: The failing task, in the words of the warning.
        trainer: The Trainer.
        on_error: ``"raise"`` lets the exception pass.
        warned: The kinds of exceptions that have been warned of.
        alone: Whether the block is no affair of other ranks.

    Yields:
        Whether the block has succeeded, known after it.

    Raises:
        MisconfigurationException: If the block raises it.
    """
    attempt = Attempt()
    try:
        with nullcontext() if alone else left_together(trainer.strategy.root_device):
            yield attempt
        attempt.succeeded = True
    except MisconfigurationException:
        raise
    except Exception as error:
        if on_error == "raise":
            raise
        traceback.clear_frames(error.__traceback__)  # graphs and vectors: training needs their memory
        kind = type(error).__name__
        if kind not in warned:
            warned.add(kind)
            warnings.warn(
                f"{what} failed at step {trainer.global_step} and is left out; training goes on. {kind}: {error} HINT: "
                "on_error='raise' shows where.",
                stacklevel=2,
            )
