"""The study of batch sizes, in a size for tests: a script of its own, so that a test can kill it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "studies"))
import large_batch_vs_small_batch as study

if __name__ in ("__main__", "__mp_main__"):  # not where pytest looks for doctests: the other tests have the study, too
    study.QUICK = replace(
        study.QUICK,
        base=replace(study.QUICK.base, width=8, max_steps=12),
        small_batch=350,
        large_batch=1400,
        batch_sizes=(350, 1400),
        num_steps=4,
        num_epochs=3,
        losses={"fully_connected": 2.0},
        swept=("fully_connected",),
    )

if __name__ == "__main__":
    study.main()
