"""Says that a long measurement is under way."""

from __future__ import annotations

import time

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_flatness.landscape import LossLandscape

FIRST_MESSAGE_AFTER = 10.0
"""Seconds."""


class Progress:
    """Says, after a while and ever more rarely, that a long measurement is under way."""

    def __init__(self, name: str, trainer: Trainer, landscape: LossLandscape) -> None:
        self._name = name
        self._trainer = trainer
        self._landscape = landscape
        self._start = time.perf_counter()
        self._next = FIRST_MESSAGE_AFTER
        self.point = ""

    def __call__(self) -> None:
        """Look at the clock, and say it if it is time."""
        elapsed = time.perf_counter() - self._start
        if elapsed < self._next:
            return
        self._next = 2 * elapsed
        if self._trainer.is_global_zero:
            bar = self._trainer.progress_bar_callback
            message = (
                f"{self._name}: measuring for {elapsed:.0f} s, "
                f"{self._landscape.cost.num_products} Hessian-vector products so far, engine "
                f"'{self._landscape.engine}'."
            )
            if self.point:
                message = f"{self._name}: {self.point} after {elapsed:.0f} s."
            (rank_zero_info if bar is None else bar.print)(message)
