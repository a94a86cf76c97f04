"""Runs as users leave them: two processes, classes of the program itself, links, hyperparameters of every kind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import lightning.pytorch as pl
import pytest
import torch
from helpers import user_program
from helpers.modules import Classifier, loader
from helpers.processes import run_python
from helpers.screenshots import BROWSER, browse, needs_browser
from helpers.tensorboard_server import Server, tensorboard
from helpers.training import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import measure, measure_checkpoints
from lightning_flatness.__main__ import main

PROGRAM = Path(user_program.__file__)
CONFIG = """
trainer:
  max_epochs: 3
  accelerator: cpu
  devices: 2
  strategy: ddp
  enable_progress_bar: false
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_top_k: -1, save_last: link}
    - class_path: lightning_flatness.FlatnessMonitor
      init_args: {every_n_epochs: 2}
model: {class_path: Net, init_args: {widths: [7, 5], lr: 0.05}}
data: {class_path: DataWithVal, init_args: {batch_size: 4}}
"""
TAG = "flatness/lambda_max"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes in LightningCLI's subclass mode, its classes those of the program, in `version_0`."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "train.py").write_text(PROGRAM.read_text().replace("LightningCLI(Net, Data)", "LightningCLI()"))
    (folder / "run.yaml").write_text(CONFIG)
    done = run_python("train.py", "fit", "-c", "run.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def measured(finished: Path) -> subprocess.CompletedProcess[str]:
    """The command of another process, of one that has never heard of the two."""
    command = ("-m", "lightning_flatness", "measure", "lightning_logs", "--module", "train:Net")
    return run_python(*command, cwd=finished)


@pytest.fixture
def user(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(finished, tmp_path / "user", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("train", None)
    return folder


def test_checkpoints_of_two_processes_are_measured_from_another_one(finished, measured):
    assert measured.returncode == 0, measured.stderr
    rows = [line.split()[:3] for line in measured.stdout.splitlines()[1:4]]
    assert rows == [[f"epoch={e}-step={5 * (e + 1)}.ckpt", str(5 * (e + 1)), str(e)] for e in range(3)]
    assert "class_path: __main__.Net" in (finished / "lightning_logs" / "version_0" / "config.yaml").read_text()


@pytest.fixture(scope="module", params=[False, True], ids=["python", "fast"])
def server(request: Any, finished: Path, measured: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param:
        pytest.importorskip("tensorboard_data_server", reason="tensorboard has its faster reader on some systems only")
    log = tmp_path_factory.mktemp("tensorboard") / "log"
    with tensorboard(finished / "lightning_logs", log, fast=request.param) as server:
        server.wait_for(lambda: TAG in server.get("data/plugin/scalars/tags").get("version_0", {}))
        yield server


def test_tensorboard_serves_one_curve_of_the_monitors_and_the_measured_points(server):
    """Both readers: the one in Python, and the faster one that TensorBoard takes where it is installed."""
    served = server.wait_for(
        lambda: len(found := server.get("data/plugin/scalars/scalars", run="version_0", tag=TAG)) == 4 and found
    )
    assert [step for _, step, _ in served] == [0, 5, 10, 15]
    losses = server.get("data/plugin/scalars/scalars", run="version_0", tag="train_loss")
    assert len(losses) == 3  # other curves stay as they are


@needs_browser
@pytest.mark.parametrize("server", [False], indirect=True, ids=["python"])
def test_a_browser_shows_the_measured_curve(server):
    """The card ends with a point that the run has not measured."""
    pins = urlencode({"smoothing": 0, "pinnedCards": json.dumps([{"plugin": "scalars", "tag": TAG}])})
    dom = browse(BROWSER, f"{server.url}/?{pins}#timeseries", "--dump-dom", seconds=20)
    text = re.sub(r"(?:\s*<[^>]+>\s*)+", "|", re.sub(r"<(style|script).*?</\1>", "", dom, flags=re.DOTALL))
    shown = re.search(r"flatness\|/lambda_max\|.*?\|version_0\|([\d.]+)\|(\d+)\|", text)
    assert shown, text[-4000:]
    points = {step: value for _, step, value in server.get("data/plugin/scalars/scalars", run="version_0", tag=TAG)}
    assert (float(shown[1]), int(shown[2])) == (pytest.approx(points[15], rel=1e-3), 15)


def test_what_lacks_its_data_is_named_and_the_others_are_measured(user, capsys):
    other = shutil.copytree(user / "lightning_logs" / "version_0", user / "lightning_logs" / "version_1", symlinks=True)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("class_path: __main__.DataWithVal", "class_path: gone.Data"))
    options = ["--module", "train:Net", "--metrics", "lambda_max", "--no-write"]
    assert main(["measure", "lightning_logs", *options]) == 2
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1 + 3
    problems = [line for line in output.err.splitlines() if "version_1" in line]
    assert len(problems) == 3
    assert all("gone" in line for line in problems)


def test_the_program_of_a_config_has_to_be_named(user):
    (*_, problem) = measure_checkpoints(["lightning_logs"], writes=False).problems
    assert "name it with --module, as in --module main:Net for main.py" in problem


@pytest.mark.usefixtures("measured")  # whose points are in the curves of the training samples
def test_another_split_has_other_samples_and_can_have_curves_of_its_own(user, capsys):
    command = ["measure", "lightning_logs/version_0/checkpoints/last.ckpt", "--module", "train:Net"]
    lines = []
    for options in ([], ["--split", "val"], ["--split", "val", "--log-key-prefix", "val_flatness/"]):
        assert main([*command, "--metrics", "lambda_max", *options]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    train, val, again = (line[1].split()[3] for line in lines)
    assert train != val == again
    hint = "--log-key-prefix makes curves of their own"
    assert [any(hint in text for text in line) for line in lines] == [True, True, False]
    events = EventAccumulator(str(user / "lightning_logs" / "version_0")).Reload()
    assert [event.step for event in events.Scalars("val_flatness/lambda_max")] == [15]


def test_links_and_second_names_of_a_file_count_once(user):
    (user / "latest").symlink_to(user / "lightning_logs" / "version_0")
    paths = ["latest", "lightning_logs", user / "lightning_logs"]
    found = measure_checkpoints(paths, module="train:Net", metrics="lambda_max", writes=False)
    assert found.problems == ()
    assert [c.step for c in found] == [5, 10, 15]


class Decided(pl.LightningModule):
    """Its one argument holds all hyperparameters; the training step asks for what only a run has."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.save_hyperparameters(config)
        self.net = nn.Sequential(nn.Linear(6, config.width), nn.Tanh(), nn.Linear(config.width, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.logger.experiment.add_scalar("loss_scale", 1.0, batch_idx)
        if not isinstance(self, Scheduled):
            self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Scheduled(Decided):
    def configure_optimizers(self) -> Any:
        if getattr(self.trainer, "train_dataloader", None) is None:
            raise RuntimeError("how many steps are there?")
        return super().configure_optimizers()


class Manual(Classifier):
    """Updates the weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def loss_of(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def decided() -> Decided:
    return Decided(Namespace(width=4))


@pytest.fixture(scope="module")
def of_decided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decided")
    callback = ModelCheckpoint(folder / "saved", filename="model")
    logger = pl.loggers.TensorBoardLogger(folder)
    fit(folder, callback, module=decided(), logger=logger, max_epochs=1, enable_checkpointing=True)
    return folder / "saved" / "model.ckpt"


def test_one_argument_that_held_all_hyperparameters(of_decided):
    found = measure_checkpoints([of_decided], module=Decided, data=loader, writes=False)
    assert found.problems == found.notes == ()
    assert "preconditioned_sharpness" in found[0].report.values
    by_function = measure_checkpoints([of_decided], module=decided, data=loader, writes=False)
    assert by_function[0].report.values == found[0].report.values


def test_an_optimizer_that_needs_the_run_is_said(of_decided):
    found = measure_checkpoints([of_decided], module=Scheduled, data=loader, writes=False)
    assert "no edge of stability: `configure_optimizers` failed (RuntimeError: how many steps" in found.notes[0]
    assert "stability_edge" not in found[0].report.values


def test_the_loss_of_manual_optimization_is_named(tmp_path, capsys, monkeypatch):
    torch.save(Classifier().state_dict(), tmp_path / "model.ckpt")
    monkeypatch.chdir(tmp_path)
    command = [
        "measure",
        "model.ckpt",
        "--module",
        f"{__name__}:Manual",
        "--data",
        "helpers.modules:loader",
        "--no-write",
    ]
    assert main(command) == 2
    assert "manual optimization" in capsys.readouterr().err
    assert main([*command, "--loss-fn", f"{__name__}:loss_of"]) == 0


def test_a_checkpoint_names_no_code_to_call(of_decided, tmp_path):
    content = torch.load(of_decided, weights_only=True)
    content["hyper_parameters"]["_instantiator"] = "subprocess.run"
    content["datamodule_hyper_parameters"] = {"_class_path": f"{__name__}.fails"}
    torch.save(content, tmp_path / "evil.ckpt")
    (problem,) = measure_checkpoints([tmp_path / "evil.ckpt"], module=Decided, data=loader).problems
    assert "got a checkpoint that asks to call 'subprocess.run'" in problem
    (problem,) = measure_checkpoints([tmp_path / "evil.ckpt"], module=decided).problems
    assert "Expected data to measure on, got none" in problem


def fails() -> None:
    raise AssertionError("a checkpoint has called this")


def test_runs_of_the_other_package(tmp_path):
    other = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")

    class Other(other.LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class OtherData(other.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.loader = loader()

        def train_dataloader(self) -> Any:
            return self.loader

    module = Other(4)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = other.Trainer(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", **options)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    found = measure_checkpoints([tmp_path / "model.ckpt"], module=Other, data=OtherData, writes=False)
    assert found.problems == found.notes == ()
    expected = measure(module, OtherData(), optimizer=run.optimizers)
    assert found[0].report.values == pytest.approx(expected.values, rel=1e-4)
