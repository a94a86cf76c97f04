"""``sam/loss_rise`` of a resumed run is that of the uninterrupted one, wherever the checkpoint was written."""

from __future__ import annotations

import pytest
from helpers.sam_reference import Resumable, Stateful, make_loader, make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_flatness import SharpnessAwareMinimization


class Curve(Callback):
    """Keeps the mean of each epoch, by epoch."""

    def __init__(self):
        self.rises = {}

    def on_train_epoch_end(self, trainer, pl_module):
        if "sam/loss_rise" in trainer.callback_metrics:
            self.rises[trainer.current_epoch] = float(trainer.callback_metrics["sam/loss_rise"])


def run(*callbacks, ckpt_path=None, **options):
    curve, module = Curve(), Resumable()
    trainer = make_trainer(
        SharpnessAwareMinimization(0.05), curve, *callbacks, enable_checkpointing=bool(callbacks), **options
    )
    trainer.fit(module, Stateful(list(make_loader())), make_loader(), ckpt_path=ckpt_path)
    return curve.rises, module.state_dict()


OPTIONS = [
    {},
    {"accumulate_grad_batches": 2},
    {"val_check_interval": 2},
    {"limit_train_batches": 4},
    {"num_sanity_val_steps": 0, "limit_val_batches": 0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_loss_rise_of_a_resumed_run(tmp_path, options):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = run(checkpoint, **options)
    assert len(whole) == 3
    for path in sorted(tmp_path.iterdir()):
        rises, _ = run(ckpt_path=path, **options)
        assert rises.items() <= whole.items(), path.name
