"""Points of TensorBoard's curves that are added after a run.

TensorBoard draws points in the order in which it reads them, and its faster reader drops all points of a curve that are
at later steps than one that follows. So points in between are not just appended: one file holds each curve that has got
points as a whole, by step, with those of the run. Both readers then take it for the curve that counts; for the slower
one, the file is of version 1, whose steps it compares.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_NUMBERS = count()
_SUFFIX = ".flatness"

Points = dict[int, tuple[float, float]]
"""Value and time, by step."""


class Curves:
    """The curves of a run.

    Args:
        folder: The folder with its event files, if there are some.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._points: dict[str, Points] = {}
        self._changed: set[str] = set()
        for path in sorted(folder.glob("*tfevents*")):
            found = _read(path)
            for tag, points in found.items():
                self._points.setdefault(tag, {}).update(points)
            if path.suffix == _SUFFIX:
                self._changed |= found.keys()

    def add(self, values: Mapping[str, float], step: int) -> int:
        """Add a point at a step to each of some curves; those that are there already stay as they are.

        Args:
            values: By the names of the curves.
            step: The step.

        Returns:
            How many were there already.
        """
        missing = {tag: value for tag, value in values.items() if step not in self._points.get(tag, {})}
        for tag, value in missing.items():
            self._points.setdefault(tag, {})[step] = (value, time.time())
        if missing:
            self._changed |= missing.keys()
            self._write()
        return len(values) - len(missing)

    def _write(self) -> None:
        earlier = list(self._folder.glob(f"*tfevents*{_SUFFIX}"))
        # One second later: read after everything that the run has written.
        name = f"{int(time.time()) + 1}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS):06d}"
        with Path(self._folder, f"events.out.tfevents.{name}{_SUFFIX}").open("wb") as stream:
            writer = RecordWriter(stream)
            writer.write(Event(wall_time=time.time(), file_version="brain.Event:1").SerializeToString())
            for tag in sorted(self._changed):
                for step, (value, wall_time) in sorted(self._points[tag].items()):
                    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                    writer.write(Event(wall_time=wall_time, step=step, summary=summary).SerializeToString())
        for path in earlier:  # all of it is in the new one
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Points]:
    events = EventAccumulator(str(path), {"scalars": 0, "images": 1, "tensors": 1}, purge_orphaned_data=False).Reload()
    return {tag: {e.step: (e.value, e.wall_time) for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
