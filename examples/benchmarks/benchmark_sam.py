"""Cost of a sharpness-aware step: time relative to a plain step, and memory in copies of the weights.

    python examples/benchmarks/benchmark_sam.py

Plain and sharpness-aware steps alternate in blocks within one run on one thread; time is processor time. Memory is the
difference between the peaks of two processes that train a network with large weights and small activations.
"""

from __future__ import annotations

import argparse
import functools
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from digits import ConvNet, DigitsDataModule

from lightning_flatness import SharpnessAwareMinimization

RESULTS = Path(__file__).parent / "results" / "benchmark_sam.md"
CASES = [(geometry, "gradient") for geometry in ("euclidean", "element", "layer", "filter")]
CASES += [("euclidean", "momentum"), ("euclidean", "previous")]
BLOCK = 10


class Timed(SharpnessAwareMinimization):
    """Takes plain and sharpness-aware steps in turn, in blocks, and the time of each, its own hooks included."""

    def __init__(self, geometry: str, ascent: Any) -> None:
        super().__init__(rho=0.05, geometry=geometry, ascent=ascent)
        self.seconds: dict[bool, list[list[float]]] = {False: [], True: []}
        self.start = 0.0

    def should_perturb(self, step_idx: int, epoch_idx: int) -> bool:
        return step_idx // BLOCK % 2 == 1

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step % BLOCK == 0:
            self.seconds[self.should_perturb(trainer.global_step, 0)].append([])
        self.step_idx = trainer.global_step
        self.start = time.process_time()
        super().on_train_batch_start(trainer, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.seconds[self.should_perturb(self.step_idx, 0)][-1].append(time.process_time() - self.start)


def make_trainer(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )


def step_seconds(geometry: str, ascent: str, batch_size: int, num_rounds: int) -> tuple[float, float, float]:
    """Return the median seconds of a plain and of a sharpness-aware step, and the median of their ratios by round."""
    timed = Timed(geometry, ascent)
    trainer = make_trainer([timed], max_steps=2 * BLOCK * (num_rounds + 1), max_epochs=-1)
    trainer.fit(ConvNet(lr=0.01), DigitsDataModule(batch_size).train_dataloader())
    plain, sam = ([statistics.median(block) for block in timed.seconds[kind][1:]] for kind in (False, True))
    ratio = statistics.median(s / p for p, s in zip(plain, sam, strict=True))
    return statistics.median(plain), statistics.median(sam), ratio


class Wide(pl.LightningModule):
    """Weights of 4 x 64 MiB in float32, and hardly any activations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(4)))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def peak_bytes(geometry: str | None, ascent: Any, accumulate: int) -> int:
    """Train two steps and return the largest size this process has had."""
    sam = [] if geometry is None else [SharpnessAwareMinimization(0.05, geometry, ascent=ascent)]
    callbacks: list[pl.Callback] = [*sam]
    trainer = make_trainer(callbacks, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(Wide(), DataLoader(TensorDataset(torch.randn(2 * accumulate, 4096)), batch_size=1))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux


@functools.cache
def peak_of_a_process(geometry: str, ascent: str, accumulate: int) -> int:
    command = [sys.executable, __file__, "--peak", geometry, ascent, str(accumulate)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def copies_of_the_weights(geometry: str, ascent: str, accumulate: int) -> float:
    """Return how many copies of the weights SAM adds to the peak."""
    peaks = [peak_of_a_process(*case, accumulate) for case in ((geometry, ascent), ("none", "gradient"))]
    return (peaks[0] - peaks[1]) / (4 * 4096 * 4096 * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    if args.peak:
        print(peak_bytes(None if args.peak[0] == "none" else args.peak[0], args.peak[1], int(args.peak[2])))
        return
    torch.set_num_threads(1)
    lines = ["| geometry | ascent | batch size | ratio | extra copies | with accumulation |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for geometry, ascent in CASES:
        copies = [copies_of_the_weights(geometry, ascent, accumulate) for accumulate in (1, 2)]
        for batch_size in args.batch_sizes:
            plain, sam, ratio = step_seconds(geometry, ascent, batch_size, args.rounds)
            lines.append(f"| {geometry} | {ascent} | {batch_size} | {ratio:.2f} | {copies[0]:.1f} | {copies[1]:.1f} |")
            print(lines[-1], f"plain {1e3 * plain:.1f} ms, SAM {1e3 * sam:.1f} ms", flush=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
