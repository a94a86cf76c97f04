"""What a Hessian product costs in basis paths, beside one in the weights.

    python examples/benchmarks/benchmark_path.py

Times products of the kept gradient graph in both geometries by turns, on the network of ``psi_flatness.py`` and on one
of 218,000 parameters, and prints medians as a table in Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from digits import ConvNet, DigitsDataModule

from lightning_flatness import LossLandscape

GEOMETRIES = ("euclidean", "path")


def larger_network() -> nn.Module:
    """The convolutional network of the design's table of costs: 218,000 parameters for images of 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2048, 60),
        nn.ReLU(),
        nn.Linear(60, 10),
    )


def problems() -> dict[str, LossLandscape]:
    """The landscapes to time products on."""
    x, y = DigitsDataModule().train_set.tensors
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    return {
        "digits, 512 samples": LossLandscape(ConvNet(), [(x[:512], y[:512])], loss_fn),
        "digits, 64 samples": LossLandscape(ConvNet(), [(x[:64], y[:64])], loss_fn),
        "218k parameters, 64 images": LossLandscape(larger_network(), [(images, labels)], loss_fn),
    }


def product_times(landscape: LossLandscape, num_rounds: int) -> dict[str, list[float]]:
    """Return seconds per product in each geometry, taken by turns."""
    times: dict[str, list[float]] = {name: [] for name in GEOMETRIES}
    with landscape.measurement():
        products: dict[str, Callable[[], Tensor]] = {}
        for name in GEOMETRIES:
            chart = landscape.chart(name)
            v = torch.randn(chart.num_coordinates)
            products[name] = partial(chart.hvp, landscape.hvp, v, gradient=landscape.gradient)
        for i in range(num_rounds + 2):
            for name, product in products.items():
                start = time.perf_counter()
                product()
                if i >= 2:  # the first ones build the graph and warm up
                    times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "benchmark_path.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lines = [
        "| network | parameters | euclidean, ms | path, ms | ratio | chart, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, landscape in problems().items():
        medians = {g: 1e3 * statistics.median(t) for g, t in product_times(landscape, args.rounds).items()}
        start = time.perf_counter()
        landscape.chart("path")
        chart = 1e3 * (time.perf_counter() - start)
        ratio = medians["path"] / medians["euclidean"]
        lines.append(
            f"| {name} | {landscape.num_parameters} | {medians['euclidean']:.2f} | {medians['path']:.2f} "
            f"| {ratio:.2f} | {chart:.1f} |"
        )
        print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
