"""How much do samples per forward pass matter where BatchNorm uses the statistics of the batch?

    python examples/benchmarks/probe_batch_size.py

trains a CNN with BatchNorm on a part of Fashion-MNIST and measures the same 512 samples in batches of 16 to 512.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from calibration import NUM_SAMPLES, PROBE_SIZE, STAGES, cross_entropy, stages
from fashion import images, network

from lightning_flatness import InvariantSharpness, LossLandscape, TopEigenvalues

RESULTS = Path(__file__).parent / "results" / "probe_batch_size.md"
SIZES = (16, 32, 64, 128, 256, 512)
KIND = "cnn with BatchNorm"


def main() -> None:
    x, y = images(NUM_SAMPLES)
    chosen = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(1))[:PROBE_SIZE]
    lines = ["| step | samples per pass | lambda_max | invariant sharpness |", f"|{'---|' * 4}"]
    for step, weights in stages(KIND, x, y).items():
        module = network(KIND).train()
        module.load_state_dict(weights)
        for size in SIZES:
            batches = list(zip(x[chosen].split(size), y[chosen].split(size), strict=True))
            landscape, values = LossLandscape(module, batches, cross_entropy), []
            for metric in (TopEigenvalues(tol=1e-2), InvariantSharpness(tol=1e-2)):
                metric.update(landscape)
                values.append(f"{float(metric.value):.3g} ± {float(metric.standard_error):.2g}")
            lines.append(f"| {step} | {size} | {' | '.join(values)} |")
    text = "\n".join(lines)
    print(text)
    RESULTS.write_text(
        "# Samples per forward pass, with BatchNorm\n\nWritten by `python examples/benchmarks/probe_batch_size.py`: "
        f"{KIND}, Fashion-MNIST, after {STAGES} steps; ± standard error of the samples.\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
