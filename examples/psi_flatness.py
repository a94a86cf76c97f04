"""Small and large batches on real handwritten digits, seen in basis paths; and what rescaling does to sharpness.

    python examples/psi_flatness.py

1. Trains the same network with small and with large batches down to the same training loss, from the same
   initialisations, and prints PSI sharpness, the balance of basis paths and test accuracy, beside the sharpness in
   weights; draws the loss surfaces of one pair in the path geometry on one scale.
2. Rescales the hidden units of one of them at random. The network computes the same; the largest eigenvalue of the
   Hessian does not stay, and the table says which measures do.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from digits import ConvNet, DigitsDataModule
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

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


def measure(landscape: LossLandscape, metrics: dict[str, FlatnessMetric]) -> dict[str, float]:
    """Measure all metrics on the same graph of the gradient."""
    with landscape.measurement():
        for metric in metrics.values():
            metric.update(landscape)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


# --------------------------------------------------------------------------------------------- small and large batches


def compare_batch_sizes(data: DigitsDataModule, num_seeds: int, target: float, out: Path) -> nn.Module:
    """Print a table over seeds, draw one pair of surfaces, and return a network."""
    x, y = data.test_set.tensors
    columns = ("loss", "test accuracy", "lambda_max", "PSI sharpness", "log10 balance")
    print(f"Trained from the same initialisations to a training loss of {target:g}:\n")
    print(f"{'seed':>4}  {'setting':<12}" + "".join(f"{c:>15}" for c in columns))
    rows: dict[str, list[dict[str, float]]] = {SMALL.name: [], LARGE.name: []}
    networks: dict[str, nn.Module] = {}
    for seed in range(num_seeds):
        for setting in (SMALL, LARGE):
            network = train(setting, seed, data, target)
            networks.setdefault(setting.name, network)
            landscape = landscape_of(network, data)
            with torch.no_grad():
                accuracy = float((network(x).argmax(dim=1) == y).double().mean())
            row = {"loss": float(landscape.loss()), "test accuracy": accuracy} | measure(
                landscape,
                {
                    "lambda_max": TopEigenvalues(tol=1e-2),
                    "PSI sharpness": PSISharpness(tol=1e-2),
                    "log10 balance": BasisPathBalance(log10=True),
                },
            )
            rows[setting.name].append(row)
            print(f"{seed:>4}  {setting.name:<12}" + "".join(f"{row[c]:>15.4g}" for c in columns))
    print()
    for column in columns[1:]:
        pairs = list(zip(rows[SMALL.name], rows[LARGE.name], strict=True))
        num_larger = sum(large[column] > small[column] for small, large in pairs)
        spread = [max(r[column] for r in rows[n]) / min(r[column] for r in rows[n]) for n in rows]
        print(
            f"{column:>14}: larger with large batches for {num_larger} of {num_seeds} seeds; "
            f"seeds alone differ by a factor of up to {max(spread):.3g}"
        )
    for geometry in ("path", "filter"):
        draw_surfaces(networks, data, geometry, out / f"surfaces_{geometry}.png")
    return networks[LARGE.name]


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
    """Multiply what goes into each hidden unit by a random factor, and divide what leaves it by the same."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer, following in pairwise(layers):
        units = layer.weight.shape[0]
        c = 10 ** (decades * (2 * torch.rand(units, generator=generator) - 1))
        layer.weight.mul_(c.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.mul_(c)
        following.weight.view(following.weight.shape[0], units, -1).div_(c[:, None])
    return network


def demonstrate_rescaling(network: nn.Module, data: DigitsDataModule, path: Path) -> None:
    """Print and draw every measure before and after."""
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
            "path (PSI sharpness)": PSISharpness(tol=1e-3),
        }
        results.append(measure(landscape_of(module, data), metrics))
    before, now = results
    print(f"\nEvery hidden unit rescaled by 0.1 ... 10; test outputs differ by {difference:.0e} of the largest:\n")
    print(f"{'sharpness in':<28}{'before':>12}{'after':>12}{'factor':>12}")
    for name in before:
        factor = now[name] / before[name]
        stays = "stays" if abs(factor - 1) < 0.01 else "changes"
        print(f"{name:<28}{before[name]:>12.4g}{now[name]:>12.4g}{factor:>12.4g}  {stays}")
    draw_factors({name: now[name] / before[name] for name in before}, path)


def draw_factors(factors: dict[str, float], path: Path) -> None:
    """Draw by how much each measure changes, on a log scale."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(reversed(factors))
    stays = [abs(factors[name] - 1) < 0.01 for name in names]
    axes.barh(names, [factors[name] - 1 for name in names], left=1, color=["C0" if s else "C3" for s in stays])
    for i, name in enumerate(names):
        text = f" x {factors[name]:.3g}" if not stays[i] else " unchanged"
        axes.text(max(factors[name], 1), i, text, va="center", fontsize="small")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *factors.values()) / 2, max(factors.values()) * 12)
    axes.set_xlabel("sharpness after rescaling units / before")
    axes.set_title("The same network, its hidden units rescaled: which sharpness stays", fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="pairs of networks to train")
    parser.add_argument("--target", type=float, default=0.01, help="training loss to train to")
    parser.add_argument("--out", type=Path, default=Path("logs/psi_flatness"))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The skeleton of basis paths has a tiny weight|The loss is not finite")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # fastest for a network of this size, and the numbers do not depend on the machine's cores
    start = time.perf_counter()
    data = DigitsDataModule()
    network = compare_batch_sizes(data, args.seeds, args.target, args.out)
    demonstrate_rescaling(network, data, args.out / "rescaling.png")
    print(
        f"\nTook {time.perf_counter() - start:.0f} s. Pictures in {args.out}: "
        + "surfaces_path.png, surfaces_filter.png, rescaling.png"
    )


if __name__ == "__main__":
    main()
