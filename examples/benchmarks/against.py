"""Time of a measurement by this checkout against another one, by turns, on a small network and on a decoder.

python examples/benchmarks/against.py OTHER_CHECKOUT                    # the digits network and 124 million parameters
python examples/benchmarks/against.py OTHER_CHECKOUT --decoder 128 2    # a small decoder

A measurement is everything: the landscape, the isolation of the module, the gradient and ten products (three for the
decoder) at the same weights with both. The figures are processor seconds, in processes that take turns, each measuring
several times after a first time that does not count; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = """
import json, sys, time, torch
sys.path[:0] = [{other!r}, {examples!r}, {benchmarks!r}]
import lightning_flatness
from lightning_flatness import LossLandscape
assert lightning_flatness.__file__.startswith({other!r}), lightning_flatness.__file__
torch.set_num_threads(1)
torch.manual_seed(0)
if {decoder!r}:
    from benchmark_scale import NUM_TOKENS, VOCABULARY, Decoder, next_token_loss
    module, num_products = Decoder(*{decoder!r}).eval(), 3
    batches, loss_fn = [torch.randint(VOCABULARY, (1, NUM_TOKENS + 1))], next_token_loss
else:
    from digits import ConvNet, DigitsDataModule
    module, num_products, loss_fn = ConvNet(), 10, None
    batches = [tuple(t[i : i + 128] for t in DigitsDataModule().train_set.tensors) for i in range(0, 512, 128)]
vectors = None
for _ in range(1 + {repeats}):
    start, wall = time.process_time(), time.perf_counter()
    landscape = LossLandscape(module, batches, loss_fn, mode="eval")
    if vectors is None:
        vectors = [torch.randn(landscape.num_parameters) for _ in range(num_products)]
    with landscape.measurement():
        landscape.gradient(keep_graphs=True)
        for v in vectors:
            landscape.hvp(v)
    print(json.dumps([time.process_time() - start, time.perf_counter() - wall]), flush=True)
"""


def times(checkout: Path, decoder: list[int] | None, repeats: int) -> list[list[float]]:
    """Return processor and wall seconds of the measurements in one process with the package of a checkout."""
    code = WORK.format(
        other=str(checkout.resolve()), examples=str(HERE.parent), benchmarks=str(HERE), decoder=decoder, repeats=repeats
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()[1:]]


def main() -> None:
    """Time both by turns and print a row for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="e.g. of `git worktree add`")
    parser.add_argument("--decoder", type=int, nargs=2, default=[768, 12], metavar=("WIDTH", "DEPTH"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each checkout")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    lines = ["| network | measurement here, processor s | there | ratio |", "|---|---:|---:|---:|"]
    for name, decoder, repeats in [("digits", None, 5), (f"decoder {options.decoder}", options.decoder, 1)]:
        seconds: dict[Path, list[float]] = {HERE.parents[1]: [], options.other: []}
        for i in range(options.rounds):
            for checkout in (list(seconds), list(seconds)[::-1])[i % 2]:
                seconds[checkout] += [processor for processor, _ in times(checkout, decoder, repeats)]
        here, there = (statistics.median(s) for s in seconds.values())
        lines.append(f"| {name} | {here:.3g} | {there:.3g} | {here / there:.2f} |")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "against.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
