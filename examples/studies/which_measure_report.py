"""Table and picture of the study of measures; every number comes from the rows of the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from four_kinds import KINDS
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from measures import MEASURES, WEIGHT_NORM
from rank_correlation import effect, taus
from report import VERDICT_HEADER, figure, interval, markdown_table, number, verdict_line
from rescaling import CHANGES
from study import Row
from style import COLOURS, save, tidy
from verdicts import Claim, Effect, judge

GAPS = {"loss_gap": "test - train loss", "accuracy_gap": "train - test accuracy"}
ORDERS = Claim("orders models by their gap", "above")
BETTER = Claim("basis paths order models of the same kind better than path norm", "above")
TITLES = {name: measure.title for name, measure in MEASURES.items()} | {
    WEIGHT_NORM: "norm of the weights (no flatness)"
}
HEADER = (
    "measure", "models", "tau within kinds", *KINDS.values(), "tau across kinds", "within, accuracy",
    "seeds / settings", "probe", "survives", "cost", "orders models of a kind",
)  # fmt: skip


def models_of(rows: Sequence[Row]) -> list[Row]:
    """Return the networks that reached the training loss, with their gaps."""
    return [
        row
        | {
            "loss_gap": row["test_loss"] - row["train_loss"],
            "accuracy_gap": row["train_accuracy"] - row["test_accuracy"],
        }
        for row in rows
        if row["reached"] and row["change"] == "none" and not row["setting"].endswith("changed weights")
    ]


def measured(models: Sequence[Row], *names: str) -> list[Row]:
    """Return the models for which all of these measures are defined."""
    return [model for model in models if all(model.get(name) is not None for name in names)]


def resampled(models: Sequence[Row], measure: str, gap: str, *, within: bool) -> np.ndarray:
    """Return tau of a measure and a gap: of all models, then of resamples."""
    x, y = (np.array([model[name] for model in models], dtype=float) for name in (measure, gap))
    kinds = [model["kind"] for model in models] if within else None
    return taus(x, y, [model["setting"] for model in models], kinds)


def correlation(models: Sequence[Row], measure: str, gap: str, *, within: bool) -> Effect:
    """Return tau of a measure and a gap with its interval."""
    chosen = measured(models, measure)
    if len(chosen) < 2:
        return Effect(math.nan, -math.inf, math.inf, len(chosen))
    values = resampled(chosen, measure, gap, within=within)
    return effect(values, len(chosen), len({model["setting"] for model in chosen}))


def path_lines(models: Sequence[Row]) -> list[list[str]]:
    """Judge whether basis paths order the networks better for which both geometries of paths are defined."""
    both = measured(models, "path", "path_norm")
    lines = []
    for gap, label in GAPS.items():
        found = Effect(math.nan, -math.inf, math.inf, len(both))
        if len(both) > 1:
            values = [resampled(both, measure, gap, within=True) for measure in ("path", "path_norm")]
            found = effect(values[0] - values[1], len(both), len({model["setting"] for model in both}))
        lines.append(verdict_line(BETTER, label, found))
    return lines


def recommended_geometry(models: Sequence[Row]) -> str:
    """Return the geometry of paths to take: ``"path_norm"``, unless basis paths order models by their loss better.

    It needs no choice of a basis, and is defined for more networks: the burden of proof is with the other one.
    """
    return "path" if path_lines(models)[0][-1] == "**holds here**" else "path_norm"


def path_table(lines: Sequence[Sequence[str]]) -> str:
    """Return the table of those verdicts."""
    return markdown_table([name.replace("pairs", "models") for name in VERDICT_HEADER], lines)


# ------------------------------------------------------------------------------------------------ what else there is


def spread(models: Sequence[Row], measure: str) -> tuple[float, float]:
    """Return standard deviations of the decimal logarithm: over seeds of a setting, and of settings of a kind."""
    logs: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for model in measured(models, measure):
        if model[measure] > 0:
            logs.setdefault(model["setting"], []).append(math.log10(model[measure]))
            kinds[model["setting"]] = model["kind"]
    seeds = [statistics.variance(group) for group in logs.values() if len(group) > 1]
    means: dict[str, list[float]] = {}
    for setting, group in logs.items():
        means.setdefault(kinds[setting], []).append(statistics.fmean(group))
    settings = [statistics.variance(group) for group in means.values() if len(group) > 1]
    return tuple(math.sqrt(statistics.fmean(v)) if v else math.nan for v in (seeds, settings))  # type: ignore[return-value]


def median(models: Sequence[Row], measure: str, column: str) -> float:
    """Return the median of what goes with a measure: relative standard errors, gradients, or seconds per gradient."""
    values = []
    for model in measured(models, measure, f"{measure}_{column}"):
        if column == "standard_error":
            values.append(model[f"{measure}_{column}"] / abs(model[measure]))
        elif column == "seconds":
            values.append(model[f"{measure}_{column}"] / model["gradient_seconds"])
        else:
            values.append(model[f"{measure}_{column}"])
    return statistics.median(values) if values else math.nan


def survives(rows: Sequence[Row], measure: str) -> list[str]:
    """Return the changes of weights that leave the measure as it is, in every kind of network where it is defined.

    As it is: within one percent. With a question mark: within four of its numerical errors, which could hide a change:
    shuffled units meet other random probes.
    """
    moves: dict[str, list[tuple[float, float]]] = {}
    before = {row["setting"]: row for row in rows if row["change"] == "none"}
    for row in rows:
        known = before[row["setting"]]
        if row["change"] != "none" and row.get(measure) is not None and known.get(measure) is not None:
            error = math.hypot(*(r.get(f"{measure}_error") or 0.0 for r in (row, known)))
            move, value = abs(row[measure] - known[measure]), max(abs(known[measure]), 1e-30)
            moves.setdefault(row["change"], []).append((move / value, error / value))
    found = []
    for change in CHANGES:
        if change in moves and all(move <= max(0.01, 4 * error) for move, error in moves[change]):
            found.append(change if all(move <= 0.01 for move, _ in moves[change]) else f"{change}?")
    return found


# --------------------------------------------------------------------------------------------------- table and picture


def table_lines(models: Sequence[Row], rows: Sequence[Row]) -> list[list[str]]:
    """Return a line per measure, those that order best first; the verdict is on models of the same kind."""
    lines = []
    for measure in ranked(models):
        chosen = measured(models, measure)
        within = correlation(models, measure, "loss_gap", within=True)
        each = [
            correlation([m for m in chosen if m["kind"] == kind], measure, "loss_gap", within=True) for kind in KINDS
        ]
        kinds = {model["kind"] for model in chosen}
        across = correlation(models, measure, "loss_gap", within=False)
        seeds, settings = spread(models, measure)
        error = median(models, measure, "standard_error")
        lines.append([
            TITLES[measure], str(len(chosen)), _cell(within),
            *("–" if not found.num else number(found.estimate, found) for found in each),
            _cell(across) if len(kinds) > 1 else "–",
            _cell(correlation(models, measure, "accuracy_gap", within=True)),
            f"{seeds:.2f} / {settings:.2f}", "–" if math.isnan(error) else f"{100 * error:.0f} %",
            ", ".join(survives(rows, measure)) or "nothing", _cost(models, measure),
            f"**{judge(within, ORDERS.direction)}**",
        ])  # fmt: skip
    return lines


def ranked(models: Sequence[Row]) -> list[str]:
    """Return the measures that some network has, by tau within kinds, and at the end the norm of the weights."""
    found = {name: correlation(models, name, "loss_gap", within=True) for name in MEASURES}
    names = [name for name in MEASURES if found[name].num > 1]
    return [*sorted(names, key=lambda name: -found[name].estimate), WEIGHT_NORM]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return the table of all measures."""
    return markdown_table(HEADER, lines)


