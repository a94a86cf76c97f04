"""Run many random cases, or every feature alone, and print what failed.

python tests/fuzz/run.py --monitor 1000 --sam 500     # 1,000 cases with the monitor, 500 of each kind of SAM
python tests/fuzz/run.py --single                     # every feature alone, in every kind
python tests/fuzz/run.py --kind monitor --seed 12     # one case again
python tests/fuzz/run.py --kind sam --features adam byol_teacher
python tests/fuzz/run.py --monitor 100 --accelerator gpu

On a GPU those cases are passed over, and counted, that fail there without us, or are not the same twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fuzz.base import KINDS, Case
from fuzz.checks import check
from fuzz.features import FEATURES, draw_case

PASSED_OVER = "passed over"
SAM_KINDS = tuple(kind for kind in KINDS if kind != "monitor")


def main() -> int:
    """Run what the command line asks for; return 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--monitor", type=int, default=0, help="number of cases of the monitor")
    parser.add_argument("--sam", type=int, default=0, help="number of cases of each kind of SAM")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--single", nargs="*", default=None, help="every feature alone, or those named")
    parser.add_argument("--kind", nargs="*", default=None, help=f"of {', '.join(KINDS)}; or baseline, to check a case")
    parser.add_argument("--seed", type=int, nargs="*", default=(), help="cases to run again")
    parser.add_argument("--features", nargs="*", default=(), help="a case of these features, of seed --first")
    parser.add_argument("--accelerator", default="cpu", help="of the Trainer")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    os.environ["FLATNESS_ACCELERATOR"] = options.accelerator
    kinds = options.kind or KINDS
    seeds = range(options.first, options.first + max(options.monitor, options.sam))
    numbers = {"monitor": options.monitor} | dict.fromkeys(SAM_KINDS, options.sam)
    tasks: list[tuple[str, tuple[str, ...], int]] = [
        (k, (), s) for k in kinds for s in (*options.seed, *seeds[: numbers.get(k, options.monitor)])
    ]
    if options.features:
        tasks += [(k, tuple(options.features), options.first) for k in kinds]
    if options.single is not None:
        wanted = [FEATURES[name] for name in options.single or FEATURES]
        tasks += [(k, (f.name,), 0) for k in kinds for f in wanted if k in (*f.kinds, "baseline")]
    return _run(tasks, options.jobs)


def _run(tasks: list[tuple[str, tuple[str, ...], int]], jobs: int) -> int:
    start, failed = time.perf_counter(), dict.fromkeys((kind for kind, _, _ in tasks), 0)
    passed_over = 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=200) as pool:
        results = map(one, tasks) if jobs == 1 else pool.map(one, tasks)
        for (kind, names, seed), (name, problem, seconds) in zip(tasks, results, strict=True):
            if problem == PASSED_OVER:
                passed_over += 1
                continue
            failed[kind] += bool(problem)
            slow = f"({seconds:.0f} s) " if seconds > 10 else ""
            if problem or slow:
                again = f"--features {' '.join(names)}" if names else f"--seed {seed}"
                print(f"{'FAILED' if problem else 'slow'} {slow}{kind}: {name}\n    {problem}")
                print(f"    again: python tests/fuzz/run.py --kind {kind} {again}", flush=True)
    for kind, count in failed.items():
        total = sum(k == kind for k, _, _ in tasks)
        print(f"{kind}: {total - count} of {total} passed")
    if passed_over:
        print(f"{passed_over} of them were passed over")
    print(f"{time.perf_counter() - start:.0f} s")
    return int(any(failed.values()))


def one(task: tuple[str, tuple[str, ...], int]) -> tuple[str, str, float]:
    """Check one case; return its name, what is wrong with it, and how long that took."""
    torch.set_num_threads(1)
    kind, names, seed = task
    start = time.perf_counter()
    case = Case(tuple(FEATURES[name] for name in names), seed) if names else draw_case(seed, kind)
    problem = check(kind, case)
    if problem and os.environ["FLATNESS_ACCELERATOR"] != "cpu" and check("baseline", case):
        problem = PASSED_OVER
    return case.name, problem, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
