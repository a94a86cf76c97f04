"""Would the default metrics be as exact with fewer Hessian-vector products? Three ways and combinations, measured.

    python examples/benchmarks/fewer_products.py --data DIR --out examples/benchmarks/results/fewer_products

trains the eight networks of ``tolerance.py`` on Fashion-MNIST and measures lambda_max, invariant sharpness and, under
Adam, the preconditioned sharpness at steps of each, every way from what it has found itself at the step before:

- no search: a small residual ends a run at once, whether or not a larger eigenvalue would have shown.
- quarter: it ends once ``min(r, r²/gap)`` of the residual r is a quarter of the standard error of the samples, as known
  from the measurement before, the gap being that to the next Ritz value.
- known space: products serve all geometries. ``H d`` is known for the displacements d of the weights so far, so that of
  ``S H S`` with ``S^-1 d`` is known in every chart ``w0 + S z``: Rayleigh-Ritz there, before and after each product.
  Memory: displacements and products, two bases.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from known_space import KnownSpace, Row, SpaceMetric, is_quarter
from tolerance import NUM_TRAINED_ON, PROBE_SIZE, RUNS, Batch, Run, fashion_mnist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_flatness import SAM, InvariantSharpness, LossLandscape, TopEigenvalues
from lightning_flatness.estimators import Which, top_eigenvalues
from lightning_flatness.estimators.krylov import misses
from lightning_flatness.estimators.krylov.solver import KrylovSolver


@dataclass(frozen=True)
class Way:
    """How to measure: whether to search for a larger eigenvalue, to stop at a quarter, to use the known space."""

    searches: bool = True
    quarter: bool = False
    known_space: bool = False


WAYS = {
    "as it is": Way(),
    "no search": Way(searches=False),
    "quarter": Way(quarter=True),
    "quarter, no search": Way(searches=False, quarter=True),
    "known space, no search": Way(searches=False, known_space=True),
    "known space, quarter, no search": Way(searches=False, quarter=True, known_space=True),
}


@contextmanager
def solver_of(way: Way, relative_error: float) -> Iterator[None]:
    """Let the package's solver go this way inside the block."""
    usual = KrylovSolver._are_converged

    def are_converged(solver: KrylovSolver, values: Tensor, residuals: Tensor) -> bool:
        if math.isnan(relative_error) or len(values) < 2:
            return usual(solver, values, residuals)
        wanted = {"LA": values, "SA": -values, "LM": values.abs()}[solver.which]
        return is_quarter(float(wanted[0]), float(residuals[0]), float(wanted[1]), relative_error)

    rule = are_converged if way.quarter else usual
    hidden = misses.LARGEST_HIDDEN_COMPONENT if way.searches else 1.0
    patched = mock.patch.object(KrylovSolver, "_are_converged", rule)
    with patched, mock.patch.object(misses, "LARGEST_HIDDEN_COMPONENT", hidden):
        yield


class Measurer:
    """Measures one way."""

    def __init__(self, way: Way, geometries: Sequence[str]) -> None:
        self.way = way
        self.spaces = [SpaceMetric(g) for g in geometries] if way.known_space else []
        makers: dict[str, TopEigenvalues | InvariantSharpness] = {
            "euclidean": TopEigenvalues(),
            "layer": InvariantSharpness(shared_start=True),
            "optimizer": TopEigenvalues(geometry="optimizer", shared_start=True),
        }
        self.metrics = {g: makers[g] for g in geometries}

    def measure(self, landscape: LossLandscape) -> Row:
        """Return values and products by geometry, and all gradients."""
        row: Row = {}
        with landscape.measurement():
            space, covector = KnownSpace(landscape), None
            for metric in self.spaces:
                found, own = metric.measure(space, covector, self.way.quarter)
                covector = own if covector is None else covector
                row |= found
            for geometry, measure in self.metrics.items() if not self.spaces else ():
                value, error = (float(t.flatten()[0]) for t in (measure.value, measure.standard_error))
                with solver_of(self.way, error / abs(value)):
                    measure.update(landscape)
                row |= {f"value {geometry}": float(measure.value.flatten()[0].abs())}
                row |= {f"products {geometry}": int(measure.num_products)}
        return row | {"gradients": landscape.cost.gradient_evaluations}


