"""How small a residual does a flatness curve need? The measurement behind the default ``tol``.

    python examples/benchmarks/tolerance.py --data DIR --work DIR

trains eight small networks on Fashion-MNIST (in the folder ``--data``, as ``torchvision`` stores it) and measures
lambda_max and invariant sharpness at 51 steps of each, as ``FlatnessMonitor`` does: every measurement starts from the
previous one's eigenvectors. It compares them with a tight cold reference, for several tolerances, with and without
the search for a larger eigenvalue. ``--work`` keeps what is done, so that a second call goes on; about 25 minutes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import SAM, InvariantSharpness, LossLandscape, TopEigenvalues
from lightning_flatness.estimators import TOLERANCE, top_eigenvalues
from lightning_flatness.estimators.krylov import misses
from lightning_flatness.metrics.eigenvalues import EigenvalueMetric

NUM_SNAPSHOTS = 51
NUM_TRAINED_ON = 4000
PROBE_SIZE = 256
POLICIES = [(4e-2, 1.0), (2e-2, 0.1), (1e-2, 0.1)]
"""Tolerance, and the largest component in which a larger eigenvalue may hide; 1 stands for no search."""

Batch = tuple[Tensor, Tensor]


class VisionTransformer(nn.Module):
    """Two blocks on patches of 2 x 2 pixels."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.randn(1, 49, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        out: Tensor = self.head(self.blocks(self.embedding(patches) + self.positions).mean(1))
        return out


