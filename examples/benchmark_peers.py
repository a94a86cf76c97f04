"""How fast are the top eigenvalues of a Hessian found, and how exactly? This package beside its peers.

    python3 -m venv .venv-benchmark
    .venv-benchmark/bin/pip install -e ".[benchmark]"
    .venv-benchmark/bin/pip install --no-deps pyhessian==0.1
    .venv-benchmark/bin/pip uninstall -y torchvision
    .venv-benchmark/bin/python examples/benchmark_peers.py

The environment is one of its own, since curvlinops brings torchvision, which nobody here needs, and which, where it is
not the build for the torch that is installed, breaks the import of torchmetrics and Lightning.

All tools measure the same weights on the same samples in one process, by turns, each round with another random start.
The reference is SciPy's ``eigsh`` in float64 on a plain double backward pass. Every tool is timed with the settings that
it documents, and with the cheapest ones that reach a relative error of 1e-2 (of each of the k eigenvalues; to be tried,
a setting has to reach half of that once, untimed). *Gradients* are seconds divided by those of one gradient over the
same batches. Memory is the growth of the process's resident set at its peak (Linux only), in the untimed run. *Warm*
is from what the tool found 25 steps of SGD earlier.

Results are kept in ``logs/benchmark_peers`` one network and k at a time: run again to go on, ``--fresh`` to start anew.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.report import TARGET_ERROR, Row, relative_error, verdict_table, write
from peers.tools import TOOLS, Measured, Tool, loss_fn
from peers.workloads import WORKLOADS, Problem, trained
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULTS = Path(__file__).parent / "results"
KEPT = Path("logs/benchmark_peers")
MAX_K = 5


@dataclasses.dataclass
class Candidate:
    """A tool in one setting, ready to be timed."""

    tool: Tool
    setting: dict[str, Any]
    row: Row
    kept: Any
    is_helped: bool

    def run(self, problem: Problem, seed: int) -> Measured:
        with sdpa_kernel(SDPBackend.MATH) if self.is_helped else nullcontext():
            return self.tool.measure(problem, self.row.k, seed, self.kept, **self.setting)


def reference(problem: Problem) -> list[float]:
    """Return the largest eigenvalues by SciPy in float64, from products by plain double backward."""
    exact = problem.in_float64().in_one_batch()
    parameters = list(exact.module.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss_fn(exact.module, exact.batches[0]), parameters, create_graph=True)
    shapes = [p.shape for p in parameters]

    def matvec(v: np.ndarray) -> np.ndarray:
        pieces = torch.as_tensor(v).reshape(-1).split([s.numel() for s in shapes])
        pieces = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        products = torch.autograd.grad(gradient, parameters, pieces, retain_graph=True)
        return torch.cat([p.reshape(-1) for p in products]).numpy()

    size = sum(s.numel() for s in shapes)
    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    start = np.random.default_rng(1).standard_normal(size)
    values = eigsh(operator, MAX_K, which="LA", tol=1e-6, v0=start, return_eigenvectors=False)
    return sorted(values.tolist(), reverse=True)


def with_peak_memory(run: Callable[[], Measured]) -> tuple[Measured, int | None]:
    """Return what a run returns and by how much the process grew during it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what was freed, so that its reuse counts
        Path("/proc/self/clear_refs").write_text("5")  # set the peak back
    except OSError:
        return run(), None
    before = _kilobytes("VmRSS")
    result = run()
    return result, 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


# ------------------------------------------------------------------------------------------------------ calibration


def candidates(tool: Tool, before: Problem, now: Problem, values: list[float], title: str) -> list[Candidate]:
    """Return a tool's settings to time: its default and the cheapest accurate enough, cold and warm."""
    k, num_batches = len(values), len(now.batches)
    found = []
    for start in ("cold", "warm") if tool.warm_starts else ("cold",):
        for kind in ("default", "cheapest"):
            settings = [tool.default] if kind == "default" else tool.cheaper(k)
            if settings[0] is not None:
                row = Row(title, k, num_batches, tool.name, kind, "", start)
                found.append(_calibrated(tool, settings, row, before, now, values))
    return found


