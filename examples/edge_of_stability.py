"""Full-batch training climbs to the edge of stability and stays there: gradient descent (arXiv 2103.00065), and Adam.

    python examples/edge_of_stability.py

trains a tanh network with squared error on real handwritten digits, always on all samples at once. The largest
eigenvalue of the Hessian rises until it reaches 2/eta, above which gradient descent is unstable, and hovers there,
while the loss goes on falling. Adam does the same (arXiv 2207.14484) in the geometry that its preconditioner makes,
``geometry="optimizer"``, at (2 + 2 beta1)/((1 - beta1) eta).
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import FlatnessMonitor

Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Run:
    """What to train with, and which curve is to be held against the optimizer's edge."""

    title: str
    optimizer: Callable[[Any], torch.optim.Optimizer]
    sharpness: str


RUNS = {
    "gradient_descent": Run("gradient descent, eta = 0.5", lambda p: torch.optim.SGD(p, lr=0.5), "flatness/lambda_max"),
    "adam": Run(
        "Adam, eta = 0.005",
        lambda p: torch.optim.Adam(p, lr=0.005, betas=(0.9, 0.99), eps=1e-7),
        "flatness/preconditioned_sharpness",
    ),
}


class TanhNet(pl.LightningModule):
    """64-32-32-10 with tanh and squared error: smooth, so that the curvature is what theory speaks of."""

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
        self.make_optimizer = make_optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = 0.5 * (self.net(x) - F.one_hot(y, 10)).square().sum(dim=1).mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def digits(num_samples: int) -> DataLoader[tuple[Tensor, ...]]:
    """The first digits as one batch."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:num_samples], dtype=torch.float32) / 16
    x = (x - x.mean(dim=0)) / (x.std(dim=0) + 0.1)
    return DataLoader(TensorDataset(x, torch.tensor(labels[:num_samples])), batch_size=num_samples)


def train(name: str, out: Path, *, steps: int, every: int, num_samples: int, seed: int) -> Curves:
    """Train on all samples at once and return the curves that TensorBoard shows."""
    pl.seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(out, name=name)
    monitor = FlatnessMonitor(every_n_epochs=None, every_n_steps=every, probe_size=num_samples)
    trainer = pl.Trainer(
        max_epochs=steps,  # one step each
        accelerator="cpu",
        callbacks=[monitor],
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=every,
    )
    trainer.fit(TanhNet(RUNS[name].optimizer), digits(num_samples))
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def print_table(name: str, curves: Curves, num_rows: int = 12) -> None:
    """Print some of the measurements."""
    sharpness, edge = dict(curves[RUNS[name].sharpness]), dict(curves["flatness/stability_edge"])
    loss, ratio = curves["train_loss"], dict(curves["flatness/edge_of_stability"])
    print(f"\n{RUNS[name].title}\n{'step':>6} {'loss':>9} {'sharpness':>11} {'edge':>9} {'sharpness/edge':>15}")
    steps = list(sharpness)
    for step in steps[:: max(1, len(steps) // num_rows)]:
        nearest = min(loss, key=lambda point: abs(point[0] - step))[1]
        print(f"{step:>6} {nearest:>9.5f} {sharpness[step]:>11.3f} {edge[step]:>9.1f} {ratio[step]:>15.3f}")


def draw(results: dict[str, Curves], path: Path) -> None:
    """Draw sharpness, edge and loss of every run."""
    figure = Figure(figsize=(5 * len(results), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(results), squeeze=False, sharex="col", height_ratios=(3, 2))
    for (name, curves), (top, bottom) in zip(results.items(), axes.T, strict=True):
        top.plot(*zip(*curves[RUNS[name].sharpness], strict=True), lw=1.2, label=RUNS[name].sharpness.split("/")[1])
        top.plot(*zip(*curves["flatness/stability_edge"], strict=True), "k--", lw=1, label="edge of stability")
        top.set(title=RUNS[name].title, ylim=(0, None))
        top.legend(fontsize=8)
        bottom.plot(*zip(*curves["train_loss"], strict=True), lw=1.2, color="C1")
        bottom.set(xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("logs/edge_of_stability"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*|.*litlogger.*|.*logging interval.*")
    start = time.perf_counter()
    options = {"steps": arguments.steps, "every": arguments.every, "num_samples": arguments.num_samples}
    results = {name: train(name, arguments.out, seed=arguments.seed, **options) for name in RUNS}
    for name, curves in results.items():
        print_table(name, curves)
    picture = arguments.out / "edge_of_stability.png"
    draw(results, picture)
    print(f"\n{time.perf_counter() - start:.0f} s. Picture: {picture}. Curves: tensorboard --logdir {arguments.out}")


if __name__ == "__main__":
    main()
