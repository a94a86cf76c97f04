"""Tables and figures of the study of PSI-flatness; every number comes from the rows of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from four_kinds import KINDS
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from measures import MEASURES
from rank_correlation import effect
from report import (
    VERDICT_HEADER,
    dots,
    figure,
    log_values,
    markdown_table,
    mean,
    outlook,
    outlook_of_models,
    tally,
    values,
    verdict_line,
)
from study import Row
from style import COLOURS, in_order, save, tidy
from verdicts import Claim, Effect, Judged, difference, judge, ratio
from which_measure_report import GAPS, correlation, measured, models_of, resampled

RATIOS = {
    "path": Claim("PSI sharpness in basis paths is larger", "above"),
    "path_norm": Claim("PSI sharpness in path norm is larger", "above"),
    "lambda_max": Claim("lambda_max is larger", "above"),
    "balance": Claim("balance of basis paths is larger", "above"),
    "balance_deciles": Claim("balance of basis paths, deciles, is larger", "above"),
}
LESS_ACCURATE = Claim("test accuracy is lower", "below")
MORE_LOSS = Claim("test loss is larger", "above")
BOUNDED = Claim("the bound exceeds the error of the noisy network on new images", "above")
ORDERED = ("balance", "balance_deciles", "path", "path_norm", "lambda_max", "layer", "element", "adaptive")
ORDERS = Claim("orders MLPs and CNNs by their gap", "above")
BETTER = {
    "balance": Claim("balance of basis paths orders them better", "above"),
    "path": Claim("PSI sharpness in basis paths orders them better", "above"),
}
OTHERS = ("lambda_max", "element")
GEOMETRIES = {"path": "basis paths", "path_norm": "path norm"}
DIRECTIONS = {"random": "random directions", "eigenvectors": "top eigenvectors"}
BOUND_HEADER = (
    "networks", "violated", "basis paths", "log10 of balance", "noise", "error", "of the noisy network", "bound",
    "bound if balanced", "nats per sample",
)  # fmt: skip


def part(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the rows of one part of the study."""
    return [row for row in rows if row["part"] == name]


