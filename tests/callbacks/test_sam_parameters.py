"""SharpnessAwareMinimization with odd parameters, odd gradients, and passes that fail."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.sam_reference import (
    GEOMETRIES,
    Net,
    assert_same_bits,
    fit,
    make_loader,
    make_network,
    make_trainer,
    plain_perturbation,
    plain_scales,
)
from helpers.training import Gradients, state_of
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from lightning_flatness import SharpnessAwareMinimization


class Odd(LightningModule):
    """Frozen, unused, tied and toggled parameters, and one that is used in the first pass of a step only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_network(torch.float64)
        self.net[1].bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.not_optimized = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.tied = nn.Linear(12, 12, dtype=torch.float64)
        self.tied_too = nn.Linear(12, 12, dtype=torch.float64)
        self.tied_too.weight = self.tied.weight

    def training_step(self, batch, batch_idx):
        self.net[4].bias.requires_grad_(batch_idx % 2 == 0)
        x, y = batch
        hidden = self.tied_too(self.tied(self.net[:2](x)).tanh())
        return F.cross_entropy(self.net[4](hidden) + self.not_optimized, y)

    def configure_optimizers(self):
        decayed = [self.net[0].weight, self.tied.weight, self.unused]
        rest = [*self.net[1].parameters(), *self.net[4].parameters(), self.tied.bias, self.tied_too.bias]
        return torch.optim.SGD([{"params": decayed, "lr": 0.05, "weight_decay": 0.1}, {"params": rest, "lr": 0.2}])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_frozen_unused_tied_toggled_parameters_and_groups(geometry):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Odd()
    plain = copy.deepcopy(module)
    fit(module, SharpnessAwareMinimization(0.1, geometry), loader=make_loader(torch.float64), max_epochs=1)
    optimizer = plain.configure_optimizers()
    for index, batch in enumerate(make_loader(torch.float64)):
        loss = plain.training_step(batch, index)
        held = {id(p): p for g in optimizer.param_groups for p in g["params"] if p.requires_grad}.values()
        held = [p for p in held if p is not plain.unused]
        first = torch.autograd.grad(loss, held)
        changes = plain_perturbation(first, plain_scales(held, geometry), 0.1)
        weights, buffers = [p.detach().clone() for p in held], [b.clone() for b in plain.buffers()]
        with torch.no_grad():
            for p, e in zip(held, changes, strict=True):
                p += e
        second = torch.autograd.grad(plain.training_step(batch, index), held)
        with torch.no_grad():
            for p, w in zip(held, weights, strict=True):
                p.copy_(w)
            for b, saved in zip(plain.buffers(), buffers, strict=True):
                b.copy_(saved)
        optimizer.zero_grad()
        for p, g in zip(held, second, strict=True):
            p.grad = g
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert module.unused.grad is None


def test_parameters_that_no_optimizer_holds_get_one_gradient_per_step():
    with_sam, without, module = Gradients(), Gradients(), Odd()
    other = copy.deepcopy(module)
    fit(module, SharpnessAwareMinimization(1e-300), with_sam, loader=make_loader(torch.float64), max_epochs=1)
    fit(other, without, loader=make_loader(torch.float64), max_epochs=1)
    assert_same_bits(with_sam.gradients, without.gradients)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("used_in", ["clean", "perturbed"])
def test_a_parameter_with_a_gradient_in_only_one_of_the_passes(used_in, accumulate):
    class Partly(LightningModule):
        def __init__(self):
            super().__init__()
            self.always = nn.Parameter(torch.ones(2))
            self.sometimes = nn.Parameter(torch.ones(2))

        def training_step(self, batch, batch_idx):
            moved = bool(self.always[0] != 1)
            loss = self.always.square().sum()
            return loss + self.sometimes.sum() if moved == (used_in == "perturbed") else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    gradients, module = Gradients(), Partly()
    fit(module, SharpnessAwareMinimization(0.1), gradients, max_epochs=1, accumulate_grad_batches=accumulate)
    assert module.always.tolist() == module.sometimes.tolist() == [1, 1]
    for _, sometimes in gradients.gradients:
        if used_in == "clean":
            assert sometimes is None
        else:
            assert sometimes is not None
            assert float(sometimes[0]) in (1.0, 1 / accumulate)


def test_training_step_that_returns_none_now_and_then():
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.calls % 3 == 0 else {"loss": loss, "extra": loss.detach()}

    ends = []
    for rho in (None, 1e-30, 0.05):
        module = Skipping()
        trainer = fit(module, *([] if rho is None else [SharpnessAwareMinimization(rho)]))
        assert "training_step" not in module.__dict__
        ends.append((state_of(module), trainer.global_step, module.calls))
    assert_same_bits(ends[0], ends[1])
    assert ends[2][1:] == ends[0][1:]


