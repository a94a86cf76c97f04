"""The main command of the README, in a size for tests: it says what it does, and leaves what it names."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import progress
import pytest

ROOT = Path(__file__).parents[2]


def test_progress_is_printed_while_the_script_is_busy(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    shown = progress.Progress("loading")
    time.sleep(0.3)
    shown.text = "training"
    time.sleep(0.3)
    shown.stop()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading ..."
    assert lines[1].endswith(" s: loading")
    assert lines[-1].endswith(" s: training")
    assert progress.SECONDS < 10


@pytest.mark.slow
def test_script_leaves_table_pictures_and_logs(tmp_path):
    command = [sys.executable, ROOT / "examples" / "sam_vs_sgd.py", "--epochs=2", "--seeds=1", f"--out={tmp_path}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("Loading PyTorch and Lightning ...")
    stem = tmp_path / "sam_vs_sgd_digits"
    table = [line.strip("| ").split(" | ") for line in stem.with_suffix(".md").read_text().splitlines()]
    rows = {row[0]: row for row in table if len(row) == 6}  # the first of two tables
    assert "SGD, same train loss" in rows
    gradients = {name: int(rows[name][-1]) for name in ("SAM", "SGD, same steps", "SGD, same gradients")}
    assert gradients == {"SAM": 176, "SGD, same steps": 88, "SGD, same gradients": 176}  # of two epochs of 44 steps
    assert min(Path(f"{stem}{end}.png").stat().st_size for end in ("", "_curves")) > 10_000
    assert {path.parent.name for path in tmp_path.rglob("seed0")} == {"sgd", "sam"}
    tools = Path(sys.executable).parent
    assert f"{tools / 'tensorboard'} --logdir {tmp_path}" in done.stdout
    assert f"{tools / 'lightning-flatness'} compare {tmp_path} --at loss=0.02" in done.stdout
