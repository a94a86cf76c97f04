"""Does the balance of basis paths, or the sharpness in them, order networks by how well they generalise?

    python examples/studies/psi_flatness_and_generalization.py          # MNIST 5k
    python examples/studies/psi_flatness_and_generalization.py --quick  # digits

Positively Scale-Invariant Flatness of ReLU Neural Networks (arXiv 1903.02237) bounds the generalisation error by a
function that grows with the ratio of the largest to the smallest value of a basis path, and concludes (in its
abstract) that minima with balanced values of basis paths are more likely to be flat and to generalise better. Its full
text was not at hand: ``BasisPathBalance`` and ``PSISharpness`` are our definitions in its spirit (see
``PathGeometry``).

The same network is trained by SGD and Adam with several batch sizes and learning rates, with weight decay and with
dropout, from several initial weights, all down to the same training loss. (Dropout came after a first look: without it
the gaps of all settings lay within those of seeds, and there was little to order.) Every measure then orders the
models, and Kendall's tau says how well that order agrees with the order of the generalisation gaps (train minus test
accuracy, and test minus train loss): 1 is the same order, 0 is chance, -1 the reverse. The 95 % interval is from a
bootstrap over settings, each with all its seeds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from report import VERDICT_HEADER, figure, markdown_table, shortfalls, tally, verdict_line, write_csv
from study import QUICK_DATA, Row, finish, parse_arguments, provenance, runs_of
from style import COLOURS, save, tidy
from training import Recipe
from verdicts import Claim, Effect, clustered_bootstrap, kendall

NAME = "psi_flatness_and_generalization"
MEASURES = {
    "log10_path_balance": "balance of basis paths",
    "psi_sharpness": "PSI sharpness",
    "lambda_max": "lambda_max",
    "invariant_sharpness": "invariant sharpness",
    "adaptive_sharpness": "adaptive sharpness",
}
GAPS = {"accuracy_gap": "train - test accuracy, %", "loss_gap": "test - train loss"}
ORDERS = Claim("orders models by their gap", "above")
BETTER = Claim("the balance of basis paths orders them better", "above")

FULL = Recipe(points=("loss=0.03",), measures=tuple(MEASURES), max_steps=2500, batch_size=0, lr=0.0)
QUICK = replace(FULL, data="digits", points=("loss=0.05",), max_steps=1000)


def settings(base: Recipe, batch_sizes: tuple[int, ...], *, regularized: bool = True) -> dict[str, Recipe]:
    """Return all settings by name: optimizers and learning rates, batch sizes, plain, weight decay and dropout."""
    found = {}
    for optimizer, lr, decay in (("sgd", 0.02, 1e-3), ("sgd", 0.06, 1e-3), ("adam", 2e-3, 0.1)):
        for batch_size in batch_sizes:
            name = f"{optimizer} lr {lr:g}, batch {batch_size}"
            plain = replace(base, optimizer=optimizer, lr=lr, batch_size=batch_size)
            found[f"{name}, decay 0"] = plain
            if regularized:
                found[f"{name}, decay {decay:g}"] = replace(plain, weight_decay=decay)
                found[f"{name}, dropout 0.2"] = replace(plain, dropout=0.2)
    return found


def models_of(rows: list[Row]) -> list[Row]:
    """Return the models that reached the training loss, with their gaps, where every measure has a value."""
    models = []
    for row in rows:
        if row["reached"] and all(row[measure] is not None for measure in MEASURES):
            gaps = {
                "accuracy_gap": row["train_accuracy"] - row["test_accuracy"],
                "loss_gap": row["test_loss"] - row["train_loss"],
            }
            models.append(row | gaps)
    return models


def correlation(models: list[Row], measure: str, gap: str) -> Effect:
    """Return Kendall's tau of a measure and a gap."""
    x, y = column(models, measure), column(models, gap)
    return clustered_bootstrap(clusters(models), lambda chosen: kendall(x[chosen], y[chosen]))


def advantage(models: list[Row], measure: str, other: str, gap: str) -> Effect:
    """Return by how much the tau of a measure exceeds that of another one on the same models."""
    x, z, y = column(models, measure), column(models, other), column(models, gap)
    return clustered_bootstrap(
        clusters(models), lambda chosen: kendall(x[chosen], y[chosen]) - kendall(z[chosen], y[chosen])
    )


