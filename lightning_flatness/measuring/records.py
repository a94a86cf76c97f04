"""Measurements of a run's checkpoints, kept in the run's folder as lines of JSON; and where that is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RECORDS = "flatness.jsonl"
_MARKS = ("config.yaml", "hparams.yaml", "metrics.csv")


def find_checkpoints(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[str]]:
    """Return all checkpoints (``*.ckpt``) in and below paths, each once, and one sentence for each path without any."""
    found: dict[Path, Path] = {}
    problems = []
    for path in map(Path, paths):
        below = sorted(path.rglob("*.ckpt")) if path.is_dir() and path.suffix != ".ckpt" else [path]
        if not path.exists():
            problems.append(f"{path}: no such file or folder.")
        elif not below:
            problems.append(f"{path}: no checkpoints (*.ckpt) in or below it.")
        else:
            for file in below:  # last.ckpt may be a link to another
                found.setdefault(file.resolve(), file)
    return list(found.values()), problems


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
