"""SharpnessAwareMinimization beside schedulers, checkpoints, early stopping, averaging and the monitor."""

from __future__ import annotations

import pytest
import torch
from helpers.sam_reference import (
    ADAMW,
    Net,
    assert_same_bits,
    fit,
    make_loader,
    make_trainer,
    watched_in_both_orders,
)
from helpers.training import Recorder, state_of
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lightning_flatness import SharpnessAwareMinimization


def test_steps_schedulers_and_checkpoints_count_as_without_sam(tmp_path):
    ends = []
    for sam in ([], [SharpnessAwareMinimization(0.05)]):
        directory = tmp_path / f"{len(sam)}"
        checkpoint = ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_top_k=-1)
        module = Net(schedule=True)
        trainer = fit(module, *sam, checkpoint, enable_checkpointing=True, max_epochs=-1, max_steps=7)
        saved = sorted(p.name for p in directory.iterdir())
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        ends.append((trainer.global_step, trainer.current_epoch, saved, rate, module.calls))
    assert ends[0] == ends[1]
    assert ends[0][2] == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]


def test_early_stopping_works_as_without_sam():
    epochs = []
    for sam in ([], [SharpnessAwareMinimization(0.0)], [SharpnessAwareMinimization(0.05)]):
        stopping = EarlyStopping("loss", mode="max", patience=1)
        trainer = fit(Net(), *sam, stopping, max_epochs=20)
        epochs.append(trainer.current_epoch)
    assert epochs[0] == epochs[1]
    assert epochs[2] < 20


def test_early_stopping_can_watch_the_loss_rise():
    stopping = EarlyStopping("sam/loss_rise", mode="min", patience=0, stopping_threshold=1e9)
    trainer = fit(Net(), stopping, SharpnessAwareMinimization(0.05), max_epochs=20)
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("geometry", ["euclidean", "element"])
@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 4}])
def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(tmp_path, every, geometry):
    class Resumable(Net):  # the masks must not depend on when the run was started
        def on_train_start(self):
            pass

        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(self.trainer.global_step)

    def sam():
        return SharpnessAwareMinimization(0.05, geometry, interval=2)

    def run(module, *callbacks, ckpt_path=None, logger):
        loader = make_loader(num_samples=40)
        enabled = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        trainer = make_trainer(*callbacks, enable_checkpointing=enabled, logger=logger, log_every_n_steps=1)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return trainer

    uninterrupted, whole = Resumable(ADAMW, schedule=True), Recorder()
    trainer = run(
        uninterrupted, sam(), ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, **every), logger=whole
    )
    path = tmp_path / "all" / ("step=5.ckpt" if "every_n_epochs" in every else "step=4.ckpt")
    resumed, rest = Resumable(ADAMW, schedule=True), Recorder()
    if "every_n_epochs" in every:
        again = run(resumed, sam(), ckpt_path=path, logger=rest)
    else:  # in the middle of an epoch: a loader that starts where it stopped
        loader = list(make_loader())
        again = make_trainer(sam(), max_epochs=3, logger=rest, log_every_n_steps=1)

        class Skipping:
            start = 4

            def __iter__(self):
                for batch in loader[Skipping.start :]:
                    Skipping.start = 0
                    yield batch

            def __len__(self):
                return 5

            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        again.fit(resumed, Skipping(), ckpt_path=path)
    assert_same_bits(state_of(resumed), state_of(uninterrupted))
    assert_same_bits(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert again.global_step == trainer.global_step
    rises = [(s, m["sam/loss_rise"]) for s, m in whole.records if "sam/loss_rise" in m]
    rises_again = [(s, m["sam/loss_rise"]) for s, m in rest.records if "sam/loss_rise" in m]
    assert len(rises) == 3
    assert rises_again == rises[-len(rises_again) :]
    assert len(rises_again) == (2 if "every_n_epochs" in every else 3)


def test_checkpoint_of_a_run_with_sam_loads_without(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    fit(Net(), SharpnessAwareMinimization(0.05), checkpoint, enable_checkpointing=True, max_epochs=1)
    content = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert not any("Sharpness" in key for key in content["callbacks"])
    assert "momentum_buffer" in content["optimizer_states"][0]["state"][0]
    trainer = fit(Net(), ckpt_path=tmp_path / "step=5.ckpt", max_epochs=2)
    assert trainer.global_step == 10


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("averaging", [StochasticWeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_works_as_without_sam(averaging, first):
    def make():
        if averaging is StochasticWeightAveraging:
            return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
        return EMAWeightAveraging(decay=0.5, update_starting_at_epoch=0)

    ends = []
    for rho in (None, 0.0, 1e-30, 0.05):
        sam = [] if rho is None else [SharpnessAwareMinimization(rho)]
        module = Net()
        fit(module, *([*sam, make()] if first else [make(), *sam]), max_epochs=5)
        ends.append((state_of(module), module.calls))
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0][0], ends[2][0])  # a perturbation that changes no weight: all else is as without
    assert ends[0][1] == ends[2][1] == ends[3][1]
    assert not torch.equal(ends[0][0]["net.0.weight"], ends[3][0]["net.0.weight"])


@pytest.mark.parametrize("geometry", ["euclidean", "element"])
def test_monitor_in_either_order_gives_the_same_numbers(geometry):
    runs = watched_in_both_orders(lambda: SharpnessAwareMinimization(0.05, geometry))
    ends = [end | {"rise": trainer.callback_metrics["sam/loss_rise"]} for trainer, _, end in runs]
    assert_same_bits(*ends)
