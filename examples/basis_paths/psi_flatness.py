"""Small and large batches on real handwritten digits, measured in basis paths, and sharpness after rescaling.

    python examples/basis_paths/psi_flatness.py

1. Trains the same network with small and with large batches down to the same training loss, from the same
   initialisations, and prints PSI sharpness (relative to the paths through each weight, and in basis paths), the
   balance of basis paths and test accuracy, beside other sharpness; draws the loss surfaces of one pair on one scale.
2. Rescales the hidden units of one of them at random and shuffles them. The network computes the same, and a table
   shows which measures change.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from digits import ConvNet, DigitsDataModule
from style import draw_factors

from lightning_flatness import (
    BasisPathBalance,
    InvariantSharpness,
    LossLandscape,
    LossSurface,
    PSISharpness,
    TopEigenvalues,
    compare_surfaces,
    loss_surface,
)
from lightning_flatness.metrics import FlatnessMetric

Batch = tuple[Tensor, Tensor]


@dataclass
class Setting:
    """How a network is trained."""

    name: str
    batch_size: int
    lr: float


SMALL = Setting("small batch", 16, 0.02)
LARGE = Setting("large batch", 700, 0.1)


def train(setting: Setting, seed: int, data: DigitsDataModule, target: float, max_epochs: int = 400) -> nn.Module:
    """Train until the loss on the training set, looked at every few steps, is below the target."""
    torch.manual_seed(seed)
    module = ConvNet()
    x, y = data.train_set.tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=setting.lr, momentum=0.9)
    for _ in range(max_epochs):
        for step, chosen in enumerate(torch.randperm(len(x)).split(setting.batch_size)):
            optimizer.zero_grad()
            F.cross_entropy(module(x[chosen]), y[chosen]).backward()
            optimizer.step()
            if step % max(1, 160 // setting.batch_size) == 0:
                with torch.no_grad():
                    if F.cross_entropy(module(x), y) < target:
                        return module.eval()
    return module.eval()


def landscape_of(module: nn.Module, data: DigitsDataModule) -> LossLandscape:
    """The loss on 512 training samples."""
    x, y = data.train_set.tensors
    return LossLandscape(
        module, [(x[:512], y[:512])], lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])
    )


def measure(landscape: LossLandscape, metrics: Mapping[str, FlatnessMetric]) -> dict[str, float]:
    """Measure all metrics on the same graph of the gradient."""
    with landscape.measurement():
        for metric in metrics.values():
            metric.update(landscape)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


# --------------------------------------------------------------------------------------------- small and large batches


def compare_batch_sizes(data: DigitsDataModule, num_seeds: int, target: float, out: Path) -> tuple[nn.Module, str]:
    """Draw one pair of surfaces; return a network trained with large batches, and a table over seeds."""
    x, y = data.test_set.tensors
    measures: dict[str, Callable[[], FlatnessMetric]] = {
        "lambda_max": lambda: TopEigenvalues(tol=1e-2),
        "element": lambda: TopEigenvalues(geometry="element", tol=1e-2),
        "PSI (path norm)": lambda: PSISharpness(tol=1e-2),
        "PSI (basis paths)": lambda: PSISharpness(geometry="path", tol=1e-2),
        "balance": BasisPathBalance,
        "balance of deciles": lambda: BasisPathBalance(quantile=0.1),
    }
    columns = ("loss", "test accuracy", *measures)
    lines = [f"Trained from the same initialisations to a training loss of {target:g}:", ""]
    lines += [f"| seed | setting | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    rows: dict[str, list[dict[str, float]]] = {SMALL.name: [], LARGE.name: []}
    networks: dict[str, nn.Module] = {}
    for seed in range(num_seeds):
        for setting in (SMALL, LARGE):
            network = train(setting, seed, data, target)
            networks.setdefault(setting.name, network)
            landscape = landscape_of(network, data)
            with torch.no_grad():
                accuracy = float((network(x).argmax(dim=1) == y).double().mean())
            row = {"loss": float(landscape.loss()), "test accuracy": accuracy}
            row |= measure(landscape, {name: metric() for name, metric in measures.items()})
            rows[setting.name].append(row)
            cells = [f"{row['loss']:.4f}", f"{row['test accuracy']:.3f}", *(f"{row[name]:.3g}" for name in measures)]
            lines.append(f"| {seed} | {setting.name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines.append("")
    for column in columns[1:]:
        pairs = list(zip(rows[SMALL.name], rows[LARGE.name], strict=True))
        num_larger = sum(large[column] > small[column] for small, large in pairs)
        ratios = [large[column] / small[column] for small, large in pairs]
        spread = [max(r[column] for r in rows[n]) / min(r[column] for r in rows[n]) for n in rows]
        mean = math.exp(statistics.mean(map(math.log, ratios)))
        orders = num_larger in (0, num_seeds) and max(mean, 1 / mean) > max(spread)
        lines.append(
            f"- {column}: larger with large batches for {num_larger} of {num_seeds} seeds, by a factor of {mean:.3g} "
            f"(geometric mean); seeds alone differ by a factor of up to {max(spread):.3g}: "
            f"{'orders the two settings' if orders else 'does not order them'}"
        )
    for geometry in ("path_norm", "filter"):
        draw_surfaces(networks, data, geometry, out / f"psi_surfaces_{geometry}.png")
    return networks[LARGE.name], "\n".join(lines)


def draw_surfaces(networks: dict[str, nn.Module], data: DigitsDataModule, geometry: str, path: Path) -> None:
    """Draw the loss over the same two random directions, equally far, as far as the sharper one is worth a look."""
    landscapes = [landscape_of(network, data) for network in networks.values()]
    looks = [loss_surface(landscape, "random", geometry, num_points=3) for landscape in landscapes]
    radius = min(float(look.x[-1]) for look in looks)
    surfaces: list[LossSurface] = []
    for landscape in landscapes:
        surfaces.append(loss_surface(landscape, "random", geometry, radius=radius, num_points=25))
    figure = compare_surfaces(surfaces, list(networks))
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------- rescaling the units


@torch.no_grad()
def rescaled(network: nn.Module, decades: float = 1.0, seed: int = 0) -> nn.Module:
    """Multiply what goes into each hidden unit by a random factor, divide what leaves it by it, and shuffle units."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer, following in pairwise(layers):
        units = layer.weight.shape[0]
        c = 10 ** (decades * (2 * torch.rand(units, generator=generator) - 1))
        layer.weight.mul_(c.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(c)
        columns = following.weight.view(following.weight.shape[0], units, -1)
        columns.div_(c[:, None])
        order = torch.randperm(units, generator=generator)
        layer.weight.copy_(layer.weight[order])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order])
        columns.copy_(columns[:, order])
    return network