def _cell(found: Effect) -> str:
    return f"{number(found.estimate, found)} ({interval(found)})"


def _cost(models: Sequence[Row], measure: str) -> str:
    if measure == WEIGHT_NORM:
        return "0 (0)"
    return f"{median(models, measure, 'gradients'):.0f} ({median(models, measure, 'seconds'):.0f})"


def draw(models: Sequence[Row], path: Path, title: str) -> None:
    """Draw tau of every measure, within kinds and across, and beside it the cost."""
    names = ranked(models)[::-1]
    made, axes = figure(1, 3, width=4.2, height=1.2 + 0.27 * len(names))
    for ax, within, label in zip(axes[0], (True, False), ("models of the same kind", "all models"), strict=False):
        for height, name in enumerate(names):
            kinds = {model["kind"] for model in measured(models, name)}
            if within or len(kinds) > 1:
                _bar(ax, height, correlation(models, name, "loss_gap", within=within), flat=name != WEIGHT_NORM)
            for marker, kind in zip("os^D", KINDS, strict=True):
                if within and kind in kinds and len(kinds) > 1:
                    of_kind = [model for model in models if model["kind"] == kind]
                    tau = correlation(of_kind, name, "loss_gap", within=True).estimate
                    ax.plot(tau, height, marker, ms=4.5, mfc="none", mec=COLOURS["reference"], mew=0.9)
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xlabel(f"Kendall's tau, {label}")
        ax.set_xlim(-1, 1)
    gradients = [0.0 if name == WEIGHT_NORM else median(models, name, "gradients") for name in names]
    axes[0][2].barh(range(len(names)), gradients, color=COLOURS["reference"], height=0.6)
    for height, cost in enumerate(gradients):
        axes[0][2].text(cost, height, f" {cost:.0f}", va="center", fontsize=8)
    axes[0][2].set_xlabel("cost in gradients of the loss")
    axes[0][2].margins(x=0.12)
    for i, ax in enumerate(axes[0]):
        ax.set_yticks(range(len(names)), [TITLES[name] for name in names] if i == 0 else [""] * len(names))
        ax.set_ylim(-0.7, len(names) - 0.3)
        tidy(ax)
    handles = [Line2D([], [], color=COLOURS["lightning-flatness"], marker="o", ms=6, lw=2.2, alpha=0.8)]
    handles += [Line2D([], [], color=COLOURS["lightning-flatness"], marker="o", ms=6, lw=2.2, mfc="white", alpha=0.4)]
    handles += [Line2D([], [], ls="", marker=m, ms=5, mfc="none", mec=COLOURS["reference"]) for m in "os^D"]
    labels = [
        "decided: the 95 % interval of tau is on one side of 0",
        "undecided",
        *(f"{k} alone" for k in KINDS.values()),
    ]
    made.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    made.suptitle(title, fontsize=11)
    save(made, path)


def _bar(ax: Axes, height: float, found: Effect, *, flat: bool) -> None:
    colour = COLOURS["lightning-flatness"] if flat else "black"
    decided = judge(found, ORDERS.direction) != "undecided"
    if math.isfinite(found.high - found.low):
        alpha = 0.8 if decided else 0.3
        ax.plot([found.low, found.high], [height, height], color=colour, lw=2.2, alpha=alpha, solid_capstyle="round")
    ax.plot(found.estimate, height, "o", color=colour, ms=6, mfc=colour if decided else "white")
