"""Settings of all tests."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

CASES = ["callbacks/accelerator_cases.py", "callbacks/gpu_cases.py"]
collect_ignore = ["helpers", *([] if "FLATNESS_DEVICE" in os.environ else CASES)]
"""Not test modules: pytest would import them, scripts among them, to look for doctests."""
