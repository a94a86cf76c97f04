"""What the tests of examples share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.fixture(scope="module")
def import_path_of_studies():
    """Let tests import the modules of ``examples/studies``, within a test: their names are as short as any."""
    sys.path.insert(0, str(STUDIES))
    yield
    sys.path.remove(str(STUDIES))
