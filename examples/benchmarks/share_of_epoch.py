"""What share of an epoch the default monitor takes: 50,000 images of Fashion-MNIST, two networks, three ways to train.

    python examples/benchmarks/share_of_epoch.py

Each line is a run of its own, on one thread. The share in gradients is exact: gradients of single samples spent on the
measurement at the end of an epoch, over those that training took. The share in time is what the monitor logs as
``flatness_cost/share_of_epoch_time``. Both are medians over the epochs; that before training is not counted.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
import fashion_mnist
from peers.workloads import ResidualBlock

from lightning_flatness import FlatnessMonitor, SharpnessAwareMinimization

RESULTS = Path(__file__).parent / "results" / "share_of_epoch.md"
BATCH_SIZE = 128
METHODS = ("SGD", "SAM", "AdamW")


def cnn() -> nn.Module:
    """Three convolutions with BatchNorm and a linear layer."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 10))


def resnet() -> nn.Module:
    """A stem and three residual blocks with BatchNorm."""
    stem = [nn.Conv2d(1, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [ResidualBlock(16, 16), ResidualBlock(16, 32), ResidualBlock(32, 64)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"CNN": cnn, "ResNet": resnet}


class Classifier(pl.LightningModule):
    """A network with SGD and momentum, or AdamW."""

    def __init__(self, net: nn.Module, method: str) -> None:
        super().__init__()
        self.net, self.method = net, method

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.method == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Shares(pl.Callback):
    """What the monitor logged at the ends of epochs."""

    def __init__(self) -> None:
        self.gradients: list[float] = []
        self.time: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients.append(float(trainer.callback_metrics["flatness_cost/gradient_evaluations"]))
        self.time.append(float(trainer.callback_metrics["flatness_cost/share_of_epoch_time"]))


def row(network: str, method: str, data: TensorDataset, epochs: int) -> str:
    """Train, and return the line of the table."""
    pl.seed_everything(0, verbose=False)
    module, monitor, shares = Classifier(NETWORKS[network](), method), FlatnessMonitor(), Shares()
    sam = [SharpnessAwareMinimization()] if method == "SAM" else []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[monitor, *sam, shares],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH_SIZE, shuffle=True))
    gradients = statistics.median(shares.gradients)
    share = gradients * monitor.probe_size / (len(data) * (2 if sam else 1))
    weights = sum(p.numel() for p in module.parameters())
    return (
        f"| {network} | {weights:,} | {method} | {gradients:.1f} | {share:.1%} | {statistics.median(shares.time):.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--data-dir", type=Path, default=fashion_mnist.FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    images, labels, *_ = fashion_mnist.load(args.data_dir)
    x = images[: args.samples, None].float() / 255
    data = TensorDataset((x - x.mean()) / x.std(), labels[: args.samples].long())
    lines = [
        f"Fashion-MNIST, {len(data):,} images in batches of {BATCH_SIZE}, probe of {FlatnessMonitor().probe_size}, "
        f"medians of {args.epochs} epochs",
        "",
        "| network | weights | trained with | gradients of the probe | share in gradients | share in time |",
        "|---|---:|---|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for network in args.networks:
        for method in args.methods:
            lines.append(row(network, method, data, args.epochs))
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
