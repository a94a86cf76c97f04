"""What does sharpness-aware training buy, and at what price in gradients and seconds?

    python examples/studies/sam_at_what_price.py          # Fashion-MNIST
    python examples/studies/sam_at_what_price.py --quick  # digits

Compared with SGD of the same momentum, learning rate and initial weights: SAM (arXiv 2010.01412) at every step, at
every fifth, and in the last 10, 20 and 50 % of training (arXiv 2410.10373); ASAM (arXiv 2102.11600); and SAM without a
second gradient, along the momentum (arXiv 2401.12033) or the gradient of the step before. A network of two hidden
layers is trained with a constant learning rate. Its minima are compared in three ways:

- equal epochs: after the same number of epochs, for which SAM takes up to twice the gradients;
- equal gradients: when the same number of gradients is spent, so that SGD may train for twice as many epochs as SAM.
  "The last 20 %" is then of the longer training, and a run of its own;
- equal train loss: at the end of the epoch in which the loss falls to a level, since late in training curvature shrinks
  with the loss. Where that epoch comes before SAM has begun there is nothing to compare.

No rho is tuned: 0.05 for SAM and 0.5 for ASAM, as usual, and 0.05 for both ways without a second gradient, so that all
but ASAM move the weights equally far. Every effect is over seeds, paired by the initial weights. Since methods that
cost nothing may well do nothing, each claim is that there is a difference; and how small a difference counts as none
was chosen before the runs: a quarter of a curvature, half a percent of accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from price_run import POINTS, PriceRecipe, train_and_measure
from report import (
    VERDICT_HEADER,
    deviation,
    figure,
    log_values,
    markdown_table,
    mean,
    outlook,
    shortfalls,
    tally,
    values,
    verdict_line,
    write_csv,
)
from study import QUICK_DATA, Row, finish, parse_arguments, provenance, runs_of
from style import draw_band, in_order, save, tidy
from verdicts import Claim, Effect, difference, judge, ratio

NAME = "sam_at_what_price"
METHODS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "SAM": {"rho": 0.05},
    "SAM, every 5th step": {"rho": 0.05, "interval": 5},
    "SAM, last 10 %": {"rho": 0.05},
    "SAM, last 20 %": {"rho": 0.05},
    "SAM, last 50 %": {"rho": 0.05},
    "ASAM": {"rho": 0.5, "geometry": "element"},
    "along the momentum": {"rho": 0.05, "ascent": "momentum"},
    "along the previous gradient": {"rho": 0.05, "ascent": "previous"},
}
LAST = {"SAM, last 10 %": 0.1, "SAM, last 20 %": 0.2, "SAM, last 50 %": 0.5}
"""Share of training that is sharpness-aware, where it is not all."""
CLAIMS = {
    "lambda_max": Claim("lambda_max differs from SGD's", "apart", 1.25),
    "invariant_sharpness": Claim("invariant sharpness differs from SGD's", "apart", 1.25),
    "test_accuracy": Claim("test accuracy differs from SGD's", "apart", 0.5),
}
PANELS = {
    "lambda_max": "lambda_max",
    "invariant_sharpness": "invariant sharpness",
    "test_accuracy": "test accuracy, %",
    "gradients": "gradients, in epochs of SGD",
    "seconds": "seconds of processor",
}


@dataclass(frozen=True)
class Size:
    """What differs between the full and the quick study."""

    base: PriceRecipe
    lr: dict[int, float]  # by batch size
    loss: dict[int, float]  # by batch size: what SGD has near the end of its epochs, so that SAM has begun
    epochs: int

    @property
    def gradients(self) -> int:
        """What SAM at every step takes for all epochs, in epochs of plain SGD."""
        return 2 * self.epochs

    def settings(self) -> dict[str, PriceRecipe]:
        """All settings by name."""
        settings = {}
        for size, lr in self.lr.items():
            for method, options in METHODS.items():
                recipe = replace(self.base, batch_size=size, lr=lr, max_epochs=3 * self.epochs, **options)
                epochs = replace(recipe, epochs=self.epochs, loss=self.loss[size])
                if (share := LAST.get(method)) is None:
                    settings[name(method, size)] = replace(epochs, gradients=self.gradients)
                    continue
                settings[name(method, size)] = replace(epochs, start_epoch=round(self.epochs * (1 - share)))
                start = round(self.gradients / (1 + share) * (1 - share))
                settings[name(method, size, "gradients")] = replace(recipe, gradients=self.gradients, start_epoch=start)
        return settings


FULL = Size(
    PriceRecipe(lr=0.0, batch_size=0, momentum=0.9),
    lr={128: 0.02, 1024: 0.1},
    loss={128: 0.12, 1024: 0.18},
    epochs=20,
)
QUICK = Size(
    replace(FULL.base, data="digits", num_train=1000, num_test=397, num_probe=250),
    lr={32: 0.02, 128: 0.05},
    loss={32: 0.05, 128: 0.2},
    epochs=6,
)


def name(method: str, batch_size: int, point: str = "") -> str:
    """Return what the runs of a method are called that are measured at a point."""
    is_own_run = point == "gradients" and method in LAST
    return f"{method}, batch {batch_size}" + ", as many gradients" * is_own_run


def found(rows: list[Row], method: str, batch_size: int, point: str, column: str) -> dict[int, float]:
    """Return a column by seed."""
    return values(rows, name(method, batch_size, point), point, column)


def judged(rows: list[Row], size: Size) -> list[tuple[Claim, str, Effect]]:
    """Return every claim, where it is looked at, and the effect: a method over (or minus) SGD.

    A comparison that no run has reached in two seeds is left out: the note on the shortfalls has it.
    """
    judgements = []
    for column, claim in CLAIMS.items():
        for batch_size in size.lr:
            for point, title in POINTS.items():
                sgd = found(rows, "SGD", batch_size, point, column)
                for method in list(METHODS)[1:]:
                    other = found(rows, method, batch_size, point, column)
                    effect = difference(other, sgd, " %") if column == "test_accuracy" else ratio(other, sgd)
                    if effect.num > 1:
                        judgements.append((claim, f"{method}, batch {batch_size}: {title}", effect))
    return judgements


def verdict_lines(rows: list[Row], size: Size) -> list[list[str]]:
    """Return the table of verdicts."""
    return [verdict_line(*line) for line in judged(rows, size)]


def mean_lines(rows: list[Row], size: Size) -> list[list[str]]:
    """Return the means over seeds of all that is compared, with standard deviations (factors of curvatures)."""
    lines = []
    for batch_size in size.lr:
        for point, title in POINTS.items():
            for method in METHODS:
                cells = [
                    cell(list(found(rows, method, batch_size, point, column).values()), column)
                    for column in ("epoch", "train_loss", *PANELS)
                ]
                lines.append([f"batch {batch_size}: {title}", method, *cells])
    return lines


def cell(group: list[float], column: str) -> str:
    """Return a mean with its deviation as it is printed."""
    if not group:
        return "–"
    if column in ("train_loss", "lambda_max", "invariant_sharpness"):
        return f"{mean(group, log=True):.3g} ×÷ {math.exp(deviation([math.log(v) for v in group])):.2f}"
    digits = 2 if column == "test_accuracy" else 1
    return f"{mean(group, log=False):.{digits}f} ± {deviation(group):.{digits}f}"


def answer(rows: list[Row], size: Size) -> Iterator[str]:
    """Yield a sentence per comparison: with which methods lambda_max differs from SGD's, and by how much."""
    for batch_size in size.lr:
        for point, title in POINTS.items():
            parts = []
            for claim, where, effect in judged(rows, size):
                is_here = claim is CLAIMS["lambda_max"] and where.endswith(f"batch {batch_size}: {title}")
                if is_here and judge(effect, claim.direction, claim.margin) == "holds here":
                    method = where.split(f", batch {batch_size}")[0]
                    spent = mean(list(found(rows, method, batch_size, point, "gradients").values()), log=False)
                    parts.append(f"{method} x {effect.estimate:.2f} ({spent:.1f} epochs of gradients)")
            yield f"- batch {batch_size}, {title}: {'; '.join(parts) or 'none'}."


