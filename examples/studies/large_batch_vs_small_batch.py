"""Are the minima of large batches sharper than those of small batches, and do they generalise worse?

    python examples/studies/large_batch_vs_small_batch.py          # Fashion-MNIST
    python examples/studies/large_batch_vs_small_batch.py --quick  # digits

A Scale Invariant Flatness Measure for Deep Network Minima (arXiv 1902.02434) confirms with its measure, our
``InvariantSharpness``, that minima of large batches are sharper than those of small batches (its abstract). Its setting
is ours: networks of ReLU without biases, five hidden layers of 512 units and LeNet, Adam with a learning rate of 1e-3,
batches of 256 against batches of 10 % of the training set, and all 60,000 images. Cut is how far training goes,
LeNet's more than the other's.

A network is trained from the same initial weights with small and with large batches, which are compared in four ways:

- equal train loss: both as soon as they reach it, since late in training curvature shrinks with the loss;
- equal train loss, scaled lr: the same, with the learning rate of large batches scaled by the square root of the ratio
  of the batch sizes, as is usual for Adam; in the other three it is the same for both;
- equal steps: after the same number of optimizer steps, for which large batches see many more samples;
- equal epochs: after the same number of samples, for which small batches take many more steps. Their losses differ.

A second figure shows sharpness over six batch sizes, at equal train loss and learning rate, for the fully connected
network. Every effect is over seeds, paired by the initial weights. Runs that do not reach the training loss are left
out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from report import (
    VERDICT_HEADER,
    dots,
    figure,
    log_values,
    markdown_table,
    mean,
    outlook,
    shortfalls,
    spread,
    tally,
    values,
    verdict_line,
    write_csv,
)
from study import QUICK_DATA, Row, finish, parse_arguments, provenance, runs_of
from style import COLOURS, in_order, save, tidy
from training import Recipe, train_and_measure
from verdicts import Claim, Effect, Judged, difference, mean_effect, ratio

NAME = "large_batch_vs_small_batch"
NETWORKS = {"fully_connected": "fully connected, 5 layers", "lenet": "LeNet"}
CLAIMS = {
    "invariant_sharpness": Claim("invariant sharpness is higher with large batches", "above"),
    "lambda_max": Claim("lambda_max is higher with large batches", "above"),
    "path_norm_sharpness": Claim("path-norm sharpness is higher with large batches", "above"),
    "test_accuracy": Claim("test accuracy is lower with large batches", "below"),
}


CURVATURES = {
    "invariant_sharpness": "invariant sharpness",
    "lambda_max": "lambda_max",
    "path_norm_sharpness": "path-norm sharpness",
}


@dataclass(frozen=True)
class Comparison:
    """Which runs are compared where.

    Attributes:
        name: In tables and figures.
        large: Which runs with large batches.
        large_point: Where those are measured.
        small_point: Where the runs with small batches are.
    """

    name: str
    large: str
    large_point: str
    small_point: str


@dataclass(frozen=True)
class Size:
    """What differs between the full and the quick study.

    Attributes:
        base: What all runs have in common.
        losses: Of the networks that are trained, the training loss at which runs are compared.
        swept: The networks that are trained with all batch sizes.
        small_batch: Batch size.
        large_batch: Batch size.
        batch_sizes: Of the second figure.
        num_samples: Training samples.
        num_test: Test samples.
        num_steps: Optimizer steps after which runs are compared.
        num_epochs: Epochs after which runs are compared.
        parts: Networks whose large batches are computed in so many parts, one after the other: faster on CPUs.
    """

    base: Recipe
    losses: Mapping[str, float]
    swept: tuple[str, ...]
    small_batch: int
    large_batch: int
    batch_sizes: tuple[int, ...]
    num_samples: int
    num_test: int
    num_steps: int
    num_epochs: int
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, str]:
        """The networks that are trained, and what they are called in tables and figures."""
        return {name: NETWORKS[name] for name in self.losses}

    def target(self, network: str) -> str:
        """The point at which the training losses of a network are equal."""
        return f"loss={self.losses[network]:g}"

    def comparisons(self, network: str) -> list[Comparison]:
        """All comparisons of a network."""
        loss, steps = self.target(network), f"step={self.num_steps}"
        epochs = [self.steps_of(size) for size in (self.large_batch, self.small_batch)]
        return [
            Comparison("equal train loss", "large batch", loss, loss),
            Comparison("equal train loss, scaled lr", "large batch, scaled lr", loss, loss),
            Comparison("equal steps", "large batch", steps, steps),
            Comparison("equal epochs", "large batch", *epochs),
        ]

    def steps_of(self, batch_size: int) -> str:
        """The step at which batches of a size have seen the samples of ``num_epochs`` epochs."""
        return f"step={self.num_epochs * -(-self.num_samples // batch_size)}"

    def name(self, batch_size: int) -> str:
        """Return what runs with batches of a size are called."""
        return {self.small_batch: "small batch", self.large_batch: "large batch"}.get(batch_size, f"batch {batch_size}")

    def settings(self) -> dict[str, Recipe]:
        """All settings by name."""
        scale = (self.large_batch / self.small_batch) ** 0.5
        compared = self.small_batch, self.large_batch
        settings = {}
        for network in self.networks:
            target = (self.target(network),)
            base = replace(self.base, network=network, points=target)
            for size in sorted({*compared, *(self.batch_sizes if network in self.swept else ())}):
                points = (*target, f"step={self.num_steps}", self.steps_of(size)) if size in compared else target
                parts = self.parts.get(network, 1) if size == self.large_batch else 1
                recipe = replace(base, batch_size=size, points=points, parts=parts)
                settings[f"{network}, {self.name(size)}"] = recipe
            large = settings[f"{network}, {self.name(self.large_batch)}"]
            settings[f"{network}, large batch, scaled lr"] = replace(large, points=target, lr=scale * base.lr)
        return settings


FULL = Size(
    Recipe(
        points=(),
        measures=("lambda_max", "invariant_sharpness", "path_norm_sharpness"),
        max_steps=20_000,
        batch_size=0,
        lr=1e-3,
        optimizer="adam",
        data="fashion",
        num_train=60_000,
        num_probe=1000,
        looks=2,
    ),
    losses={"fully_connected": 0.25, "lenet": 0.35},
    swept=("fully_connected",),
    small_batch=256,
    large_batch=6000,
    batch_sizes=(256, 512, 1000, 2000, 4000, 6000),
    num_samples=60_000,
    num_test=10_000,
    num_steps=100,
    num_epochs=5,
    parts={"lenet": 10},
)
QUICK = Size(
    replace(FULL.base, data="digits", width=128, max_steps=500, num_probe=500),
    losses={"fully_connected": 0.1, "lenet": 0.1},
    swept=("fully_connected", "lenet"),
    small_batch=32,
    large_batch=350,
    batch_sizes=(32, 128, 350),
    num_samples=1400,
    num_test=397,
    num_steps=100,
    num_epochs=10,
    parts={"lenet": 2},
)


def judged(rows: list[Row], size: Size) -> list[Judged]:
    """Return every claim, where it is looked at, and the effect: large over (or minus) small batches, and slopes."""
    found = []
    for column, claim in CLAIMS.items():
        for network, title in size.networks.items():
            for comparison in size.comparisons(network):
                large = values(rows, f"{network}, {comparison.large}", comparison.large_point, column)
                small = values(rows, f"{network}, small batch", comparison.small_point, column)
                effect = difference(large, small, " %") if column == "test_accuracy" else ratio(large, small)
                found.append((claim, f"{title}: {comparison.name}", effect))
    for column, label in CURVATURES.items():
        rises = Claim(f"{label} rises with the batch size (slope of the logarithms)", "above")
        for network in size.swept:
            where = f"{NETWORKS[network]}: {size.batch_sizes[0]} to {size.batch_sizes[-1]}"
            found.append((rises, where, slope(rows, size, network, column)))
    return found


def slope(rows: list[Row], size: Size, network: str, column: str) -> Effect:
    """Return the slope of a logarithm over that of the batch size, by least squares in each seed that has all sizes."""
    point = size.target(network)
    by_size = [values(rows, f"{network}, {size.name(batch)}", point, column) for batch in size.batch_sizes]
    seeds = sorted(set.intersection(*map(set, by_size)))
    x = np.log(size.batch_sizes)
    return mean_effect([float(np.polyfit(x, [math.log(found[seed]) for found in by_size], 1)[0]) for seed in seeds])


def verdict_lines(rows: list[Row], size: Size) -> list[list[str]]:
    """Return the table of verdicts."""
    return [verdict_line(*line) for line in judged(rows, size)]


def mean_lines(rows: list[Row], size: Size) -> list[list[str]]:
    """Return the means over seeds that the verdicts compare."""
    curvatures = dict.fromkeys(("train_loss", "lambda_max", "invariant_sharpness"), ".3g")
    columns = {"step": ".0f", **curvatures, "test_accuracy": ".2f"}
    lines = []
    for network, title in size.networks.items():
        for comparison in size.comparisons(network):
            for setting, point in (("small batch", comparison.small_point), (comparison.large, comparison.large_point)):
                cells = []
                for column, form in columns.items():
                    cell = list(values(rows, f"{network}, {setting}", point, column).values())
                    cells.append(format(mean(cell, log=form == ".3g"), form) if cell else "–")
                lines.append([f"{title}: {comparison.name}", setting, *cells])
    return lines


def draw(rows: list[Row], size: Size, path: Path, title: str) -> None:
    """Draw a row of panels per network: small and large batches side by side, for every comparison."""
    panels = CURVATURES | {"test_accuracy": "test accuracy, %"}
    made, axes = figure(len(size.networks), len(panels), width=4.0)
    for axes_row, (network, name) in zip(axes, size.networks.items(), strict=True):
        comparisons = size.comparisons(network)
        places = {
            "small batch": [("small batch", c.small_point) for c in comparisons],
            "large batch": [(c.large, c.large_point) for c in comparisons],
        }
        for ax, (column, label) in zip(axes_row, panels.items(), strict=True):
            log = column in CURVATURES
            for shift, kind in ((-0.15, "small batch"), (0.15, "large batch")):
                groups = [values(rows, f"{network}, {s}", point, column).values() for s, point in places[kind]]
                look = {"color": COLOURS[kind], "label": kind, "line": "none"}
                dots(ax, [i + shift for i in range(len(groups))], groups, log=log, **look)
            names = [c.name.replace(", ", ",\n").replace(" ", "\n", 1) for c in comparisons]
            ax.set_xticks(range(len(comparisons)), names)
            ax.set_xlim(-0.5, len(comparisons) - 0.5)
            finish_panel(ax, f"{name}: {label}", log=log)
            ax.grid(axis="x", visible=False)
    made.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    made.suptitle(f"{title}: dots are seeds, bars their means")
    save(made, path)


def draw_over_batch_sizes(rows: list[Row], size: Size, path: Path, title: str) -> None:
    """Draw sharpness and accuracy over the batch size, at equal train loss."""
    panels = CURVATURES | {"test_accuracy": "test accuracy, %"}
    made, axes = figure(1, len(panels), width=3.4)
    for ax, (column, label) in zip(axes[0], panels.items(), strict=True):
        log = column in CURVATURES
        for network, colour in zip(size.swept, in_order(len(size.swept)), strict=True):
            settings, point = [f"{network}, {size.name(batch)}" for batch in size.batch_sizes], size.target(network)
            groups = [list(values(rows, setting, point, column).values()) for setting in settings]
            errors = [standard_error(rows, setting, point, column, size.num_test) for setting in settings]
            spread(ax, size.batch_sizes, groups, errors, color=colour, label=NETWORKS[network], log=log)
        ax.set_xscale("log")
        ax.set_xticks(size.batch_sizes, [str(batch) for batch in size.batch_sizes], rotation=45)
        ax.minorticks_off()
        ax.set_xlabel("batch size")
        finish_panel(ax, label, log=log)
    made.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    made.suptitle(f"{title}\nbands: one standard deviation over seeds; bars: standard error of the samples measured on")
    save(made, path)


def standard_error(rows: list[Row], setting: str, point: str, column: str, num_test: int) -> float:
    """Return the mean standard error of a curvature; of the accuracy that of a share of the test samples."""
    if column == "test_accuracy":
        share = mean(list(values(rows, setting, point, column).values()), log=False) / 100
        return 100 * math.sqrt(share * (1 - share) / num_test)
    return mean(list(values(rows, setting, point, f"{column}_standard_error").values()), log=False)


def finish_panel(ax: Axes, title: str, *, log: bool) -> None:
    """Set the title and the vertical axis."""
    if log:
        log_values(ax)
    ax.set_title(title)
    tidy(ax)


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=5, fashion=True)
    size = QUICK if args.quick else FULL
    runs = runs_of(size.settings(), args.seeds)
    rows = finish(runs, args.out, args.workers, partial(train_and_measure, data_dir=args.data_dir, device=args.device))
    write_csv(rows, args.results / f"{NAME}.csv")
    data = QUICK_DATA if args.quick else "Fashion-MNIST"
    title = f"Batches of {size.small_batch} and {size.large_batch}, Adam, {data}, {args.seeds} seeds"
    draw(rows, size, args.results / f"{NAME}.png", title)
    losses = " and ".join(sorted({f"{size.losses[network]:g}" for network in size.swept}))
    over = f"At a training loss of {losses}, Adam with one learning rate, {data}, {args.seeds} seeds"
    draw_over_batch_sizes(rows, size, args.results / f"{NAME}_over_batch_sizes.png", over)
    lines = verdict_lines(rows, size)
    reached = ", ".join(f"{size.losses[network]:g} ({name})" for network, name in size.networks.items())
    text = f"{title}. Equal train loss: {reached}. Effects are large over (or minus) small batches, paired by seed. "
    text += f"{tally(lines)}\n\n"
    text += markdown_table(VERDICT_HEADER, lines)
    text += "\nMeans over seeds (geometric ones of losses and curvatures):\n\n"
    header = ("comparison", "setting", "steps", "train loss", "lambda_max", "invariant sharpness", "test accuracy, %")
    text += markdown_table(header, mean_lines(rows, size))
    notes = [outlook(judged(rows, size)), shortfalls(rows), provenance(runs, args.out)]
    text += "\n" + "\n\n".join(note.strip() for note in notes if note) + "\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
