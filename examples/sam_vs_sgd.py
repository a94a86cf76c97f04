"""Does SAM find flatter minima than SGD, and does it help? From the same weights, on the same batches, measured.

    python examples/sam_vs_sgd.py

trains a small convolutional network with SGD and with SAM, several seeds each, with the flatness monitor on both;
writes TensorBoard logs side by side, draws the curves, and prints what came out: after the same number of optimizer
steps, after the same number of gradient evaluations, of which SAM takes two per step, and at the same training loss.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from digits import ConvNet, DigitsDataModule, Mnist5kDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_flatness import FlatnessMonitor, SharpnessAwareMinimization

DATA = {"digits": DigitsDataModule, "mnist5k": Mnist5kDataModule}
COLUMNS = {
    "lambda_max": ("flatness/lambda_max", "{:.2f}"),
    "invariant sharpness": ("flatness/invariant_sharpness", "{:.1f}"),
    "train loss": ("train_loss", "{:.4f}"),
    "test accuracy, %": ("test_accuracy", "{:.2f}"),
    "seconds": ("train_seconds", "{:.1f}"),
    "gradients": ("gradient_evaluations", "{:.0f}"),
}
"""Columns of the table: the curve in TensorBoard that each is read from, and how it is printed."""

Curves = dict[str, list[float]]


class Cost(pl.Callback):
    """Logs what training has cost so far: gradients, counted where they are made, and seconds without the monitor."""

    def __init__(self) -> None:
        self.num_gradients = 0
        self.seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hook = pl_module.net[-1].bias.register_hook(self.count)

    def count(self, gradient: torch.Tensor) -> None:
        self.num_gradients += 1

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:  # all batches of the epoch are behind, the monitor is still to come
            self.seconds += time.perf_counter() - self.start

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("gradient_evaluations", float(self.num_gradients))
        pl_module.log("train_seconds", self.seconds)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hook.remove()


def train(name: str, sam: list[pl.Callback], seed: int, num_epochs: int, args: argparse.Namespace) -> Curves:
    """Train from the weights and on the batches that belong to ``seed``; return the curves, one value per epoch."""
    pl.seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(args.out, name=name, version=f"seed{seed}")
    shutil.rmtree(logger.log_dir, ignore_errors=True)  # of an earlier run: its curves would be mixed into these
    trainer = pl.Trainer(
        max_epochs=num_epochs,
        accelerator="cpu",
        callbacks=[*sam, Cost(), FlatnessMonitor(every_n_epochs=args.every_n_epochs)],
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    trainer.fit(ConvNet(lr=args.lr, momentum=args.momentum), DATA[args.data](args.batch_size))
    curves = read_curves(Path(logger.log_dir), trainer.num_training_batches)
    curves["test_accuracy"] = [100 * value for value in curves["test_accuracy"]]
    return curves


def read_curves(log_dir: Path, steps_per_epoch: int) -> Curves:
    """Read the curves back from the event file; a measurement every few epochs holds for those since the last one."""
    events = EventAccumulator(str(log_dir)).Reload()
    curves: Curves = {}
    for tag, _ in COLUMNS.values():
        # The monitor logs at the number of steps taken, Lightning at the index of the last one.
        points = {-(-e.step // steps_per_epoch): e.value for e in events.Scalars(tag)}
        num_epochs, value = max(points), points.get(0, float("nan"))
        curves[tag] = [value := points.get(epoch, value) for epoch in range(1, num_epochs + 1)]
    return curves


def epoch_of_loss(run: Curves, loss: float) -> int:
    """Return the first epoch that reaches a training loss, the last one if none does."""
    losses = run["train_loss"]
    return next((i for i, value in enumerate(losses, 1) if value <= loss), len(losses))


def print_table(rows: dict[str, tuple[list[Curves], list[int]]]) -> None:
    """Print mean ± standard deviation over seeds of each column; a row has runs and the epoch of each to look at."""
    cells = [["", *COLUMNS]]
    for title, (runs, epochs) in rows.items():
        cells.append([title])
        for tag, form in COLUMNS.values():
            mean, deviation = mean_and_deviation(at(runs, epochs, tag))
            cells[-1].append(form.format(mean) + (f" ± {form.format(deviation)}" if deviation else ""))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


def at(runs: list[Curves], epochs: list[int], tag: str) -> list[float]:
    return [run[tag][epoch - 1] for run, epoch in zip(runs, epochs, strict=True)]


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation; one seed has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def print_verdicts(rows: dict[str, tuple[list[Curves], list[int]]]) -> None:
    """Print SAM minus each SGD row, paired by seed, and in how many seeds it is lower: the spread hides that."""
    (_, sam), *others = rows.items()
    for title, sgd in others:
        print(f"SAM minus {title}, paired by seed:")
        for name in ("lambda_max", "invariant sharpness", "test accuracy, %"):
            tag, form = COLUMNS[name]
            differences = [a - b for a, b in zip(at(*sam, tag), at(*sgd, tag), strict=True)]
            mean, deviation = mean_and_deviation(differences)
            lower, higher = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
            counts = f"lower in {lower}, higher in {higher} of {len(differences)} seeds"
            spread = "" if deviation is None else f"± {form.format(deviation)}"
            print(f"  {name:<19} {form.replace(':', ':+').format(mean):>8} {spread:<8} {counts}")


def draw(runs: dict[str, list[Curves]], path: Path, title: str, every_n_epochs: int) -> None:
    """Draw mean and range over the seeds, over gradient evaluations: there a step of SAM counts twice."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    panels = (
        ("flatness/lambda_max", "Largest Hessian eigenvalue", "log"),
        ("flatness/invariant_sharpness", "Invariant sharpness", "log"),
        ("test_accuracy", "Test accuracy, %", "linear"),
    )
    for ax, (tag, name, scale) in zip(axes, panels, strict=True):
        for color, (label, seeds) in zip(("C0", "C1"), runs.items(), strict=True):
            step = every_n_epochs if tag.startswith("flatness/") else 1  # in between nothing was measured
            x = seeds[0]["gradient_evaluations"][step - 1 :: step]
            columns = list(zip(*(run[tag][step - 1 :: step] for run in seeds), strict=True))
            ax.plot(x, [statistics.fmean(c) for c in columns], color=color, label=label, lw=1.8, marker="o", ms=3)
            ax.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.18, lw=0)
        ax.set(title=name, xlabel="gradient evaluations", yscale=scale)
        ax.grid(alpha=0.3)
    low = min(statistics.median(run["test_accuracy"]) for seeds in runs.values() for run in seeds)
    axes[2].set_ylim(low - 3, 100)
    axes[0].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--epochs", type=int, default=15, help="of SAM; SGD trains twice as long")
    parser.add_argument("--every-n-epochs", type=int, default=3, help="how often to measure")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--geometry", default="euclidean", help="euclidean (SAM), element (ASAM), layer or filter")
    parser.add_argument("--out", type=Path, default=Path("logs/sam_vs_sgd"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*|.*litlogger.*")
    start = time.perf_counter()
    sgd, sam = [], []
    for seed in range(args.seeds):
        callback: Any = SharpnessAwareMinimization(rho=args.rho, geometry=args.geometry)
        sgd.append(train("sgd", [], seed, 2 * args.epochs, args))
        sam.append(train("sam", [callback], seed, args.epochs, args))
        print(f"seed {seed} done after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    epochs = [args.epochs] * args.seeds
    reached = [epoch_of_loss(a, b["train_loss"][-1]) for a, b in zip(sgd, sam, strict=True)]
    rows = {
        "SAM": (sam, epochs),
        "SGD, same steps": (sgd, epochs),
        "SGD, same gradients": (sgd, [2 * epoch for epoch in epochs]),
        "SGD, same train loss": (sgd, reached),
    }
    print(
        f"{args.data}: rho={args.rho} ({args.geometry}), lr={args.lr}; mean ± standard deviation, {args.seeds} seeds\n"
    )
    print_table(rows)
    print()
    print_verdicts(rows)
    path = args.out / f"sam_vs_sgd_{args.data}.png"
    labels = {"SGD": sgd, f"SAM, rho={args.rho}": sam}
    title = f"{args.data}: mean and range over {args.seeds} seeds; each step of SAM takes two gradients"
    draw(labels, path, title, args.every_n_epochs)
    print(f"\nTook {time.perf_counter() - start:.0f} s. Curves: {path}")
    print(f"Open them in TensorBoard:  tensorboard --logdir {args.out}")
    print(f"Compare at a training loss of your choice:  lightning-flatness compare {args.out} --at loss=0.02")


if __name__ == "__main__":
    main()
