"""What SAM's callback logs: means over the microbatches of an epoch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_MOST_PENDING = 256


class EpochMeans:
    """Sums of loss rises, of lengths of the perturbation and of microbatches, in one epoch.

    Attributes:
        totals: The three sums; None in an epoch without a sharpness-aware step.
        epoch: The epoch of the sums.
    """

    def __init__(self) -> None:
        self.totals: list[float] | None = None
        self.epoch = 0
        self._pending: list[tuple[Tensor, float]] = []  # of the last microbatches

    def begin(self, epoch: int) -> None:
        """Start anew unless the sums are those of this epoch."""
        if self.totals is None or self.epoch != epoch:
            # A checkpoint that was written at the last step of an epoch holds the sums of that one.
            self.totals, self._pending, self.epoch = [0.0, 0.0, 0.0], [], epoch

    def add(self, norm: float, rise: Tensor | None = None) -> None:
        """Count a microbatch.

        Args:
            norm: Length of its perturbation.
            rise: Rise of its loss. On an accelerator it is not there yet, and waiting for it would hold up the step.
        """
        if rise is None:
            self._add(0.0, norm)
            return
        self._pending.append((rise, norm))
        if len(self._pending) == _MOST_PENDING:
            self._add_pending()

    def _add_pending(self) -> None:
        rises = torch.stack([rise for rise, _ in self._pending]).tolist() if self._pending else []
        for rise, (_, norm) in zip(rises, self._pending, strict=True):
            if math.isfinite(rise):  # not finite: an overflow in half precision
                self._add(rise, norm)
        self._pending.clear()

    def _add(self, rise: float, norm: float) -> None:
        if self.totals is not None:
            self.totals = [total + value for total, value in zip(self.totals, (rise, norm, 1.0), strict=True)]

    def take(self, epoch: int) -> list[float] | None:
        """Return the sums of an epoch that has ended, and forget them; None if there are none."""
        if self.totals is None or self.epoch != epoch:
            return None
        self._add_pending()
        totals, self.totals = self.totals, None
        return totals

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of a begun epoch, for a checkpoint in the middle of it; nothing at its end."""
        self._add_pending()
        return {} if self.totals is None else {"totals": self.totals, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums of a begun epoch; on several ranks those of the first one stand for all."""
        self.totals, self.epoch = state_dict.get("totals"), state_dict.get("epoch", 0)
