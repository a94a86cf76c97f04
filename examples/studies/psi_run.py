"""The runs of the study of PSI-flatness: pairs of networks to look at, and small networks for the bound."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from balance_bound import NOISES, Complexity, NoisyChain, bound_of, complexity_of, largest_error
from four_kinds import Data, Trained, data_of, descend, loss_and_accuracy, optimizer_of, train
from measures import measure_all
from study import Row
from torch import Tensor, nn
from torch.nn import functional as F
from training import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from fashion_mnist import FOLDER

from lightning_flatness import LossLandscape, LossSurface, OutputLoss, loss_surface

NUM_DRAWS = 40
"""Noisy networks that stand for all of them; a standard error says how well."""
GEOMETRIES = ("path", "path_norm")
DIRECTIONS = ("random", "eigenvectors")


@dataclass(frozen=True)
class PairRecipe:
    """Two ways of training the same network from the same weights.

    Attributes:
        recipes: By the name of the setting: first the one whose PSI sharpness is small.
        num_probe: Training samples to measure on.
        num_points: Of a surface, per axis; surfaces are those of seed 0.
    """

    recipes: dict[str, Recipe]
    num_probe: int
    num_points: int


@dataclass(frozen=True)
class SmallRecipe:
    """A network with one hidden layer for images of 7x7 pixels, few weights against many samples.

    Attributes:
        width: Hidden units.
        batch_size: Of SGD with momentum 0.9.
        lr: Its learning rate.
        data: ``"fashion"`` or ``"digits"``.
        num_train: Training samples.
        epochs: How long.
    """

    width: int
    batch_size: int
    lr: float
    data: str = "fashion"
    num_train: int = 60_000
    epochs: int = 5


def train_and_measure(
    setting: str,
    seed: int,
    recipe: PairRecipe | SmallRecipe,
    folder: Path,
    data_dir: Path = FOLDER,
    device: str = "cpu",
) -> list[Row]:
    """Do a run.

    Args:
        setting: Of the run.
        seed: Of the initial weights, which both networks of a pair have, and of the order of samples.
        recipe: What to do.
        folder: Where logs would be: there are none.
        data_dir: Folder of Fashion-MNIST.
        device: Where to train and measure.

    Returns:
        A row per network (``part``: ``"pair"`` or ``"bound"``), and one per point of a surface (``"surface"``).
    """
    if isinstance(recipe, SmallRecipe):
        return [_bound_row(setting, seed, recipe, data_of(recipe.data, recipe.num_train, data_dir).to(device))]
    first = next(iter(recipe.recipes.values()))
    data = data_of(first.data, first.num_train, data_dir).to(device)
    networks = {name: train(one, seed, data) for name, one in recipe.recipes.items()}
    rows = [_pair_row(name, seed, recipe, networks[name], data) for name in networks]
    if seed == 0 and all(row["reached"] for row in rows):
        probe = tuple(part[: recipe.num_probe] for part in data.train)
        modules = {name: trained.module for name, trained in networks.items()}
        rows += [row | {"seed": seed} for row in surface_rows(modules, probe, recipe.num_points)]
    return rows


# --------------------------------------------------------------------------------------------------- pairs of networks


def _pair_row(setting: str, seed: int, pair: PairRecipe, trained: Trained, data: Data) -> Row:
    recipe = pair.recipes[setting]
    (point,) = recipe.points
    row: Row = {"part": "pair", "setting": setting, "seed": seed, "point": point, "reached": trained.reached}
    if not trained.reached:
        return row
    row |= {"step": trained.step, "epoch": trained.step / -(-len(data.train[0]) // recipe.batch_size)}
    for name, samples in (("train", data.train), ("test", data.test)):
        row[f"{name}_loss"], row[f"{name}_accuracy"] = loss_and_accuracy(trained.module, samples, data.train[0])
    x, y = data.train
    probe = (x[: pair.num_probe], y[: pair.num_probe])
    measured = measure_all(trained.module, recipe.network, probe, len(x), names=recipe.measures)
    row |= {name: value for name, value in measured.items() if not name.endswith("seconds")}
    assert isinstance(trained.module, nn.Sequential)
    return row | {"bound": _least_bound(complexity_of(trained.module), len(x))}


def _least_bound(complexity: Complexity, num_train: int) -> float:
    """Return what the bound would be in percent if the noisy network made no error on its training samples."""
    return 100 * min(largest_error(0.0, complexity.budget(noise, num_train)) for noise in NOISES)


def surface_rows(modules: dict[str, nn.Module], probe: tuple[Tensor, ...], num_points: int) -> list[Row]:
    """Return the loss over planes through both networks, equally far in both, a row per point.

    The plane is spanned by two random directions in the coordinates of a geometry, or by the eigenvectors of the two
    largest eigenvalues. How far: as far as the loss of the sharper network has risen by about one.
    """
    landscapes = {name: LossLandscape(m, [probe], OutputLoss(F.cross_entropy)) for name, m in modules.items()}
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The loss is not finite at")  # the figure shows where
        for geometry, kind in product(GEOMETRIES, DIRECTIONS):
            looks = {
                name: loss_surface(landscape, kind, geometry, num_points=3) for name, landscape in landscapes.items()
            }
            radius = min(float(look.x[-1]) for look in looks.values())
            for name, landscape in landscapes.items():
                plane = looks[name].directions
                surface = loss_surface(landscape, plane, geometry, radius=radius, num_points=num_points)
                place = {"part": "surface", "setting": name, "geometry": geometry, "directions": kind}
                rows += [place | point for point in _points(surface)]
    return rows


def _points(surface: LossSurface) -> list[dict[str, Any]]:
    assert surface.y is not None
    return [
        {"x": float(f"{x:.6g}"), "y": float(f"{y:.6g}"), "loss": float(f"{z:.6g}") if math.isfinite(z) else None}
        for y, row in zip(surface.y.tolist(), surface.losses.tolist(), strict=True)
        for x, z in zip(surface.x.tolist(), row, strict=True)
    ]


# --------------------------------------------------------------------------------------- small networks, for the bound


def pooled(samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return images of 14x14 pixels averaged to 7x7."""
    return F.avg_pool2d(samples[0], 2), samples[1]