def draw(rows: list[Row], size: Size, path: Path, title: str) -> None:
    """Draw a row of panels per batch size: every method, in three comparisons side by side."""
    made, axes = figure(len(size.lr), len(PANELS), width=3.1, height=2.7)
    places = range(len(METHODS))
    for axes_row, batch_size in zip(axes, size.lr, strict=True):
        for ax, (column, label) in zip(axes_row, PANELS.items(), strict=True):
            log = column in ("lambda_max", "invariant_sharpness")
            for i, (point, colour) in enumerate(zip(POINTS, in_order(len(POINTS)), strict=True)):
                groups = [list(found(rows, method, batch_size, point, column).values()) for method in METHODS]
                ranges = [range_of(group, log=log) for group in groups]
                x = [place + 0.22 * (i - 1) for place in places]
                for position, group in zip(x, groups, strict=True):
                    ax.plot([position] * len(group), group, "o", color=colour, ms=3, alpha=0.4, mew=0)
                low, middle, high = zip(*ranges, strict=True)
                sides = [
                    [b - a for a, b in zip(middle_or_low, other, strict=True)]
                    for middle_or_low, other in ((low, middle), (middle, high))
                ]
                ax.errorbar(
                    x, middle, yerr=sides, color=colour, ls="none", marker="_", ms=9, capsize=2, label=POINTS[point]
                )
                draw_band(ax, [-0.5, len(METHODS) - 0.5], [low[0]] * 2, [high[0]] * 2, colour)
            if log:
                log_values(ax)
            short = [method.removeprefix("SAM, ").removeprefix("along the ") for method in METHODS]
            is_last = batch_size == list(size.lr)[-1]
            ax.set_xticks(places, short if is_last else [""] * len(short), rotation=90)
            ax.set_xlim(-0.5, len(METHODS) - 0.5)
            ax.set_title(f"batches of {batch_size}: {label}", fontsize=9)
            tidy(ax)
    made.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    made.suptitle(f"{title}\ndots: seeds; bars: mean ± one standard deviation over seeds; bands: those of SGD")
    save(made, path)


