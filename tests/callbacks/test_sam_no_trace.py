"""The second pass leaves no trace: hooks, state, random numbers and batches are as without it."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from helpers.sam_reference import (
    SGD,
    Net,
    assert_same_bits,
    fit,
    make_loader,
    make_network,
    make_optimizer,
    plain_loop,
)
from helpers.training import Gradients, Recorder, everything, gradients_of
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from lightning_flatness import SharpnessAwareMinimization


def test_nothing_but_the_gradient_differs_from_a_clean_pass():
    """With a learning rate of zero the runs see the same weights, so all else must be the same, bit for bit."""

    class Still(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ends = []
    for callbacks in ([], [SharpnessAwareMinimization(rho=0.5)]):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        module, logger = Still(), Recorder()
        trainer = fit(module, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
        records = [(s, {k: v for k, v in m.items() if not k.startswith("sam/")}) for s, m in logger.records]
        ends.append(everything(module, trainer) | {"records": [r for r in records if set(r[1]) - {"epoch"}]})
        assert any("loss_step" in m for _, m in records)
    assert_same_bits(*ends)


def test_hooks_run_once_and_see_the_sharpness_aware_gradient():
    class Hooked(Net):
        num_before, num_after = 0, 0

        def on_before_backward(self, loss):
            Hooked.num_before += 1

        def on_after_backward(self):
            Hooked.num_after += 1
            self.gradient = gradients_of(self.net)

    first, last, module = Gradients(), Gradients(), Hooked(dtype=torch.float64)
    fit(module, first, SharpnessAwareMinimization(0.05), last, loader=make_loader(torch.float64), max_epochs=1)
    assert first.num_before == last.num_before == Hooked.num_before == Hooked.num_after == 5
    for a, b, c in zip(first.after_backward, last.after_backward, last.gradients, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(b, c)
    assert_same_bits(module.gradient, last.gradients[-1])
    assert first.gradients[0][0].norm() > 0


def test_both_passes_start_from_the_same_state():
    """A queue in a buffer, a count and a momentum encoder: what the step changes must not change its function."""

    class Stateful(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_network(torch.float64)
            self.target = copy.deepcopy(self.net).requires_grad_(False)
            for p in self.target.parameters():
                p += 1
            self.register_buffer("queue", torch.zeros(3, dtype=torch.float64))
            self.count = 0
            self.history = {}
            self.trace = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x + random.random() + torch.from_numpy(np.random.standard_normal(x.shape))  # noqa: NPY002
            self.count += 1
            with torch.no_grad():
                for mine, its in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    mine.data.mul_(0.9).add_(its.data, alpha=0.1)
            trace.append((self.count, self.queue.clone(), float(self.target[0].weight.sum()), x, dict(self.history)))
            self.history[self.count] = batch_idx
            logits = self.net(x)
            loss = F.cross_entropy(logits + self.queue, y) + (self.target(x) - logits).square().mean() / self.count
            self.queue.add_(1)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.0)

    trace: list[Any] = []
    module = Stateful()
    fit(module, SharpnessAwareMinimization(1e-300), loader=make_loader(torch.float64), max_epochs=1)
    assert len(trace) == 10
    for clean, perturbed in zip(trace[::2], trace[1::2], strict=True):
        assert_same_bits(clean, perturbed)
    assert module.count == 5
    assert list(module.history) == [1, 2, 3, 4, 5]
    assert module.queue.tolist() == [5, 5, 5]
    # The target has moved once per step, and by the clean weights.
    expected = make_network(torch.float64)[0].weight + 0.9**5
    torch.testing.assert_close(module.target[0].weight.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_batch_that_the_step_takes_apart():
    class Destructive(Net):
        def training_step(self, batch, batch_idx):
            x = batch.pop("x")
            x.mul_(2).add_(1)
            return self.loss((x, batch["nested"].pop()))

    def collate(samples):
        x, y = torch.utils.data.default_collate(samples)
        return {"x": x, "nested": [y]}

    module, plain = Destructive(dtype=torch.float64), make_network(torch.float64)
    fit(module, SharpnessAwareMinimization(0.05), loader=make_loader(torch.float64, collate_fn=collate))
    batches = [(2 * x + 1, y) for x, y in make_loader(torch.float64)]
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), batches, rho=0.05)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


def test_random_numbers_drawn_between_the_hooks():
    """Mixup in a callback or in the module's on_train_batch_start comes after this callback's own hook."""

    class Mixup(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch[0].add_(torch.randn(()))

    class Drawing(Net):
        masks: list[Tensor] = []  # noqa: RUF012

        def on_train_batch_start(self, batch, batch_idx):
            torch.rand(7)

        def training_step(self, batch, batch_idx):
            Drawing.masks.append(torch.cat([batch[0].flatten(), torch.rand(3)]))
            torch.set_rng_state(torch.get_rng_state())
            return super().training_step(batch, batch_idx)

    fit(Drawing(), SharpnessAwareMinimization(0.05), Mixup(), max_epochs=1)
    for clean, perturbed in zip(Drawing.masks[::2], Drawing.masks[1::2], strict=True):
        assert torch.equal(clean, perturbed)
