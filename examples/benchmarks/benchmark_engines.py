"""Cost of a Hessian-vector product with each engine, in gradients of the same loss on the same batches.

    python examples/benchmarks/benchmark_engines.py

By turns in one process, on one thread: a gradient by plain autograd (``backward``), and a product by each engine of
``LossLandscape`` once its graphs and steps are there. Medians over the rounds of the ratio within a round; processor
time. Batched is not an engine: four directions at once through the kept graphs (``is_grads_batched``), per direction.
Memory is counted: the peak of what a measurement with two products holds beside the weights and the batches. Prints the
tables and writes ``examples/benchmarks/results/engines.md``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from memory import CountedMemory

from lightning_flatness import LossLandscape
from lightning_flatness.landscape.options import EngineName

ENGINES: tuple[EngineName, ...] = ("kept", "rebuilt", "finite_difference")
RESULTS = Path(__file__).parent / "results" / "engines.md"
NUM_DIRECTIONS = 4


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(2048, 60), nn.ReLU(), nn.Linear(60, 10),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(num_out), nn.BatchNorm2d(num_out)
        self.shortcut = nn.Identity() if num_in == num_out else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def resnet() -> nn.Module:
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    layers = [784, 1024, 1024, 128]
    parts = [m for a, b in pairwise(layers) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(128, 10))


class Transformer(nn.Module):
    def __init__(self, width: int = 128, num_layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(256, width)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(dim=1))
        return logits


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "ReLU convnet": (convnet, lambda n: torch.randn(n, 3, 32, 32), 64),
    "BatchNorm ResNet-20": (resnet, lambda n: torch.randn(n, 3, 32, 32), 16),
    "MLP": (mlp, lambda n: torch.randn(n, 784), 256),
    "transformer": (Transformer, lambda n: torch.randint(256, (n, 64)), 16),
}
"""Module, inputs and number of samples."""


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def seconds(function: Callable[[], object]) -> float:
    """Processor time: other processes on the machine matter less than for the time that passes."""
    start = time.process_time()
    function()
    return time.process_time() - start


def gradient_of(module: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    module.zero_grad()
    for batch in batches:
        (loss_fn(module, batch) / len(batches)).backward()


def peak(module: nn.Module, batches: list[tuple[Tensor, Tensor]], engine: EngineName) -> int:
    """Return the bytes that a measurement with two products holds at its peak."""
    landscape = LossLandscape(module, batches, loss_fn, engine=engine)
    v = torch.randn(landscape.num_parameters)
    memory = CountedMemory()
    with memory, landscape.measurement():
        landscape.hvp(v)
        landscape.hvp(v)
    return memory.peak


def batched_product(module: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    """Return what multiplies several directions at once, by autograd alone."""
    parameters = list(module.parameters())
    gradients = [
        torch.autograd.grad(loss_fn(module, batch) / len(batches), parameters, create_graph=True) for batch in batches
    ]
    directions = [torch.randn(NUM_DIRECTIONS, *p.shape) for p in parameters]

    def product() -> None:
        for gradient in gradients:
            torch.autograd.grad(
                gradient, parameters, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
            )

    return product


def measure(name: str, num_batches: int, num_rounds: int) -> tuple[list[str], list[str]]:
    """Return a row of the table of times, and one of the table of memory."""
    make, inputs, num_samples = WORKLOADS[name]
    torch.manual_seed(0)
    module, size = make().eval(), num_samples // num_batches
    batches = [(inputs(size), torch.randint(10, (size,))) for _ in range(num_batches)]
    landscapes = {engine: LossLandscape(module, batches, loss_fn, engine=engine) for engine in ENGINES}
    v = torch.randn(landscapes["kept"].num_parameters)
    with ExitStack() as stack:
        for landscape in landscapes.values():
            stack.enter_context(landscape.measurement())  # attention on the math kernel for all that follows, too
            landscape.hvp(v)
        products: dict[str, Callable[[], object]] = {e: partial(l.hvp, v) for e, l in landscapes.items()}
        products["batched"] = batched_product(module, batches)
        times: dict[str, list[float]] = {key: [] for key in ("gradient", *products)}
        for i in range(num_rounds + 1):
            for key, function in {"gradient": lambda: gradient_of(module, batches), **products}.items():
                spent = seconds(function)
                if i > 0:
                    times[key].append(spent)
    gradient = statistics.median(times["gradient"])
    ratios = {e: statistics.median(t / g for t, g in zip(times[e], times["gradient"], strict=True)) for e in products}
    ratios["batched"] /= NUM_DIRECTIONS
    workload = [name, f"{v.numel():,}", f"{num_batches} x {size}"]
    row = [*workload, f"{1000 * gradient:.0f}", *(f"{ratios[e]:.2f}" for e in (*ENGINES, "batched"))]
    weights = sum(p.nbytes for p in module.parameters())
    peaks = [f"{peak(module, batches, e) / 2**20:.0f}" for e in ENGINES]
    print(" | ".join(row), "   MiB:", " ".join(peaks), flush=True)
    return row, [*workload, f"{weights / 2**20:.1f}", *peaks]


def report(rows: list[tuple[list[str], list[str]]], num_rounds: int) -> str:
    head = ["workload", "parameters", "batches"]
    names = [engine.replace("_", " ") for engine in ENGINES]
    times = [*head, "gradient, ms", *names, "batched"]
    tables = [
        "Seconds per product over seconds per gradient",
        table([times, *(row for row, _ in rows)]),
        "Memory at the peak of a measurement, MiB",
        table([[*head, "weights", *names], *(row for _, row in rows)]),
        f"One thread of {platform.machine()}, torch {torch.__version__}, medians of {num_rounds} rounds: "
        f"`python examples/benchmarks/benchmark_engines.py --rounds {num_rounds}`.",
    ]
    return "\n\n".join(tables) + "\n"


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * 3 + "|---:" * (len(rows[0]) - 3) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, n, args.rounds) for name in args.workloads for n in (1, 16)]
    text = report(rows, args.rounds)
    print(text)
    if args.workloads == list(WORKLOADS):
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
