"""Figures of the monitors in every logger that takes them: the real classes where they run offline."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from helpers.training import fit
from lightning.pytorch.loggers import (
    CometLogger,
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_flatness import FlatnessMonitor, SpectralDensity
from lightning_flatness.callbacks.loggers.figures import ADAPTERS, adapter_for

KEY = "flatness/density"


def run(path: Path, logger: Any) -> None:
    """Two figures: before training and after the only epoch, of five steps."""
    metric = SpectralDensity(num_runs=2, num_steps=5, tol=10)
    fit(path, FlatnessMonitor({"density": metric}, on_error="raise"), logger=logger, max_epochs=1)


def test_tensorboard(tmp_path):
    run(tmp_path, TensorBoardLogger(tmp_path, name="", version="run"))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Images(KEY)] == [0, 5]


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="WandbLogger needs wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    run(tmp_path, logger)
    wandb.finish()
    pictures = [path for path in tmp_path.rglob("*.png") if "density" in path.name]
    assert len(pictures) == 2
    assert all(image.imread(path).shape[0] > 100 for path in pictures)


def test_mlflow_in_files(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="MLFlowLogger needs mlflow or mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # later versions ask for a data base
    run(tmp_path, MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}"))
    pictures = sorted(path.relative_to(path.parents[2]) for path in tmp_path.rglob("*.png"))
    assert pictures == [Path(KEY, f"step={step:08d}.png") for step in (0, 5)]


@pytest.mark.filterwarnings("ignore")  # comet_ml warns about what it was imported after
def test_comet_offline(tmp_path, monkeypatch):
    """The real logger and experiment; an offline one keeps nothing without an account, so its call is looked at."""
    pytest.importorskip("comet_ml", reason="CometLogger needs comet_ml")
    logger = CometLogger(online=False, offline_directory=str(tmp_path / "comet"))
    kind, seen = type(logger.experiment), []
    signature = inspect.signature(kind.log_image)

    def log_image(*args: Any, **options: Any) -> None:
        seen.append(signature.bind(*args, **options).arguments)

    monkeypatch.setattr(kind, "log_image", log_image)
    run(tmp_path, logger)
    logger.experiment.end()
    assert [(call["name"], call["step"], call["image_data"].ndim) for call in seen] == [(KEY, 0, 3), (KEY, 5, 3)]


@pytest.mark.filterwarnings("ignore")
def test_neptune_offline(tmp_path, monkeypatch):
    neptune = pytest.importorskip("neptune", reason="NeptuneLogger needs neptune, a service that has ended")
    monkeypatch.chdir(tmp_path)
    loggers = pytest.importorskip("lightning.pytorch.loggers.neptune", reason="needs lightning's NeptuneLogger")
    if not hasattr(loggers, "NeptuneLogger"):
        pytest.skip("this version of lightning has no NeptuneLogger")
    experiment = neptune.init_run(mode="debug")
    run(tmp_path, loggers.NeptuneLogger(run=experiment))
    experiment.stop()


class LitLogger(CSVLogger):
    """In the place of Lightning's, which needs an account: its public method, as lightning 2.6 has it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, name="", version="run")
        self.files: list[str] = []

    def log_file(self, path: str) -> None:
        assert image.imread(path).shape[0] > 100
        self.files.append(path)


def test_litlogger_gets_a_file(tmp_path):
    logger = LitLogger(tmp_path)
    run(tmp_path, logger)
    assert logger.files == [str(tmp_path / "run" / KEY / f"step={step:08d}.png") for step in (0, 5)]
    real = pytest.importorskip("lightning.pytorch.loggers.litlogger", reason="lightning 2.6 brings LitLogger").LitLogger
    assert adapter_for(object.__new__(real)) is ADAPTERS["LitLogger"]  # the method has kept its name


def test_loggers_without_images_are_passed_over(tmp_path):
    assert adapter_for(CSVLogger(tmp_path)) is None
    assert all(issubclass(kind, Logger) for kind in (CometLogger, MLFlowLogger, WandbLogger))
    run(tmp_path, CSVLogger(tmp_path))
