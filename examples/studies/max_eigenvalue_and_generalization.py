"""Does a smaller largest eigenvalue of the Hessian mean better generalisation? Five findings, tried again.

    python examples/studies/max_eigenvalue_and_generalization.py          # MNIST 5k
    python examples/studies/max_eigenvalue_and_generalization.py --quick  # digits

On the Maximum Hessian Eigenvalue and Generalization (arXiv 2206.10654) says, in its abstract:

1. larger learning rates reduce lambda_max for all batch sizes, while their benefit for generalisation sometimes
   vanishes at larger batch sizes;
2. by scaling batch size and learning rate together lambda_max can be changed without affecting generalisation;
3. SAM produces a smaller lambda_max for all batch sizes, while its benefit vanishes with larger batch sizes;
4. excessive dropout can degrade generalisation, even as it promotes a smaller lambda_max;
5. BatchNorm does not consistently produce a smaller lambda_max, and nevertheless helps generalisation.

The paper has larger networks on CIFAR-10 (from memory); here it is a small convolutional network on MNIST, trained
with momentum. All networks are measured at the same training loss (that of evaluation mode: no dropout, running
statistics of BatchNorm), since late in training lambda_max shrinks with the loss. lambda_max is that of the monitor's
default mode, with BatchNorm's statistics of the batch; the committed table is older and of evaluation mode. Effects are
over seeds, paired by the initial weights. What counts as the same is fixed in advance: test accuracies within one
percent point, and lambda_max within a factor of 1.25.
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
    shortfalls,
    tally,
    values,
    verdict_line,
    write_csv,
)
from study import QUICK_DATA, Row, finish, parse_arguments, provenance, runs_of
from style import COLOURS, save, tidy
from training import Recipe
from verdicts import Claim, all_of, difference, judge, not_all_of, ratio

NAME = "max_eigenvalue_and_generalization"
SAME_ACCURACY, SAME_LAMBDA = 1.0, 1.25


@dataclass(frozen=True)
class Grid:
    """What is trained: learning rates and batch sizes, small and large, plain, with SAM, dropout and BatchNorm.

    SAM and dropout are tried at the large learning rate, dropout with large batches, and down to a training loss of its
    own, which the noise of excessive dropout can still reach.
    """

    base: Recipe
    lrs: tuple[float, float]
    batch_sizes: tuple[int, int]
    rho: float
    dropouts: tuple[float, float]
    dropout_loss: float

    def settings(self) -> dict[str, Recipe]:
        """All settings by name, each once: findings share them."""
        settings = {}
        for size in self.batch_sizes:
            for lr in self.lrs:
                settings[plain(lr, size)] = replace(self.base, lr=lr, batch_size=size)
                settings[batch_norm(lr, size)] = replace(self.base, lr=lr, batch_size=size, batch_norm=True)
            settings[sam(size)] = replace(self.base, lr=self.lrs[1], batch_size=size, rho=self.rho)
        at_loss = replace(self.base, points=(f"loss={self.dropout_loss:g}",))
        for p in (0.0, *self.dropouts):
            settings[dropout(p)] = replace(at_loss, lr=self.lrs[1], batch_size=self.batch_sizes[1], dropout=p)
        return settings


def plain(lr: float, batch_size: int) -> str:
    return f"lr {lr:g}, batch {batch_size}"


def sam(batch_size: int) -> str:
    return f"SAM, batch {batch_size}"


def dropout(p: float) -> str:
    return f"dropout {p:g}"


def batch_norm(lr: float, batch_size: int) -> str:
    return f"BatchNorm, lr {lr:g}, batch {batch_size}"


FULL = Grid(
    Recipe(points=("loss=0.03",), measures=("lambda_max",), max_steps=2500, batch_size=0, lr=0.0),
    lrs=(0.02, 0.08),
    batch_sizes=(50, 200),
    rho=0.1,
    dropouts=(0.2, 0.6),
    dropout_loss=0.1,
)
QUICK = replace(
    FULL,
    base=replace(FULL.base, data="digits", points=("loss=0.1",), max_steps=1000),
    batch_sizes=(32, 128),
    dropout_loss=0.3,
    dropouts=(0.2, 0.6),
)


class Findings:
    """The verdicts and the figure of each finding, from the rows of all runs."""

    def __init__(self, rows: list[Row], grid: Grid) -> None:
        self.rows = rows
        self.grid = grid
        self.points = {name: recipe.points[0] for name, recipe in grid.settings().items()}

    def lambda_max(self, setting: str) -> dict[int, float]:
        return values(self.rows, setting, self.points[setting], "lambda_max")

    def accuracy(self, setting: str) -> dict[int, float]:
        return values(self.rows, setting, self.points[setting], "test_accuracy")

    def benefit(self, setting: str, reference: str) -> dict[int, float]:
        """Return by how many points the test accuracy is higher, by seed."""
        a, b = self.accuracy(setting), self.accuracy(reference)
        return {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}

    def verdicts(self) -> dict[str, list[list[str]]]:
        """Return the lines of the table of each finding, by its heading."""
        return {
            "1. Learning rate and batch size": self.learning_rate(),
            "2. Learning rate and batch size scaled together": self.scaled_together(),
            f"3. SAM (rho = {self.grid.rho:g}) and batch size": self.sharpness_aware(),
            "4. Dropout": self.excessive_dropout(),
            "5. BatchNorm": self.batch_normalization(),
        }

    # --------------------------------------------------------------------------------- 1: learning rate x batch size

    def learning_rate(self) -> list[list[str]]:
        low, high = self.grid.lrs
        smaller = Claim("a larger learning rate reduces lambda_max", "below")
        helps = Claim("a larger learning rate helps accuracy", "above")
        vanishes = Claim("it helps less with large batches than with small ones", "above")
        lines, benefits = [], []
        for size in self.grid.batch_sizes:
            effect = ratio(self.lambda_max(plain(high, size)), self.lambda_max(plain(low, size)))
            lines.append(verdict_line(smaller, f"lr {low:g} to {high:g}, batch {size}", effect))
            benefits.append(self.benefit(plain(high, size), plain(low, size)))
        where = f"lr {low:g} to {high:g}, batch {self.grid.batch_sizes[0]}"
        lines.append(verdict_line(helps, where, difference(benefits[0], dict.fromkeys(benefits[0], 0.0), " %")))
        where += f" and {self.grid.batch_sizes[-1]}"
        lines.append(verdict_line(vanishes, where, difference(benefits[0], benefits[-1], " %")))
        return lines

    # ------------------------------------------------------------------ 2: learning rate and batch size scaled together

    def scaled_together(self) -> list[list[str]]:
        first, last = [plain(lr, size) for lr, size in zip(self.grid.lrs, self.grid.batch_sizes, strict=True)]
        changes = Claim("lambda_max changes", "apart", SAME_LAMBDA)
        stays = Claim("test accuracy stays", "within", SAME_ACCURACY)
        curvature = ratio(self.lambda_max(last), self.lambda_max(first))
        accuracy = difference(self.accuracy(last), self.accuracy(first), " %")
        both = all_of([judge(curvature, "apart", SAME_LAMBDA), judge(accuracy, "within", SAME_ACCURACY)])
        where = f"{first} to {last}"
        return [
            verdict_line(changes, where, curvature),
            verdict_line(stays, where, accuracy),
            ["lambda_max changes without affecting accuracy", where, "both", "", "", f"**{both}**"],
        ]

    # ---------------------------------------------------------------------------------------------- 3: SAM x batch size

    def sharpness_aware(self) -> list[list[str]]:
        smaller = Claim("SAM reduces lambda_max", "below")
        helps = Claim("SAM helps accuracy", "above")
        vanishes = Claim("it helps less with large batches than with small ones", "above")
        lines, benefits = [], []
        for size in self.grid.batch_sizes:
            reference = plain(self.grid.lrs[1], size)
            effect = ratio(self.lambda_max(sam(size)), self.lambda_max(reference))
            lines.append(verdict_line(smaller, f"batch {size}", effect))
            benefits.append(self.benefit(sam(size), reference))
        where = f"batch {self.grid.batch_sizes[0]}"
        lines.append(verdict_line(helps, where, difference(benefits[0], dict.fromkeys(benefits[0], 0.0), " %")))
        where += f" and {self.grid.batch_sizes[-1]}"
        lines.append(verdict_line(vanishes, where, difference(benefits[0], benefits[-1], " %")))
        return lines

    # ------------------------------------------------------------------------------------------------------- 4: dropout

    def excessive_dropout(self) -> list[list[str]]:
        moderate, excessive = self.grid.dropouts[0], self.grid.dropouts[-1]
        where = f"p {moderate:g} to {excessive:g}"
        smaller = Claim("excessive dropout reduces lambda_max", "below")
        worse = Claim("excessive dropout lowers accuracy", "below")
        curvature = ratio(self.lambda_max(dropout(excessive)), self.lambda_max(dropout(moderate)))
        accuracy = difference(self.accuracy(dropout(excessive)), self.accuracy(dropout(moderate)), " %")
        return [verdict_line(smaller, where, curvature), verdict_line(worse, where, accuracy)]

    # ----------------------------------------------------------------------------------------------------- 5: BatchNorm

    def batch_normalization(self) -> list[list[str]]:
        smaller = Claim("lambda_max with BatchNorm", "below")
        sides = {"holds here": "smaller", "does not": "larger", "undecided": "undecided"}
        helps = Claim("BatchNorm helps accuracy", "above")
        lines, verdicts = [], []
        places = [(lr, size) for size in self.grid.batch_sizes for lr in self.grid.lrs]
        for place in places:
            effect = ratio(self.lambda_max(batch_norm(*place)), self.lambda_max(plain(*place)))
            verdicts.append(judge(effect, "below"))
            lines.append([*verdict_line(smaller, plain(*place), effect)[:-1], sides[verdicts[-1]]])
        inconsistent = "BatchNorm does not consistently reduce lambda_max"
        lines.append([inconsistent, "all four", "all", "", "", f"**{not_all_of(verdicts)}**"])
        for place in places:
            effect = difference(self.accuracy(batch_norm(*place)), self.accuracy(plain(*place)), " %")
            lines.append(verdict_line(helps, plain(*place), effect))
        return lines

    # ---------------------------------------------------------------------------------------------------------- figures

    def curves(self) -> dict[str, tuple[str, list[str], dict[str, list[str]]]]:
        """Return what each finding's figure shows: the axis, its ticks, and the settings along each line."""
        lrs, sizes = self.grid.lrs, self.grid.batch_sizes
        diagonal = list(zip(lrs, sizes, strict=True))
        by_lr = {f"batch {size}": [plain(lr, size) for lr in lrs] for size in sizes}
        normalized = {f"batch {size}, BatchNorm": [batch_norm(lr, size) for lr in lrs] for size in sizes}
        sharpness_aware = {
            "SGD": [plain(lrs[1], size) for size in sizes],
            f"SAM, rho = {self.grid.rho:g}": [sam(size) for size in sizes],
        }
        dropped = [dropout(p) for p in (0.0, *self.grid.dropouts)]
        lr_ticks, pair_ticks = [f"{lr:g}" for lr in lrs], [f"{size}, {lr:g}" for lr, size in diagonal]
        return {
            "1_learning_rate": ("learning rate", lr_ticks, by_lr),
            "2_scaled_together": ("batch size, learning rate", pair_ticks, {"": [plain(*pair) for pair in diagonal]}),
            "3_sam": ("batch size", [str(size) for size in sizes], sharpness_aware),
            "4_dropout": ("dropout probability", ["0", *map(str, self.grid.dropouts)], {"": dropped}),
            "5_batch_norm": ("learning rate", lr_ticks, by_lr | normalized),
        }

    def look(self, line: str) -> dict[str, str]:
        """Return the colour of a line by its method or size of batches; dashes mark BatchNorm."""
        sizes = dict(zip(("small batch", "large batch"), self.grid.batch_sizes, strict=True))
        by_size = [COLOURS[name] for name, size in sizes.items() if line.split(",")[0] == f"batch {size}"]
        method = COLOURS["SAM" if line.startswith("SAM") else "SGD"]
        return {"color": [*by_size, method][0], "line": "--" if "BatchNorm" in line else "-"}

    def draw(self, folder: Path, title: str) -> None:
        """Draw one figure per finding: lambda_max and test accuracy."""
        for stem, (axis, ticks, lines) in self.curves().items():
            made, axes = figure(1, 2, width=3.8, height=3.2)
            for ax, label, read in zip(
                axes[0], ("lambda_max", "test accuracy, %"), (self.lambda_max, self.accuracy), strict=True
            ):
                log = label == "lambda_max"
                for i, (name, settings) in enumerate(lines.items()):
                    look = self.look(name)
                    groups = [read(setting).values() for setting in settings]
                    shift = 0.06 * (i - (len(lines) - 1) / 2)  # so that the dots of lines do not cover each other
                    dots(ax, [x + shift for x in range(len(ticks))], groups, label=name, log=log, **look)
                ax.set_xticks(range(len(ticks)), ticks)
                ax.set_xlim(-0.5, len(ticks) - 0.5)
                ax.set(xlabel=axis)
                if log:
                    ax.set_yscale("log")
                    log_axis(ax.yaxis)
                ax.set_title(label, fontsize=10)
                tidy(ax)
            if len(lines) > 1:
                handles, labels = axes[0][0].get_legend_handles_labels()
                options = {"ncols": 4, "fontsize": 8, "frameon": False, "handlelength": 3}
                made.legend(handles, labels, loc="outside lower center", **options)
            loss = {self.points[setting].removeprefix("loss=") for settings in lines.values() for setting in settings}
            made.suptitle(f"{title}, at training loss {loss.pop()}\ndots are seeds, lines their means", fontsize=9)
            save(made, folder / f"{NAME}_{stem}.png")


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=5)
    grid = QUICK if args.quick else FULL
    runs = runs_of(grid.settings(), args.seeds)
    rows = finish(runs, args.out, args.workers)
    write_csv(rows, args.results / f"{NAME}.csv")
    findings = Findings(rows, grid)
    data = QUICK_DATA if args.quick else "MNIST 5k (1,000 for training, averaged to 8x8)"
    loss = grid.base.points[0].removeprefix("loss=")
    title = f"{data}, {args.seeds} seeds, at equal training loss ({loss}; dropout: {grid.dropout_loss:g})"
    findings.draw(args.results, f"{data}, {args.seeds} seeds")
    verdicts = findings.verdicts()
    lines = [line for lines in verdicts.values() for line in lines]
    text = f"{title}. Effects are ratios or differences, paired by seed. {tally(lines)}\n\n"
    for heading, lines in verdicts.items():
        text += f"**{heading}**\n\n{markdown_table(VERDICT_HEADER, lines)}\n"
    text += f"{shortfalls(rows)}\n\n{provenance(runs, args.out)}\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
