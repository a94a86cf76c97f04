"""SharpnessAwareMinimization in half and double precision, with and without a loss scaler."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from helpers.sam_reference import (
    GEOMETRIES,
    Net,
    assert_same_bits,
    fit,
    make_loader,
)
from helpers.training import state_of
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from lightning_flatness import SharpnessAwareMinimization


class Scaled(MixedPrecision):
    """A loss scaler without half precision, so that scaling by a power of two changes no bit."""

    def __init__(self, scale: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**9))

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_perturbation_does_not_depend_on_the_loss_scale(geometry):
    ends = []
    for scale in (None, 2.0**16, 2.0**40):
        module, plugins = Net(), [] if scale is None else [Scaled(scale)]
        trainer = fit(module, SharpnessAwareMinimization(0.05, geometry), plugins=plugins, gradient_clip_val=0.5)
        ends.append((state_of(module), trainer.callback_metrics["sam/loss_rise"]))
    assert_same_bits(ends[0], ends[1])
    torch.testing.assert_close(ends[0][0], ends[2][0], rtol=1e-6, atol=1e-6)


def test_half_precision_with_the_cpu_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    module = Net()
    fit(module, SharpnessAwareMinimization(0.05), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    exact = Net()
    fit(exact, SharpnessAwareMinimization(0.05))
    torch.testing.assert_close(module.net[0].weight, exact.net[0].weight, rtol=0, atol=0.03)


class Overflowing(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


def test_a_gradient_that_is_not_finite_perturbs_nothing_and_the_scaler_skips_the_step():
    class Watch(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights.append(state_of(pl_module.net))

    scales = []
    for sam in ([], [SharpnessAwareMinimization(0.05)]):
        watch, plugin, module = Watch(), Scaled(2.0**16), Overflowing()
        trainer = fit(module, *sam, watch, plugins=[plugin], max_epochs=1)
        assert torch.equal(watch.weights[2]["0.weight"], watch.weights[3]["0.weight"])
        assert not torch.equal(watch.weights[3]["0.weight"], watch.weights[4]["0.weight"])
        assert torch.isfinite(module.net[0].weight).all()
        scales.append((plugin.scaler.get_scale(), trainer.global_step))
    assert scales[0] == scales[1] == (2.0**15, 5)
    assert math.isfinite(trainer.callback_metrics["sam/loss_rise"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module, exact = Net(), Net()
    fit(module, SharpnessAwareMinimization(0.5, "element"), precision=precision, loader=make_loader(dtype))
    fit(exact, SharpnessAwareMinimization(0.5, "element"))
    torch.testing.assert_close(module.net[0].weight.float(), exact.net[0].weight, rtol=0, atol=0.2)


def test_the_second_pass_runs_under_the_same_autocast():
    class Watching(Net):
        dtypes: list[torch.dtype] = []  # noqa: RUF012

        def loss(self, batch):
            Watching.dtypes.append(self.net[0](batch[0]).dtype)
            return super().loss(batch)

    fit(Watching(), SharpnessAwareMinimization(0.05), precision="bf16-mixed", max_epochs=1)
    assert Watching.dtypes == [torch.bfloat16] * 10
