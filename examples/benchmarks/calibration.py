"""Are the standard errors right? Probes of 512 samples beside the whole training set.

    python examples/benchmarks/calibration.py

trains small networks on a part of Fashion-MNIST, stops at three stages, and measures on the whole part and on 20 random
probes. With ``z = (probe - whole) / standard_error``, a good error has ``sd(z)`` of about one, and ±2 of it cover the
truth in about 95 % of the probes. What is measured is kept in a file: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from fashion import images, network

from lightning_flatness import LossLandscape, metrics
from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.module.modes import uses_batch_statistics

RESULTS = Path(__file__).parent / "results" / "calibration.md"
KINDS = {"mlp": 0.05, "cnn": 0.05, "cnn with BatchNorm": 0.05, "lstm": 0.3}
"""Kinds of network and their learning rates."""

STAGES = (30, 200, 1000)
"""Steps of SGD with momentum on batches of 64."""

NUM_SAMPLES, PROBE_SIZE, BATCH_SIZE = 4096, 512, 128
Record = dict[str, Any]


def measures(seed: int = 0) -> dict[str, FlatnessMetric]:
    """Return the measures of the monitor's presets, the expensive ones with fewer products."""
    return {
        "lambda_max": metrics.TopEigenvalues(seed=seed),
        "invariant_sharpness": metrics.InvariantSharpness(seed=seed),
        "lambda_min": metrics.TopEigenvalues(which="SA", tol=3e-2, max_products=60, seed=seed),
        "hessian_trace": metrics.HessianTrace(num_products=16, seed=seed),
        "spectral_density": metrics.SpectralDensity(num_runs=4, num_steps=8, seed=seed),
        "worst_case_sharpness": metrics.WorstCaseSharpness(rho=0.05, seed=seed),
        "adaptive_sharpness": metrics.WorstCaseSharpness(rho=0.5, geometry="element", seed=seed),
        "average_case_sharpness": metrics.AverageCaseSharpness(rho=0.05, num_draws=10, seed=seed),
        "relative_flatness": metrics.RelativeFlatness(num_products=24, seed=seed),
        "minimum_sharpness": metrics.MinimumSharpness(num_products=48, seed=seed),
        "psi_sharpness": metrics.PSISharpness(seed=seed),
        "gradient_noise": metrics.GradientNoise(),
        "fisher_trace": metrics.FisherTrace(),
        "noise_curvature_ratio": metrics.NoiseCurvatureRatio(num_products=24, seed=seed),
        "batch_sharpness": metrics.BatchSharpness(batch_size=64),
    }


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(module(batch[0]), batch[1])


def stages(kind: str, x: Tensor, y: Tensor) -> dict[int, dict[str, Tensor]]:
    """Train, and return the weights at each stage."""
    torch.manual_seed(0)
    module = network(kind).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=KINDS[kind], momentum=0.9 if kind != "lstm" else 0.0)
    found = {}
    for step in range(1, STAGES[-1] + 1):
        chosen = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        cross_entropy(module, (x[chosen], y[chosen])).backward()
        optimizer.step()
        if step in STAGES:
            found[step] = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return found


def measured(module: nn.Module, x: Tensor, y: Tensor, name: str, metric: FlatnessMetric) -> dict[str, list[float]]:
    """Return value, numerical and standard error of each curve of a metric; nothing where it is not defined."""
    size = BATCH_SIZE if uses_batch_statistics(module, "batch_statistics") else PROBE_SIZE  # others do not depend on it
    batches = list(zip(x.split(size), y.split(size), strict=True))
    try:
        metric.update(LossLandscape(module, batches, cross_entropy, num_total=NUM_SAMPLES))
    except ValueError as error:  # of another network
        return {"undefined": [math.nan] * 3} if "Expected" in str(error) else {}
    return {curve.name: [curve.value, curve.error, curve.standard_error] for curve in metric.curves(name)}


def run(path: Path, names: list[str], kinds: list[str], num_probes: int) -> list[Record]:
    """Measure what the file lacks, one line each, and return all of it."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["kind"], r["stage"], r["measure"], r["probe"]) for r in records}
    undefined = {(r["kind"], r["measure"]) for r in records if "undefined" in r["curves"]}
    x, y = images(NUM_SAMPLES)
    weights: dict[str, dict[int, dict[str, Tensor]]] = {kind: stages(kind, x, y) for kind in kinds}
    for name, probe, kind, stage in product(names, range(-1, num_probes), kinds, STAGES):
        if (kind, stage, name, probe) in done or (kind, name) in undefined:
            continue
        chosen = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(probe + 1))
        chosen = chosen if probe < 0 else chosen[:PROBE_SIZE]  # -1: the whole training set
        module = network(kind).train()
        module.load_state_dict(weights[kind][stage])
        curves = measured(module, x[chosen], y[chosen], name, measures(seed=probe + 1)[name])
        record = {"kind": kind, "stage": stage, "measure": name, "probe": probe, "curves": curves}
        records.append(record)
        if "undefined" in curves:
            undefined.add((kind, name))
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return records


def scores(records: list[Record]) -> dict[tuple[str, str], list[float]]:
    """Return the z of all probes by kind and curve; the numerical error of the truth counts, too."""
    truth = {
        (r["kind"], r["stage"], curve): numbers
        for r in records
        if r["probe"] < 0
        for curve, numbers in r["curves"].items()
    }
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        for curve, (value, _, error) in record["curves"].items():
            whole = truth.get((record["kind"], record["stage"], curve))
            if record["probe"] >= 0 and whole is not None and error > 0 and math.isfinite(whole[0]):
                found[record["kind"], curve].append((value - whole[0]) / math.hypot(error, whole[1]))
    return found


def table(records: list[Record]) -> str:
    """Return sd of z and coverage of ±2 standard errors, by kind of network and measure, and the size of the errors."""
    relative: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        for curve, (value, _, error) in record["curves"].items():
            if record["probe"] >= 0 and error > 0:
                relative[record["kind"], curve].append(error / abs(value))
    lines = [
        "| network | measure | probes | standard error | mean z | sd z | ±2 covers |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, curve), values in scores(records).items():
        z = torch.tensor(values, dtype=torch.float64)
        size = torch.tensor(relative[kind, curve]).median()
        lines.append(
            f"| {kind} | {curve} | {len(z)} | {size:.1%} | {z.mean():.2f} | {z.square().mean().sqrt():.2f} | "
            f"{(z.abs() <= 2).double().mean():.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measures", nargs="*", default=list(measures()), choices=list(measures()))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--probes", type=int, default=20)
    parser.add_argument("--records", type=Path, default=Path("logs/calibration.jsonl"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*did not converge.*")
    args.records.parent.mkdir(parents=True, exist_ok=True)
    text = table(run(args.records, args.measures, args.kinds, args.probes))
    print(text)
    steps = ", ".join(map(str, STAGES[:-1])) + f" and {STAGES[-1]}"
    args.out.write_text(
        f"# Standard errors of probes of {PROBE_SIZE} among {NUM_SAMPLES} samples\n\n"
        "Written by `python examples/benchmarks/calibration.py`: Fashion-MNIST at 14 x 14 pixels, after "
        f"{steps} steps of SGD. z = (probe - whole) / standard error; sd is taken around 0; the standard error is the "
        f"median, relative to the value.\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
