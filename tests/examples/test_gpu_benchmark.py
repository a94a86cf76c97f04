"""The benchmark for GPUs runs, on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_it_measures_a_network(tmp_path):
    sizes = ("--samples", "64", "--probe-size", "16", "--networks", "convnet")
    done = run("--device", "cpu", *sizes, "--out", str(tmp_path / "gpu.md"))
    assert done.returncode == 0, done.stderr
    first, _, header, _, line = (tmp_path / "gpu.md").read_text().splitlines()
    assert first.startswith("CPU, torch ")
    assert line.count("|") == header.count("|")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[2]) > 0
    assert float(cells[3]) == 0  # the same device twice
    assert float(cells[4]) > 0
    assert float(cells[6]) > 0
