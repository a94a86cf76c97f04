"""The examples of loops without a Trainer, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]


def python(folder: Path, *arguments: Any) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_fabric_logs_the_curves_of_the_monitor(tmp_path):
    output = python(tmp_path, ROOT / "examples/loops/fabric.py", "--epochs", 2, "--logs", tmp_path)
    events = EventAccumulator(str(tmp_path / "fabric" / "version_0")).Reload()
    assert [event.step for event in events.Scalars("flatness/lambda_max")] == [0, 44, 88]
    assert {"flatness/edge_of_stability", "flatness_cost/seconds"} <= set(events.Tags()["scalars"])
    printed = re.findall(r"^lambda_max +(\S+)", output, re.MULTILINE)
    assert [float(v) for v in printed] == pytest.approx(
        [event.value for event in events.Scalars("flatness/lambda_max")], rel=1e-3
    )


def test_the_callback_for_hugging_face_on_a_tiny_random_gpt2(tmp_path):
    pytest.importorskip("transformers", reason="the recipe is for transformers")
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    output = python(tmp_path, ROOT / "examples/loops/hugging_face.py", "--epochs", 2, "--out", tmp_path)
    found = re.findall(r"^step (\d+): lambda_max (\S+)$", output, re.MULTILINE)
    assert [int(step) for step, _ in found] == [0, 4, 8]
    assert all(float(value) > 0 for _, value in found)
