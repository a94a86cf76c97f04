"""What the second pass of SAM does to loggers, to clamped weights, to a run that diverges, and to a second fit."""

from __future__ import annotations

import os

import torch
from helpers.sam_reference import SGD, Net, assert_same_bits, make_loader, make_network, make_optimizer, make_trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from lightning_flatness import SAM, SharpnessAwareMinimization


def fit(module, *callbacks, dtype=torch.float32, **options):
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, make_loader(dtype))
    return trainer


def test_the_muted_logger_looks_as_the_logger(tmp_path):
    class Logging(Net):
        def training_step(self, batch, batch_idx):
            assert isinstance(self.logger, CSVLogger)
            os.path.join(self.logger.experiment.log_dir, "file")
            self.logger.experiment.summary = {}
            self.logger.experiment.summary["x"] = 1
            self.logger.log_metrics({"step": 1.0}, step=self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    trainer = fit(Logging(), SharpnessAwareMinimization(0.05), logger=logger)
    assert trainer.loggers == [logger]


def test_a_clamped_weight_equals_the_plain_loop():
    """The clamping of the first pass counts; the perturbation and the clamping of the second one are undone."""

    def clamp(network):
        network[0].weight.data.clamp_(-0.3, 0.3)

    class Clamped(Net):
        def loss(self, batch):
            clamp(self.net)
            return super().loss(batch)

    module, plain = Clamped(dtype=torch.float64), make_network(torch.float64)
    fit(module, SharpnessAwareMinimization(0.05), dtype=torch.float64)
    optimizer = SAM(make_optimizer(SGD, plain.parameters()), rho=0.05, module=plain)
    torch.manual_seed(3)
    for x, y in [batch for _ in range(3) for batch in make_loader(torch.float64)]:

        def closure(x=x, y=y):
            clamp(plain)
            loss = F.cross_entropy(plain(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


def test_a_run_that_diverges_ends_as_without():
    class Steep(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e20)

    ends = []
    for callbacks in ([], [SharpnessAwareMinimization(0.05)]):
        module = Steep()
        ends.append((fit(module, *callbacks).global_step, [p.isnan().all() for p in module.net.parameters()]))
    assert ends[0] == ends[1]


def test_a_second_fit_starts_as_new():
    sam, new = SharpnessAwareMinimization(0.05), SharpnessAwareMinimization(0.05)
    fit(Net(), sam, max_epochs=-1, max_steps=7)  # stops within an epoch
    again, first = Net(), Net()
    rises = [float(fit(m, c).callback_metrics["sam/loss_rise"]) for m, c in ((again, sam), (first, new))]
    assert rises[0] == rises[1]
    assert_same_bits(dict(again.state_dict()), dict(first.state_dict()))
    assert vars(sam._means) == vars(new._means)
    assert sam._step is None
