"""What measuring and SAM cost on an accelerator, and whether its numbers are those of the CPU.

    python examples/benchmarks/gpu.py

For each network one line: lambda_max on the CPU and how far the accelerator's is from it, relative to the former; a
Hessian-vector product and a gradient of the loss on the probe, as the ratio of their times; the time of the default
measurement at the end of an epoch over that of the epoch; a step of SAM's callback over a plain step. The images are
random, their classes those of a fixed random network, so that nothing has to be loaded.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peers.workloads import WORKLOADS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import FlatnessMonitor, LossLandscape, SharpnessAwareMinimization, TopEigenvalues

RESULTS = Path(__file__).parent / "results" / "gpu.md"
NETWORKS = ("convnet", "resnet", "transformer")
HEADER = "| network | weights | lambda_max | difference | product / gradient | share of an epoch | SAM / plain step |"


class Classifier(pl.LightningModule):
    """A network with SGD and momentum."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class EpochTime(pl.Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median time of a function, after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def loss(module: Any, batch: Any) -> Tensor:
    """Return the loss of a batch."""
    return F.cross_entropy(module.net(batch[0]), batch[1])


def samples(network: Callable[[], nn.Module], size: int, num_samples: int) -> TensorDataset:
    """Return random images, and as classes what a network with other weights says."""
    torch.manual_seed(1)
    x, teacher = torch.randn(num_samples, 1, size, size), network().eval()
    with torch.no_grad():
        y = torch.cat([teacher(part).argmax(dim=1) for part in x.split(1024)])
    return TensorDataset(x, y)


def fit(module: pl.LightningModule, data: TensorDataset, device: str, *callbacks: pl.Callback, epochs: int) -> Any:
    """Train, and return the Trainer."""
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=128, shuffle=True))
    return trainer


def row(name: str, num_samples: int, probe_size: int, device: str) -> str:
    """Return the line of a network."""
    workload = WORKLOADS[name]
    data = samples(workload.network, workload.image_size, num_samples)
    torch.manual_seed(0)
    start = Classifier(workload.network(), workload.lr)

    monitor = FlatnessMonitor(probe_size=probe_size)
    trained = copy.deepcopy(start)
    share = fit(trained, data, device, monitor, epochs=2).callback_metrics["flatness_cost/share_of_epoch_time"]

    times = []
    for callbacks in ([], [SharpnessAwareMinimization()]):
        epoch_time = EpochTime()
        fit(copy.deepcopy(start), data, device, epoch_time, *callbacks, epochs=2)
        times.append(epoch_time.seconds[1])

    values = []
    for place in ("cpu", device):
        module = copy.deepcopy(trained).to(place)
        batches = [[t.to(place) for t in batch] for batch in DataLoader(data, batch_size=128)][: -(-probe_size // 128)]
        landscape = LossLandscape(module, batches, loss)
        metric = TopEigenvalues(tol=1e-4)
        metric.update(landscape)
        values.append(float(metric.compute()))
    v = torch.randn(landscape.num_parameters, device=place)
    with landscape.measurement():
        product = seconds(lambda: landscape.hvp(v))

    def gradient() -> None:
        for batch in batches:
            loss(module, batch).backward()

    ratio = product / seconds(gradient)
    difference = abs(values[1] - values[0]) / abs(values[0])
    return (
        f"| {workload.title} | {landscape.num_parameters:,} | {values[0]:.4g} | {difference:.0e} | {ratio:.2f} | "
        f"{100 * float(share):.1f} % | {times[1] / times[0]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000, help="of an epoch")
    parser.add_argument("--probe-size", type=int, default=512)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=list(WORKLOADS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a GPU, got none. Use --device cpu to try the script.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    lines = [f"{name}, torch {torch.__version__}, {args.samples:,} samples, probe of {args.probe_size}", ""]
    lines += [HEADER, "|---|---:|---:|---:|---:|---:|---:|"]
    print("\n".join(lines), flush=True)
    for network in args.networks:
        lines.append(row(network, args.samples, args.probe_size, args.device))
        print(lines[-1], flush=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