class RowLSTM(nn.Module):
    """Reads an image row by row."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rows = nn.LSTM(14, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rows(x[:, 0])[0][:, -1])
        return out


def mlp(*widths: int, activation: type[nn.Module]) -> nn.Module:
    """Return a chain of linear layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(batch_norm: bool = False) -> nn.Module:
    """Return a network of two convolutions and two linear layers."""
    norms = [[nn.BatchNorm2d(n)] if batch_norm else [] for n in (8, 16)]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *norms[0], nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), *norms[1], nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A network and how it is trained; ``every`` is the number of steps between measurements."""

    module: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    batch_size: int
    every: int
    pixels: int = 14
    rho: float = 0.0


def sgd(lr: float, momentum: float = 0.0) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr, momentum=momentum)


def adam(lr: float) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr)


RUNS = {
    "MLP tanh, momentum": Run(lambda: mlp(49, 32, 10, activation=nn.Tanh), sgd(0.1, 0.9), 50, 80, pixels=7),
    "MLP ReLU, SGD": Run(lambda: mlp(49, 64, 64, 10, activation=nn.ReLU), sgd(0.1), 32, 80, pixels=7),
    "CNN, SGD": Run(cnn, sgd(0.05), 32, 60),
    "CNN, SAM": Run(cnn, sgd(0.05), 32, 60, rho=0.1),
    "CNN, Adam": Run(cnn, adam(2e-3), 64, 40),
    "CNN with BatchNorm, SGD": Run(lambda: cnn(batch_norm=True), sgd(0.08), 64, 40),
    "ViT, Adam": Run(VisionTransformer, adam(2e-3), 64, 30),
    "LSTM, momentum": Run(RowLSTM, sgd(0.1, 0.9), 64, 40),
}


def fashion_mnist(folder: Path, pixels: int) -> Batch:
    """Return the first training images, reduced to ``pixels`` x ``pixels``, and their classes."""
    raw = []
    for name, header in (("images-idx3", 16), ("labels-idx1", 8)):
        (path,) = folder.glob(f"train-{name}-ubyte*")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        raw.append(np.frombuffer(data, np.uint8, offset=header))
    images = torch.tensor(raw[0].reshape(-1, 1, 28, 28)[:NUM_TRAINED_ON].astype(np.float32)) / 255
    images = F.avg_pool2d(images, 28 // pixels)
    return (images - images.mean()) / images.std(), torch.tensor(raw[1][:NUM_TRAINED_ON].astype(np.int64))


def trained(run: Run, data: Batch) -> list[dict[str, Tensor]]:
    """Return the states of the network in the course of training."""
    torch.manual_seed(0)
    module = run.module()
    optimizer = run.optimizer(module.parameters())
    if run.rho:
        optimizer = SAM(optimizer, rho=run.rho)
    states = []
    for step in range((NUM_SNAPSHOTS - 1) * run.every + 1):
        if step % run.every == 0:
            states.append({name: value.clone() for name, value in module.state_dict().items()})
        chosen = torch.randint(NUM_TRAINED_ON, (run.batch_size,))

        def closure(x: Tensor = data[0][chosen], y: Tensor = data[1][chosen]) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            return float(loss)

        optimizer.step(closure)
    return states


def landscapes(run: Run, states: list[dict[str, Tensor]], data: Batch) -> Iterable[LossLandscape]:
    """Yield the loss on the probe at each state; batch statistics in BatchNorm."""
    probe = torch.randperm(NUM_TRAINED_ON, generator=torch.Generator().manual_seed(1))[:PROBE_SIZE].split(128)
    batches = [(data[0][part], data[1][part]) for part in probe]
    for state in states:
        module = run.module()
        module.load_state_dict(state)
        yield LossLandscape(module, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), mode="train")


def reference(landscape: LossLandscape) -> dict[str, float]:
    """Measure from a random start, to a small residual, with a search for missed eigenvalues."""
    options: dict[str, Any] = {"k": 2, "tol": 1e-3}
    with landscape.measurement():
        hessian = top_eigenvalues(landscape, "euclidean", **options)
        relative = top_eigenvalues(landscape, "layer", which="LM", **options)
    return {"lambda_max": float(hessian.eigenvalues[0]), "invariant_sharpness": float(relative.eigenvalues[0].abs())}


def references(run: Run, states: list[dict[str, Tensor]], data: Batch) -> list[dict[str, float]]:
    """Measure each state on its own."""
    return [reference(landscape) for landscape in landscapes(run, states, data)]


def measured(run: Run, states: list[dict[str, Tensor]], data: Batch, tol: float) -> list[dict[str, float]]:
    """Measure at all states in turn, each time from what was found before."""
    metrics: dict[str, EigenvalueMetric] = {
        "lambda_max": TopEigenvalues(tol=tol),
        "invariant_sharpness": InvariantSharpness(tol=tol, shared_start=True),
    }
    rows = []
    for landscape in landscapes(run, states, data):
        with landscape.measurement():
            for metric in metrics.values():
                metric.update(landscape)
        row = {name: float(metric.value.flatten()[0]) for name, metric in metrics.items()}
        row |= {f"products of {name}": int(metric.num_products) for name, metric in metrics.items()}
        rows.append(row | {"gradients": landscape.cost.gradient_evaluations})
    return rows


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """Return what a file holds, or make it and store it there."""
    if not path.exists():
        made = make()
        torch.save(made, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return torch.load(path)


def study(folder: Path, work: Path, names: list[str]) -> list[dict[str, Any]]:
    """Return a row for each run, policy and warm measurement."""
    rows = []
    for name in names:
        run, data = RUNS[name], fashion_mnist(folder, RUNS[name].pixels)
        stem = name.replace(" ", "_").replace(",", "")
        states = cached(work / f"{stem}.states", partial(trained, run, data))
        exact = cached(work / f"{stem}.reference", partial(references, run, states, data))
        for tol, hidden in POLICIES:
            misses.LARGEST_HIDDEN_COMPONENT = hidden
            found = cached(work / f"{stem}.{tol:g}.{hidden:g}", partial(measured, run, states, data, tol))
            for i in range(1, NUM_SNAPSHOTS):
                errors = {f"error of {key}": found[i][key] / value - 1 for key, value in exact[i].items()}
                here = {"run": name, "step": i * run.every, "tol": tol, "hidden": hidden}
                rows.append(here | errors | {key: v for key, v in found[i].items() if key not in exact[i]})
        print("done:", name, flush=True, file=sys.stderr)
    return rows


def cells(rows: list[dict[str, Any]]) -> str:
    """Return the part of a table that sums up some measurements."""
    errors = [abs(row[f"error of {key}"]) for row in rows for key in ("lambda_max", "invariant_sharpness")]
    products = [
        statistics.fmean(row[f"products of {k}"] for row in rows) for k in ("lambda_max", "invariant_sharpness")
    ]
    return (
        f"{len(errors)} | {sum(e > 0.02 for e in errors) / len(errors):.2%} | {max(errors):.2%} | "
        f"{statistics.median(errors):.0e} | {products[0]:.1f} | {products[1]:.1f} | "
        f"{statistics.fmean(row['gradients'] for row in rows):.1f}"
    )


def table(rows: list[dict[str, Any]], chosen: tuple[float, float]) -> list[str]:
    """Return all runs together for each policy, and each run for the one that is the default."""
    head = "measurements | more than 2 % off | largest error | median error | products | of inv. sharpness | gradients"
    bar = "|---" * 8 + "|"
    lines = [
        f"Warm measurements of lambda_max and invariant sharpness on {PROBE_SIZE} samples against a cold reference.",
        "",
        f"| tol; hidden | {head} |",
        bar,
    ]
    for policy in POLICIES:
        here = [row for row in rows if (row["tol"], row["hidden"]) == policy]
        search = "no search" if policy[1] == 1 else f"{policy[1]:g}"
        lines.append(f"| {policy[0]:g}; {search}{' (default)' if policy == chosen else ''} | {cells(here)} |")
    lines += ["", f"Each run at the default, tol {chosen[0]:g}:", "", f"| run | {head} |", bar]
    for name in dict.fromkeys(row["run"] for row in rows):
        here = [row for row in rows if row["run"] == name and (row["tol"], row["hidden"]) == chosen]
        lines.append(f"| {name} | {cells(here)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is done")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, help="also write the table to OUT.md and all measurements to OUT.csv")
    args = parser.parse_args()
    default = TOLERANCE, misses.LARGEST_HIDDEN_COMPONENT
    args.work.mkdir(parents=True, exist_ok=True)
    rows = study(args.data, args.work, args.runs)
    lines = table(rows, default)
    print("\n".join(lines))
    if args.out is not None:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        with args.out.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
