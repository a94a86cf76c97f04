"""Which measure of flatness should a user take? All of the package, on four kinds of networks.

    python examples/studies/which_measure.py          # Fashion-MNIST, 14x14, and text
    python examples/studies/which_measure.py --quick  # digits, and text

An MLP, a CNN and a ResNet with BatchNorm are trained on images, and a transformer on the standard library's sources, of
which it tells the next character. Each has eight settings (batch size, learning rate, SAM, weight decay, augmentation)
and several initial weights, and all networks of a kind come down to the same loss on all training samples. Every
measure then orders the models, and Kendall's tau says how well that order agrees with the order of their
generalisation gaps, test minus train loss: 1 is the same order, 0 is chance, -1 the reverse.

Within kinds only pairs of networks of the same kind count; across kinds all do. The verdict is on the former: a measure
that tells a transformer from an MLP may still say nothing about two runs of either. 95 % intervals are from a bootstrap
over settings, each with all its seeds; that of "across" is for these four kinds and no others. What a measure survives
is tried out: weights are changed so that the function stays, and the measure is taken again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from four_kinds import KINDS, data_of, loss_and_accuracy, train
from measures import MEASURES, measure_all
from report import shortfalls, tally, write_csv
from rescaling import CHANGES, changed
from study import QUICK_DATA, Row, Run, finish, parse_arguments, provenance, runs_of
from training import Recipe
from which_measure_report import draw, models_of, path_lines, path_table, recommended_geometry, table, table_lines

NAME = "which_measure"
PROBE = 256
SMALL_PROBE = 64
"""Samples for the changes of weights: whether a number stays does not depend on how many there are."""

FULL = Recipe(
    points=("loss=0.2",), measures=tuple(MEASURES), max_steps=0, batch_size=32, lr=0.0, data="fashion", num_train=1000,
)  # fmt: skip
QUICK = replace(FULL, points=("loss=0.5",), data="digits", num_train=500, measures=(
    "lambda_max", "element", "path_norm", "path", "fisher", "balance"))  # fmt: skip
TEXT = {"fashion": (4000, 1.5), "digits": (500, 2.5)}
"""Training samples and loss of the transformer, beside these images."""
MAX_EPOCHS = 300

LEARNING_RATES = {
    "mlp": (0.01, 0.04, 0.02, 0.08),
    "cnn": (0.01, 0.04, 0.02, 0.08),
    "resnet": (0.02, 0.08, 0.04, 0.16),
    "transformer": (0.001, 0.003, 0.001, 0.004),
}
"""Low and high with batches of 32, low and high with larger ones."""

NOT_AUGMENTED = ("resnet", "transformer")
"""Too small for augmented images: they did not come down to the loss in the epochs allowed."""


def settings(base: Recipe, *, quick: bool = False) -> dict[str, Recipe]:
    """Return all settings by name, kind by kind; with ``quick`` two of each kind."""
    found = {}
    for kind, (low, high, large_low, large_high) in LEARNING_RATES.items():
        is_text = kind == "transformer"
        plain = replace(base, network=kind, lr=low)
        if is_text:
            num_train, loss = TEXT[base.data]
            points = (f"loss={loss:g}",)
            plain = replace(plain, optimizer="adam", data="sources", num_train=num_train, points=points)
        of_kind = {
            "batch 32, low lr": plain,
            "batch 256, high lr": replace(plain, batch_size=256, lr=large_high),
            "batch 32, high lr": replace(plain, lr=high),
            "batch 256, low lr": replace(plain, batch_size=256, lr=large_low),
            "batch 1000, high lr": replace(plain, batch_size=1000, lr=large_high),
            "SAM": replace(plain, rho=0.1),
            "weight decay": replace(plain, weight_decay=0.1 if is_text else 4e-3),
            "augmentation": replace(plain, augmentation=True),
        }
        if kind in NOT_AUGMENTED:
            of_kind["SAM, batch 256"] = replace(of_kind["batch 256, high lr"], rho=0.1)
            del of_kind["augmentation"]
        for name, recipe in list(of_kind.items())[: 2 if quick else None]:
            num_batches = -(-recipe.num_train // recipe.batch_size)
            found[f"{kind}: {name}"] = replace(recipe, max_steps=MAX_EPOCHS * num_batches)
    return found


def transformed(settings: dict[str, Recipe]) -> list[Run]:
    """Return a run per kind that is measured again after every change of the weights that leaves the function."""
    runs = []
    for kind in KINDS:
        recipe = settings[f"{kind}: batch 32, low lr"]
        changes = tuple(change for change, (_, kinds) in CHANGES.items() if kind in kinds)
        runs.append(Run(f"{kind}: changed weights", 0, replace(recipe, points=(*recipe.points, *changes))))
    return runs


def train_and_measure(setting: str, seed: int, recipe: Recipe, folder: Path) -> list[Row]:
    """Train a network, and measure it where its loss is that of the recipe: one row.

    Args:
        setting: Of the run.
        seed: Of the run.
        recipe: Further points name changes of the weights: then there is a row for each, on fewer samples.
        folder: Where logs would be: there are none.

    Returns:
        The rows.
    """
    data, kind = data_of(recipe.data, recipe.num_train), recipe.network
    trained = train(recipe, seed)
    point, *changes = recipe.points
    row: Row = {"setting": setting, "seed": seed, "kind": kind, "point": point, "change": "none"}
    row |= {"reached": trained.reached, "step": trained.step}
    if not trained.reached:
        return [row]
    row["epoch"] = trained.step / -(-len(data.train[0]) // recipe.batch_size)
    for name, samples in (("train", data.train), ("test", data.test)):
        row[f"{name}_loss"], row[f"{name}_accuracy"] = loss_and_accuracy(trained.module, samples, data.train[0])
    x, y = data.train
    size, num_total = SMALL_PROBE if changes else PROBE, len(x)
    probe = (x[:size], y[:size])

    rows = [row | measure_all(trained.module, kind, probe, num_total, trained.optimizer, recipe.measures)]
    for change in changes:  # without the optimizer, whose state belongs to the weights before
        names = [name for name in recipe.measures if name != "optimizer"]
        module = changed(trained.module, change)
        rows.append(row | {"change": change} | measure_all(module, kind, probe, num_total, names=names))
    return rows


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=2)
    base = QUICK if args.quick else FULL
    chosen = settings(base, quick=args.quick)
    runs = [*transformed(chosen), *runs_of(chosen, args.seeds)]
    rows = finish(runs, args.out, args.workers, train_and_measure)
    write_csv(rows, args.results / f"{NAME}.csv")
    models = models_of(rows)
    data = QUICK_DATA if args.quick else "Fashion-MNIST (1,000 for training, averaged to 14x14) and text (4,000)"
    kinds = len({model["kind"] for model in models})
    title = f"{len(models)} models of {kinds} kinds and {len({m['setting'] for m in models})} settings, {data}"
    lines, paths = table_lines(models, rows), path_lines(models)
    draw(models, args.results / f"{NAME}.png", f"{title}:\nKendall's tau of a measure and of test - train loss")
    target = f"{base.points[0].removeprefix('loss=')} (text: {TEXT[base.data][1]:g})"
    text = f"{title}, trained to a loss of {target}, measured on {PROBE} of the training samples. {tally(lines)}\n\n"
    text += f"{table(lines)}\n{path_table(paths)}"
    text += f"\nOf the two geometries of paths the one to take: {recommended_geometry(models)}.\n"
    text += f"\n{shortfalls(rows)}\n\n{provenance(runs, args.out)}\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
