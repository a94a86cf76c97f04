"""The study of measures, in a size for tests: a script of its own, so that a test can kill it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "studies"))
import which_measure as study

if __name__ == "__main__":
    study.QUICK = replace(
        study.QUICK, points=("loss=2.2",), num_train=150, measures=("lambda_max", "path_norm", "path")
    )
    study.MAX_EPOCHS = 20
    study.main()