def kinds_of(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return both settings of each kind of network: first that of small PSI sharpness."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["setting"] for row in part(rows, "pair")):
        found.setdefault(name.split(":")[0], []).append(name)
    return {kind: (small, large) for kind, (small, large) in found.items()}


# ------------------------------------------------------------------------------------------------------------ verdicts


def pair_claims(rows: Sequence[Row]) -> list[Judged]:
    """Return what differs between both settings: the one of large PSI sharpness over (or minus) the other."""
    pairs, found = part(rows, "pair"), []
    for kind, (small, large) in kinds_of(rows).items():
        where = f"{KINDS[kind]}: {large.split(': ')[1]} against {small.split(': ')[1]}"

        def both(column: str, names: tuple[str, str] = (large, small)) -> tuple[dict[int, float], dict[int, float]]:
            (point,) = {row["point"] for row in pairs}
            a, b = (values(pairs, name, point, column) for name in names)
            return a, b

        found += [(claim, where, ratio(*both(column))) for column, claim in RATIOS.items()]
        found.append((LESS_ACCURATE, where, difference(*both("test_accuracy"), unit=" %")))
        found.append((MORE_LOSS, where, difference(*both("test_loss"))))
    return found


def bound_claims(rows: Sequence[Row]) -> list[Judged]:
    """Return whether the bound exceeds what it bounds: right side minus left side."""
    found = []
    for setting, group in bound_groups(rows).items():
        right, left = ({row["seed"]: row[name] for row in group} for name in ("bound", "noisy_test_error"))
        found.append((BOUNDED, setting, difference(right, left, " %")))
    return found


def bound_groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the small networks to which the bound applies, by setting."""
    groups: dict[str, list[Row]] = {}
    for row in [row for row in part(rows, "bound") if row["applies"]]:
        groups.setdefault(row["setting"], []).append(row)
    return groups


def each_network(rows: Sequence[Row]) -> list[list[str]]:
    """Return both sides of the bound of every network, and whether it holds."""
    return [
        [setting, str(row["seed"]), f"{row['noisy_test_error']:.2f} %", f"{row['bound']:.2f} %", holds(row)]
        for setting, group in bound_groups(rows).items()
        for row in group
    ]


def holds(row: Row) -> str:
    """Return whether a network keeps to its bound."""
    return "holds" if row["noisy_test_error"] <= row["bound"] else "violated"


def bound_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return both sides of the bound, means over seeds, and how many networks violate it."""
    lines = []
    for setting, group in bound_groups(rows).items():

        def of(column: str, chosen: Sequence[Row] = group) -> float:
            return mean([row[column] for row in chosen], log=False)

        violated = sum(holds(row) == "violated" for row in group)
        errors = [f"{of(name):.1f} %" for name in ("test_error", "noisy_test_error", "bound", "bound_if_balanced")]
        nats = mean([row["nats"] / row["num_train"] for row in group], log=False)
        lines.append([
            setting, f"{violated} of {len(group)}", f"{of('num_paths'):,.0f}",
            f"{of('log_balance') / math.log(10):.1f}", f"{of('noise'):.2g}", *errors, f"{nats:.3f}",
        ])  # fmt: skip
    return lines


def chains(models: Sequence[Row]) -> list[Row]:
    """Return the networks of the study of measures that have basis paths, with their gaps."""
    return measured(models_of(models), "path", "balance")


def order_claims(models: Sequence[Row]) -> list[Judged]:
    """Return for every measure and gap whether it orders chains of the same kind."""
    chosen = chains(models)
    return [
        (ORDERS, f"{MEASURES[name].title}; {label}", correlation(chosen, name, gap, within=True))
        for gap, label in GAPS.items()
        for name in ORDERED
    ]


def advantage_claims(models: Sequence[Row]) -> list[Judged]:
    """Return whether measures of basis paths order them better than measures that need no paths."""
    chosen, found = chains(models), []
    num_settings = len({model["setting"] for model in chosen})
    for gap, label in GAPS.items():
        for name, claim in BETTER.items():
            for other in OTHERS:
                a, b = (resampled(chosen, measure, gap, within=True) for measure in (name, other))
                where = f"than {MEASURES[other].title}; {label}"
                found.append((claim, where, effect(a - b, len(chosen), num_settings)))
    return found


def verdict_lines(rows: Sequence[Row], models: Sequence[Row]) -> list[list[str]]:
    """Return the lines of all tables of verdicts, in their order."""
    claims = pair_claims(rows) + bound_claims(rows) + order_claims(models) + advantage_claims(models)
    return [verdict_line(*claim) for claim in claims]


def tables(rows: Sequence[Row], models: Sequence[Row]) -> str:
    """Return the page from the tally of verdicts on."""
    text = f"{tally(verdict_lines(rows, models))}\n\n**Two models**, large over (or minus) small PSI sharpness:\n\n"

    def table(claims: Sequence[Judged], header: Sequence[str] = VERDICT_HEADER) -> str:
        return markdown_table(header, [verdict_line(*claim) for claim in claims])

    text += table(pair_claims(rows)) + "\n" + outlook(pair_claims(rows))
    least = [row["bound"] for row in part(rows, "pair") if row.get("bound") is not None]
    if least:
        text += f"\nFor these networks the bound below is at least {min(least):.1f} %, whatever their errors.\n"
    text += "\n**The bound**: means over seeds, then right side minus left side, then every network.\n\n"
    text += markdown_table(BOUND_HEADER, bound_cells(rows)) + "\n" + table(bound_claims(rows))
    text += "\n" + markdown_table(("networks", "seed", "left side", "right side", "inequality"), each_network(rows))
    left_out = sum(not row["applies"] for row in part(rows, "bound"))
    text += f"\nThe bound does not apply to {left_out} of {len(part(rows, 'bound'))} networks.\n"
    header = [name.replace("pairs", "models") for name in VERDICT_HEADER]
    text += (
        "\n**The order** of the MLPs and CNNs of `which_measure.py`: Kendall's tau within kinds, then differences.\n\n"
    )
    order, advantage = order_claims(models), advantage_claims(models)
    text += table(order, header) + "\n" + table(advantage, header)
    return f"{text}\n{outlook_of_models(order + advantage)}\n"


# ------------------------------------------------------------------------------------------------------------- figures


def draw_surfaces(rows: Sequence[Row], surfaces: Sequence[Row], path: Path, title: str) -> None:
    """Draw the loss around both models of seed 0, two rows of panels per kind, all on one scale of losses."""
    kinds = [(kind, names, plane) for kind, names in kinds_of(rows).items() for plane in DIRECTIONS]
    if not surfaces:
        return
    made, axes = figure(len(kinds), 4, width=3.0, height=3.1)
    low = min(row["loss"] for row in surfaces if row["loss"] is not None)
    levels = [low + 1.5 * (i / 20) ** 2 for i in range(21)]  # equally wide rings of a paraboloid
    for axes_row, (kind, names, plane) in zip(axes, kinds, strict=True):
        columns = [(geometry, name) for geometry in GEOMETRIES for name in names]
        for ax, (geometry, name) in zip(axes_row, columns, strict=True):
            wanted = {"geometry": geometry, "setting": name, "directions": plane}
            (model,) = [row for row in part(rows, "pair") if (row["setting"], row["seed"]) == (name, 0)]
            mappable = draw_plane(ax, [row for row in surfaces if wanted.items() <= row.items()], levels)
            ax.set_title(
                f"{KINDS[kind]}, {name.split(': ')[1]}\ntest accuracy {model['test_accuracy']:.1f} %\n"
                f"PSI sharpness {model[geometry]:.3g}"
            )
            ax.set_xlabel(f"{DIRECTIONS[plane]} of {GEOMETRIES[geometry]}")
    made.colorbar(mappable, ax=axes, label="training loss", ticks=levels[::4], format="%.2f", shrink=0.5)
    made.suptitle(
        f"{title}\nLoss over planes, equally far in both models of a pair (seed 0). Grey: a path of the skeleton has "
        "reached 0, where basis paths end"
    )
    save(made, path)


def draw_plane(ax: Axes, places: Sequence[Row], levels: Sequence[float]) -> Any:
    """Draw filled contours; grey where the loss is not finite."""
    x, y = (sorted({row[name] for row in places}) for name in ("x", "y"))
    losses = np.full((len(y), len(x)), np.nan)
    for row in places:
        if row["loss"] is not None:
            losses[y.index(row["y"]), x.index(row["x"])] = row["loss"]
    ax.set_facecolor("0.85")
    norm = BoundaryNorm(levels, ncolors=256, extend="max")
    mappable = ax.contourf(x, y, losses, levels=levels, norm=norm, cmap="viridis", extend="max")
    ax.contour(x, y, losses, levels=levels, colors="white", linewidths=0.3, alpha=0.5)
    ax.plot(0, 0, "*", ms=10, color="tab:red", mec="white", mew=0.6)
    ax.locator_params(nbins=4)
    return mappable


def draw_models(rows: Sequence[Row], models: Sequence[Row], path: Path, title: str) -> None:
    """Draw both settings, a dot per seed; both sides of the bound; and how measures order models."""
    made, axes = figure(2, 4, width=3.2, height=3.2)
    places = list(axes.flat)
    columns = {name: MEASURES[name].title for name in RATIOS} | {"test_accuracy": "test accuracy, %"}
    for ax, (column, label) in zip(places, columns.items(), strict=False):
        for colour, (kind, names) in zip(in_order(2), kinds_of(rows).items(), strict=False):
            pairs = part(rows, "pair")
            groups = [[r[column] for r in pairs if r["setting"] == name and r.get(column)] for name in names]
            if all(groups):
                log = column != "test_accuracy"
                dots(ax, range(len(names)), groups, color=colour, label=KINDS[kind], log=log)
                ax.set_xticks(range(len(names)), [name.split(": ")[1].replace(", ", "\n") for name in names])
        ax.set_xlim(-0.4, 1.4)
        ax.set_title(label)
        if column != "test_accuracy":
            log_values(ax)
    places[0].legend(frameon=False)
    _draw_bound(places[6], rows)
    _draw_order(places[7], models)
    for ax in places:
        tidy(ax)
    made.suptitle(
        f"{title}. First six panels: dots are seeds, lines join their means.\n"
        "The bound: a dot per network. Order: dots are tau, bars its 95 % interval over settings, filled where decided."
    )
    save(made, path)


def _draw_bound(ax: Axes, rows: Sequence[Row]) -> None:
    groups = bound_groups(rows)
    for colour, (setting, group) in zip(in_order(len(groups)), groups.items(), strict=True):
        x, y = ([row[name] for row in group] for name in ("noisy_test_error", "bound"))
        ax.plot(x, y, "o", color=colour, ms=4.5, alpha=0.7, mew=0, label=setting)
    ends = [0, 1.1 * max((row["bound"] for group in groups.values() for row in group), default=1)]
    ax.plot(ends, ends, color=COLOURS["reference"], lw=1, label="equal: violated below")
    ax.set_xlabel("error of the noisy network on new images, %")
    ax.set_title("bound, %")
    ax.legend(frameon=False, fontsize=7)


def _draw_order(ax: Axes, models: Sequence[Row]) -> None:
    chosen = chains(models)
    for colour, shift, (gap, label) in zip(in_order(2), (0.15, -0.15), GAPS.items(), strict=True):
        for height, name in enumerate(ORDERED[::-1]):
            found: Effect = correlation(chosen, name, gap, within=True)
            decided = judge(found, "above") != "undecided"
            ax.plot([found.low, found.high], [height + shift] * 2, color=colour, lw=1.5, alpha=0.7)
            face, name_of = colour if decided else "white", label if height == 0 else None
            ax.plot(found.estimate, height + shift, "o", color=colour, ms=4.5, mfc=face, label=name_of)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlim(-1, 1)
    ax.set_ylim(-0.6, len(ORDERED) + 0.9)  # room for the legend
    titles = [MEASURES[name].title.split(" (")[0].replace("balance of basis paths", "balance") for name in ORDERED]
    ax.set_yticks(range(len(ORDERED)), titles[::-1], fontsize=7)
    ax.set_title(f"Kendall's tau, {len(chosen)} MLPs and CNNs")
    ax.legend(frameon=False, fontsize=7, loc="upper left")
