"""What ``CSVLogger`` of Lightning writes: ``metrics.csv`` and ``hparams.yaml``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FILE_NAME = "metrics.csv"


def read_points(file: Path) -> Iterator[tuple[str, int, float]]:
    """Yield tag, step and value of each number of a file, in its order; what is no number is passed over.

    Args:
        file: A CSV file with the column ``step``.

    Raises:
        ValueError: If it has no such column.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        if "step" not in (rows.fieldnames or ()):
            raise ValueError("has no column `step`")
        for row in rows:
            try:
                step = int(float(row["step"]))
            except (TypeError, ValueError):  # cut off
                continue
            for tag, text in row.items():
                if tag and tag != "step" and text:
                    try:
                        yield tag, step, float(text)
                    except (TypeError, ValueError):
                        continue


def read_hyperparameters(folder: Path) -> dict[str, Any]:
    """Return the plain values in a folder's ``hparams.yaml``; nothing if it has none that can be read safely.

    Args:
        folder: Where ``metrics.csv`` is.
    """
    try:
        content = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        str(name): value if isinstance(value, bool | str) else float(value)
        for name, value in content.items()
        if isinstance(value, bool | int | float | str)
    }