def column(models: list[Row], name: str) -> np.ndarray:
    return np.array([model[name] for model in models], dtype=float)


def clusters(models: list[Row]) -> list[str]:
    return [model["setting"] for model in models]


def correlation_lines(models: list[Row]) -> list[list[str]]:
    """Judge for every measure and gap whether it orders the models."""
    return [
        verdict_line(ORDERS, f"{title}; {label}", correlation(models, measure, gap))
        for gap, label in GAPS.items()
        for measure, title in MEASURES.items()
    ]


def advantage_lines(models: list[Row]) -> list[list[str]]:
    """Judge whether the balance orders the models better than the measures that need no paths."""
    balance, _, *others = MEASURES
    return [
        verdict_line(BETTER, f"than {MEASURES[other]}; {label}", advantage(models, balance, other, gap))
        for gap, label in GAPS.items()
        for other in others
    ]


def draw(models: list[Row], path: Path, title: str) -> None:
    """Draw the gap over each measure, a dot per model; the colour is the batch size, the shape the optimizer."""
    made, axes = figure(len(GAPS), len(MEASURES), width=3.0, height=2.9)
    kinds = dict.fromkeys(model["setting"].rsplit(", ", 1)[0] for model in models)
    batches = sorted({kind.split("batch ")[1] for kind in kinds}, key=int)
    sizes = ("small", "medium", "large") if len(batches) == 3 else ("small", "large")
    optimizers = list(dict.fromkeys(kind.split(", batch")[0] for kind in kinds))
    for axes_row, (gap, label) in zip(axes, GAPS.items(), strict=True):
        for ax, (measure, name) in zip(axes_row, MEASURES.items(), strict=True):
            for kind in kinds:
                chosen = [model for model in models if model["setting"].startswith(f"{kind},")]
                optimizer, batch = kind.split(", batch ")
                x, y = column(chosen, measure), column(chosen, gap)
                marker, color = "os^"[optimizers.index(optimizer)], COLOURS[f"{sizes[batches.index(batch)]} batch"]
                ax.scatter(x, y, s=18, alpha=0.7, linewidths=0, label=kind, marker=marker, color=color)
            tau = correlation(models, measure, gap)
            ax.set_title(f"tau {tau.estimate:+.2f} ({tau.low:+.2f} … {tau.high:+.2f})", fontsize=9)
            ax.set_xscale("linear" if measure.startswith("log10") else "log")
            if measure == "adaptive_sharpness":  # spans less than a decade: powers of ten would be one tick
                ax.set_xticks([0.05, 0.1, 0.2, 0.4, 0.8], ["0.05", "0.1", "0.2", "0.4", "0.8"], minor=False)
                ax.minorticks_off()
            ax.set_xlabel(f"log10 {name}" if measure.startswith("log10") else name, fontsize=9)
            tidy(ax)
        axes_row[0].set_ylabel(label, fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(optimizers), fontsize=8, frameon=False)
    made.suptitle(title, fontsize=11)
    save(made, path)


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=2)
    if args.quick:
        runs = runs_of(settings(QUICK, (32, 256), regularized=False), args.seeds)
    else:
        runs = runs_of(settings(FULL, (25, 100, 250)), args.seeds)
    rows = finish(runs, args.out, args.workers)
    write_csv(rows, args.results / f"{NAME}.csv")
    models = models_of(rows)
    data = QUICK_DATA if args.quick else "MNIST 5k (1,000 for training, averaged to 8x8)"
    title = f"{len(models)} models of {len(runs) // args.seeds} settings, {data}, trained to the same loss"
    draw(models, args.results / f"{NAME}.png", f"{title}: Kendall's tau of measure and generalisation gap")
    correlations, advantages = correlation_lines(models), advantage_lines(models)
    text = f"{title}. The effect is Kendall's tau, or a difference of two. {tally(correlations + advantages)}\n\n"
    header = [name.replace("pairs", "models") for name in VERDICT_HEADER]
    text += markdown_table(header, correlations) + "\n" + markdown_table(header, advantages)
    text += f"\n{shortfalls(rows)}\n\n{provenance(runs, args.out)}\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
