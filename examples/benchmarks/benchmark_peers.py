"""How fast are the top eigenvalues of a Hessian found, and how exactly? This package beside its peers.

    python3 -m venv .venv-benchmark
    .venv-benchmark/bin/pip install -e ".[benchmark]"
    .venv-benchmark/bin/pip install --no-deps pyhessian==0.1
    .venv-benchmark/bin/pip uninstall -y torchvision
    .venv-benchmark/bin/python examples/benchmarks/benchmark_peers.py

Use a separate environment: curvlinops installs torchvision, and a torchvision built for another torch breaks the import
of torchmetrics and Lightning.

All tools measure the same weights on the same samples in one process, by turns, each round from another random start.
The truth is SciPy's ``eigsh`` in float64 on a plain double backward pass. Every tool is timed

- as its documentation uses it ("default");
- with the least work, among settings tried beforehand, that is accurate to 1e-2 ("cheapest"). Choosing it takes
  knowing the truth, so it is a bound. The error is the largest of the k eigenvalues',
  and a setting has to reach half of 1e-2 in three untimed trials, to keep 1e-2 in the timed rounds;
- hessian-eigenthings, which takes a fixed number of steps, with enough of them to report convergence, and
  ``eigsh`` with a tolerance of 1e-2 ("converged").

*Gradients* are seconds over those of one gradient on the same batches. Memory is the growth of the process's resident
set at its peak (Linux only). *Warm* starts from what the tool found 25 steps of SGD earlier, in its default setting. A
tool that has no second derivative of fused attention is shown as failing, or timed within PyTorch's ``sdpa_kernel``.

Results are kept in ``logs/benchmark_peers`` one network and k at a time: run again to go on, ``--fresh`` to start anew,
``--again`` to time anew without looking for the settings of the peers once more.
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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.calibration import Candidate, calibrated, for_microbatches
from peers.picture import draw
from peers.report import Row, quote, relative_error, write
from peers.tools import loss_fn
from peers.workloads import NUM_MICROBATCHES, WORKLOADS, Problem, trained
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULTS = Path(__file__).parent / "results"
KEPT = Path("logs/benchmark_peers")
MAX_K = 5


def reference(problem: Problem) -> tuple[list[float], float]:
    """Return the largest eigenvalues and the lowest by SciPy in float64, from products by plain double backward."""
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
    lowest = eigsh(operator, 1, which="SA", tol=0.1, v0=start, return_eigenvectors=False)
    return sorted(values.tolist(), reverse=True), float(lowest[0])


def reset_peak() -> int | None:
    """Reset the peak of the process's memory and return its current memory, or None if the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what was freed, so that its reuse counts
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory("VmRSS")


def memory(name: str) -> int:
    """Return a figure of this process in bytes."""
    (kib,) = re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


# ----------------------------------------------------------------------------------------------------------- timing


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def timed(run: Callable[[], Any], clock: str) -> tuple[float, Any]:
    gc.collect()
    start = CLOCKS[clock]()
    result = run()
    return CLOCKS[clock]() - start, result


def gradient(problem: Problem) -> None:
    parameters = list(problem.module.parameters())
    for batch in problem.batches:
        torch.autograd.grad(loss_fn(problem.module, batch), parameters)


def time_by_turns(candidates: list[Candidate], problem: Problem, values: list[float], args: argparse.Namespace) -> None:
    """Run all candidates in every round, each round in another order and with another random start."""
    gradient(problem)
    for i in range(args.rounds):
        turn = [
            c for c in candidates if c.is_runnable and (i < args.slow_rounds or c.row.kind not in c.tool.slow_kinds)
        ]
        seconds_of_gradient = statistics.median(timed(lambda: gradient(problem), args.clock)[0] for _ in range(3))
        for candidate in turn[i % len(turn) :] + turn[: i % len(turn)]:
            row = candidate.row
            before = reset_peak()
            seconds, result = timed(partial(candidate.run, problem, i + 1), args.clock)
            row.peak_bytes = None if before is None else max(row.peak_bytes or 0, memory("VmHWM") - before)
            row.seconds.append(seconds)
            row.gradient_seconds.append(seconds_of_gradient)
            row.products.append(result.products)
            row.errors.append(relative_error(result.values, values))


