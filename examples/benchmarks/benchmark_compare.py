"""How long `lightning-flatness compare` takes to read many runs, and how much memory.

    python examples/benchmarks/benchmark_compare.py

writes event files of as many runs as asked for (by default 100, of 1,000 points in each of 10 curves, with images and
histograms between them), then runs the command on them in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

RESULTS = Path(__file__).parent / "results" / "benchmark_compare.md"
TAGS = [
    *("flatness/lambda_max", "flatness_errors/lambda_max_residual", "flatness/invariant_sharpness"),
    *("flatness_errors/invariant_sharpness_residual", "flatness/edge_of_stability", "flatness/stability_edge"),
    *("train_loss", "val_loss", "val_accuracy", "epoch"),
]


def write_runs(folder: Path, num_runs: int, num_points: int, num_seeds: int, image_size: int) -> None:
    """Write runs of `num_seeds` seeds per setting; every hundredth step has an image and a histogram."""
    rng = np.random.default_rng(0)
    for run in range(num_runs):
        with SummaryWriter(str(folder / f"setting{run // num_seeds}" / f"seed{run % num_seeds}")) as writer:
            for step in range(num_points):
                for i, tag in enumerate(TAGS):
                    writer.add_scalar(tag, math.exp(-step / num_points) * (1 + i) + 0.01 * rng.normal() ** 2, step)
                if step % 100 == 0:
                    noise = rng.integers(0, 255, (image_size, image_size, 3), dtype=np.uint8)
                    writer.add_image("flatness/loss_surface", noise, step, dataformats="HWC")
                    writer.add_histogram("weights", rng.normal(size=1000), step)


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return seconds of processor time, and its peak memory in MB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = [
        "| runs | points | event files, MB | s of processor time | peak memory, MB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for num_runs in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            logs = Path(folder, "logs")
            write_runs(logs, num_runs, args.points, args.seeds, args.image_size)
            size = sum(path.stat().st_size for path in logs.rglob("*tfevents*")) / 2**20
            command = [
                sys.executable,
                "-m",
                "lightning_flatness",
                "compare",
                str(logs),
                "--at",
                "loss=4",
                "--out",
                folder,
            ]
            processor, memory = measure(command)
        num_points = num_runs * args.points * len(TAGS)
        lines.append(f"| {num_runs} | {num_points:,} | {size:.0f} | {processor:.1f} | {memory:.0f} |")
        print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
