"""Read runs from TensorBoard's event files and CSVLogger's ``metrics.csv``: curves and hyperparameters.

Records are taken one by one and forgotten, so that images and histograms cost no memory; a point of a curve takes 16
bytes. TensorBoard's ``EventAccumulator`` keeps samples of everything, spends most of its time on checksums of images,
and says nothing about records that it could not read.
"""

from __future__ import annotations

import os
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util import tensor_util

from lightning_flatness.compare.csv_logs import FILE_NAME, read_hyperparameters, read_points

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")  # length and its checksum; checksum of the record
_LARGEST_CHECKED = 2**16  # bytes: scalars are small, and checksums take Python a second for 10 MB
Value = bool | float | str


@dataclass(frozen=True)
class Curve:
    """A scalar over the steps of a run.

    Args:
        steps: Shape (n,), ascending, each step once: of a step logged twice, as after a resume, the later value counts.
        values: Shape (n,).
    """

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Run:
    """The curves and hyperparameters in a folder of event files.

    Args:
        name: Its folder, relative to the folder that all runs read together have in common.
        path: Its folder, or the event file if that was asked for.
        curves: Scalars by tag.
        hyperparameters: Those logged for TensorBoard's HParams tab.
    """

    name: str
    path: Path
    curves: dict[str, Curve] = field(repr=False)
    hyperparameters: dict[str, Value]


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """Read all runs below folders.

    Args:
        paths: Folders of runs, folders above them, or event files.

    Returns:
        The runs in the order given, those of one folder by name; and one sentence per problem. Of a damaged run, what
        could be read is returned.
    """
    found: dict[Path, list[Path]] = {}
    problems = []
    for path in map(Path, paths):
        below = _event_files(path)
        if not path.exists():
            problems.append(f"{path}: no such file or folder.")
        elif not below:
            problems.append(f"{path}: no TensorBoard event files (*tfevents*), nor metrics.csv, in or below it.")
        found |= {folder: files for folder, files in below.items() if folder not in found}
    runs = []
    for path, name in zip(found, _names(list(found)), strict=True):
        run, damage = _read_run(name, path, found[path])
        problems += damage
        if run is not None:
            runs.append(run)
    return runs, problems


def _event_files(path: Path) -> dict[Path, list[Path]]:
    if path.is_file():
        return {path: [path]}
    found = {}
    for folder, subfolders, names in os.walk(path):
        subfolders.sort(key=natural)
        # TensorBoard reads them in this order, too: the names begin with the time at which the file was opened.
        if files := sorted(name for name in names if "tfevents" in name or name == FILE_NAME):
            found[Path(folder)] = [Path(folder, name) for name in files]
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``version_10`` behind ``version_9``."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the paths without their common part; a single path keeps its last component."""
    absolute = [path.resolve() for path in paths]
    if not absolute:
        return []
    common = Path(os.path.commonpath(absolute)) if len(absolute) > 1 else absolute[0].parent
    return [path.name if path == common else path.relative_to(common).as_posix() for path in absolute]


def _read_run(name: str, path: Path, files: list[Path]) -> tuple[Run | None, list[str]]:
    collected = _Scalars()
    problems = []
    for file in files:
        if problem := collected.read(file):
            problems.append(problem)
    curves = collected.curves()
    if not curves:
        if not problems and not collected.hyperparameters:
            problems.append(f"{path}: no scalars in its event files.")
        return None, problems
    return Run(name, path, curves, collected.hyperparameters), problems


class _Scalars:
    """Collects the scalars and hyperparameters of one run, file by file."""

    def __init__(self) -> None:
        self.hyperparameters: dict[str, Value] = {}
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self._plugins: dict[str, str] = {}

    def read(self, file: Path) -> str:
        """Read a file up to its end or the first damage; return a text about the damage, empty if there is none."""
        if file.suffix == ".csv":
            return self._read_csv(file)
        num_bytes = num_events = 0
        try:
            size = file.stat().st_size
            with file.open("rb") as stream:
                for record in _records(stream, size):
                    self._add(Event.FromString(record))
                    num_bytes += _HEADER.size + len(record) + _FOOTER.size
                    num_events += 1
        except OSError as error:
            return f"{file}: cannot be read ({error})."
        except DecodeError:
            pass  # damaged from here on
        if size == 0:
            return f"{file}: is empty."
        if num_bytes < size:
            return (
                f"{file}: is cut off or damaged after {num_bytes} of {size} bytes ({num_events} events, which are "
                "used). A run that is still being written looks like this, too."
            )
        return ""

    def _read_csv(self, file: Path) -> str:
        try:
            for tag, step, value in read_points(file):
                self._append(tag, step, value)
        except (OSError, ValueError) as error:
            return f"{file}: cannot be read ({error})."
        self.hyperparameters = self.hyperparameters or read_hyperparameters(file.parent)
        return ""

    def _append(self, tag: str, step: int, value: float) -> None:
        self._steps.setdefault(tag, array("q")).append(step)
        self._values.setdefault(tag, array("d")).append(value)

    def _add(self, event: Any) -> None:
        for value in event.summary.value:
            tag = value.tag
            if value.HasField("metadata"):  # only the first value of a tag carries it
                self._plugins.setdefault(tag, value.metadata.plugin_data.plugin_name)
                if tag == hparams.SESSION_START_INFO_TAG and not self.hyperparameters:
                    self.hyperparameters = _session_hyperparameters(value.metadata.plugin_data.content)
            if value.HasField("simple_value"):
                scalar = value.simple_value
            elif value.HasField("tensor") and self._plugins.get(tag) == "scalars":
                scalar = float(tensor_util.make_ndarray(value.tensor).item())
            else:
                continue
            self._append(tag, event.step, scalar)

    def curves(self) -> dict[str, Curve]:
        return {tag: _curve(steps, self._values[tag]) for tag, steps in self._steps.items()}


def _records(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the records of an event file up to its end, or to the first that is cut off or damaged.

    A wrong length shows when the record does not fit into the file, or in the record's own checksum.
    """
    while len(header := stream.read(_HEADER.size)) == _HEADER.size:
        length, _ = _HEADER.unpack(header)
        if length > size:
            return
        record, footer = stream.read(length), stream.read(_FOOTER.size)
        if len(footer) < _FOOTER.size:
            return
        if length <= _LARGEST_CHECKED and masked_crc32c(record) != _FOOTER.unpack(footer)[0]:
            return
        yield record


def _curve(steps: array[int], values: array[float]) -> Curve:
    # np.unique keeps the first of equal ones: reversed, that is the one written last.
    unique, index = np.unique(np.array(steps, dtype=np.int64)[::-1], return_index=True)
    return Curve(unique, np.array(values, dtype=np.float64)[::-1][index])


def _session_hyperparameters(content: bytes) -> dict[str, Value]:
    session: Any = hparams.parse_session_start_info_plugin_data(content)
    return dict(_plain_values(session.hparams.items()))


def _plain_values(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Value]]:
    for name, value in sorted(items):
        kind = value.WhichOneof("kind")
        if kind in ("number_value", "string_value", "bool_value"):
            yield name, getattr(value, kind)