def _bound_row(setting: str, seed: int, recipe: SmallRecipe, data: Data) -> Row:
    samples, new_samples = pooled(data.train), pooled(data.test)
    noisy = NoisyChain(train_small(recipe, seed, samples), NUM_DRAWS)
    num_train, known = len(samples[0]), noisy.complexity
    row: Row = {"part": "bound", "setting": setting, "seed": seed, "point": f"epochs={recipe.epochs}", "reached": True}
    row |= {"num_train": num_train, "num_paths": known.num_paths, "applies": known.applies}
    if not known.applies:
        return row
    bound, noise = bound_of(noisy, samples)
    row |= {"log_balance": known.log_balance, "noise": noise, "nats": known.divergence(noise), "bound": 100 * bound}
    for name, part in (("train", samples), ("test", new_samples)):
        row[f"{name}_error"] = 100 * noisy.error(part, 0.0)[0]
        mean, spread = noisy.error(part, noise)
        row |= {f"noisy_{name}_error": 100 * mean, f"noisy_{name}_error_standard_error": 100 * spread}
    row["holds"] = row["noisy_test_error"] <= row["bound"]
    balanced = Complexity(known.num_paths, known.num_units, known.log_skeletons, 0.0)
    at_best = largest_error(row["noisy_train_error"] / 100, balanced.budget(noise, num_train))
    return row | {"bound_if_balanced": 100 * at_best}


def train_small(recipe: SmallRecipe, seed: int, samples: tuple[Tensor, Tensor]) -> nn.Sequential:
    """Return the network after its epochs."""
    x, y = samples
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(x[0].numel(), recipe.width), nn.ReLU(), nn.Linear(recipe.width, 10)
    ).to(x.device)
    optimizer = optimizer_of(Recipe((), (), 0, recipe.batch_size, recipe.lr), module)
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(x)).to(x.device).split(recipe.batch_size):
            descend(module, optimizer, x[chosen], y[chosen])
    return module
