"""Does a smaller largest eigenvalue of the Hessian mean better generalisation? Five findings, in their own protocol.

    python examples/studies/max_eigenvalue_and_generalization.py          # Fashion-MNIST
    python examples/studies/max_eigenvalue_and_generalization.py --quick  # 1,000 images of it, or digits

On the Maximum Hessian Eigenvalue and Generalization (arXiv 2206.10654) says, in its abstract:

1. larger learning rates reduce lambda_max for all batch sizes, while their benefit for generalisation sometimes
   vanishes at larger batch sizes;
2. by scaling batch size and learning rate together lambda_max can be changed without affecting generalisation;
3. SAM produces a smaller lambda_max for all batch sizes, while its benefit vanishes with larger batch sizes;
4. excessive dropout can degrade generalisation, even as it promotes a smaller lambda_max;
5. BatchNorm does not consistently produce a smaller lambda_max, and nevertheless helps generalisation.

The protocol is that of the authors' code, see ``to_accuracy.py``. The multilayer perceptron is theirs, too. Cut are the
training set, to its first 10,000 images, and VGG11: to its first four convolutions, at an eighth of their width, and
5,000 images. The test set is whole. Effects are over seeds, paired by the initial weights. What counts as the same is
fixed in advance: test accuracies within half a percent point, and lambda_max within a factor of 1.25. What is certain
to help by less than half a point does not help.

BatchNorm is looked at in evaluation mode and with momentum, too. The paper has neither, and earlier versions of this
study, which had both, came to other verdicts. (That the factor of 1.25 counts for the fifth finding, too, was settled
when two seeds of five were known, and that half a point counts for what helps when three were.)
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from max_eigenvalue_grid import FULL, QUICK, Grid, batch_norm, convolutional, dropout, plain, sam, with_momentum
from report import (
    VERDICT_HEADER,
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
from study import Row, finish, parse_arguments, provenance, runs_of
from style import COLOURS, in_order, save, tidy
from to_accuracy import train_and_measure
from verdicts import Claim, Judged, Verdict, all_of, difference, judge, not_all_of, ratio

NAME = "max_eigenvalue_and_generalization"
SAME_ACCURACY, SAME_LAMBDA = 0.5, 1.25

Lines = list[Judged | list[str]]
"""Of a table: claims, or lines whose verdict is made of several claims'."""

FEWER = Claim("it helps less with the largest batches than with the smallest", "above", SAME_ACCURACY)


