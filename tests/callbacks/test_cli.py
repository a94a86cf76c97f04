"""LightningCLI builds the monitor from YAML."""

from __future__ import annotations

import lightning.pytorch as pl
from helpers.modules import Classifier, loader
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_flatness import FlatnessMonitor, InvariantSharpness, TopEigenvalues

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 1
  logger: false
  accelerator: cpu
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_flatness.FlatnessMonitor
      init_args:
        top_k: 3
        every_n_steps: 2
        probe_size: 16
        mode: train
    - class_path: lightning_flatness.FlatnessMonitor
      init_args:
        log_key_prefix: mine/
        metrics:
          filterwise:
            class_path: lightning_flatness.TopEigenvalues
            init_args: {k: 2, geometry: filter, which: LM}
          invariant:
            class_path: lightning_flatness.InvariantSharpness
"""


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()


def test_lightning_cli_builds_monitors_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    cli = LightningCLI(Classifier, Data, args=["fit", "--config", str(path)], save_config_callback=None)
    first, second = [c for c in cli.trainer.callbacks if isinstance(c, FlatnessMonitor)]
    assert (first.every_n_steps, first.probe_size, first.mode) == (2, 16, "train")
    assert isinstance(second.metrics["filterwise"], TopEigenvalues)
    assert isinstance(second.metrics["invariant"], InvariantSharpness)
    assert {"flatness/lambda_3", "mine/filterwise_2", "mine/invariant"} <= set(cli.trainer.callback_metrics)
