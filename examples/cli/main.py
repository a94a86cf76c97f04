"""LightningCLI without an import of this package: YAML files add the monitor and SAM to the Trainer.

    cd examples/cli
    ../../.venv/bin/python main.py fit -c sgd.yaml -c flatness.yaml
    ../../.venv/bin/python main.py fit -c sam.yaml -c flatness.yaml
    ../../.venv/bin/lightning-flatness compare logs --at loss=0.05

Other seeds: ``--seed_everything 1``. Other values: ``--model.lr 0.01``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from lightning.pytorch.cli import LightningCLI

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples share their data and their network

from digits import ConvNet, DigitsDataModule


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*|.*litlogger.*")
    LightningCLI(ConvNet, DigitsDataModule)


if __name__ == "__main__":
    main()
