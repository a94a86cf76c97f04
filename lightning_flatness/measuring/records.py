"""Measurements of a run's checkpoints, kept in the run's folder: lines of JSON, and points for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

RECORDS = "flatness.jsonl"
_MARKS = ("config.yaml", "hparams.yaml", "metrics.csv")


def find_checkpoints(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[str]]:
    """Return all checkpoints (``*.ckpt``) in and below paths, each once, and one sentence for each path without any."""
    found: dict[Path, None] = {}
    problems = []
    for path in map(Path, paths):
        below = sorted(path.rglob("*.ckpt")) if path.is_dir() and path.suffix != ".ckpt" else [path]
        if not path.exists():
            problems.append(f"{path}: no such file or folder.")
        elif not below:
            problems.append(f"{path}: no checkpoints (*.ckpt) in or below it.")
        else:
            unique = {p.resolve(): p for p in reversed(below)}  # last.ckpt may be a link to another
            found |= dict.fromkeys(p for p in below if unique[p.resolve()] == p)
    return list(found), problems


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to: where its logs are, else where it is itself."""
    parents = list(checkpoint.resolve().parents)[:3]
    for folder in parents:
        if any((folder / mark).exists() for mark in _MARKS) or any(folder.glob("*tfevents*")):
            return folder
    return parents[1] if parents[0].name == "checkpoints" else parents[0]


def identity(checkpoint: Path) -> dict[str, Any]:
    """Return what tells a checkpoint from a later one of the same name."""
    stat = checkpoint.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def recorded(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier call has found in a run's folder with the same key, None if none has.

    The key holds the checkpoint, its identity and all settings.
    """
    try:
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut off
            continue
        if isinstance(record, dict) and record.get("key") == key:
            return record
    return None


def record(folder: Path, key: dict[str, Any], found: dict[str, Any]) -> None:
    """Keep plain values that were found in a run's folder, for a later call with the same key; see :func:`recorded`."""
    with (folder / RECORDS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"key": key, **found}) + "\n")


def known_points(folder: Path) -> dict[str, set[int]]:
    """Return the steps of all curves that the event files in a run's folder hold, by tag."""
    if not any(folder.glob("*tfevents*")):
        return {}
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 1, "tensors": 1}, purge_orphaned_data=False)
    return {tag: {event.step for event in events.Scalars(tag)} for tag in events.Reload().Tags()["scalars"]}


def write_points(folder: Path, values: dict[str, float], step: int, known: dict[str, set[int]]) -> int:
    """Write points of curves at a step to a new event file in a run's folder; add them to those ``known``.

    Points that are known already stay as they are.

    Returns:
        How many were there already.
    """
    missing = {tag: value for tag, value in values.items() if step not in known.get(tag, set())}
    if missing:
        with SummaryWriter(str(folder), filename_suffix=".flatness") as writer:
            for tag, value in missing.items():
                writer.add_scalar(tag, value, step)
                known.setdefault(tag, set()).add(step)
    return len(values) - len(missing)
