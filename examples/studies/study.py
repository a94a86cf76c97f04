"""Shared by the studies: runs that survive a kill, a progress bar, and the command line.

A study is a list of runs, independent of each other. A finished run is one file, which appears all at once, so that a
study that was killed resumes where it stopped; and since a run's outcome depends on its recipe and seed alone, the
table in the end is the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # shared helpers
from fashion_mnist import FOLDER, is_there
from training import train_and_measure

Row = dict[str, Any]
"""What was measured at one point of one run, by column."""

QUICK_DATA = "digits (quick mode: to see it work, not to conclude from)"


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        setting: What the runs of several seeds have in common, by name.
        seed: Of the initial weights and of the order of the samples.
        recipe: How the network is trained, and where it is measured: a frozen dataclass.
    """

    setting: str
    seed: int
    recipe: Any

    @property
    def description(self) -> dict[str, Any]:
        """Everything the outcome depends on, as JSON has it."""
        described = {"setting": self.setting, "seed": self.seed, "recipe": asdict(self.recipe)}
        as_json: dict[str, Any] = json.loads(json.dumps(described))
        return as_json

    @property
    def stem(self) -> str:
        """Of the file that holds the outcome."""
        return f"{self.setting.replace(' ', '_').replace('/', '-')}-seed{self.seed}"


def runs_of(settings: Mapping[str, Any], num_seeds: int) -> list[Run]:
    """Return the runs seed by seed, so that a study that is half done has some seeds of everything."""
    return [Run(name, seed, recipe) for seed in range(num_seeds) for name, recipe in settings.items()]


def finish(runs: list[Run], out: Path, workers: int, train: Callable[..., list[Row]] = train_and_measure) -> list[Row]:
    """Do the runs that are not done yet, and return the rows of all, in order.

    Args:
        runs: What has to be done.
        out: Folder of the study: ``runs`` has a file for every finished run, ``logs`` what TensorBoard shows.
        workers: Number of processes.
        train: ``train(setting, seed, recipe, log_folder)`` returns the rows of a run.

    Returns:
        The rows.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if finished(run, out) is None]
    if len(missing) < len(runs):
        tqdm.write(f"{len(runs) - len(missing)} of {len(runs)} runs are done already, in {out / 'runs'}.")
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run") as bar:
        for run in _done(missing, out, workers, train):
            bar.set_postfix_str(run.stem, refresh=False)
            bar.update()
    return [row for run in runs for row in _outcome(run, out)["rows"]]


def finished(run: Run, out: Path) -> dict[str, Any] | None:
    """Return what is known of a finished run; None if it is not finished, or was done by another recipe."""
    try:
        outcome = _outcome(run, out)
    except FileNotFoundError:
        return None
    return outcome if outcome["run"] == run.description else None


def _outcome(run: Run, out: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((out / "runs" / f"{run.stem}.json").read_text())
    return outcome


def _done(runs: list[Run], out: Path, workers: int, train: Callable[..., list[Row]]) -> Iterator[Run]:
    """Yield each run when it is done."""
    commit = current_commit()  # now: that is the code that was imported
    if workers == 1:
        _start_worker()
        for run in runs:
            _do(run, out, train, commit)
            yield run
        return
    context = multiprocessing.get_context("spawn")  # torch and threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(_do, run, out, train, commit): run for run in runs}
        for future in as_completed(futures):
            if future.exception() is not None:  # do not do all the others first
                pool.shutdown(wait=False, cancel_futures=True)
            future.result()
            yield futures[future]


def _start_worker() -> None:
    """Make this process quiet, single-threaded (numbers depend on the number of threads), and mortal."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*litlogger.*|The skeleton of basis paths has a tiny weight")
    if (parent := multiprocessing.parent_process()) is not None:
        # A study that is killed cannot tell its workers, which would wait for it for ever.
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _do(run: Run, out: Path, train: Callable[..., list[Row]], commit: str) -> None:
    start = time.process_time()
    rows = train(run.setting, run.seed, run.recipe, out / "logs" / run.setting / f"seed{run.seed}")
    seconds = time.process_time() - start
    outcome = {"run": run.description, "rows": rows, "seconds": seconds, "commit": commit, "torch": torch.__version__}
    path = out / "runs" / f"{run.stem}.json"
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(outcome, indent=1))
    unfinished.replace(path)


def current_commit() -> str:
    """Return the commit of this file's repository, with a mark if its tracked files are not as committed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-modified" if changed.stdout.strip() else "")


def provenance(runs: list[Run], out: Path) -> str:
    """Return a sentence: on which commit the runs were done, with which torch, and what they cost."""
    outcomes = [outcome for run in runs if (outcome := finished(run, out)) is not None]
    commits, versions = (", ".join(sorted({outcome[key] for outcome in outcomes})) for key in ("commit", "torch"))
    minutes = sum(outcome["seconds"] for outcome in outcomes) / 60
    return (
        f"{len(outcomes)} runs at commit {commits} with torch {versions}, one thread each: "
        f"{minutes:.1f} minutes of processor time."
    )


def parse_arguments(docstring: str, name: str, *, num_seeds: int, fashion: bool = False) -> argparse.Namespace:
    """Return the options that all studies have, and those of the ones on Fashion-MNIST."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples and seeds, under two minutes: to see it work")
    parser.add_argument("--seeds", type=int, help=f"default: {num_seeds}; with --quick: 2")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help=f"runs and logs (default: logs/studies/{name}[_quick])")
    parser.add_argument("--results", type=Path, help="table, verdicts and figures (default: those of --out)")
    if fashion:
        parser.add_argument(
            "--data-dir", type=Path, default=FOLDER, help="the four files of Fashion-MNIST (default: %(default)s)"
        )
        parser.add_argument("--device", default="cpu", help="where to train and measure: cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    args.seeds = args.seeds or (2 if args.quick else num_seeds)
    args.out = args.out or Path("logs/studies") / (f"{name}_quick" if args.quick else name)
    args.results = args.results or args.out
    args.has_fashion_mnist = fashion and is_there(args.data_dir)
    args.results.mkdir(parents=True, exist_ok=True)
    return args
