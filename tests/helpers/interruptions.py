"""Raise an exception at the n-th line of the package that a call executes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning_flatness

_PACKAGE = str(Path(lightning_flatness.__file__).parent)


class Interrupter:
    """Counts the distinct lines of the package that are executed while it is active, and interrupts at one of them.

    Args:
        at: Number of the line, in the order of their first execution, before which the exception is raised; None to
            only count.
        error: The exception.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.lines: dict[tuple[str, int], None] = {}
        self.raised = False
        self._at, self._error = at, error
        self._before: Any = None
        self._is_active = False

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function; the exception passes through."""
        self.start()
        try:
            return function()
        finally:
            self.stop()

    def start(self) -> None:
        """Interrupt from the next call of a function on, until :meth:`stop`."""
        self._before = sys.gettrace()
        self._is_active = True
        sys.settrace(self._enter)

    def stop(self) -> None:
        """Let whoever traced before, such as a measurement of coverage, go on."""
        if self._is_active:
            self._is_active = False
            sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return None if self.raised or not frame.f_code.co_filename.startswith(_PACKAGE) else self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.raised:
            self.lines.setdefault((frame.f_code.co_filename, frame.f_lineno))
            if self._at is not None and len(self.lines) > self._at:
                self.raised = True
                raise self._error("as a test")
        return self._line
