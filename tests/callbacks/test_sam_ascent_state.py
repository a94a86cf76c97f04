"""SAM with one gradient per step: loss scalers, resuming, optimizers that change gradients, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.ascent_reference import ASCENTS
from helpers.sam_reference import (
    ADAMW,
    SGD,
    Net,
    Resumable,
    Stateful,
    assert_same_bits,
    fit,
    make_loader,
    make_trainer,
)
from helpers.training import Recorder, state_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_flatness import FlatnessMonitor, SharpnessAwareMinimization
from lightning_flatness.callbacks.loggers.hyperparameters import _hyperparameters
from lightning_flatness.sam.ascent import PREVIOUS_GRADIENT


def previous_gradients(trainer):
    (optimizer,) = trainer.optimizers
    return [optimizer.state[p][PREVIOUS_GRADIENT] for p in optimizer.param_groups[0]["params"]]


# -------------------------------------------------------------------------------------------------------- precision


class Scaled(MixedPrecision):
    """A loss scaler without half precision, so that scaling by a power of two changes no bit."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**9))

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_loss_scaler_changes_nothing(ascent):
    ends = []
    for plugins in ([], [Scaled()]):
        module = Net(ADAMW)
        sam = SharpnessAwareMinimization(0.05, ascent=ascent)
        trainer = fit(module, sam, plugins=plugins, gradient_clip_val=0.5, accumulate_grad_batches=2)
        ends.append((state_of(module), trainer.optimizers[0].state_dict()["state"]))
    assert_same_bits(*ends)


class Overflowing(Net):
    def __init__(self, at, optimizer=ADAMW):
        super().__init__(optimizer)
        self.at = at

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == self.at else loss


class Kept(Callback):
    def __init__(self):
        self.gradients = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = trainer.optimizers[0].state
        self.gradients.append([dict(s).get(PREVIOUS_GRADIENT) for s in state.values()])


@pytest.mark.parametrize("at", [0, 2])
def test_a_skipped_step_keeps_no_gradient(at):
    kept, module = Kept(), Overflowing(at)
    sam = SharpnessAwareMinimization(0.05, ascent="previous")
    fit(module, sam, kept, plugins=[Scaled()], max_epochs=1)
    if at == 0:
        assert kept.gradients[0] == []  # Adam takes a state that is not empty to be its own
    else:
        assert_same_bits(kept.gradients[at], kept.gradients[at - 1])
    assert all(torch.isfinite(g).all() for g in kept.gradients[-1])
    assert not torch.equal(kept.gradients[at + 1][0], kept.gradients[-1][0])
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_direction_that_is_not_finite_moves_nothing(ascent):
    ends = []
    for sam in ([], [SharpnessAwareMinimization(0.05, ascent=ascent)]):
        module = Overflowing(0, SGD)
        fit(module, *sam, max_epochs=1)
        ends.append([p.isnan().all() for p in module.net.parameters()])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(ascent, precision):
    module, exact = Net(), Net()
    loader = make_loader(torch.float64 if precision == "64-true" else torch.float32)
    fit(module, SharpnessAwareMinimization(0.05, ascent=ascent), precision=precision, loader=loader)
    fit(exact, SharpnessAwareMinimization(0.05, ascent=ascent))
    torch.testing.assert_close(module.net[0].weight.float(), exact.net[0].weight, rtol=0, atol=0.2)


def test_the_gradient_is_the_one_that_backward_left():
    """Nesterov's momentum is added to the gradient in place."""

    class Nesterov(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)

        def on_before_optimizer_step(self, optimizer):
            self.gradients = [p.grad.clone() for p in self.net.parameters()]

    module = Nesterov()
    trainer = fit(module, SharpnessAwareMinimization(0.05, ascent="previous"), max_epochs=1)
    assert_same_bits(previous_gradients(trainer), module.gradients)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_a_gradient_that_a_later_hook_takes_away(optimizer):
    """As DINO does with its last layer at first; Adam takes a state that is not empty to be its own."""

    class Cancelling(Net):
        def configure_gradient_clipping(self, optimizer, **kwargs):
            if self.global_step < 2:
                self.net[0].weight.grad = None

    kept, module = Kept(), Cancelling(optimizer)
    before = module.net[0].weight.detach().clone()
    fit(module, SharpnessAwareMinimization(0.05, ascent="previous"), kept, max_epochs=1)
    num = len(list(module.net.parameters()))
    assert [sum(g is not None for g in step) for step in kept.gradients] == [num - 1, num - 1, num, num, num]
    assert not torch.equal(before, module.net[0].weight)


# --------------------------------------------------------------------------------------------------------- resuming


