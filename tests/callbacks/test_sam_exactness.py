"""SharpnessAwareMinimization equals a plain loop, bit for bit or to rounding, with every setting."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sam_reference import (
    ADAMW,
    SGD,
    Net,
    assert_same_bits,
    fit,
    make_loader,
    make_network,
    make_optimizer,
    plain_loop,
)
from helpers.training import Recorder, everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_flatness import SharpnessAwareMinimization


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_rho_zero_is_bit_identical_to_no_callback(optimizer):
    ends = []
    for callbacks in ([], [SharpnessAwareMinimization(rho=0.0)]):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        module, logger = Net(optimizer, schedule=True), Recorder()
        trainer = fit(module, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
        ends.append(everything(module, trainer) | {"records": logger.records})
    assert_same_bits(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize(("geometry", "rho"), [("euclidean", 0.05), ("element", 0.5), ("layer", 0.05), ("filter", 0.2)])
def test_equals_a_plain_loop(geometry, rho, optimizer, dtype):
    module = Net(optimizer, dtype)
    trainer = fit(module, SharpnessAwareMinimization(rho, geometry), loader=make_loader(dtype))
    plain = make_network(dtype)
    means = plain_loop(
        plain, make_optimizer(optimizer, plain.parameters()), list(make_loader(dtype)), rho=rho, geometry=geometry
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)
    logged = trainer.callback_metrics
    torch.testing.assert_close(float(logged["sam/loss_rise"]), means[-1][0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(float(logged["sam/perturbation_norm"]), means[-1][1], rtol=1e-5, atol=0)


def test_the_plain_loop_differs_without_sam():
    """Guard of the guard: the test above can fail."""
    module, plain = Net(), make_network()
    fit(module)
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader()), rho=0.05)
    assert not torch.allclose(module.net[0].weight, plain[0].weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("accumulate", [2, 3])  # the last window of an epoch is ragged
def test_accumulated_microbatches_are_perturbed_each_on_its_own(accumulate):
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    trainer = fit(
        module,
        SharpnessAwareMinimization(0.05),
        loader=make_loader(torch.float64),
        accumulate_grad_batches=accumulate,
    )
    batches = list(make_loader(torch.float64))
    means = plain_loop(plain, make_optimizer(SGD, plain.parameters()), batches, rho=0.05, accumulate=accumulate)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert trainer.global_step == 3 * math.ceil(5 / accumulate)
    assert float(trainer.callback_metrics["sam/loss_rise"]) == pytest.approx(means[-1][0], rel=1e-5)


def test_accumulation_scheduler():
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2}), SharpnessAwareMinimization(0.05)]
    fit(module, *callbacks, loader=make_loader(torch.float64), max_epochs=2)
    optimizer, batches = make_optimizer(SGD, plain.parameters()), list(make_loader(torch.float64))
    plain_loop(plain, optimizer, batches, rho=0.05, num_epochs=1)
    rng = torch.get_rng_state()
    reseed: Any = torch.manual_seed
    keep: Any = lambda seed: torch.set_rng_state(rng)  # noqa: E731
    try:  # the second epoch goes on with the random numbers of the first
        torch.manual_seed = keep
        plain_loop(plain, optimizer, batches, rho=0.05, num_epochs=1, accumulate=2)
    finally:
        torch.manual_seed = reseed
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


def test_clipping_acts_on_the_sharpness_aware_gradient_only():
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    fit(module, SharpnessAwareMinimization(0.05), loader=make_loader(torch.float64), gradient_clip_val=0.1)
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader(torch.float64)), rho=0.05, max_norm=0.1)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-12)


def test_interval_and_start_epoch_choose_the_steps():
    class Counting(Net):
        num_forwards = 0

        def loss(self, batch):
            Counting.num_forwards += 1  # on the class: not put back
            return super().loss(batch)

    for arguments, expected in (({}, 30), ({"interval": 3}, 15 + 5), ({"start_epoch": 2}, 15 + 5)):
        Counting.num_forwards = 0
        module = Counting()
        fit(module, SharpnessAwareMinimization(0.05, **arguments))
        assert Counting.num_forwards == expected, arguments
        assert module.calls == 15


def test_a_schedule_of_ones_own():
    class Late(SharpnessAwareMinimization):
        def should_perturb(self, step_idx: int, epoch_idx: int) -> bool:
            return step_idx == 14

    module, without = Net(), Net()
    fit(module, Late(0.05))
    fit(without)
    weights = module.net[0].weight - without.net[0].weight
    assert 0 < weights.norm().item() < 0.1
