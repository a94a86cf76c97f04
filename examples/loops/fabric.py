"""Flatness curves of a loop of Lightning Fabric, in the names of FlatnessMonitor.

.venv/bin/python examples/loops/fabric.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples share their data and their network

from digits import ConvNet, DigitsDataModule

from lightning_flatness import FlatnessTracker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    args = parser.parse_args()

    fabric = Fabric(accelerator="cpu", loggers=TensorBoardLogger(args.logs, name="fabric"))
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    network = ConvNet()
    loader = DigitsDataModule().train_dataloader()
    tracker_data = loader  # before Fabric wraps it: the tracker moves batches itself
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9))
    batches = fabric.setup_dataloaders(loader)

    tracker = FlatnessTracker(
        network,
        tracker_data,
        loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        optimizer=optimizer.optimizer,
        log=fabric.log_dict,
    )
    step = 0
    print(tracker.measure(step))
    for _ in range(args.epochs):
        for x, y in batches:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            step += 1
        print(tracker.measure(step))


if __name__ == "__main__":
    main()
