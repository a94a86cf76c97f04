"""What of a checkpoint's file stays in memory while its module is measured."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_flatness.measuring.loading import read_checkpoint


def bytes_of_files() -> int:
    (kib,) = re.findall(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_the_weights_go_with_the_weights_though_the_optimizers_stay(tmp_path):
    size = 4_000_000  # 16 MB
    states = [{"state": {0: {"exp_avg": torch.ones(size)}}, "param_groups": []}]
    torch.save({"state_dict": {"weight": torch.ones(size)}, "optimizer_states": states}, tmp_path / "last.ckpt")
    content = read_checkpoint(tmp_path / "last.ckpt")
    kept = content["optimizer_states"]
    assert float(content["state_dict"]["weight"].sum()) == size  # as a copy does, it reads all pages
    before = bytes_of_files()
    content.clear()
    assert before - bytes_of_files() > 0.9 * 4 * size
    assert float(kept[0]["state"][0]["exp_avg"].sum()) == size