def measure(name: str, k: int, earlier: list[Row], args: argparse.Namespace) -> list[Row]:
    """Calibrate on one batch, and time all tools on one batch and, for several eigenvalues, on microbatches."""
    (before, now), (values, _) = prepared(name)
    num_parameters = sum(p.numel() for p in now.module.parameters())
    title = f"{WORKLOADS[name].title}, {num_parameters / 1e6:.2g}M"
    whole = calibrated(before, now, values[:k], title, quick=args.quick, earlier=earlier)
    time_by_turns(whole, now, values[:k], args)
    split = for_microbatches(whole, NUM_MICROBATCHES) if k > 1 else []
    if split:
        time_by_turns(split, now.in_microbatches(), values[:k], args)
    return [candidate.row for candidate in whole + split]


def prepared(name: str) -> tuple[tuple[Problem, Problem], tuple[list[float], float]]:
    """Return the network at both of its weights, and the reference at the later ones; kept between runs."""
    path = KEPT / f"{name}.pt"
    if not path.exists():
        problems = trained(WORKLOADS[name])
        KEPT.mkdir(parents=True, exist_ok=True)
        torch.save({"problems": problems, "reference": reference(problems[1])}, path)
    kept = torch.load(path, weights_only=False)
    return kept["problems"], kept["reference"]


def spectrum(name: str) -> str:
    """Return a sentence with what is to be found, and the lowest, which tools that look at moduli must not find."""
    values, lowest = prepared(name)[1]
    largest = ", ".join(f"{value:.3g}" for value in values)
    return f"{WORKLOADS[name].title}: {largest} (lowest: {lowest:.2g})."


def machine(clock: str) -> str:
    """Return a sentence that names the machine and the versions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    packages = ("torch", "pyhessian", "curvlinops-for-pytorch", "scipy", "hessian-eigenthings")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    system = f"{platform.system()}, Python {platform.python_version()}"
    num = torch.get_num_threads()
    return f"{clock.capitalize()} time on {num} {'core' if num == 1 else 'cores'} of {cpu} ({system}; {versions})."


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--k", type=int, nargs="+", default=[1, MAX_K])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--slow-rounds", type=int, default=2, help="of PyHessian, power iteration and eigsh at full precision"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="on a machine that others use: processor, with --threads 1"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--again", action="store_true", help="time anew, with the settings of peers found earlier")
    parser.add_argument("--readme", type=Path, help="a README.md to put the table into, between its comments")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one round of settings not looked for: does it run?")
    args = parser.parse_args()
    kept = KEPT
    if args.quick:
        args.rounds, args.slow_rounds, kept = 1, 1, KEPT / "quick"
        kept.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    for name in args.workload:
        for k in args.k:
            path = kept / f"{name}_k{k}.json"
            if args.fresh or args.again or not path.exists():
                earlier = [Row(**row) for row in json.loads(path.read_text())] if args.again and path.exists() else []
                start, busy = time.perf_counter(), time.process_time()
                found = measure(name, k, earlier, args)
                path.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1))
                took, used = time.perf_counter() - start, time.process_time() - busy
                print(f"{path.stem}: {took:.0f} s, {used:.0f} s of processor time", flush=True)
            rows += [Row(**row) for row in json.loads(path.read_text())]
    spectra = " ".join(spectrum(name) for name in args.workload)
    block = write(rows, machine(args.clock), spectra, args.out / "benchmark_peers.md")
    print(block)
    draw(rows, args.out / "benchmark_peers.png")
    if args.readme is not None:
        picture = "![True error over seconds](examples/benchmarks/results/benchmark_peers.png)"
        quote(args.readme, "benchmark_peers", f"{block}\n\n{picture}")


if __name__ == "__main__":
    main()
