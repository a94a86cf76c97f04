"""What share of an epoch's time its measurements take."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class EpochClock:
    """Measures an epoch without the measurements in it.

    Args:
        epoch_start: When the epoch began.
        seconds_in_epoch: The time of this monitor's measurements in it.
        others_before: The time that other monitors had taken when it began.
        others_counted: The time of other monitors that is in the share of an earlier measurement.
    """

    epoch_start: float | None = None
    seconds_in_epoch: float = 0.0
    others_before: float = 0.0
    others_counted: float = 0.0

    def start_epoch(self, others: float) -> None:
        """Look at the clock.

        Args:
            others: The time that other monitors have taken so far.
        """
        self.epoch_start, self.seconds_in_epoch = time.perf_counter(), 0.0
        self.others_before = others
        self.others_counted = self.others_counted or others

    def share_of_epoch(self, start: float, seconds: float, others: float) -> float | None:
        """Return the time of a measurement at an epoch's end over that of the epoch; None without an epoch.

        Args:
            start: When the measurement began.
            seconds: What it took.
            others: The time that other monitors have taken so far.
        """
        if self.epoch_start is None:
            return None
        in_epoch = self.seconds_in_epoch + others - self.others_before
        spent = seconds + others - self.others_counted
        self.others_counted = others
        return spent / (start - self.epoch_start - in_epoch)
