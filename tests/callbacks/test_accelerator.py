"""Everything on an accelerator: a pretend one, and with ``pytest -m gpu`` a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def run_cases(device: str, cases: str = "accelerator_cases.py") -> None:
    """Run cases in a process of their own: torch cannot take a pretend device back, nor a GPU's settings."""
    settings = {"FLATNESS_DEVICE": device, "PYTEST_ADDOPTS": "", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider", str(FOLDER / cases)],
        env=os.environ | settings,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_on_a_pretend_accelerator():
    run_cases("fakegpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cases", ["accelerator_cases.py", "gpu_cases.py"])
def test_on_a_gpu(cases):
    run_cases("cuda", cases)
