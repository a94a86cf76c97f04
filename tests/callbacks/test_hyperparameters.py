"""What the monitor tells TensorBoard's HParams tab, and what it leaves alone."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.modules import Classifier, Plain, loader, loaders, trainer
from helpers.training import fit_with_tensorboard
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_flatness import SAM, FlatnessMonitor, SharpnessAwareMinimization, TopEigenvalues
from lightning_flatness.callbacks.loggers.hyperparameters import saved_hyperparameters
from lightning_flatness.compare import read_runs

HEADLINES = ["flatness/lambda_max", "flatness/invariant_sharpness", "flatness/edge_of_stability"]


class Saved(Classifier):
    """Saves its hyperparameters, as most modules do."""

    def __init__(self, lr: float = 0.1, num_hidden: int = 8, **options: Any) -> None:
        super().__init__(lr, num_hidden)
        self.save_hyperparameters()


class SavedForItself(Classifier):
    def __init__(self, lr: float = 0.1, secret: str = "mine") -> None:
        super().__init__(lr)
        self.save_hyperparameters(logger=False)


def written(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return hyperparameters and columns as TensorBoard sees them: the first of each in a run."""
    events = EventAccumulator(str(path / "run"), purge_orphaned_data=False).Reload()
    content = events.PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    (run,), _ = read_runs([path / "run"])
    assert set(run.hyperparameters) == {info.name for info in experiment.hparam_infos}
    return run.hyperparameters, [info.name.tag for info in experiment.metric_infos]


def test_flatness_comes_before_the_placeholder_of_lightning(tmp_path):
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), module=Saved(lr=0.2))
    hyperparameters, columns = written(tmp_path)
    assert columns == [*HEADLINES, "hp_metric"]
    assert hyperparameters == {
        **{"lr": 0.2, "num_hidden": 8.0},
        **{"optimizer": "SGD", "momentum": 0.0, "weight_decay": 0.0, "batch_size": 8.0, "sam_rho": 0.0},
    }


def test_without_the_placeholder_everything_logged_is_a_column(tmp_path):
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), default_hp_metric=False, module=Saved())
    assert written(tmp_path)[1] == [*HEADLINES, "loss", "val_loss"]


def test_a_module_that_saves_nothing_has_what_optimizer_and_data_know(tmp_path):
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), module=Classifier())
    hyperparameters, columns = written(tmp_path)
    assert set(hyperparameters) == {"optimizer", "lr", "momentum", "weight_decay", "batch_size", "sam_rho"}
    assert columns == [*HEADLINES, "loss", "val_loss"]


def test_hyperparameters_that_are_not_for_the_logger_stay_with_the_module(tmp_path):
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), module=SavedForItself())
    assert "secret" not in written(tmp_path)[0]


def test_rho_and_samples_per_step(tmp_path):
    sam = SharpnessAwareMinimization(rho=0.25)
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), sam, accumulate_grad_batches=3, module=Saved())
    hyperparameters, _ = written(tmp_path)
    assert (hyperparameters["sam_rho"], hyperparameters["batch_size"]) == (0.25, 24.0)


@pytest.mark.parametrize("module", [Saved, Classifier])
def test_data_without_a_length(tmp_path, module):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(Plain())

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer(tmp_path, FlatnessMonitor(), logger=logger, max_epochs=1).fit(module(), loader(Stream(), shuffle=False))
    assert written(tmp_path)[0]["batch_size"] == 8.0


def test_the_optimizer_inside_sam_is_named(tmp_path):
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return SAM(torch.optim.Adam(self.parameters(), lr=0.01), rho=0.5, module=self)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            def closure() -> Any:
                self.optimizers().zero_grad()
                loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            self.optimizers().step(closure)

    def loss(module: Any, batch: Any) -> Any:
        return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])

    fit_with_tensorboard(tmp_path, FlatnessMonitor(loss_fn=loss), module=Manual())
    hyperparameters, columns = written(tmp_path)
    assert (hyperparameters["optimizer"], hyperparameters["sam_rho"]) == ("Adam", 0.5)
    assert hyperparameters["lr"] == pytest.approx(0.01)
    assert "flatness/preconditioned_sharpness" in columns


def test_the_rate_that_was_set_and_not_the_one_that_a_scheduler_begins_with(tmp_path):
    class Warm(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)]

    fit_with_tensorboard(tmp_path, FlatnessMonitor(), module=Warm())
    assert written(tmp_path)[0]["lr"] == 0.5


def test_what_the_user_saved_has_precedence(tmp_path):
    class Own(Classifier):
        def __init__(self, learning_rate: float = 0.1, batch_size: int = 999, optimizer: str = "mine") -> None:
            super().__init__(learning_rate)
            self.save_hyperparameters()

    fit_with_tensorboard(tmp_path, FlatnessMonitor(), module=Own())
    hyperparameters, _ = written(tmp_path)
    assert hyperparameters["learning_rate"] == 0.1
    assert (hyperparameters["batch_size"], hyperparameters["optimizer"]) == (999.0, "mine")
    assert "lr" not in hyperparameters