def test_a_step_that_returns_none_at_the_perturbed_weights_only():
    class Careful(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if float(self.net[0].weight.detach().norm()) > 100 else loss

    module, without = Careful(), Careful()
    trainer = fit(module, SharpnessAwareMinimization(1e4))
    fit(without)
    assert_same_bits(state_of(module.net), state_of(without.net))
    assert float(trainer.callback_metrics["sam/perturbation_norm"]) == 0


def test_a_gradient_of_zero_perturbs_nothing():
    class Flat(Net):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx)

    module, without = Flat(), Flat()
    trainer = fit(module, SharpnessAwareMinimization(0.05))
    fit(without)
    assert_same_bits(state_of(module), state_of(without))
    assert float(trainer.callback_metrics["sam/perturbation_norm"]) == 0


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_second_pass_that_raises_leaves_everything_as_it_was(where, geometry):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            before.setdefault("weights", state_of(self.net))
            loss = super().training_step(batch, batch_idx)
            changed = not torch.equal(before["weights"]["0.weight"], self.net[0].weight)
            if not changed:
                before["all"] = (state_of(self), self.calls, len(self.seen), torch.get_rng_state())
            elif where == "forward":
                raise RuntimeError("as a test")
            else:
                loss.register_hook(self.fail)
            return loss

        def fail(self, gradient):
            raise RuntimeError("as a test")

    before: dict[str, Any] = {}
    module, other = Failing(), Callback()
    sam = SharpnessAwareMinimization(0.05, geometry)
    trainer = make_trainer(other, sam)
    with pytest.raises(RuntimeError, match="as a test"):
        trainer.fit(module, make_loader())
    for name, value in before["weights"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, module.net.state_dict()[name])
    assert_same_bits((state_of(module), module.calls, len(module.seen), torch.get_rng_state()), before["all"])
    assert trainer.callbacks == [sam, other]
    assert not {"training_step", "on_after_backward", "log"} & set(module.__dict__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_submodules_see_one_pass():
    class Scripted(Net):
        def __init__(self):
            super().__init__()
            self.extra = torch.jit.script(nn.BatchNorm1d(5, momentum=0.5))

        def loss(self, batch):
            return super().loss((self.extra(batch[0]), batch[1]))

    ends = []
    for rho in (None, 1e-30):
        module = Scripted()
        fit(module, *([] if rho is None else [SharpnessAwareMinimization(rho)]))
        ends.append(state_of(module))
    assert_same_bits(*ends)


def test_tensor_hooks_act_on_the_sharpness_aware_gradient():
    module, gradients = Net(), Gradients()
    mask = (torch.rand(12, 5) < 0.5).float()
    module.net[0].weight.register_hook(lambda gradient: gradient * mask)  # e.g. pruning
    fit(module, SharpnessAwareMinimization(0.05), gradients, max_epochs=1)
    assert all((g[0] * (1 - mask)).abs().max() == 0 for g in gradients.gradients)
    assert gradients.gradients[0][0].norm() > 0


def test_gradients_kept_by_the_user_are_added_to():
    """A module that zeroes in place, or not at all, gets what it would get without SAM."""

    class InPlace(Net):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    class Never(Net):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            pass

    reference, in_place = Net(), InPlace()
    fit(reference, SharpnessAwareMinimization(0.05))
    fit(in_place, SharpnessAwareMinimization(0.05))
    assert_same_bits(state_of(reference.net), state_of(in_place.net))
    never, without = Never(), Never()
    fit(never, SharpnessAwareMinimization(1e-30))
    fit(without)
    assert_same_bits(state_of(never.net), state_of(without.net))


def test_custom_backward_and_compiled_training_step():
    class Custom(Net):
        num_backwards = 0

        def backward(self, loss, *args, **kwargs):
            Custom.num_backwards += 1
            (2 * loss).backward()

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for p in self.parameters():
                if p.grad is not None:
                    p.grad /= 2

    module, reference = Custom(), Net()
    own = module.training_step
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx)  # where a compiled step is kept
    kept = module.training_step
    fit(module, SharpnessAwareMinimization(0.05))
    fit(reference, SharpnessAwareMinimization(0.05))
    assert module.training_step is kept
    assert Custom.num_backwards == 30
    assert_same_bits(state_of(module.net), state_of(reference.net))
