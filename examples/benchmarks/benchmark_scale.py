"""Cost of the top eigenvalues of a decoder's Hessian, up to the 124 million parameters of the small GPT-2.

    python examples/benchmarks/benchmark_scale.py

Decoders in the shape of GPT-2 (causal attention, tied embeddings of 50,257 tokens) with random weights, on sequences
of 256 random tokens, one to a microbatch. Three series: parameters, samples and the number k of eigenvalues grow, each
with everything else held fixed; the largest decoder with k = 5, too. Each measurement has a process of its own, so that
its peak of memory is its own. Results are kept in ``logs/benchmark_scale``: run again to go on, ``--fresh`` to start
anew. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from matplotlib.ticker import LogLocator, NullFormatter
from peers.report import quote
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from style import COLOURS, new_figure, save, tidy

RESULTS = Path(__file__).parent / "results"
KEPT = Path("logs/benchmark_scale")
VOCABULARY, CONTEXT, NUM_TOKENS = 50_257, 1024, 256
SPARE_BASIS = 8
"""Vectors in the basis beyond the k wanted ones; the package's own default at these sizes."""
GRAPH_MEMORY = 2**30
"""Bytes of graphs that the package keeps between products by default."""


@dataclass(frozen=True)
class Case:
    """One measurement: a decoder of this width and depth, this many sequences, this many eigenvalues."""

    width: int
    depth: int
    num_samples: int = 1
    k: int = 1


SMALL = (128, 2)
SERIES = {
    "parameters": [Case(*shape) for shape in (SMALL, (256, 4), (384, 6), (512, 8), (768, 12))],
    "samples": [Case(*SMALL, num_samples=n) for n in (1, 2, 4, 8, 16)],
    "k": [Case(*SMALL, k=k) for k in (1, 2, 5, 10)],
    "largest, k = 5": [Case(768, 12, k=5)],
}


@dataclass(frozen=True)
class Outcome:
    """What one measurement took; bytes are what the process grew by beyond Python, libraries and weights."""

    num_parameters: int
    seconds: float
    products: int
    gradient_evaluations: float
    plain_seconds: float
    plain_bytes: int
    peak_bytes: int
    resident_bytes: int
    value: float
    error: float

    @property
    def seconds_per_product(self) -> float:
        """With everything else that a measurement does shared out."""
        return self.seconds / self.products

    @property
    def copies(self) -> float:
        """Memory beyond that of one plain double backward pass, in copies of the weights."""
        return (self.peak_bytes - self.plain_bytes) / (4 * self.num_parameters)


