"""Forward passes and memory of the critical sharpness of a decoder of 124 million parameters in training.

    python examples/benchmarks/critical_sharpness.py

The largest decoder of benchmark_scale.py takes steps of AdamW with a warm-up of the learning rate; after each the
critical sharpness of arXiv 2601.16979 is measured on 8 other sequences of 32 random tokens, as many tokens as in that
benchmark. The first measurement has no earlier one to start from. Linux only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from benchmark_scale import RESULTS, SERIES, VOCABULARY, Decoder, machine, memory, next_token_loss, reset_peak

from lightning_flatness import CriticalSharpness, LossLandscape, OptimizerStep

LARGEST = SERIES["largest, k = 5"][0]
LEARNING_RATES = (1e-5, 2e-5, 3e-5, 4e-5)
NUM_SEQUENCES, LENGTH = 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(LARGEST.width, LARGEST.depth))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    module = Decoder(*args.shape)
    num_parameters = sum(p.numel() for p in module.parameters())
    train, probe = torch.randint(VOCABULARY, (2, NUM_SEQUENCES, LENGTH + 1))
    optimizer, metric = torch.optim.AdamW(module.parameters(), lr=0.0), CriticalSharpness()
    lines = [
        "| step | learning rate η | forward passes | 2/η_c | its error | its standard error | 2/η | seconds | GB |"
    ]
    lines.append("|---:|" + "---:|" * 8)
    for step, optimizer.param_groups[0]["lr"] in enumerate(LEARNING_RATES, start=1):
        optimizer.zero_grad()
        next_token_loss(module, train).backward()
        with OptimizerStep(optimizer) as update:
            optimizer.step()
        optimizer.zero_grad()
        landscape = LossLandscape(module, [probe], next_token_loss, update=update)
        before, start = reset_peak(), time.perf_counter()
        metric.update(landscape)
        seconds, grown = time.perf_counter() - start, memory("VmHWM") - before
        value, error, standard_error = (float(x) for x in (metric.compute(), metric.error, metric.standard_error))
        passes, rate = round(3 * float(metric.gradient_evaluations)), update.learning_rate
        lines.append(
            f"| {step} | {rate:.0e} | {passes} | {value:.4g} | {error:.2g} | {standard_error:.2g} | {2 / rate:.4g} "
            f"| {seconds:.0f} | {grown / 1e9:.2f} |"
        )
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    text = (
        "# Critical sharpness of a decoder in training\n\n`python examples/benchmarks/critical_sharpness.py`\n\n"
        f"{table}\n\n{num_parameters / 1e6:.1f}M parameters, {4 * num_parameters / 1e9:.2f} GB; {NUM_SEQUENCES} "
        f"sequences of {LENGTH} tokens. Two of the forward passes are those of the standard error. Memory is what the "
        "process grew by in the measurement; the weights before the step, one more copy, were there already. There is "
        "no value where the update does not lower the loss of these sequences.\n\n"
        f"*{machine(torch.get_num_threads())}; float32.*\n"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "critical_sharpness.md").write_text(text)


if __name__ == "__main__":
    main()