class Findings:
    """The verdicts and the figure of each finding, from the rows of all runs."""

    def __init__(self, rows: list[Row], grid: Grid) -> None:
        self.rows = rows
        self.grid = grid
        self.point = f"accuracy={grid.base.accuracy:g}"

    def column(self, setting: str, name: str) -> dict[int, float]:
        """Return a column by seed."""
        return values(self.rows, setting, self.point, name)

    def lambda_max(self, setting: str, *, mode: str = "") -> dict[int, float]:
        """Return lambda_max by seed: the largest up to the next iterate where that was looked at."""
        if mode:
            return self.column(setting, f"lambda_max_{mode}")
        return self.column(setting, "lambda_max") | self.column(setting, "lambda_max_between")

    def accuracy(self, setting: str) -> dict[int, float]:
        return self.column(setting, "test_accuracy")

    def benefit(self, setting: str, reference: str) -> dict[int, float]:
        """Return by how many points the test accuracy is higher, by seed."""
        a, b = self.accuracy(setting), self.accuracy(reference)
        return {seed: a[seed] - b[seed] for seed in a.keys() & b.keys()}

    def findings(self) -> dict[str, Lines]:
        """Return the lines of the table of each finding, by its heading."""
        return {
            "1. Learning rate and batch size": self.learning_rate(),
            "2. Learning rate and batch size scaled together": self.scaled_together(),
            "3. SAM and batch size": self.sharpness_aware(),
            "4. Dropout": self.excessive_dropout(),
            "5. BatchNorm": self.batch_normalization(),
        }

    def verdicts(self) -> dict[str, list[list[str]]]:
        """Return the tables in words."""
        return {name: [written(line) for line in lines] for name, lines in self.findings().items()}

    # --------------------------------------------------------------------------------- 1: learning rate x batch size

    def learning_rate(self) -> Lines:
        low, high = self.grid.lrs[0], self.grid.lrs[-1]
        pairs = {size: (plain(high, size), plain(low, size)) for size in self.grid.batch_sizes}
        return self.reduces_and_helps(f"lr {low:g} to {high:g}", "a larger learning rate", pairs)

    def reduces_and_helps(self, where: str, what: str, pairs: dict[int, tuple[str, str]]) -> Lines:
        """Judge that something reduces lambda_max for all batch sizes, and helps, but less at large ones."""
        smaller, helps = (
            Claim(f"{what} reduces lambda_max", "below"),
            Claim(f"{what} helps accuracy", "above", SAME_ACCURACY),
        )
        effects = {size: ratio(self.lambda_max(a), self.lambda_max(b)) for size, (a, b) in pairs.items()}
        lines: Lines = [(smaller, f"{where}, batch {size}", effect) for size, effect in effects.items()]
        everywhere = all_of([judge(effect, "below") for effect in effects.values()])
        lines.append([f"{what} reduces lambda_max at all batch sizes", where, "all", "", "", f"**{everywhere}**"])
        benefits = {size: self.benefit(a, b) for size, (a, b) in pairs.items()}
        first, last = min(benefits), max(benefits)
        for size in (first, last):
            lines.append((helps, f"{where}, batch {size}", difference(benefits[size], zeros(benefits[size]), " %")))
        less = difference(benefits[first], benefits[last], " %")
        return [*lines, (FEWER, f"{where}, batch {first} and {last}", less)]

    # ------------------------------------------------------------------ 2: learning rate and batch size scaled together

    def scaled_together(self) -> Lines:
        first, *_, last = [plain(lr, size) for lr, size in self.grid.diagonal]
        changes = Claim("lambda_max changes", "apart", SAME_LAMBDA)
        stays = Claim("test accuracy stays", "within", SAME_ACCURACY)
        curvature = ratio(self.lambda_max(last), self.lambda_max(first))
        accuracy = difference(self.accuracy(last), self.accuracy(first), " %")
        both = all_of([judge(curvature, "apart", SAME_LAMBDA), judge(accuracy, "within", SAME_ACCURACY)])
        where = f"{first} to {last}"
        text = "lambda_max changes without affecting accuracy"
        return [(changes, where, curvature), (stays, where, accuracy), [text, where, "both", "", "", f"**{both}**"]]

    # ---------------------------------------------------------------------------------------------- 3: SAM x batch size

    def sharpness_aware(self) -> Lines:
        lines: Lines = []
        for rho in self.grid.rhos:
            pairs = {size: (sam(rho, size), plain(self.grid.sam_lr, size)) for size in self.grid.sam_batch_sizes}
            lines += self.reduces_and_helps(f"rho {rho:g}", "SAM", pairs)
        return lines

    # ------------------------------------------------------------------------------------------------------- 4: dropout

    def excessive_dropout(self) -> Lines:
        moderate, excessive = self.grid.moderate_dropout, self.grid.dropouts[-1]
        helps = Claim("moderate dropout helps accuracy", "above", SAME_ACCURACY)
        costs = Claim("excessive dropout costs accuracy", "below", SAME_ACCURACY)
        return [
            *self.dropout_lines("moderate", 0.0, moderate, helps),
            *self.dropout_lines("excessive", moderate, excessive, costs),
        ]

    def dropout_lines(self, what: str, low: float, high: float, on_accuracy: Claim) -> Lines:
        where = f"p {low:g} to {high:g}"
        curvature = ratio(self.lambda_max(dropout(high)), self.lambda_max(dropout(low)))
        accuracy = difference(self.accuracy(dropout(high)), self.accuracy(dropout(low)), " %")
        on_curvature = Claim(f"{what} dropout reduces lambda_max", "below")
        return [(on_curvature, where, curvature), (on_accuracy, where, accuracy)]

    # ----------------------------------------------------------------------------------------------------- 5: BatchNorm

    def batch_normalization(self) -> Lines:
        places = [(convolutional(*place), batch_norm(*place)) for place in self.grid.norm_places]
        names = [(convolutional(*place), batch_norm(*place)) for place in self.grid.momentum_places]
        lines: Lines = []
        here = self.norm_lines(lines, places)
        self.norm_lines(lines, places, mode="eval", words=", in evaluation mode")
        self.norm_lines(lines, [(with_momentum(without), with_momentum(normed)) for without, normed in names])
        inconsistent = not_all_of(here)
        where = f"all {len(places)}"
        lines.append(["BatchNorm does not consistently reduce lambda_max", where, "all", "", "", f"**{inconsistent}**"])
        for without, normed in places:
            effect = difference(self.accuracy(normed), self.accuracy(without), " %")
            lines.append((Claim("BatchNorm helps accuracy", "above", SAME_ACCURACY), without, effect))
        return lines

    def norm_lines(self, lines: Lines, pairs: list[tuple[str, str]], mode: str = "", words: str = "") -> list[Verdict]:
        """Add how lambda_max with BatchNorm compares with that without, and return whether it is smaller."""
        sides = {"holds here": "smaller", "does not": "larger", "undecided": "undecided"}
        are_smaller = []
        for without, normed in pairs:
            effect = ratio(self.lambda_max(normed, mode=mode), self.lambda_max(without))
            is_smaller, side = judge(effect, "below"), sides[judge(effect, "below")]
            if judge(effect, "within", SAME_LAMBDA) == "holds here":
                is_smaller, side = "does not", "the same"
            line = verdict_line(Claim(f"lambda_max with BatchNorm{words}", "below"), without, effect)
            lines.append([*line[:-1], side])
            are_smaller.append(is_smaller)
        return are_smaller

    # ---------------------------------------------------------------------------------------------------------- figures

    def curves(self) -> dict[str, tuple[str, list[str], dict[str, list[str]]]]:
        """Return what each finding's figure shows: the axis, its ticks, and the settings along each line."""
        grid = self.grid
        by_size = {f"batch {size}": [plain(lr, size) for lr in grid.lrs] for size in grid.batch_sizes}
        by_rho = {f"SAM, rho {rho:g}": [sam(rho, size) for size in grid.sam_batch_sizes] for rho in grid.rhos}
        norms = {f"batch {size}": [convolutional(lr, size) for lr in grid.norm_lrs] for size in grid.norm_batch_sizes}
        for size in grid.norm_batch_sizes:
            norms[f"batch {size}, BatchNorm"] = [batch_norm(lr, size) for lr in grid.norm_lrs]
        pairs = [f"{lr:g}\n{size}" for lr, size in grid.diagonal]
        return {
            "1_learning_rate": ("learning rate", [f"{lr:g}" for lr in grid.lrs], by_size),
            "2_scaled_together": ("learning rate, batch size", pairs, {"SGD": [plain(*p) for p in grid.diagonal]}),
            "3_sam": (
                "batch size",
                [str(size) for size in grid.sam_batch_sizes],
                {"SGD": [plain(grid.sam_lr, size) for size in grid.sam_batch_sizes]} | by_rho,
            ),
            "4_dropout": ("dropout", [f"{p:g}" for p in grid.dropouts], {"SGD": [dropout(p) for p in grid.dropouts]}),
            "5_batch_norm": ("learning rate", [f"{lr:g}" for lr in grid.norm_lrs], norms),
        }

    def errors(self, setting: str, column: str) -> float:
        """Return the standard error that the samples make: of the probe, or of the test set."""
        if column == "lambda_max":
            return mean(list(self.column(setting, "lambda_max_standard_error").values()), log=False)
        share = mean(list(self.accuracy(setting).values()), log=False) / 100
        return 100 * math.sqrt(share * (1 - share) / self.grid.base.num_test)

    def draw(self, folder: Path, title: str) -> None:
        """Draw one figure per finding: lambda_max and test accuracy."""
        for stem, (axis, ticks, lines) in self.curves().items():
            made, axes = figure(1, 2, width=3.8, height=3.3)
            for ax, column in zip(axes[0], ("lambda_max", "test_accuracy"), strict=True):
                log = column == "lambda_max"
                read = self.lambda_max if log else self.accuracy
                for name, settings in lines.items():
                    groups = [list(read(setting).values()) for setting in settings]
                    errors = [self.errors(setting, column) for setting in settings]
                    spread(ax, range(len(ticks)), groups, errors, label=name, log=log, **look(name, list(lines)))
                ax.set_xticks(range(len(ticks)), ticks)
                ax.set_xlim(-0.3, len(ticks) - 0.7)
                ax.set(xlabel=axis, title="lambda_max" if log else "test accuracy, %")
                if log:
                    log_values(ax)
                tidy(ax)
            if len(lines) > 1:
                entries = axes[0][0].get_legend_handles_labels()
                made.legend(*entries, loc="outside lower center", ncols=4, frameon=False, handlelength=3)
            bars = "bars: standard error of the samples measured on"
            made.suptitle(f"{title}\nbands: one standard deviation over seeds; {bars}", fontsize=9)
            save(made, folder / f"{NAME}_{stem}.png")


