"""Cost of each measure, in gradients of the loss on the whole probe, in the course of training.

    python examples/benchmarks/costs_of_measures.py

measures every one of ``FlatnessMonitor(metrics="all")`` on the digits example's network, before training, after one
epoch and after five; later measurements start from what earlier ones found. The last line names the measures whose
costs differ from ``lightning_flatness.metrics.presets.TYPICAL_COSTS``, the source of the published tables.
"""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from digits import ConvNet, DigitsDataModule

from lightning_flatness import BatchSharpness, FlatnessMonitor, LossLandscape, OptimizerStep, OutputLoss
from lightning_flatness.callbacks.probe import draw_probe
from lightning_flatness.landscape import MissingUpdateError
from lightning_flatness.metrics.presets import TYPICAL_COSTS, preset_metrics

EPOCHS = (0, 1, 5)


class Costs(pl.Callback):
    """Measures at the start of some epochs and keeps what every metric has cost."""

    def __init__(self) -> None:
        self.metrics = preset_metrics("all")
        self.costs: dict[str, list[str]] = {name: [] for name in self.metrics}
        self.step: OptimizerStep | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.step = OptimizerStep(trainer.optimizers)
        self.step.begin()

    def on_train_batch_end(self, *_: object) -> None:
        assert self.step is not None
        self.step.end()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch not in EPOCHS:
            return
        assert trainer.train_dataloader is not None  # it is training
        probe = draw_probe(trainer.train_dataloader, FlatnessMonitor().probe_size)
        for name, metric in self.metrics.items():
            if isinstance(metric, BatchSharpness):
                metric.run_batch_size = trainer.train_dataloader.batch_size
            loss = OutputLoss(F.cross_entropy)
            landscape = LossLandscape(pl_module, probe, loss, optimizer=trainer.optimizers, update=self.step)
            with suppress(MissingUpdateError):  # before the first step
                metric.update(landscape)
            mark = "" if metric.converged or not landscape.cost.gradient_evaluations else "*"
            self.costs[name].append(f"{landscape.cost.gradient_evaluations:.0f}{mark}")


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    pl.seed_everything(0, verbose=False)
    costs = Costs()
    trainer = pl.Trainer(
        max_epochs=max(EPOCHS) + 1, accelerator="cpu", callbacks=[costs], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ConvNet(), DigitsDataModule().train_dataloader())
    print("| measure | " + " | ".join(f"epoch {epoch}" for epoch in EPOCHS) + " |\n|---|---|---|---|")
    for name, found in costs.costs.items():
        print(f"| {name} | {' | '.join(found)} |")
    print("\n* its tolerance was not reached")
    measured = {name: tuple(int(cost.rstrip("*")) for cost in found) for name, found in costs.costs.items()}
    differing = [name for name, found in measured.items() if TYPICAL_COSTS[name] != found]
    print("differs from TYPICAL_COSTS:", ", ".join(differing) or "none")


if __name__ == "__main__":
    main()
