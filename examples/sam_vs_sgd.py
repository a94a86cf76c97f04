"""Does SAM find flatter minima than SGD, and do they generalise better?

    python examples/sam_vs_sgd.py

trains a small convolutional network with SGD and with SAM, from the same weights on the same batches, for some seeds.
Writes TensorBoard logs, draws two pictures, and prints a comparison after equal optimizer steps, after equal gradient
evaluations (SAM takes two per step), and at equal training loss.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import shutil
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progress import Progress

if __name__ == "__main__":
    loading = Progress("Loading PyTorch and Lightning")

import lightning.pytorch as pl
import torch
from digits import ConvNet, DigitsDataModule, Mnist5kDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from style import COLOURS, draw_band, new_figure, save, standard_error, tidy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F

from lightning_flatness import FlatnessMonitor, LossLandscape, LossSurface, SharpnessAwareMinimization, loss_surface

DATA = {"digits": DigitsDataModule, "mnist5k": Mnist5kDataModule}
COLUMNS = {
    "lambda_max": ("flatness/lambda_max", "{:.2f}"),
    "invariant sharpness": ("flatness/invariant_sharpness", "{:.1f}"),
    "train loss": ("loss_on_all_training_samples", "{:.4f}"),
    "test accuracy, %": ("test_accuracy", "{:.2f}"),
    "gradients": ("gradient_evaluations", "{:.0f}"),
}
"""Columns of the table: the curve in TensorBoard that each is read from, and how it is printed."""

Curves = dict[str, list[float]]


class Record(pl.Callback):
    """Counts gradients, logs the training loss of the weights, and keeps the weights of all epochs.

    Args:
        title: What is trained, for lines of progress.
        data: What it is trained on.
        sam: The callback that makes a step take two gradients, or none.
        progress: Where to say how far training is.
    """

    def __init__(
        self, title: str, data: DigitsDataModule, sam: list[SharpnessAwareMinimization], progress: Progress
    ) -> None:
        self.title, self.data, self.sam, self.progress = title, data, sam, progress
        self.num_gradients = 0
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, *args: object) -> None:
        self.num_gradients += 1 + sum(sam.has_perturbed for sam in self.sam)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.text = f"{self.title}, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        x, y = self.data.train_set.tensors
        pl_module.log("loss_on_all_training_samples", F.cross_entropy(pl_module(x), y))
        pl_module.log("gradient_evaluations", float(self.num_gradients))
        self.weights.append(copy.deepcopy(pl_module.state_dict()))


@dataclass
class Run:
    """A trained network: its curves, one value per epoch, and its weights after every epoch."""

    curves: Curves
    weights: list[dict[str, Tensor]]


def train(
    name: str,
    sam: list[SharpnessAwareMinimization],
    seed: int,
    num_epochs: int,
    progress: Progress,
    args: argparse.Namespace,
) -> Run:
    """Train from the weights and on the batches that belong to ``seed``."""
    pl.seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(args.out, name=name, version=f"seed{seed}")
    shutil.rmtree(logger.log_dir, ignore_errors=True)  # of an earlier run: its curves would be mixed into these
    data = DATA[args.data](args.batch_size)
    record = Record(f"{name.upper()}, seed {seed}", data, sam, progress)
    trainer = pl.Trainer(
        max_epochs=num_epochs,
        accelerator="cpu",
        callbacks=[*sam, record, FlatnessMonitor()],
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    trainer.fit(ConvNet(lr=args.lr, momentum=args.momentum), data)
    curves = read_curves(Path(logger.log_dir), num_epochs)
    curves["test_accuracy"] = [100 * value for value in curves["test_accuracy"]]
    return Run(curves, record.weights)


def read_curves(log_dir: Path, num_epochs: int) -> Curves:
    """Read the last value of every epoch back from the event file; flatness begins before the first one."""
    events = EventAccumulator(str(log_dir)).Reload()
    tags = [tag for tag, _ in COLUMNS.values()]
    tags += [standard_error(tag) for tag in tags if tag.startswith("flatness/")]
    return {tag: [event.value for event in events.Scalars(tag)][-num_epochs:] for tag in tags}


Rows = dict[str, tuple[list[Run], list[int]]]
"""Of a table: the runs of a row, and the epoch of each to look at."""


def epoch_of_loss(run: Run, loss: float) -> int:
    """Return the epoch whose training loss is nearest to a given one, as a ratio."""
    losses = run.curves["loss_on_all_training_samples"]
    return 1 + min(range(len(losses)), key=lambda i: abs(math.log(losses[i] / loss)))


def at(runs: list[Run], epochs: list[int], tag: str) -> list[float]:
    return [run.curves[tag][epoch - 1] for run, epoch in zip(runs, epochs, strict=True)]


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation; one seed has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(rows: Rows) -> str:
    """Return mean ± standard deviation over seeds of each column, as Markdown."""
    cells = [["", *COLUMNS]]
    for title, (runs, epochs) in rows.items():
        cells.append([title])
        for tag, form in COLUMNS.values():
            mean, deviation = mean_and_deviation(at(runs, epochs, tag))
            cells[-1].append(form.format(mean) + (f" ± {form.format(deviation)}" if deviation else ""))
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def differences(rows: Rows) -> str:
    """Return SAM minus each SGD row, paired by seed, and in how many seeds it is lower: the spread hides that."""
    (_, sam), *others = rows.items()
    lines = ["| SAM minus | of | mean ± standard deviation | seeds lower | seeds higher |", "|---|---|---|---|---|"]
    for title, sgd in others:
        for name in ("lambda_max", "invariant sharpness", "test accuracy, %"):
            tag, form = COLUMNS[name]
            pairs = [a - b for a, b in zip(at(*sam, tag), at(*sgd, tag), strict=True)]
            mean, deviation = mean_and_deviation(pairs)
            lower, higher = sum(p < 0 for p in pairs), sum(p > 0 for p in pairs)
            spread = "" if deviation is None else f" ± {form.format(deviation)}"
            lines.append(f"| {title} | {name} | {form.replace(':', ':+').format(mean)}{spread} | {lower} | {higher} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- pictures


def loss_along_eigenvector(weights: dict[str, Tensor], args: argparse.Namespace, radius: float) -> LossSurface:
    """Return the loss on all training samples along the eigenvector of the largest eigenvalue of the Hessian."""
    module = ConvNet()
    module.load_state_dict(weights)
    batch = DATA[args.data]().train_set.tensors
    landscape = LossLandscape(module.eval(), [batch], lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]))
    return loss_surface(landscape, "eigenvectors", "euclidean", num_directions=1, radius=radius, num_points=31)


def draw_equal_loss(rows: Rows, path: Path, args: argparse.Namespace, progress: Progress) -> None:
    """Draw the loss along the sharpest direction at the same training loss, and lambda_max over the training loss."""
    figure = new_figure(10, 3.9)
    valley, course = figure.subplots(1, 2)
    for label, (runs, epochs) in {"SGD": rows["SGD, same train loss"], "SAM": rows["SAM"]}.items():
        for i, (run, epoch) in enumerate(zip(runs, epochs, strict=True)):
            progress.text = f"the loss along the sharpest direction, {label}, seed {i}"
            line = loss_along_eigenvector(run.weights[epoch - 1], args, args.radius)
            valley.plot(line.x, line.losses, color=COLOURS[label], lw=1.8, alpha=0.8, label=label if i == 0 else None)
            losses, sharpness = run.curves["loss_on_all_training_samples"], run.curves["flatness/lambda_max"]
            errors = run.curves[standard_error("flatness/lambda_max")]
            course.errorbar(losses, sharpness, errors, fmt=".-", color=COLOURS[label], lw=0.6, ms=5, alpha=0.5)
            course.plot(losses[epoch - 1], sharpness[epoch - 1], "o", color=COLOURS[label], mec="black", ms=8, zorder=3)
    valley.set(title="Loss along the sharpest direction", xlabel="distance in weight space", ylabel="training loss")
    course.set(
        title="Sharpness after each epoch", xlabel="training loss, falling", ylabel="lambda_max ± standard error"
    )
    course.set(xscale="log", yscale="log")
    course.invert_xaxis()
    for ax in (valley, course):
        tidy(ax)
    valley.set_ylim(0, None)
    figure.legend(*valley.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Compared at equal training loss (large dots: the weights on the left)", fontsize=11)
    save(figure, path)


def band(run: Run, tag: str, sign: int) -> list[float]:
    """Return one end of the values, plus or minus their standard errors where they have any."""
    errors = run.curves.get(standard_error(tag), [0.0] * len(run.curves[tag]))
    return [value + sign * error for value, error in zip(run.curves[tag], errors, strict=True)]


def draw_curves(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw mean and range over the seeds, over gradient evaluations: there a step of SAM counts twice."""
    figure = new_figure(11, 3.8)
    axes = figure.subplots(1, 3)
    panels = (
        ("flatness/lambda_max", "Largest Hessian eigenvalue", "log"),
        ("flatness/invariant_sharpness", "Invariant sharpness", "log"),
        ("test_accuracy", "Test accuracy, %", "linear"),
    )
    for ax, (tag, name, scale) in zip(axes, panels, strict=True):
        for label, seeds in runs.items():
            x = seeds[0].curves["gradient_evaluations"]
            columns = list(zip(*(run.curves[tag] for run in seeds), strict=True))
            colour = COLOURS[label]
            ax.plot(x, [statistics.fmean(c) for c in columns], color=colour, label=label, lw=1.8, marker="o", ms=3)
            lowest = [min(ends) for ends in zip(*(band(run, tag, -1) for run in seeds), strict=True)]
            highest = [max(ends) for ends in zip(*(band(run, tag, 1) for run in seeds), strict=True)]
            draw_band(ax, x, lowest, highest, colour)
        ax.set(title=name, xlabel="gradient evaluations", yscale=scale)
        tidy(ax)
    low = min(statistics.median(run.curves["test_accuracy"]) for seeds in runs.values() for run in seeds)
    axes[2].set_ylim(low - 3, 100)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    num_seeds = len(next(iter(runs.values())))
    figure.suptitle(
        f"Mean and range over {num_seeds} seeds, ± standard errors; a step of SAM takes two gradients", fontsize=10
    )
    save(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--epochs", type=int, default=15, help="of SAM; SGD trains twice as long")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--geometry", default="euclidean", help="euclidean (SAM), element (ASAM), layer or filter")
    parser.add_argument("--radius", type=float, default=0.6, help="how far the picture of the loss goes")
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for networks of this size")
    parser.add_argument("--out", type=Path, default=Path("logs/sam_vs_sgd"))
    return parser.parse_args()


