"""What TensorBoard reads back: one point per key and measurement at the right step, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Classifier
from helpers.training import fit_with_tensorboard
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_flatness import FlatnessMonitor


class Interrupt(pl.Callback):
    """Stops the process at a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def points(path: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(path / "run"), purge_orphaned_data=False).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_steps(path: Path, steps: list[int]) -> None:
    flatness = {tag: values for tag, values in points(path).items() if tag.startswith("flatness")}
    share = flatness.pop("flatness_cost/share_of_epoch_time")
    # Only at the ends of whole epochs, of five steps here: not before training, nor where a run was resumed in between.
    assert {step for step, _ in share} <= {step for step in steps if step > 0 and step % 5 == 0}
    assert len(share) == len({step for step, _ in share}) >= 1
    assert len(flatness) == 10  # two values with two errors each, the edge and its share, two costs
    for tag, values in flatness.items():
        assert [step for step, _ in values] == steps, tag


def test_one_point_per_key_and_epoch(tmp_path):
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), max_epochs=3)
    assert_steps(tmp_path, [0, 5, 10, 15])


def test_values_are_those_of_callback_metrics(tmp_path):
    run = fit_with_tensorboard(tmp_path, FlatnessMonitor(), max_epochs=3)
    for tag, values in points(tmp_path).items():
        if tag.startswith("flatness"):
            assert values[-1][1] == pytest.approx(float(run.callback_metrics[tag]), rel=1e-6)


@pytest.mark.parametrize("save_on_train_epoch_end", [True, False])
def test_none_doubled_after_resume_from_an_epoch_end(tmp_path, save_on_train_epoch_end):
    checkpoint = ModelCheckpoint(
        tmp_path / "ckpt", save_last=True, save_top_k=-1, save_on_train_epoch_end=save_on_train_epoch_end
    )
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), checkpoint, max_epochs=2)
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), max_epochs=4, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert_steps(tmp_path, [0, 5, 10, 15, 20])


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 3}])
def test_none_doubled_after_resume_from_the_middle_of_an_epoch(tmp_path, options):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit_with_tensorboard(tmp_path, FlatnessMonitor(**options), checkpoint, Interrupt(7), max_epochs=3)
    path = tmp_path / "ckpt" / "step=6.ckpt"
    fit_with_tensorboard(tmp_path, FlatnessMonitor(**options), ckpt_path=path, max_epochs=3)
    assert_steps(tmp_path, [0, 3, 5, 6, 9, 10, 12, 15] if options else [0, 5, 10, 15])


def test_the_checkpoint_of_a_run_holds_nothing_of_the_monitor(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), checkpoint, max_epochs=1)
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=False)
    assert not any("Flatness" in key for key in saved["callbacks"])
    assert list(saved["state_dict"]) == list(Classifier().state_dict())


def test_a_checkpoint_saved_without_the_monitor_can_be_resumed_with_it(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit_with_tensorboard(tmp_path, checkpoint, max_epochs=1)
    fit_with_tensorboard(tmp_path, FlatnessMonitor(), max_epochs=2, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert_steps(tmp_path, [10])
