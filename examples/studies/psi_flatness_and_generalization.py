"""PSI-flatness: two learned models side by side, the balance's bound, and the order of models.

    python examples/studies/psi_flatness_and_generalization.py          # Fashion-MNIST
    python examples/studies/psi_flatness_and_generalization.py --quick  # digits

Positively Scale-Invariant Flatness of ReLU Neural Networks (arXiv 1903.02237) draws the loss around two learned models
in the values of basis paths: the one with the smaller PSI-flatness generalises better. It bounds the generalisation
error by a function of the balance, the ratio of the largest to the smallest value of a basis path, and concludes that
balanced minima are more likely to be flat and to generalise better. Its full text was not at hand:
``BasisPathBalance`` and ``PSISharpness`` are our definitions in its spirit, and so is the bound (``balance_bound.py``).

- **Two models.** An MLP and a CNN, each trained from the same weights in two settings to the same training loss. The
  settings are those with the smallest and the largest PSI sharpness in basis paths in ``results/which_measure.csv``,
  chosen before accuracies were looked at. Effects are over seeds, paired by the initial weights. The surfaces of seed 0
  are drawn in basis paths (skeleton of maximum products) and in path norm.
- **The bound.** Networks of one hidden layer on images of 7x7 pixels: few paths against many samples, since for the
  networks above it says nothing. Both of its sides are computed.
- **The order of models** by measures of paths and by others is that of the 32 MLPs and CNNs of ``which_measure.py``,
  whose rows are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from psi_report import draw_models, draw_surfaces, tables
from psi_run import PairRecipe, SmallRecipe, train_and_measure
from report import read_csv, shortfalls, write_csv
from study import QUICK_DATA, Row, finish, parse_arguments, provenance, runs_of
from training import Recipe

NAME = "psi_flatness_and_generalization"
MODELS = Path(__file__).parent / "results" / "which_measure.csv"
MEASURES = ("path", "path_norm", "lambda_max", "balance", "balance_deciles")
PAIR = {"batch 32, high lr": (32, 0.04), "batch 256, low lr": (256, 0.02)}
"""Batch size and learning rate, as in ``which_measure.py``: small PSI sharpness first."""


@dataclass(frozen=True)
class Size:
    """What differs between the full and the quick study."""

    data: str
    num_train: dict[str, int]  # by kind of network
    loss: float
    num_probe: int
    num_points: int
    widths: tuple[int, ...]
    num_small: int
    epochs: int

    def settings(self) -> dict[str, PairRecipe | SmallRecipe]:
        """All settings by name."""
        found: dict[str, PairRecipe | SmallRecipe] = {}
        for kind, num_train in self.num_train.items():
            base = Recipe(
                points=(f"loss={self.loss:g}",), measures=MEASURES, max_steps=0, batch_size=0, lr=0.0, network=kind,
                data=self.data, num_train=num_train,
            )  # fmt: skip
            recipes = {
                f"{kind}: {name}": replace(base, batch_size=size, lr=lr, max_steps=300 * -(-num_train // size))
                for name, (size, lr) in PAIR.items()
            }
            found[kind] = PairRecipe(recipes, self.num_probe, self.num_points)
        for width in self.widths:
            for name, (size, lr) in PAIR.items():
                small = SmallRecipe(width, size, lr, self.data, self.num_small, self.epochs)
                found[f"{width} units: {name}"] = small
        return found


FULL = Size("fashion", {"mlp": 10_000, "cnn": 4000}, 0.2, 500, 17, (8, 32), 60_000, 5)
QUICK = Size("digits", {"mlp": 500, "cnn": 500}, 0.5, 200, 11, (8,), 1400, 20)


def text_of(rows: list[Row], models: list[Row], title: str) -> str:
    """Return all of the page but where its numbers come from."""
    return f"{title}. {tables(rows, models)}\n{shortfalls([row for row in rows if row['part'] != 'surface'])}\n"


def main() -> None:
    args = parse_arguments(__doc__, NAME, num_seeds=8, fashion=True)
    size = QUICK if args.quick else FULL
    runs = runs_of(size.settings(), args.seeds)
    found = finish(runs, args.out, args.workers, partial(train_and_measure, data_dir=args.data_dir, device=args.device))
    rows = [row for row in found if row["part"] != "surface"]
    surfaces = [row for row in found if row["part"] == "surface"]
    write_csv(rows, args.results / f"{NAME}.csv")
    write_csv(surfaces, args.results / f"{NAME}_surfaces.csv")
    samples = " and ".join(f"{num:,} ({kind.upper()})" for kind, num in size.num_train.items())
    data = QUICK_DATA if args.quick else "Fashion-MNIST averaged to 14x14"
    title = f"{data}, {samples} for training, {args.seeds} seeds"
    models = read_csv(MODELS)
    draw_surfaces(rows, surfaces, args.results / f"{NAME}_surfaces.png", title)
    draw_models(rows, models, args.results / f"{NAME}.png", title)
    text = f"{text_of(rows, models, title)}\n{provenance(runs, args.out)}\n"
    (args.results / f"{NAME}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
