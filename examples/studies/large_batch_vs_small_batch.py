"""Are the minima of large batches sharper than those of small batches, and do they generalise worse?

    python examples/studies/large_batch_vs_small_batch.py          # MNIST 5k
    python examples/studies/large_batch_vs_small_batch.py --quick  # digits

A Scale Invariant Flatness Measure for Deep Network Minima (arXiv 1902.02434) confirms with its measure, our
``InvariantSharpness``, that minima of large batches are sharper than those of small batches (its abstract). That they
are less accurate, too, and the setting (networks without biases, Adam with learning rate 1e-3) are from memory.

Two networks without biases (five hidden layers of 512 units, and LeNet) are trained from the same initial weights with
small batches and with all training samples as one batch, and compared in four ways:

- equal train loss: both as soon as they reach it, since late in training curvature shrinks with the loss;
- equal train loss, scaled lr: the same, with the learning rate of the full batch scaled by the square root of the ratio
  of the batch sizes, as is usual for Adam; in the other three it is the same for both;
- equal steps: after the same number of optimizer steps, for which full batches see many more samples;
- equal epochs: after the same number of samples, for which small batches take many more steps. Their losses differ.

Every effect is over seeds, paired by the initial weights. Runs that do not reach the training loss are left out and
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from report import (
    VERDICT_HEADER,
    dots,
    figure,
    log_axis,
    markdown_table,
    mean,
    shortfalls,
    tally,
    values,
    verdict_line,
    write_csv,
)
from study import QUICK_DATA, Row, finish, parse_arguments, provenance, runs_of
from style import COLOURS, save, tidy
from training import Recipe
from verdicts import Claim, difference, ratio

NAME = "large_batch_vs_small_batch"
NETWORKS = {"fully_connected": "fully connected, 5 layers", "lenet": "LeNet"}
CLAIMS = {
    "invariant_sharpness": Claim("invariant sharpness is higher with the full batch", "above"),
    "lambda_max": Claim("lambda_max is higher with the full batch", "above"),
    "test_accuracy": Claim("test accuracy is lower with the full batch", "below"),
}


@dataclass(frozen=True)
class Comparison:
    """Which runs are compared where.

    Attributes:
        name: In tables and figures.
        full: Which runs with the full batch.
        full_point: Where those are measured.
        small_point: Where the runs with small batches are.
    """

    name: str
    full: str
    full_point: str
    small_point: str


@dataclass(frozen=True)
class Size:
    """What differs between the full and the quick study."""

    base: Recipe
    small_batch: int
    num_samples: int
    loss: float
    num_steps: int
    num_epochs: int

    @property
    def comparisons(self) -> list[Comparison]:
        """All comparisons."""
        target, steps = f"loss={self.loss:g}", f"step={self.num_steps}"
        return [
            Comparison("equal train loss", "full batch", target, target),
            Comparison("equal train loss, scaled lr", "full batch, scaled lr", target, target),
            Comparison("equal steps", "full batch", steps, steps),
            Comparison("equal epochs", "full batch", f"step={self.num_epochs}", self.epochs_of_small_batches),
        ]

    @property
    def epochs_of_small_batches(self) -> str:
        """The step at which small batches have seen as many samples as the full batch in its epochs."""
        return f"step={self.num_epochs * -(-self.num_samples // self.small_batch)}"

    def settings(self) -> dict[str, Recipe]:
        """All settings by name."""
        target, steps = f"loss={self.loss:g}", f"step={self.num_steps}"
        scale = (self.num_samples / self.small_batch) ** 0.5
        settings = {}
        for network in NETWORKS:
            base = replace(self.base, network=network, batch_size=self.num_samples)
            points = (target, steps, self.epochs_of_small_batches)
            settings[f"{network}, small batch"] = replace(base, batch_size=self.small_batch, points=points)
            points = (target, steps, f"step={self.num_epochs}")
            settings[f"{network}, full batch"] = replace(base, points=points)
            settings[f"{network}, full batch, scaled lr"] = replace(base, points=(target,), lr=scale * base.lr)
        return settings


FULL = Size(
    Recipe(
        points=(),
        measures=("lambda_max", "invariant_sharpness"),
        max_steps=2500,
        batch_size=0,
        lr=1e-3,
        optimizer="adam",
        pixels=16,
    ),
    small_batch=50,
    num_samples=1000,
    loss=0.01,
    num_steps=100,
    num_epochs=30,
)
QUICK = Size(
    replace(FULL.base, data="digits", width=128, max_steps=500),
    small_batch=32,
    num_samples=1400,
    loss=0.1,
    num_steps=100,
    num_epochs=10,
)


def verdict_lines(rows: list[Row], comparisons: list[Comparison]) -> list[list[str]]:
    """Judge every claim for every network and comparison: full over (or minus) small batches."""
    lines = []
    for column, claim in CLAIMS.items():
        for network, title in NETWORKS.items():
            for comparison in comparisons:
                full = values(rows, f"{network}, {comparison.full}", comparison.full_point, column)
                small = values(rows, f"{network}, small batch", comparison.small_point, column)
                effect = difference(full, small, " %") if column == "test_accuracy" else ratio(full, small)
                lines.append(verdict_line(claim, f"{title}: {comparison.name}", effect))
    return lines


def mean_lines(rows: list[Row], comparisons: list[Comparison]) -> list[list[str]]:
    """Return the means over seeds that the verdicts compare."""
    curvatures = dict.fromkeys(("train_loss", "lambda_max", "invariant_sharpness"), ".3g")
    columns = {"step": ".0f", **curvatures, "test_accuracy": ".2f"}
    lines = []
    for network, title in NETWORKS.items():
        for comparison in comparisons:
            for setting, point in (("small batch", comparison.small_point), (comparison.full, comparison.full_point)):
                cells = []
                for column, form in columns.items():
                    cell = list(values(rows, f"{network}, {setting}", point, column).values())
                    cells.append(format(mean(cell, log=form == ".3g"), form) if cell else "–")
                lines.append([f"{title}: {comparison.name}", setting, *cells])
    return lines


def draw(rows: list[Row], comparisons: list[Comparison], path: Path, title: str) -> None:
    """Draw a row of panels per network: small and full batches side by side, for every comparison."""
    panels = (
        ("invariant_sharpness", "invariant sharpness", True),
        ("lambda_max", "lambda_max", True),
        ("test_accuracy", "test accuracy, %", False),
    )
    places = {
        "small batch": [("small batch", c.small_point) for c in comparisons],
        "full batch": [(c.full, c.full_point) for c in comparisons],
    }
    made, axes = figure(len(NETWORKS), len(panels), width=4.0)
    for axes_row, (network, name) in zip(axes, NETWORKS.items(), strict=True):
        for ax, (column, label, log) in zip(axes_row, panels, strict=True):
            for color, shift, kind in (
                (COLOURS["small batch"], -0.15, "small batch"),
                (COLOURS["large batch"], 0.15, "full batch"),
            ):
                groups = [values(rows, f"{network}, {s}", point, column).values() for s, point in places[kind]]
                dots(ax, [i + shift for i in range(len(groups))], groups, color=color, label=kind, line="none", log=log)
            names = [c.name.replace(", ", ",\n").replace(" ", "\n", 1) for c in comparisons]
            ax.set_xticks(range(len(comparisons)), names)
            ax.set_xlim(-0.5, len(comparisons) - 0.5)
            ax.tick_params(axis="x", labelsize=8)
            if log:
                ax.set_yscale("log")
                log_axis(ax.yaxis)
            ax.set_title(f"{name}: {label}", fontsize=10)
            tidy(ax)
            ax.grid(axis="x", visible=False)
    made.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    made.suptitle(title, fontsize=11)
    save(made, path)


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=5)
    size = QUICK if args.quick else FULL
    runs = runs_of(size.settings(), args.seeds)
    rows = finish(runs, args.out, args.workers)
    write_csv(rows, args.results / f"{NAME}.csv")
    data = QUICK_DATA if args.quick else "MNIST 5k (1,000 for training, averaged to 16x16)"
    title = f"Batches of {size.small_batch} and {size.num_samples} (all), Adam, {data}, {args.seeds} seeds"
    draw(rows, size.comparisons, args.results / f"{NAME}.png", f"{title}: dots are seeds, bars their means")
    lines = verdict_lines(rows, size.comparisons)
    text = f"{title}. Effects are full over (or minus) small batches, paired by seed. {tally(lines)}\n\n"
    text += markdown_table(VERDICT_HEADER, lines)
    text += "\nMeans over seeds (geometric ones of losses and curvatures):\n\n"
    header = ("comparison", "setting", "steps", "train loss", "lambda_max", "invariant sharpness", "test accuracy, %")
    text += markdown_table(header, mean_lines(rows, size.comparisons))
    text += f"\n{shortfalls(rows)}\n\n{provenance(runs, args.out)}\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