def study(name: str, folder: Path, num_points: int) -> list[Row]:
    """Train a network, and return a row for each point and way."""
    run = RUNS[name]
    data = fashion_mnist(folder, run.pixels)
    torch.manual_seed(0)
    module = run.module()
    optimizer = run.optimizer(module.parameters())
    geometries = ["euclidean", "layer", *(["optimizer"] if "Adam" in name else [])]
    measurers = {way: Measurer(settings, geometries) for way, settings in WAYS.items()}
    probe = torch.randperm(NUM_TRAINED_ON, generator=torch.Generator().manual_seed(1))[:PROBE_SIZE].split(128)
    batches = [(data[0][part], data[1][part]) for part in probe]
    rows = []
    for point in range(num_points):
        train(run, module, optimizer, data)

        def landscape() -> LossLandscape:
            loss_fn = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
            return LossLandscape(module, batches, loss_fn, mode="train", optimizer=optimizer)

        with landscape().measurement() as reference:  # from a random start, with a search for missed eigenvalues
            which: dict[str, Which] = {g: "LM" if g == "layer" else "LA" for g in geometries}
            found = {g: top_eigenvalues(reference, g, k=2, tol=1e-3, which=which[g]) for g in geometries}
        exact = {g: float(result.eigenvalues[0].abs()) for g, result in found.items()}
        for way, measurer in measurers.items():
            row = measurer.measure(landscape())
            errors = {f"error {g}": row[f"value {g}"] / value - 1 for g, value in exact.items()}
            known = {k.replace("value", "error"): row[k] / exact[k.split()[-1]] - 1 for k in row if "known value" in k}
            rows.append({"run": name, "point": point, "way": way} | errors | known | row)
    return rows


def train(run: Run, module: nn.Module, optimizer: Optimizer, data: Batch) -> None:
    """Train for as many steps as there are between measurements."""
    stepper = SAM(optimizer, rho=run.rho) if run.rho else optimizer
    for _ in range(run.every):
        chosen = torch.randint(NUM_TRAINED_ON, (run.batch_size,))

        def closure(x: Tensor = data[0][chosen], y: Tensor = data[1][chosen]) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            return float(loss.detach())

        stepper.step(closure)


def table(rows: list[Row]) -> list[str]:
    """Return a table of the ways, under SGD and under Adam, and what the known space holds before any product."""
    warm = [row for row in rows if row["point"] > 0]
    lines = [f"Warm measurements on {PROBE_SIZE} samples against a cold reference, at {len(warm) // len(WAYS)} points."]
    head = "| way | values | gradients, median | products, median | more than 2 % off | largest error | median error |"
    for kind in ("SGD", "Adam"):
        names = dict.fromkeys(row["run"] for row in warm if ("Adam" in row["run"]) == (kind == "Adam"))
        lines += ["", f"{kind}: {'; '.join(names)}.", "", head, "|---" * 7 + "|"]
        for way in WAYS:
            here = [row for row in warm if row["way"] == way and row["run"] in names]
            errors = [abs(row[k]) for row in here for k in row if k.startswith("error ")]
            products = [sum(row[k] for k in row if k.startswith("products ")) for row in here]
            if errors:
                lines.append(
                    f"| {way} | {len(errors)} | {statistics.median(row['gradients'] for row in here):.1f} | "
                    f"{statistics.median(products):.0f} | {sum(e > 0.02 for e in errors) / len(errors):.1%} | "
                    f"{max(errors):.1%} | {statistics.median(errors):.0e} |"
                )
    here = [row for row in warm if row["way"] == "known space, no search"]
    residuals = [row[k] for row in here for k in row if k.startswith("known residual")]
    errors = [abs(row[k]) for row in here for k in row if k.startswith("known error")]
    return [
        *lines,
        "",
        f"The known space in the second and third geometry, before any product there: relative residual "
        f"{statistics.median(residuals):.2f}, relative error {statistics.median(errors):.2f} in the median.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's files")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--read", type=Path, nargs="*", default=[], help="tables of all measurements to add, OUT.csv")
    parser.add_argument("--out", type=Path, help="also write the table to OUT.md and all measurements to OUT.csv")
    args = parser.parse_args()
    rows: list[Row] = []
    for path in args.read:
        with path.open(newline="") as file:
            read = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        rows += [{k: v if k in ("run", "way") else float(v) for k, v in row.items()} for row in read]
    for name in args.runs:
        rows += study(name, args.data, args.points)
        print("done:", name, flush=True, file=sys.stderr)
    lines = table(rows)
    print("\n".join(lines))
    if args.out is not None:
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        with args.out.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
