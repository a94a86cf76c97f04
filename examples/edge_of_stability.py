"""Training climbs to the edge of stability: gradient descent, Adam, SGD with small batches, and cross-entropy.

    python examples/edge_of_stability.py

trains a tanh network on real handwritten digits. With squared error and all samples at once, the largest eigenvalue of
the Hessian rises to 2/eta, above which gradient descent is unstable, and hovers there while the loss keeps falling
(arXiv 2103.00065). Adam does the same (arXiv 2207.14484) in the geometry of its preconditioner,
``geometry="optimizer"``, at (2 + 2 beta1)/((1 - beta1) eta). With small batches it is the sharpness of the batches that
rises to 2/eta; lambda_max stays below (arXiv 2412.20553). Under cross-entropy the edge is reached and left again: the
curvature shrinks with the loss.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.ticker import LogLocator, NullFormatter
from sklearn.datasets import load_digits
from style import COLOURS, draw_errors, new_figure, save, tidy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import BatchSharpness, FlatnessMonitor, TopEigenvalues

Curves = dict[str, list[tuple[int, float]]]


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Half the squared distance to one-hot labels."""
    return 0.5 * (outputs - F.one_hot(labels, 10)).square().sum(dim=1).mean()


@dataclass(frozen=True)
class Run:
    """What to train with, and which curve is compared with the optimizer's edge."""

    title: str
    method: str
    optimizer: Callable[[Any], torch.optim.Optimizer]
    sharpness: str
    edge: str = "flatness/stability_edge"
    loss: Callable[[Tensor, Tensor], Tensor] = squared_error
    batch_size: int | None = None
    factor: float = 1.0
    """Of the number of steps, and of the steps between measurements."""
    pause: int = 1
    """Another factor of those: measuring many batches takes longer."""


RUNS = {
    "gradient_descent": Run(
        "gradient descent, eta = 0.5", "SGD", lambda p: torch.optim.SGD(p, lr=0.5), "flatness/lambda_max"
    ),
    "adam": Run(
        "Adam, eta = 0.005",
        "Adam",
        lambda p: torch.optim.Adam(p, lr=0.005, betas=(0.9, 0.99), eps=1e-7),
        "flatness/preconditioned_sharpness",
    ),
    "small_batches": Run(
        "SGD, batches of 4, eta = 0.6",
        "small batch",
        lambda p: torch.optim.SGD(p, lr=0.6),
        "flatness/batch_sharpness",
        edge="flatness/batch_sharpness_upper_edge",
        batch_size=4,
        factor=4,
        pause=5,
    ),
    "cross_entropy": Run(
        "cross-entropy, eta = 2.5",
        "SGD",
        lambda p: torch.optim.SGD(p, lr=2.5),
        "flatness/lambda_max",
        loss=F.cross_entropy,
        factor=0.1,
    ),
}