def zeros(benefits: dict[int, float]) -> dict[int, float]:
    return dict.fromkeys(benefits, 0.0)


def written(line: Judged | list[str]) -> list[str]:
    """Return a line of a table in words."""
    return line if isinstance(line, list) else verdict_line(*line)


def look(name: str, names: list[str]) -> dict[str, str]:
    """Return the colour of a line, by its method or its place in an order; dashes mark BatchNorm."""
    ordered = [other for other in names if other != "SGD" and "BatchNorm" not in other]
    plain_name = name.removesuffix(", BatchNorm")
    colour = COLOURS["SGD"] if name == "SGD" else in_order(len(ordered))[ordered.index(plain_name)]
    return {"color": colour, "line": "--" if "BatchNorm" in name else "-"}


def text_of(findings: Findings, title: str) -> str:
    """Return title, verdicts of each finding, and what would decide the undecided ones."""
    verdicts = findings.verdicts()
    every = [line for lines in verdicts.values() for line in lines]
    text = f"{title}. Effects are ratios or differences, paired by seed. {tally(every)}\n\n"
    for heading, lines in verdicts.items():
        text += f"**{heading}**\n\n{markdown_table(VERDICT_HEADER, lines)}\n"
    judged = [line for lines in findings.findings().values() for line in lines if isinstance(line, tuple)]
    return text + "\n".join(part for part in (outlook(judged), shortfalls(findings.rows)) if part)


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=5, fashion=True)
    grid, data = FULL, "Fashion-MNIST (10,000 for training)"
    if args.quick:
        grid, data = QUICK, "1,000 images of Fashion-MNIST (quick mode: to see it work, not to conclude from)"
        if not args.has_fashion_mnist:
            grid, data = QUICK.on("digits"), "digits (quick mode: to see it work, not to conclude from)"
    runs = runs_of(grid.settings(), args.seeds)
    train = partial(train_and_measure, data_dir=args.data_dir, device=args.device)
    rows = finish(runs, args.out, args.workers, train)
    write_csv(rows, args.results / f"{NAME}.csv")
    findings = Findings(rows, grid)
    title = f"{data}, {args.seeds} seeds, at a training accuracy of {grid.base.accuracy:g} %"
    findings.draw(args.results, title)
    text = f"{text_of(findings, title)}\n\n{provenance(runs, args.out)}\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
