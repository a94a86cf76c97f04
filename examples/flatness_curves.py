"""Train a small convolutional network on real handwritten digits and watch how sharp its minimum is.

    python examples/flatness_curves.py

writes TensorBoard logs, prints a table of what they hold, and draws the curves.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
from digits import ConvNet, DigitsDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from style import COLOURS, draw_errors, new_figure, save, standard_error, tidy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_flatness import FlatnessMonitor

Curve = list[tuple[int, float]]


def train(out: Path, *, epochs: int, batch_size: int, lr: float, top_k: int, seed: int) -> Path:
    """Train with the monitor and return the folder of the TensorBoard logs."""
    pl.seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(out, name="digits")
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[FlatnessMonitor(top_k=top_k)],
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        log_every_n_steps=10,
    )
    trainer.fit(ConvNet(lr=lr), datamodule=DigitsDataModule(batch_size))
    return Path(logger.log_dir)


def read_curves(log_dir: Path) -> dict[str, Curve]:
    """Read every scalar back from the event file, as TensorBoard does."""
    events = EventAccumulator(str(log_dir)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def print_table(curves: dict[str, Curve]) -> None:
    """Print one line per measurement."""
    flatness = ("flatness/lambda_max", "flatness/invariant_sharpness", "flatness/edge_of_stability")
    columns = {tag: dict(curves[tag]) for tag in (*flatness, "flatness_cost/seconds")}
    errors = {tag: dict(curves[standard_error(tag)]) for tag in flatness[:2]}
    accuracy = sorted(curves["test_accuracy"])
    print(f"{'step':>6} {'lambda_max':>19} {'invariant sharpness':>22} {'eta·lambda/2':>13} {'accuracy':>9} {'s':>6}")
    for step in columns[flatness[0]]:
        reached = [value for at, value in accuracy if at < step]
        print(
            f"{step:>6} {columns[flatness[0]][step]:>10.3f} ± {errors[flatness[0]][step]:<6.1g} "
            f"{columns[flatness[1]][step]:>13.2f} ± {errors[flatness[1]][step]:<6.1g} "
            f"{columns[flatness[2]][step]:>13.3f} {reached[-1] if reached else float('nan'):>9.3f} "
            f"{columns['flatness_cost/seconds'][step]:>6.2f}"
        )


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Draw the eigenvalues, the invariant sharpness and the losses over the steps."""
    figure, color = new_figure(11, 3.6), COLOURS["SGD"]
    axes = figure.subplots(1, 3)
    eigenvalues = sorted(tag for tag in curves if tag.startswith("flatness/lambda_"))
    eigenvalues.insert(0, eigenvalues.pop())  # lambda_max before lambda_2
    for i, tag in enumerate(eigenvalues):
        steps, values = zip(*curves[tag], strict=True)
        axes[0].plot(steps, values, marker="o", ms=3, color=color, alpha=1 - 0.8 * i / len(eigenvalues), label=tag[9:])
    draw_errors(axes[0], curves, eigenvalues[0], color)
    axes[0].set(title="Largest Hessian eigenvalues", xlabel="optimizer step", yscale="log")
    steps, values = zip(*curves["flatness/invariant_sharpness"], strict=True)
    axes[1].plot(steps, values, marker="o", ms=3, color=color)
    draw_errors(axes[1], curves, "flatness/invariant_sharpness", color)
    axes[1].set(title="Invariant sharpness", xlabel="optimizer step", yscale="log")
    for tag, line in (("train_loss", "-"), ("test_loss", "--")):
        steps, values = zip(*curves[tag], strict=True)
        axes[2].plot([s + 1 for s in steps], values, line, marker="o", ms=3, color=color, label=tag.replace("_", " "))
    axes[2].set(title="Loss", xlabel="optimizer step", yscale="log")
    for ax in axes:
        tidy(ax)
    handles = [line for ax in axes for line in ax.get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("logs/flatness_curves"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*|.*litlogger.*")
    start = time.perf_counter()
    log_dir = train(
        args.out, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, top_k=args.top_k, seed=args.seed
    )
    curves = read_curves(log_dir)
    print_table(curves)
    draw(curves, log_dir / "flatness_curves.png")
    print(f"\nTook {time.perf_counter() - start:.0f} s. Curves: {log_dir / 'flatness_curves.png'}")
    print(f"Open them in TensorBoard:  {Path(sys.executable).parent / 'tensorboard'} --logdir {args.out}")


if __name__ == "__main__":
    main()