def test_hyperparameters_of_every_kind(tmp_path):
    options = {
        "flag": True,
        "none": None,
        "nested": {"depth": 2, "space": Namespace(x=1.5)},
        "tensor": torch.tensor([3.0]),
        "array": np.ones(2),
        "number": np.float32(0.5),
        "layer": torch.nn.ReLU,
    }
    run = fit_with_tensorboard(tmp_path, FlatnessMonitor(), module=Saved(**options))
    saved = saved_hyperparameters(run)
    assert {name: saved[name] for name in ("flag", "none", "tensor", "number")} == {
        "flag": True,
        "none": "None",
        "tensor": 3.0,
        "number": 0.5,
    }
    assert (saved["nested/depth"], saved["nested/space/x"]) == (2, 1.5)
    assert "ReLU" in saved["layer"]
    assert written(tmp_path)[0]["nested/space/x"] == 1.5


def test_datamodule_and_monitored_curves(tmp_path):
    class Data(pl.LightningDataModule):
        def __init__(self, batch_size: int = 4, fold: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader(batch_size=self.hparams.batch_size)

        def val_dataloader(self) -> Any:
            return loader(shuffle=False)

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="flatness/lambda_max")
    stopping = EarlyStopping("val_loss")
    run = trainer(tmp_path, FlatnessMonitor(), checkpoint, stopping, logger=logger, enable_checkpointing=True)
    run.fit(Saved(), Data())
    hyperparameters, columns = written(tmp_path)
    assert (hyperparameters["batch_size"], hyperparameters["fold"]) == (4.0, 2.0)
    assert sorted(columns) == sorted([*HEADLINES, "val_loss", "hp_metric"])


def test_two_monitors_share_one_description(tmp_path):
    other = FlatnessMonitor({"filterwise": TopEigenvalues(geometry="filter")}, log_key_prefix="mine/")
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), other, module=Saved())
    assert written(tmp_path)[1] == [*HEADLINES, "mine/filterwise", "hp_metric"]


def test_a_description_of_the_users_own_is_left_alone(tmp_path):
    class Describes(Saved):
        def on_train_start(self) -> None:  # as Lightning's documentation has it
            logger: Any = self.logger
            logger.log_hyperparams(self.hparams, {"hp/mine": 0.0})

    fit_with_tensorboard(tmp_path, FlatnessMonitor(), default_hp_metric=False, module=Describes())
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    content = events.PluginTagToContent("hparams")[metadata.EXPERIMENT_TAG]
    assert [m.name.tag for m in metadata.parse_experiment_plugin_data(content).metric_infos] == ["hp/mine"]


def test_nothing_where_hyperparameters_are_not_to_be_logged(tmp_path):
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), enable_autolog_hparams=False, module=Saved())
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert "hparams" not in {m.plugin_data.plugin_name for m in events.summary_metadata.values()}


def test_a_resumed_run_is_described_as_it_began(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), checkpoint, module=Saved())
    before = written(tmp_path)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    run = trainer(tmp_path, FlatnessMonitor(), logger=logger, max_epochs=2)
    run.fit(Saved(), *loaders(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert len(list((tmp_path / "run").glob("*tfevents*"))) == 2
    assert written(tmp_path) == before


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_curves_and_the_users_files_are_the_same_but_for_flatness(tmp_path, default_hp_metric):
    """No point is added to any curve, and ``hparams.yaml`` holds what the module saved."""
    for name, callbacks in {"with": [FlatnessMonitor()], "without": []}.items():
        torch.manual_seed(0)
        fit_with_tensorboard(tmp_path / name, *callbacks, default_hp_metric=default_hp_metric, module=Saved())
    (watched,), _ = read_runs([tmp_path / "with" / "run"])
    (alone,), _ = read_runs([tmp_path / "without" / "run"])
    for tag, curve in alone.curves.items():
        assert np.array_equal(watched.curves[tag].steps, curve.steps)
        assert np.array_equal(watched.curves[tag].values, curve.values)
    assert {tag for tag in watched.curves if not tag.startswith("flatness")} == set(alone.curves)
    events = EventAccumulator(str(tmp_path / "with" / "run")).Reload()
    assert [e.step for e in events.Scalars("flatness/lambda_max")] == [0, 5]
    texts = [(tmp_path / name / "run" / "hparams.yaml").read_text() for name in ("with", "without")]
    assert texts[0] == texts[1]


def test_other_loggers_get_nothing_of_it(tmp_path):
    csv = CSVLogger(tmp_path)
    fit_with_tensorboard(
        tmp_path, FlatnessMonitor(), logger=[csv, TensorBoardLogger(tmp_path, name="", version="run")], module=Saved()
    )
    assert written(tmp_path)[1] == [*HEADLINES, "hp_metric"]
    text = next(tmp_path.rglob("hparams.yaml")).read_text()
    assert "sam_rho" not in text
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "sam_rho" not in header
    assert "flatness/lambda_max" in header


def test_private_names_of_lightning_are_where_they_were(tmp_path):
    """If this fails, Lightning has moved what `callbacks/hyperparameters.py` has to know; see the comment there."""
    module = Saved()
    assert module._log_hyperparams is True
    assert SavedForItself()._log_hyperparams is False
    logger = TensorBoardLogger(tmp_path, prefix="mine", default_hp_metric=False)
    assert (logger._default_hp_metric, logger._prefix) == (False, "mine")

    class Look(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.source = trainer.fit_loop._data_source.instance

    look, data = Look(), loader()
    trainer(tmp_path, look, max_epochs=1).fit(module, data, loader(shuffle=False))
    assert look.source is data


def test_a_prefix_of_the_logger_is_part_of_the_names(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run", prefix="mine")
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), logger=logger, module=Saved())
    columns = written(tmp_path)[1]
    assert columns[0] == "mine-flatness/lambda_max"
    (run,), _ = read_runs([tmp_path / "run"])
    assert set(columns) <= set(run.curves)
