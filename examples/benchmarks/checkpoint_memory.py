"""Memory of `lightning-flatness measure` on a checkpoint of 124 million parameters, beside that of benchmark_scale.py.

    python examples/benchmarks/checkpoint_memory.py

The checkpoint is Lightning's, of the largest decoder of benchmark_scale.py after one step of AdamW, whose two moments
are in it, too: three times the weights. It is measured by the command, in a process of its own, on one sequence of 256
random tokens and with the benchmark's tolerance. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from benchmark_scale import NUM_TOKENS, RESULTS, SERIES, VOCABULARY, Decoder, machine, next_token_loss
from torch import Tensor
from torch.utils.data import DataLoader

LARGEST = SERIES["largest, k = 5"][0]


class LitDecoder(pl.LightningModule):
    """The benchmark's decoder in a LightningModule."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.decoder = Decoder(width, depth)

    def training_step(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self.decoder, tokens)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def data() -> DataLoader[Tensor]:
    """Return the sequence."""
    generator = torch.Generator().manual_seed(0)
    sequence: list[Tensor] = list(torch.randint(VOCABULARY, (1, NUM_TOKENS + 1), generator=generator))
    return DataLoader(sequence)  # type: ignore[arg-type]


def train(path: Path, width: int, depth: int) -> None:
    """Take one step and save a checkpoint."""
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, **silent)
    trainer.fit(LitDecoder(width, depth), data())
    trainer.save_checkpoint(path)


def peak_of(*command: object, folder: Path) -> tuple[str, int]:
    """Run a command; return what it prints, and the peak of its resident memory in bytes."""
    with subprocess.Popen([*map(str, command)], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    return printed, 1024 * usage.ru_maxrss


def limits(path: Path) -> list[str]:
    """Return the peaks in GB of the benchmark with its largest decoder, for one eigenvalue and for several."""
    lines = path.read_text().splitlines()
    return [line.split("|")[8].strip() for line in lines if line.startswith("| 124.4M")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(LARGEST.width, LARGEST.depth))
    parser.add_argument("--metrics", nargs="+", default=["lambda_max"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        train(args.train, *args.shape)
        return
    here = Path(__file__).resolve().parent
    one, several = limits(RESULTS / "benchmark_scale.md")
    lines = ["| metrics | peak GB |", "|---|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step=1.ckpt")
        shape = [*map(str, args.shape)]
        subprocess.run([sys.executable, __file__, "--train", path, "--shape", *shape], check=True, cwd=here)
        size = path.stat().st_size
        for metrics in args.metrics:
            options = ["--module", "checkpoint_memory:LitDecoder", "--data", "checkpoint_memory:data"]
            options += ["--metrics", metrics, "--tol", "0.1", "--device", "cpu", "--no-write"]
            command = [sys.executable, "-m", "lightning_flatness", "measure", path, *options]
            printed, peak = peak_of(*command, folder=here)
            print(printed, flush=True)
            lines.append(f"| `{metrics}` | {peak / 1e9:.2f} |")
            print(lines[-1], flush=True)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in LitDecoder(*args.shape).parameters())
    found = "\n".join(lines)
    text = f"# Memory of a measured checkpoint\n\n`python examples/benchmarks/checkpoint_memory.py`\n\n{found}\n\n"
    text += (
        f"A checkpoint of {num_parameters / 1e6:.1f}M parameters and AdamW's moments ({size / 1e9:.2f} GB), one "
        f"sequence of {NUM_TOKENS} tokens. The benchmark (benchmark_scale.md) takes {one} GB for one eigenvalue of a "
        f"module that it has in memory, without an optimizer, and {several} GB for {LARGEST.k}. The peak counts the "
        "pages of the file that are in memory, which the system may drop.\n\n"
        f"*{machine(torch.get_num_threads())}; tol = 0.1, float32.*\n"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "checkpoint_memory.md").write_text(text)


if __name__ == "__main__":
    main()