def main(progress: Progress) -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*|.*litlogger.*")
    print(f"Training with SGD and with SAM on {args.data}, {args.seeds} seeds each: a few minutes.", flush=True)
    sgd, sam = [], []
    for seed in range(args.seeds):
        callback: Any = SharpnessAwareMinimization(rho=args.rho, geometry=args.geometry)
        sgd.append(train("sgd", [], seed, 2 * args.epochs, progress, args))
        sam.append(train("sam", [callback], seed, args.epochs, progress, args))
    epochs = [args.epochs] * args.seeds
    losses = at(sam, epochs, "loss_on_all_training_samples")
    rows = {
        "SAM": (sam, epochs),
        "SGD, same steps": (sgd, epochs),
        "SGD, same gradients": (sgd, [2 * epoch for epoch in epochs]),
        "SGD, same train loss": (sgd, [epoch_of_loss(run, loss) for run, loss in zip(sgd, losses, strict=True)]),
    }
    setting = (
        f"{args.data}: rho={args.rho} ({args.geometry}), lr={args.lr}; mean ± standard deviation, {args.seeds} seeds"
    )
    text = f"{setting}\n\n{table(rows)}\n\nPaired by seed:\n\n{differences(rows)}\n"
    stem = args.out / f"sam_vs_sgd_{args.data}"
    stem.with_suffix(".md").write_text(text)
    print(f"\n{text}", flush=True)
    draw_equal_loss(rows, stem.with_suffix(".png"), args, progress)
    draw_curves({"SGD": sgd, "SAM": sam}, Path(f"{stem}_curves.png"))
    progress.stop()
    tools = Path(sys.executable).parent
    print(f"Took {progress.seconds:.0f} s. Table and pictures: {stem}.md, .png, _curves.png")
    print(f"Open the curves in TensorBoard:\n  {tools / 'tensorboard'} --logdir {args.out}")
    print(f"Compare them at a training loss:\n  {tools / 'lightning-flatness'} compare {args.out} --at loss=0.02")


if __name__ == "__main__":
    main(loading)