def _calibrated(
    tool: Tool, settings: list[dict[str, Any]], row: Row, before: Problem, now: Problem, values: list[float]
) -> Candidate:
    """Try settings until one is accurate enough; without a second derivative, again with the math attention kernel."""
    candidate = Candidate(tool, settings[0], row, None, is_helped=False)
    for setting in settings:
        candidate.setting, candidate.kept = setting, None
        row.setting = ", ".join(f"{name}={value}" for name, value in setting.items() if name != "check")
        try:
            result = _tried(candidate, before, now)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if candidate.is_helped:
                row.note = f"fails: {reason}"
                return candidate
            candidate.is_helped = True
            row.note = "fails with fused attention; here given the math kernel"
            result = _tried(candidate, before, now)
        if relative_error(result.values, values) <= TARGET_ERROR / 2:
            return candidate
    if row.kind == "cheapest":
        row.note = "no setting tried is accurate enough"
    return candidate


def _tried(candidate: Candidate, before: Problem, now: Problem) -> Measured:
    if candidate.row.start == "warm":
        candidate.kept = None
        candidate.kept = candidate.run(before, 0).kept
    result, candidate.row.peak_bytes = with_peak_memory(lambda: candidate.run(now, 0))
    return result


# ----------------------------------------------------------------------------------------------------------- timing


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def gradient(problem: Problem) -> None:
    parameters = list(problem.module.parameters())
    for batch in problem.batches:
        torch.autograd.grad(loss_fn(problem.module, batch), parameters)


def measure(name: str, k: int, problems: tuple[Problem, Problem], values: list[float], args: Any) -> list[Row]:
    """Calibrate and time all tools on one Hessian, by turns."""
    before, now = problems
    num_parameters = sum(p.numel() for p in now.module.parameters())
    title = f"{WORKLOADS[name].title}, {num_parameters / 1e6:.2g}M"
    entries = [c for tool in TOOLS for c in candidates(tool, before, now, values[:k], title)]
    runners = [c for c in entries if not c.row.note.startswith(("fails:", "no setting"))]
    gradient(now)
    for i in range(args.rounds):
        turn = [c for c in runners if i < args.slow_rounds or not c.tool.is_slow]
        seconds_of_gradient = statistics.median(timed(lambda: gradient(now))[0] for _ in range(3))
        for candidate in turn[i % len(turn) :] + turn[: i % len(turn)]:
            seconds, result = timed(lambda c=candidate, seed=i + 1: c.run(now, seed))
            row = candidate.row
            row.seconds.append(seconds)
            row.gradient_seconds.append(seconds_of_gradient)
            row.products.append(result.products)
            row.errors.append(relative_error(result.values, values[:k]))
    return [c.row for c in entries]


def prepared(name: str) -> tuple[tuple[Problem, Problem], list[float]]:
    """Return the network at both of its weights, and the reference at the later ones; kept between runs."""
    path = KEPT / f"{name}.pt"
    if not path.exists():
        problems = trained(WORKLOADS[name])
        KEPT.mkdir(parents=True, exist_ok=True)
        torch.save({"problems": problems, "reference": reference(problems[1])}, path)
    kept = torch.load(path, weights_only=False)
    return kept["problems"], kept["reference"]


def machine() -> str:
    """Return a sentence that names the machine and the versions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    packages = ("torch", "pyhessian", "curvlinops-for-pytorch", "scipy", "hessian-eigenthings")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"Measured on {torch.get_num_threads()} cores of {cpu} ({platform.system()}, Python {platform.python_version()}; {versions})."


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--k", type=int, nargs="+", default=[1, MAX_K])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=2, help="of PyHessian and of the plain power iteration")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    for name in args.workload:
        (before, now), values = prepared(name)
        for in_batches in (Problem.in_one_batch, Problem.in_microbatches):
            problems = in_batches(before), in_batches(now)
            for k in args.k:
                path = KEPT / f"{name}_k{k}_{len(problems[0].batches)}.json"
                if args.fresh or not path.exists():
                    start = time.perf_counter()
                    found = measure(name, k, problems, values, args)
                    path.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1))
                    print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)
                rows += [Row(**row) for row in json.loads(path.read_text())]
    print(write(rows, machine(), args.out / "benchmark_peers.md"))


if __name__ == "__main__":
    main()