def range_of(group: list[float], *, log: bool) -> tuple[float, float, float]:
    """Return mean minus deviation, mean, and mean plus deviation; geometric if ``log``; nan of nothing."""
    if not group:
        return (math.nan,) * 3
    group = [math.log(v) for v in group] if log else group
    middle, width = mean(group, log=False), deviation(group)
    low, middle, high = (math.exp(v) if log else v for v in (middle - width, middle, middle + width))
    return low, middle, high


def text_of(rows: list[Row], size: Size, title: str) -> str:
    """Return all of the page but where its numbers come from."""
    lines = verdict_lines(rows, size)
    rhos = "; ".join(f"{name}: {options['rho']:g}" for name, options in METHODS.items() if "rho" in options)
    text = f"{title}. Effects are those of a method over (or minus) SGD, paired by seed. {tally(lines)}\n\n"
    text += f"rho, not tuned: {rhos}.\n\n"
    text += "lambda_max differs from SGD's, by these factors:\n\n" + "\n".join(answer(rows, size)) + "\n\n"
    text += markdown_table(VERDICT_HEADER, lines)
    text += "\nMeans and standard deviations over seeds (geometric ones of losses and curvatures):\n\n"
    return text + markdown_table(("where", "method", "epochs", "train loss", *PANELS.values()), mean_lines(rows, size))


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=8, fashion=True)
    size = QUICK if args.quick else FULL
    runs = runs_of(size.settings(), args.seeds)
    rows = finish(runs, args.out, args.workers, partial(train_and_measure, data_dir=args.data_dir, device=args.device))
    write_csv(rows, args.results / f"{NAME}.csv")
    data = QUICK_DATA if args.quick else f"Fashion-MNIST ({size.base.num_train:,} for training)"
    title = f"SGD with momentum {size.base.momentum:g} and SAM, {data}, {args.seeds} seeds"
    draw(rows, size, args.results / f"{NAME}.png", title)
    notes = [outlook(judged(rows, size)), shortfalls(rows), provenance(runs, args.out)]
    text = text_of(rows, size, title) + "\n" + "\n\n".join(note.strip() for note in notes if note) + "\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
