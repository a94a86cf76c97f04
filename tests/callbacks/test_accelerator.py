"""Everything on an accelerator: a pretend one, and with ``pytest -m gpu`` a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("accelerator_cases.py")


def run_cases(device: str) -> None:
    """Run the cases in a process of their own: torch cannot take a pretend device back."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env={**os.environ, "FLATNESS_DEVICE": device, "PYTEST_ADDOPTS": ""},
        cwd=CASES.parents[2],
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
def test_on_a_gpu():
    run_cases("cuda")