class EndsEarly(Stateful):
    """Is at its start again when the last batch is taken, so that a checkpoint after that batch begins an epoch."""

    def __iter__(self):
        for index in range(self.start, len(self.batches)):
            self.start = (index + 1) % len(self.batches)
            yield self.batches[index]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, ascent, optimizer):
    def run(*callbacks, ckpt_path=None):
        module, logger = Resumable(optimizer, schedule=True), Recorder()
        sam = SharpnessAwareMinimization(0.05, ascent=ascent)
        trainer = make_trainer(
            sam, *callbacks, enable_checkpointing=bool(callbacks), logger=logger, log_every_n_steps=1, max_epochs=2
        )
        trainer.fit(module, EndsEarly(list(make_loader())), make_loader(), ckpt_path=ckpt_path)
        norms = [m["sam/perturbation_norm"] for _, m in logger.records if "sam/perturbation_norm" in m]
        return state_of(module), trainer.optimizers[0].state_dict(), norms[-1]

    whole = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    for step in (1, 3, 7):
        assert_same_bits(run(ckpt_path=tmp_path / f"step={step}.ckpt"), whole)


def test_checkpoints_load_with_and_without(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    sam = SharpnessAwareMinimization(0.05, ascent="previous")
    fit(Net(ADAMW), sam, checkpoint, enable_checkpointing=True, max_epochs=1)
    path = tmp_path / "step=5.ckpt"
    assert PREVIOUS_GRADIENT in torch.load(path, weights_only=True)["optimizer_states"][0]["state"][0]
    assert fit(Net(ADAMW), ckpt_path=path, max_epochs=2).global_step == 10


# --------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("ascent", ASCENTS)
def test_one_gradient_per_step_is_planned_and_written_down(ascent):
    monitor = FlatnessMonitor(probe_size=8, budget=1.0)
    sam = SharpnessAwareMinimization(0.05, ascent=ascent)
    trainer = fit(Net(), monitor, sam, max_epochs=1, logger=Recorder())
    assert monitor.run.epoch == 40
    assert _hyperparameters(trainer)["sam_ascent"] == ascent
    assert "sam_ascent" not in _hyperparameters(fit(Net(), SharpnessAwareMinimization(), max_epochs=1))


# ---------------------------------------------------------------------------------------------------- what is refused


def optimized_by(make):
    class Optimized(Net):
        def configure_optimizers(self):
            return make(self.parameters())

    return Optimized()


class Momentumless(torch.optim.Optimizer):
    """Keeps something, under a promising name, but no momentum."""

    def __init__(self, parameters):
        super().__init__(parameters, {"beta2": 0.9})

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = self.state[p].get("count", 0) + 1
        return loss


class ZeroRedundancyOptimizer(torch.optim.SGD):  # the real one needs a process group
    pass


@pytest.mark.parametrize(
    ("ascent", "make", "message"),
    [
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.1), "with momentum for ascent='momentum', got SGD without. Use"),
        ("momentum", lambda p: torch.optim.Adagrad(p), "with momentum for ascent='momentum', got Adagrad without"),
        ("momentum", lambda p: ZeroRedundancyOptimizer(p, momentum=0.9), "ascent='momentum', got ZeroRedundancyOptim"),
        ("previous", lambda p: ZeroRedundancyOptimizer(p), "every rank for ascent='previous', got ZeroRedundancyOptim"),
    ],
)
def test_optimizers_that_are_refused(ascent, make, message):
    module = optimized_by(make)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, SharpnessAwareMinimization(ascent=ascent))
    assert module.calls == 0


def test_an_optimizer_that_turns_out_to_keep_no_momentum():
    module = optimized_by(Momentumless)
    with pytest.raises(RuntimeError, match="'momentum_buffer' or 'exp_avg' for ascent='momentum', got Momentumless"):
        fit(module, SharpnessAwareMinimization(ascent="momentum"))
    fit(optimized_by(Momentumless), SharpnessAwareMinimization(ascent="previous"), max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ascent": "foo"}, "Expected `ascent` to be one of 'gradient', 'momentum', 'previous', got 'foo'. Use"),
        (
            {"ascent": "momentum", "sync_perturbation": False},
            "Expected `sync_perturbation` to be True for ascent='momentum', got False. Leave it out",
        ),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SharpnessAwareMinimization(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.Adamax(p),
        lambda p: torch.optim.SGD([{"params": list(p), "momentum": 0.5}], lr=0.1),
    ],
)
def test_optimizers_with_momentum_are_taken(make):
    trainer = fit(optimized_by(make), SharpnessAwareMinimization(0.05, ascent="momentum"), max_epochs=1)
    assert float(trainer.callback_metrics["sam/perturbation_norm"]) == pytest.approx(0.05 * 4 / 5)