def demonstrate_rescaling(network: nn.Module, data: DigitsDataModule, path: Path) -> str:
    """Draw every measure before and after, and return them as a table."""
    x, _ = data.test_set.tensors
    after = rescaled(network)
    with torch.no_grad():
        difference = float((network(x) - after(x)).abs().max() / network(x).abs().max())
    results = []
    for module in (network, after):
        metrics = {
            "weights (lambda_max)": TopEigenvalues(tol=1e-3),
            "layer (invariant sharpness)": InvariantSharpness(tol=1e-3),
            "filter": TopEigenvalues(geometry="filter", tol=1e-3),
            "element": TopEigenvalues(geometry="element", tol=1e-3),
            "path norm (PSI sharpness)": PSISharpness(tol=1e-3),
            "basis paths (PSI sharpness)": PSISharpness(geometry="path", tol=1e-3),
        }
        results.append(measure(landscape_of(module, data), metrics))
    before, now = results
    lines = [
        f"Hidden units rescaled by 0.1 to 10 and shuffled; test outputs differ by {difference:.0e} of the largest:",
        "",
    ]
    lines += ["| sharpness in | before | after | factor |", "|---|---:|---:|---:|"]
    for name in before:
        factor = now[name] / before[name]
        lines.append(f"| {name} | {before[name]:.4g} | {now[name]:.4g} | {factor:.3g} |")
    factors = {name: now[name] / before[name] for name in before}
    title = "The same network, its units rescaled and shuffled: which sharpness stays"
    draw_factors(factors, path, "sharpness after rescaling and shuffling units / before", title)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="pairs of networks to train")
    parser.add_argument("--target", type=float, default=0.01, help="training loss to train to")
    parser.add_argument("--out", type=Path, default=Path("logs/psi_flatness"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The loss is not finite")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # fastest for a network of this size, and the numbers do not depend on the machine's cores
    start = time.perf_counter()
    data = DigitsDataModule()
    network, batch_sizes = compare_batch_sizes(data, args.seeds, args.target, args.out)
    text = f"{batch_sizes}\n\n{demonstrate_rescaling(network, data, args.out / 'psi_rescaling.png')}\n"
    (args.out / "psi_flatness.md").write_text(text)
    print(f"\n{text}\nTook {time.perf_counter() - start:.0f} s. Table and pictures are in {args.out}.")


if __name__ == "__main__":
    main()
