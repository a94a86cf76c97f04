"""How many Hessian-vector products does a measurement at the end of an epoch take, and how exact is it?

    python examples/benchmarks/warm_start.py

trains the example's network on digits and on MNIST with the flatness monitor's default metrics and prints, for every
measurement, the products that ``TopEigenvalues(tol=1e-2)`` takes, those of the default metrics at their own tolerance,
what share of the gradients of an epoch of 50,000 samples that is, and the error against a tightly converged reference.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from digits import ConvNet, DigitsDataModule, Mnist5kDataModule

from lightning_flatness import (
    FlatnessMonitor,
    InvariantSharpness,
    LossLandscape,
    SharpnessAwareMinimization,
    TopEigenvalues,
)
from lightning_flatness.callbacks.probe import draw_probe
from lightning_flatness.metrics import preset_metrics

EPOCH = 50_000
COLUMNS = {
    "products, lambda_max at 1e-2": "{:.0f}",
    "products, default": "{:.0f}",
    "of an epoch": "{:.1%}",
    "error of lambda_max": "{:.1e}",
    "error of invariant sharpness": "{:.1e}",
}


class AdamNet(ConvNet):
    """The same network, trained with Adam: its default metrics have the preconditioned sharpness, too."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


RUNS: dict[str, tuple[type[ConvNet], type[DigitsDataModule], float, list[pl.Callback]]] = {
    "digits, SGD, lr 0.05": (ConvNet, DigitsDataModule, 0.05, []),
    "digits, SGD, lr 0.03": (ConvNet, DigitsDataModule, 0.03, []),
    "digits, SAM": (ConvNet, DigitsDataModule, 0.02, [SharpnessAwareMinimization(rho=0.1)]),
    "digits, Adam": (AdamNet, DigitsDataModule, 0.002, []),
    "MNIST, SGD, lr 0.05": (ConvNet, Mnist5kDataModule, 0.05, []),
    "MNIST, SGD, lr 0.02": (ConvNet, Mnist5kDataModule, 0.02, []),
}


class Count(pl.Callback):
    """Measures before training and at the ends of epochs; keeps a row of the table for each."""

    def __init__(self, tol: float) -> None:
        self.lambda_max = TopEigenvalues(tol=1e-2)
        self.default = preset_metrics("default", tol=tol)
        self.tol = tol
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert trainer.train_dataloader is not None  # training starts
        self.probe = draw_probe(trainer.train_dataloader, FlatnessMonitor().probe_size)
        self.measure(pl_module, trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, AdamNet):
            preconditioned = TopEigenvalues(geometry="optimizer", tol=self.tol, shared_start=True)
            self.default.setdefault("preconditioned_sharpness", preconditioned)
        self.measure(pl_module, trainer)

    def measure(self, module: pl.LightningModule, trainer: pl.Trainer) -> None:
        alone, default, reference = (LossLandscape(module, self.probe, optimizer=trainer.optimizers) for _ in range(3))
        update(alone, self.lambda_max)
        update(default, *self.default.values())
        exact = TopEigenvalues(k=2, tol=1e-4), InvariantSharpness(tol=1e-4)
        update(reference, *exact)
        errors = [
            abs(float(found.compute()) / float(value.compute().flatten()[0]) - 1)
            for found, value in zip(self.default.values(), exact, strict=False)
        ]
        share = default.cost.gradient_evaluations * default.num_samples / EPOCH
        numbers = (alone.cost.num_products, default.cost.num_products, share, *errors)
        self.rows.append(dict(zip(COLUMNS, numbers, strict=True)))


def update(landscape: LossLandscape, *metrics: Any) -> None:
    """Measure several metrics in one measurement."""
    with landscape.measurement():
        for metric in metrics:
            metric.update(landscape)


def run(name: str, epochs: int, tol: float) -> list[dict[str, float]]:
    """Train, and return a row for every measurement, the one before training first."""
    module, data, lr, callbacks = RUNS[name]
    pl.seed_everything(0, verbose=False)
    count = Count(tol)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks, count], logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module(lr=lr), data())
    return count.rows


def table(results: dict[str, list[dict[str, float]]], tol: float) -> list[str]:
    """Return the median of the warm measurements of each run, with the largest value behind it, and of all of them."""
    warm = {name: rows[1:] for name, rows in results.items()}
    if len(results) > 1:
        warm["all"] = [row for rows in warm.values() for row in rows]
    lines = [
        f"Measurements at the ends of epochs, median (largest), on {FlatnessMonitor().probe_size} samples; default "
        f"metrics at tol {tol:g}",
        "",
        f"| run | epochs | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, rows in warm.items():
        cells = []
        for column, form in COLUMNS.items():
            values = [row[column] for row in rows]
            cells.append(f"{form.format(statistics.median(values))} ({form.format(max(values))})")
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    cold = sorted({int(rows[0][next(iter(COLUMNS))]) for rows in results.values()})
    return [
        *lines,
        "",
        f"Before training, without a start: lambda_max at 1e-2 takes {' or '.join(map(str, cold))} products.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tol", type=float, default=FlatnessMonitor().tol, help="of the default metrics")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results = {}
    for name in args.runs:
        results[name] = run(name, args.epochs, args.tol)
        print(name)
        for epoch, row in enumerate(results[name]):
            print(f"  epoch {epoch:2d}: {', '.join(f'{c} {form.format(row[c])}' for c, form in COLUMNS.items())}")
    lines = table(results, args.tol)
    print("\n".join(["", *lines]))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
