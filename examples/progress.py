"""Prints what a script is doing every few seconds, from its own thread: also during long imports and measurements."""

from __future__ import annotations

import threading
import time

SECONDS = 5.0


class Progress:
    """Prints ``text`` at once, and then whatever it has become, every few seconds until :meth:`stop`.

    Args:
        text: What the script is doing; assign another text later.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.start = time.perf_counter()
        self._stopped = threading.Event()
        print(f"{text} ...", flush=True)
        threading.Thread(target=self._print, daemon=True).start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def stop(self) -> None:
        """Print nothing from now on."""
        self._stopped.set()

    def _print(self) -> None:
        while not self._stopped.wait(SECONDS):
            print(f"{self.seconds:4.0f} s: {self.text}", flush=True)
