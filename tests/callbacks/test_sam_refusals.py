"""Modules, strategies and arguments that SharpnessAwareMinimization refuses, and how."""

from __future__ import annotations

import pytest
import torch
from helpers.sam_reference import (
    Net,
    assert_same_bits,
    fit,
    make_trainer,
)
from helpers.training import state_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from lightning_flatness import SAM, SharpnessAwareMinimization
from lightning_flatness.geometry import Geometry


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TakesIterator(Net):
    def training_step(self, dataloader_iter):
        return super().training_step(*next(dataloader_iter)[:2])


class UsesLbfgs(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class UsesSam(Net):
    def configure_optimizers(self):
        return SAM(torch.optim.SGD(self.parameters(), lr=0.1))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "manual optimization. HINT: Wrap its optimizer"),
        (TakesIterator, "`dataloader_iter`. HINT: Let `training_step` take `batch`"),
        (UsesLbfgs, "got LBFGS. HINT: Return e.g. torch.optim.SGD"),
        (UsesSam, "got SAM. HINT: Return e.g. torch.optim.SGD"),
    ],
)
def test_modules_that_are_refused(module, message):
    instance = module()
    before = state_of(instance)
    with pytest.raises(MisconfigurationException, match=message):
        fit(instance, SharpnessAwareMinimization())
    assert instance.calls == 0
    assert_same_bits(state_of(instance), before)


class DeepSpeedStrategy(SingleDeviceStrategy):  # the real one needs deepspeed
    pass


class XLAFSDPStrategy(SingleDeviceStrategy):  # the real one needs torch_xla
    pass


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, XLAFSDPStrategy])
def test_strategies_that_are_refused(strategy):
    sam, module, trainer = SharpnessAwareMinimization(), Net(), make_trainer()
    trainer.strategy.__class__ = strategy  # what `setup` sees on machines that can run them
    with pytest.raises(MisconfigurationException, match=rf"{strategy.__name__}. HINT: Use strategy='auto' or 'ddp'"):
        sam.setup(trainer, module, "fit")


class _Curved(Geometry):
    name = "curved"

    def chart(self, module, parameters, dtype):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "Expected `rho` to be >= 0 and finite, got -0.1. Use 0.0"),
        ({"rho": float("nan")}, ValueError, "Expected `rho` to be >= 0 and finite, got nan"),
        ({"rho": float("inf")}, ValueError, "Expected `rho` to be >= 0 and finite, got inf"),
        ({"interval": 0}, ValueError, "Expected `interval` to be >= 1, got 0"),
        ({"start_epoch": -1}, ValueError, "Expected `start_epoch` to be >= 0, got -1"),
        ({"geometry": "round"}, ValueError, "Expected `geometry` to be one of .*, got 'round'"),
        ({"geometry": 3}, TypeError, "Expected `geometry` to be a name or a Geometry, got int"),
        ({"geometry": _Curved()}, ValueError, "Expected `geometry` to be linear .* got _Curved"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SharpnessAwareMinimization(**arguments)