class Decoder(nn.Module):
    """GPT-2's shape: pre-norm blocks, GELU, learned positions, the output tied to the embedding."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.tokens(tokens) + self.positions.weight[:length]
        return F.linear(self.blocks(hidden, mask, is_causal=True), self.tokens.weight)


def next_token_loss(module: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def plain_product(module: nn.Module, batch: Tensor) -> None:
    """One product with the Hessian as in every tutorial, the whole graph of the microbatch at hand until its end."""
    parameters = list(module.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(next_token_loss(module, batch), parameters, create_graph=True)
        torch.autograd.grad(gradient, parameters, [torch.ones_like(p) for p in parameters], retain_graph=True)


def memory(name: str) -> int:
    """Return a figure of this process in bytes."""
    (kib,) = re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kib)


def reset_peak() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def measure(case: Case) -> Outcome:
    """Measure in this process."""
    from lightning_flatness import LossLandscape, TopEigenvalues

    torch.manual_seed(0)
    module = Decoder(case.width, case.depth).eval()
    batches = [torch.randint(VOCABULARY, (1, NUM_TOKENS + 1)) for _ in range(case.num_samples)]
    before = reset_peak()
    start = time.perf_counter()
    plain_product(module, batches[0])
    plain_seconds, plain_bytes = time.perf_counter() - start, memory("VmHWM") - before
    metric = TopEigenvalues(k=case.k, tol=0.1, max_basis=case.k + SPARE_BASIS, max_products=20 * case.k)
    landscape = LossLandscape(module, batches, next_token_loss)
    before = reset_peak()
    start = time.perf_counter()
    metric.update(landscape)
    seconds, resident = time.perf_counter() - start, memory("VmHWM")
    return Outcome(
        num_parameters=landscape.num_parameters,
        seconds=seconds,
        products=int(metric.num_products),
        gradient_evaluations=float(metric.gradient_evaluations),
        plain_seconds=plain_seconds,
        plain_bytes=plain_bytes,
        peak_bytes=resident - before,
        resident_bytes=resident,
        value=float(metric.compute().flatten()[0]),
        error=float(metric.error.flatten()[0]),
    )


def in_a_process(case: Case, threads: int, fresh: bool) -> Outcome:
    path = KEPT / f"{'_'.join(map(str, astuple(case)))}.json"
    if fresh or not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--threads", str(threads), "--case", *map(str, astuple(case))]
        path.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return Outcome(**json.loads(path.read_text()))


# ----------------------------------------------------------------------------------------------------------- report


def exponent(x: list[float], y: list[float]) -> float:
    """Return the slope of a straight line through the points in logarithms: 1 where y is proportional to x."""
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    return statistics.linear_regression(log_x, log_y).slope


def points(name: str, found: dict[Case, Outcome]) -> tuple[list[float], list[float]]:
    """Return the x of a series, and seconds: per product where products do not depend on x, else of everything."""
    cases = SERIES[name]
    if name == "parameters":
        return [found[c].num_parameters for c in cases], [found[c].seconds_per_product for c in cases]
    if name == "samples":
        return [c.num_samples for c in cases], [found[c].seconds_per_product for c in cases]
    return [c.k for c in cases], [found[c].seconds for c in cases]


def table(found: dict[Case, Outcome]) -> str:
    columns = ["parameters", "samples", "k", "products", "seconds", "s per product", "in plain products", "peak GB"]
    columns += ["beyond a plain product, in weights"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]
    for case, o in found.items():
        plain = o.seconds_per_product / (o.plain_seconds * case.num_samples)
        lines.append(
            f"| {o.num_parameters / 1e6:.1f}M | {case.num_samples} | {case.k} | {o.products} | {o.seconds:.1f} "
            f"| {o.seconds_per_product:.2f} | {plain:.2f} | {o.resident_bytes / 1e9:.2f} | {o.copies:.1f} |"
        )
    return "\n".join(lines)


def summary(found: dict[Case, Outcome]) -> str:
    """Return the sentences under the table."""
    slopes = {name: exponent(*points(name, found)) for name in ("parameters", "samples", "k")}
    largest = max(found.values(), key=lambda o: (o.num_parameters, o.resident_bytes))
    copies = max(o.copies - case.k - SPARE_BASIS for case, o in found.items() if case.num_samples == 1)
    several = [o.peak_bytes - o.plain_bytes for case, o in found.items() if case.num_samples > 1]
    return (
        f"Cost grows with the power {slopes['parameters']:.2f} of the parameters (seconds per product), "
        f"{slopes['samples']:.2f} of the samples (the same) and {slopes['k']:.2f} of k (seconds of a measurement). "
        f"The largest process took {largest.resident_bytes / 1e9:.1f} GB in all. With one microbatch, a measurement "
        f"holds its basis of k + {SPARE_BASIS} vectors and at most {copies:.1f} copies of the weights more than "
        f"a plain product. With several, it also keeps graphs of at most {GRAPH_MEMORY / 1e9:.1f} GB (`graph_memory`): "
        f"{max(several) / 1e9:.1f} GB beyond a plain product at most."
    )


def draw(found: dict[Case, Outcome], path: Path) -> None:
    """Draw the three series and the memory of the first."""
    figure = new_figure(9, 6)
    axes = figure.subplots(2, 2).flatten()
    ours, reference = COLOURS["lightning-flatness"], COLOURS["reference"]
    labels = {
        "parameters": ("parameters", "seconds per product"),
        "samples": ("sequences of 256 tokens", "seconds per product"),
        "k": ("eigenvalues k", "seconds of a measurement"),
    }
    for ax, (name, (x_label, y_label)) in zip(axes, labels.items(), strict=False):
        x, y = points(name, found)
        slope = exponent(x, y)
        middle = len(x) // 2
        ax.loglog(x, [y[middle] * v / x[middle] for v in x], "--", color=reference, label="proportional")
        ax.loglog(x, y, "o-", color=ours, label="measured")
        ax.set(xlabel=x_label, ylabel=y_label, title=f"power {slope:.2f}")
        ax.set_xticks(x, [f"{v / 1e6:.0f}M" if name == "parameters" else f"{v:g}" for v in x], minor=False)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    outcomes = [found[case] for case in SERIES["parameters"]]
    millions = [o.num_parameters / 1e6 for o in outcomes]
    axes[3].plot(millions, [o.resident_bytes / 1e9 for o in outcomes], "o-", color=ours)
    axes[3].plot(millions, [4 * o.num_parameters / 1e9 for o in outcomes], ":", color=reference, label="the weights")
    axes[3].set(xlabel="million parameters", ylabel="GB", ylim=(0, None), title="peak memory of the process")
    for ax in axes:
        tidy(ax)
    handles = [*axes[0].get_legend_handles_labels()[0], *axes[3].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Top eigenvalues of the Hessian of GPT-2-shaped decoders", fontsize=11)
    save(figure, path)


def machine(threads: int) -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    cores = f"{threads} {'core' if threads == 1 else 'cores'}"
    return f"{cores} of {names[0] if names else platform.machine()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--readme", type=Path, help="a README.md to put the table into, between its comments")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(asdict(measure(Case(*args.case)))))
        return
    found: dict[Case, Outcome] = {}
    for case in dict.fromkeys(case for series in SERIES.values() for case in series):
        found[case] = in_a_process(case, args.threads, args.fresh)
        print(f"{case}: {found[case].seconds:.1f} s", flush=True)
    block = f"{table(found)}\n\n{summary(found)}\n\n*{machine(args.threads)}; tol = 0.1, float32.*\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmark_scale.md").write_text(
        f"# Top eigenvalues of GPT-2-shaped decoders\n\n`python examples/benchmarks/benchmark_scale.py`\n\n{block}"
    )
    draw(found, args.out / "benchmark_scale.png")
    print(block)
    if args.readme is not None:
        quote(
            args.readme,
            "benchmark_scale",
            f"{block}\n![Cost and memory](examples/benchmarks/results/benchmark_scale.png)",
        )


if __name__ == "__main__":
    main()
