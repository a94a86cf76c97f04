"""What each measure costs, in gradients of the loss on the whole probe, as training goes on.

    python examples/costs_of_measures.py

measures every one of ``FlatnessMonitor(metrics="all")`` by itself on the network of the digits example, before training,
after one epoch and after five; later measurements start from what earlier ones found.
"""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
from digits import ConvNet, DigitsDataModule

from lightning_flatness import FlatnessMonitor
from lightning_flatness.metrics import preset_metrics


class Costs(pl.Callback):
    """Keeps what every metric of a monitor has cost."""

    def __init__(self, monitor: FlatnessMonitor) -> None:
        self.monitor = monitor
        self.rows: dict[str, list[str]] = {name: [] for name in monitor.metrics}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in (0, 1, 5):
            for name, metric in self.monitor.metrics.items():
                mark = "" if metric.converged else " (not converged)"
                self.rows[name].append(f"{float(metric.gradient_evaluations):.0f}{mark}")


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print("| measure | before training | after epoch 1 | after epoch 5 |\n|---|---|---|---|")
    for name in preset_metrics("all"):
        pl.seed_everything(0, verbose=False)
        monitor = FlatnessMonitor({name: preset_metrics("all")[name]})
        costs = Costs(monitor)
        trainer = pl.Trainer(
            max_epochs=6, accelerator="cpu", callbacks=[monitor, costs], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(ConvNet(), DigitsDataModule().train_dataloader())
        print(f"| {name} | {' | '.join(costs.rows[name])} |", flush=True)


if __name__ == "__main__":
    main()