class TanhNet(pl.LightningModule):
    """64-32-32-10 with tanh: smooth, as the theory assumes."""

    def __init__(
        self,
        make_optimizer: Callable[[Any], torch.optim.Optimizer],
        loss: Callable[[Tensor, Tensor], Tensor] = squared_error,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
        self.make_optimizer = make_optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self.net(batch[0]), batch[1])
        several = self.trainer.num_training_batches > 1
        self.log("train_loss", loss, on_step=not several, on_epoch=several)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def digits(num_samples: int, batch_size: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    """The first digits, as one batch unless there is a batch size."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:num_samples], dtype=torch.float32) / 16
    x = (x - x.mean(dim=0)) / (x.std(dim=0) + 0.1)
    dataset = TensorDataset(x, torch.tensor(labels[:num_samples]))
    return DataLoader(dataset, batch_size or num_samples, shuffle=batch_size is not None)


def train(name: str, out: Path, *, steps: int, every: int, num_samples: int, seed: int) -> Curves:
    """Train and return the curves that TensorBoard shows."""
    run = RUNS[name]
    steps, every = round(steps * run.factor), max(1, round(every * run.factor * run.pause))
    pl.seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(out, name=name)
    metrics = {"lambda_max": TopEigenvalues(tol=1e-2), "batch_sharpness": BatchSharpness()}
    monitor = FlatnessMonitor(
        metrics if run.batch_size else "default", every_n_epochs=None, every_n_steps=every, probe_size=num_samples
    )
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=steps,
        accelerator="cpu",
        callbacks=[monitor],
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=every,
    )
    trainer.fit(TanhNet(run.optimizer, run.loss), digits(num_samples, run.batch_size))
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def table(name: str, curves: Curves, num_rows: int = 12) -> str:
    """Return some of the measurements."""
    run, loss = RUNS[name], curves["train_loss"]
    sharpness, edge, largest = (dict(curves[key]) for key in (run.sharpness, run.edge, "flatness/lambda_max"))
    extra = {" lambda_max/edge |": largest} if run.batch_size else {}
    lines = [
        f"{run.title}:",
        "",
        f"| step | loss | sharpness | edge | sharpness/edge |{''.join(extra)}",
        "|---:|---:|---:|---:|---:|" + "---:|" * len(extra),
    ]
    steps = list(sharpness)
    for step in steps[:: max(1, len(steps) // num_rows)]:
        nearest = min(loss, key=lambda point: abs(point[0] - step))[1]
        ratios = [values[step] / edge[step] for values in (sharpness, *extra.values())]
        row = f"| {step} | {nearest:.5f} | {sharpness[step]:.4g} | {edge[step]:.4g} |"
        lines.append(row + "".join(f" {ratio:.3f} |" for ratio in ratios))
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Curves], path: Path) -> None:
    """Draw sharpness, edge and loss of every run."""
    figure = new_figure(4 * len(results), 4.8)
    axes = figure.subplots(2, len(results), squeeze=False, sharex="col", height_ratios=(3, 2))
    for (name, curves), (top, bottom) in zip(results.items(), axes.T, strict=True):
        run, colour = RUNS[name], COLOURS[RUNS[name].method]
        top.plot(*zip(*curves[run.sharpness], strict=True), lw=1.4, color=colour)
        if run.batch_size:  # the others are measured on all samples there are
            draw_errors(top, curves, run.sharpness, colour)
            top.plot([], [], color=colour, label="batch_sharpness ± standard error")
            largest = zip(*curves["flatness/lambda_max"], strict=True)
            top.plot(*largest, lw=1, color=COLOURS["reference"], label="lambda_max")
            top.legend(loc="lower right", frameon=False)
        top.plot(*zip(*curves[run.edge], strict=True), "--", lw=1.2, color=COLOURS["reference"])
        top.set(title=run.title, ylabel=run.sharpness.split("/")[1], ylim=(0, None))
        top.annotate(f"edge of stability: {curves[run.edge][-1][1]:.4g}", (0.99, 0.99),
                     xycoords="axes fraction", ha="right", va="top", color=COLOURS["reference"])  # fmt: skip
        bottom.plot(*zip(*curves["train_loss"], strict=True), lw=1.4, color=colour)
        bottom.set(xlabel="step", ylabel="training loss", yscale="log")
        bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bottom.yaxis.set_major_formatter("{x:g}")
        bottom.yaxis.set_minor_formatter(NullFormatter())
        for ax in (top, bottom):
            tidy(ax)
    save(figure, path)


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
    text = "\n".join(table(name, curves) for name, curves in results.items())
    (arguments.out / "edge_of_stability.md").write_text(text)
    print(text)
    picture = arguments.out / "edge_of_stability.png"
    draw(results, picture)
    tensorboard = Path(sys.executable).parent / "tensorboard"
    print(f"{time.perf_counter() - start:.0f} s. Picture: {picture}. Curves: {tensorboard} --logdir {arguments.out}")


if __name__ == "__main__":
    main()
