"""The command ``lightning-flatness measure``: table to stdout, progress and problems to stderr, files to a folder."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning_flatness.measuring.checkpoints import measure_checkpoints
from lightning_flatness.measuring.results import MeasuredCheckpoints

_FAILURE, _INTERRUPTED = 2, 130


def measure(args: argparse.Namespace) -> int:
    """Measure checkpoints, given the arguments of the command.

    Args:
        args: ``out``, and arguments of :func:`measure_checkpoints` by their names, where given.

    Returns:
        The exit code: 2 if a checkpoint could not be measured.
    """
    sys.path.insert(0, os.getcwd())  # where the user's code is, as for python -m
    options = {name: value for name, value in vars(args).items() if name not in ("run", "out")}
    progress = _Progress()
    try:
        measured = measure_checkpoints(on_progress=progress, **options)
    except ValueError as error:  # of arguments
        _say(str(error))
        return _FAILURE
    progress.end()
    if len(measured):
        print(measured)
    for note in measured.notes:
        print(note)
    for problem in measured.problems:
        _say(problem)
    if args.out is not None:
        try:
            write(measured, args.out)
        except OSError as error:
            _say(f"Expected `--out` to be a folder that can be written to, got {args.out} ({error}).")
            return _FAILURE
    if any(problem.startswith("interrupted") for problem in measured.problems):
        return _INTERRUPTED
    return _FAILURE if measured.problems else 0


def write(measured: MeasuredCheckpoints, folder: Path) -> None:
    """Write ``flatness.csv`` and ``flatness.json`` to a folder: a row per checkpoint, with all numbers in full."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "checkpoint": str(c.path)} for row, c in zip(measured.rows(), measured, strict=True)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "flatness.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    document = {"checkpoints": [_finite(row) for row in rows], "problems": measured.problems}
    (folder / "flatness.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _say(message: str) -> None:
    for line in message.splitlines():
        print(f"lightning-flatness measure: {line}", file=sys.stderr)


class _Progress:
    """One line that is written over in a terminal; a line per checkpoint elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._start = time.perf_counter()
        self._latest = 0.0

    def __call__(self, number: int, total: int, path: Path, num_evaluations: float | None) -> None:
        now = time.perf_counter()
        line = f"[{number}/{total}] {path.name}"
        if num_evaluations is None:
            line += f", {now - self._start:.0f} s so far"
        elif not self._is_terminal or now - self._latest < 0.1:
            return
        else:
            line += f": {num_evaluations:.0f} evaluations of the loss"
        self._latest = now
        print(f"\r\033[K{line}" if self._is_terminal else line, end="" if self._is_terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr)
