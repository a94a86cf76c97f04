"""SharpnessAwareMinimization with one gradient per step equals a plain loop, and keeps SAM's promises."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.ascent_reference import ASCENTS, plain_ascent_loop
from helpers.sam_reference import (
    ADAMW,
    SGD,
    Net,
    assert_same_bits,
    fit,
    make_loader,
    make_network,
    make_trainer,
    watched_in_both_orders,
)
from helpers.training import Recorder, everything, state_of
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch import nn

from lightning_flatness import SharpnessAwareMinimization
from lightning_flatness.sam.ascent import PREVIOUS_GRADIENT

pytestmark = pytest.mark.parametrize("ascent", ASCENTS)


def double():
    return list(make_loader(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize(("geometry", "rho"), [("euclidean", 0.05), ("element", 0.5), ("filter", 0.2)])
def test_equals_a_plain_loop(ascent, geometry, rho, optimizer, dtype):
    module, plain = Net(optimizer, dtype), make_network(dtype)
    trainer = fit(module, SharpnessAwareMinimization(rho, geometry, ascent=ascent), loader=make_loader(dtype))
    batches = list(make_loader(dtype))
    means = plain_ascent_loop(plain, batches, ascent=ascent, rho=rho, optimizer=optimizer, geometry=geometry)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)
    logged = trainer.callback_metrics
    assert float(logged["sam/perturbation_norm"]) == pytest.approx(means[-1], rel=1e-4)
    assert "sam/loss_rise" not in logged


def test_the_plain_loop_differs_without(ascent):
    """Guard of the guard: the test above can fail, also by the sign."""
    ends = []
    for other, rho in ((None, 0.0), (ascent, 0.05), (ascent, -0.05)):
        plain = make_network(torch.float64)
        plain_ascent_loop(plain, double(), ascent=other or ascent, rho=rho)
        ends.append(plain[0].weight.detach())
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(ends[one], ends[other], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("accumulate", [2, 3])  # the last window of an epoch is ragged
def test_all_microbatches_of_a_step_are_taken_at_the_same_weights(ascent, accumulate):
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    sam = SharpnessAwareMinimization(0.05, ascent=ascent)
    fit(module, sam, loader=make_loader(torch.float64), accumulate_grad_batches=accumulate, gradient_clip_val=0.3)
    plain_ascent_loop(plain, double(), ascent=ascent, rho=0.05, accumulate=accumulate, max_norm=0.3)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "is_perturbed"),
    [({"interval": 2}, lambda step: step % 2 == 0), ({"start_epoch": 1}, lambda step: step >= 5)],
)
def test_interval_and_start_epoch_choose_the_steps(ascent, arguments, is_perturbed):
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    trainer = fit(
        module, SharpnessAwareMinimization(0.05, ascent=ascent, **arguments), loader=make_loader(torch.float64)
    )
    means = plain_ascent_loop(plain, double(), ascent=ascent, rho=0.05, is_perturbed=is_perturbed)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-11, atol=1e-11)
    assert float(trainer.callback_metrics["sam/perturbation_norm"]) == pytest.approx(means[-1])


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_rho_zero_is_bit_identical_to_no_callback(ascent, optimizer):
    ends = []
    for callbacks in ([], [SharpnessAwareMinimization(rho=0.0, ascent=ascent)]):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        module, logger = Net(optimizer, schedule=True), Recorder()
        trainer = fit(module, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
        ends.append(everything(module, trainer) | {"records": logger.records})
    assert_same_bits(*ends)


def test_the_first_step_is_an_ordinary_one(ascent):
    ends = []
    for callbacks in ([], [SharpnessAwareMinimization(0.05, ascent=ascent)]):
        module = Net()
        fit(module, *callbacks, max_epochs=-1, max_steps=1)
        ends.append(state_of(module))
    assert_same_bits(*ends)


class Watching(Callback):
    """Keeps the weights that hooks see, by the number of the microbatch."""

    def __init__(self):
        self.seen = []
        self.at_validation = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append({"start": state_of(pl_module.net)["0.weight"]})

    def on_after_backward(self, trainer, pl_module):
        self.seen[-1]["after"] = state_of(pl_module.net)["0.weight"]

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen[-1]["end"] = state_of(pl_module.net)["0.weight"]

    def on_validation_start(self, trainer, pl_module):
        self.at_validation.append(state_of(pl_module.net)["0.weight"])


class Seeing(Net):
    def __init__(self, optimizer=SGD):
        super().__init__(optimizer)
        self.inside = []

    def training_step(self, batch, batch_idx):
        self.inside.append(self.net[0].weight.detach().clone())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        return None


def test_only_the_step_sees_the_moved_weights(ascent):
    module, watching = Seeing(), Watching()
    sam = SharpnessAwareMinimization(0.05, ascent=ascent)
    trainer = fit(module, watching, sam, accumulate_grad_batches=2, max_epochs=2, log_every_n_steps=1)
    assert module.calls == len(watching.seen) == 10  # one pass each
    assert not sam.has_perturbed
    for index, (seen, inside) in enumerate(zip(watching.seen, module.inside, strict=True)):
        assert torch.equal(seen["start"], seen["after"])
        assert torch.equal(seen["start"], inside) == (index < 2)
        if index % 5 in (0, 2):  # the step is accumulated: the weights stay
            assert torch.equal(seen["start"], seen["end"])
    assert "training_step" not in vars(trainer.strategy)


def test_validation_within_a_step_sees_the_weights_of_training(ascent):
    module, watching = Seeing(), Watching()
    sam = SharpnessAwareMinimization(0.05, ascent=ascent)
    data = {"accumulate_grad_batches": 2, "val_check_interval": 1, "max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = make_trainer(watching, sam, **data)
    trainer.fit(module, make_loader(), make_loader())
    assert len(watching.at_validation) == 10
    for seen, at_validation in zip(watching.seen, watching.at_validation, strict=True):
        assert torch.equal(seen["end"], at_validation)


def test_accumulation_scheduler_and_nothing_left_in_the_optimizer(ascent):
    module = Net()
    trainer = fit(module, GradientAccumulationScheduler({0: 1, 1: 2}), SharpnessAwareMinimization(0.05, ascent=ascent))
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks
    kept = [PREVIOUS_GRADIENT in state for state in optimizer.state.values()]
    assert kept == [ascent == "previous"] * 5


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_puts_the_weights_back(ascent, where):
    class Failing(Seeing):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.calls == 4:
                if where == "forward":
                    raise RuntimeError("as a test")
                loss.register_hook(self.fail)
            return loss

        def fail(self, gradient):
            raise RuntimeError("as a test")

    module, watching = Failing(), Watching()
    with pytest.raises(RuntimeError, match="as a test"):
        fit(module, watching, SharpnessAwareMinimization(0.05, ascent=ascent))
    assert not torch.equal(module.inside[-1], watching.seen[-1]["start"])
    assert torch.equal(state_of(module.net)["0.weight"], watching.seen[-1]["start"])


def test_a_skipped_batch_puts_the_weights_back(ascent):
    class Skipping(Seeing):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 2 else loss

    module, watching = Skipping(), Watching()
    fit(module, watching, SharpnessAwareMinimization(0.05, ascent=ascent), max_epochs=1)
    assert torch.equal(watching.seen[2]["end"], watching.seen[2]["start"])
    assert not torch.equal(module.inside[2], watching.seen[2]["start"])


def test_weights_that_the_step_writes_to_are_put_back_with_a_warning(ascent):
    class Clamped(Net):
        def loss(self, batch):
            with torch.no_grad():
                self.net[0].weight.clamp_(-0.3, 0.3)
            return super().loss(batch)

    with pytest.warns(UserWarning, match="wrote to weights .* undone after the backward pass. Change weights in"):
        fit(Clamped(), SharpnessAwareMinimization(0.05, ascent=ascent), max_epochs=1)


def test_monitor_in_either_order_gives_the_same_numbers_and_changes_nothing(ascent):
    runs = watched_in_both_orders(lambda: SharpnessAwareMinimization(0.05, ascent=ascent))
    assert_same_bits(*(end for _, _, end in runs))
    assert [monitor.run.work.trained for _, monitor, _ in runs] == [3 * 40] * 2


def test_sparse_gradients_frozen_and_unused_weights(ascent):
    class Embedded(Net):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3, sparse=True)
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.unused = nn.Parameter(torch.ones(2))

        def loss(self, batch):
            return super().loss(batch) + self.embedding(torch.tensor([1])).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Embedded()
    before = state_of(module)
    trainer = fit(module, SharpnessAwareMinimization(0.05, ascent=ascent))
    after = state_of(module)
    assert float(trainer.callback_metrics["sam/perturbation_norm"]) == pytest.approx(0.05)
    for name in ("frozen", "unused"):
        assert torch.equal(before[name], after[name])
    rows = (before["embedding.weight"] != after["embedding.weight"]).any(1).tolist()
    assert rows == [False, True, False, False]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_layers_that_are_trained_in_turns(ascent, optimizer):
    """Where all that has a direction is frozen, a step is ordinary."""

    class InTurns(Seeing):
        def on_train_epoch_start(self):
            for layer in self.net:
                layer.requires_grad_((layer is self.net[0]) == (self.current_epoch == 1))

    module, watching = InTurns(optimizer), Watching()
    fit(module, watching, SharpnessAwareMinimization(0.05, ascent=ascent), max_epochs=2)
    moved = [not torch.equal(seen["start"], w) for seen, w in zip(watching.seen, module.inside, strict=True)]
    assert moved == [False] * 6 + [True] * 4  # the first layer has been frozen in steps 0 to 4
