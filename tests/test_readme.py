"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})


def test_commands_are_where_ci_looks_for_them():
    commands = re.findall(r"^python3 -m venv .*$", README.read_text(), re.MULTILINE)
    assert len([c for c in commands if re.search(r"pytest$", c)]) == 1
    assert len([c for c in commands if re.search(r"examples/.*\.py$", c)]) == 1


def test_pictures_and_files_that_are_named_exist():
    text = README.read_text()
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) + re.findall(r"`((?:tests|examples)/[\w/]+\.\w+)`", text):
        assert (README.parent / name).exists(), name
