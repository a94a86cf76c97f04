"""SharpnessAwareMinimization in short runs, in several runs, from YAML and with pytorch_lightning."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers.sam_reference import (
    SGD,
    Net,
    assert_same_bits,
    fit,
    make_loader,
    make_network,
    make_optimizer,
    make_trainer,
    plain_loop,
)
from helpers.training import Recorder, state_of
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from lightning_flatness import SharpnessAwareMinimization


def test_fast_dev_run_barebones_validation_and_limits():
    sam = SharpnessAwareMinimization(0.05)
    for options in ({"fast_dev_run": True}, {"limit_train_batches": 0}, {"limit_train_batches": 1}):
        trainer = fit(Net(), sam, **options)
        assert ("sam/loss_rise" in trainer.callback_metrics) == (options.get("limit_train_batches") != 0)
    from lightning.pytorch import Trainer

    class Silent(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        validation_step = training_step

    trainer = Trainer(barebones=True, max_epochs=1, callbacks=[sam], accelerator="cpu", devices=1)
    trainer.fit(Silent(), make_loader())
    assert trainer.global_step == 5
    make_trainer(sam).validate(Silent(), make_loader(), verbose=False)


def test_batches_are_let_go_without_the_garbage_collector():
    class Copies(Callback):
        def __init__(self):
            self.held = []

        def on_before_backward(self, trainer, pl_module, loss):
            self.held.append(weakref.ref(trainer.callbacks[0]._step._arguments[0][0]))

        def on_train_batch_end(self, *args):
            assert all(kept() is None for kept in self.held)

    gc.collect()
    gc.disable()
    try:
        copies = Copies()
        fit(Net(), SharpnessAwareMinimization(0.05), copies, max_epochs=1)
    finally:
        gc.enable()
    assert len(copies.held) == 5


def test_epoch_that_the_module_ends_early():
    class Impatient(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    module = Impatient()
    trainer = fit(module, SharpnessAwareMinimization(0.05))
    assert module.calls == trainer.global_step == 6
    assert "training_step" not in module.__dict__


def test_no_keys_without_a_sharpness_aware_step():
    for sam in (SharpnessAwareMinimization(0.0), SharpnessAwareMinimization(0.1, start_epoch=9)):
        trainer = fit(Net(), sam)
        assert not any(key.startswith("sam/") for key in trainer.callback_metrics)


def test_logged_once_per_epoch_at_its_last_step():
    logger = Recorder()
    fit(Net(), SharpnessAwareMinimization(0.05), logger=logger, log_every_n_steps=1)
    points = [(s, m["sam/perturbation_norm"]) for s, m in logger.records if "sam/perturbation_norm" in m]
    assert [s for s, _ in points] == [4, 9, 14]
    assert all(value == pytest.approx(0.05) for _, value in points)


def test_pickle_and_deepcopy_before_and_after_training():
    sam = SharpnessAwareMinimization(0.05, "element", interval=2, start_epoch=1, sync_perturbation=False)
    fit(Net(), sam)
    for other in (pickle.loads(pickle.dumps(sam)), copy.deepcopy(sam)):
        assert (other.rho, other.geometry.name, other.interval) == (0.05, "element", 2)
        assert (other.start_epoch, other.sync_perturbation) == (1, False)
        fit(Net(), other)


def test_one_callback_can_serve_several_fits():
    sam, first, second = SharpnessAwareMinimization(0.05), Net(), Net()
    fit(first, sam)
    fit(second, sam)
    assert_same_bits(state_of(first), state_of(second))


@pytest.mark.filterwarnings("ignore:.*")  # two copies of Lightning in one process
def test_pytorch_lightning_trainer_and_module():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_network(torch.float64)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        on_train_start = Net.on_train_start

        def configure_optimizers(self):
            return make_optimizer(SGD, self.parameters())

    module, plain = Other(), make_network(torch.float64)
    trainer = pytorch_lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SharpnessAwareMinimization(0.05)],
    )
    trainer.fit(module, make_loader(torch.float64))
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader(torch.float64)), rho=0.05)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert "sam/loss_rise" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:No seed found", "ignore::DeprecationWarning")
def test_lightning_cli_builds_it_from_yaml(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  enable_checkpointing: false\n  callbacks:\n"
        "    - class_path: lightning_flatness.SharpnessAwareMinimization\n"
        "      init_args: {rho: 0.5, geometry: element, interval: 2, start_epoch: 1, sync_perturbation: false}\n"
    )
    cli = LightningCLI(Net, run=False, args=["--config", str(config)], save_config_callback=None)
    sam = next(c for c in cli.trainer.callbacks if isinstance(c, SharpnessAwareMinimization))
    assert (sam.rho, sam.geometry.name, sam.interval, sam.start_epoch) == (0.5, "element", 2, 1)
    assert sam.sync_perturbation is False
