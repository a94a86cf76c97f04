"""The mode "batch_statistics": the loss that training minimises, without its noise, for every layer that normalises."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Plain
from helpers.training import fit, state_of
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_flatness import FlatnessMonitor, LossLandscape, TopEigenvalues
from lightning_flatness.callbacks.probe import SeenBatches, draw_probe
from lightning_flatness.module.modes import uses_batch_statistics


class ThirdParty(nn.Module):
    """Normalises by itself, under the usual names."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.register_buffer("running_mean", torch.randn(num_features))
        self.register_buffer("running_var", torch.rand(num_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class Subclass(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def net_with(normalization: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), normalization, nn.Dropout(0.5), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for name, buffer in net[1].named_buffers():
            if name.startswith("running"):
                buffer.uniform_(0.5, 2)
    return net


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def batches(*sizes: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator).double(), torch.arange(n) % 3) for n in sizes]


LAYERS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "subclass": lambda: Subclass(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "third party": lambda: ThirdParty(6),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_of_training_without_dropout(name):
    net, data = net_with(LAYERS[name]()), batches(8, 8)
    expected = copy.deepcopy(net).train()
    expected[2].eval()
    before = state_of(net)
    landscape = LossLandscape(net, data, cross_entropy)
    assert landscape.mode == "batch_statistics"
    value = torch.stack([cross_entropy(expected, batch) for batch in data]).mean()
    torch.testing.assert_close(landscape.loss(), value.detach())
    TopEigenvalues(tol=1e-6).update(landscape)  # twice differentiable
    torch.testing.assert_close(state_of(net), before, rtol=0, atol=0)
    assert landscape.loss() != LossLandscape(net, data, cross_entropy, mode="eval").loss()


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6, track_running_stats=False)])
def test_without_running_statistics_it_is_evaluation_bit_for_bit(layer):
    net, data = net_with(layer), batches(8, 5)
    one, other = (LossLandscape(net, data, cross_entropy, mode=mode) for mode in ("batch_statistics", "eval"))
    v = torch.linspace(-1, 1, one.num_parameters, dtype=torch.float64)
    assert torch.equal(one.loss(), other.loss())
    assert torch.equal(one.hvp(v), other.hvp(v))


def test_instance_normalization_takes_the_statistics_of_each_sample():
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.InstanceNorm1d(2, affine=True, track_running_stats=True))
    net[1].running_mean.fill_(3.0)
    x = torch.randn(4, 1, 8)
    landscape = LossLandscape(net, [x], lambda m, x: m(x).pow(4).mean())
    torch.testing.assert_close(landscape.loss(), net.train()(x).pow(4).mean().detach())
    assert not uses_batch_statistics(net, "batch_statistics")


def test_layers_that_are_frozen_while_others_train_stay_frozen():
    net = net_with(nn.BatchNorm1d(6)).train()
    net[1].eval()
    frozen = LossLandscape(net, batches(8), cross_entropy)
    loss = frozen.loss()
    assert torch.equal(loss, LossLandscape(net, batches(8), cross_entropy, mode="eval").loss())
    assert not uses_batch_statistics(net, "batch_statistics")
    net.eval()  # nothing trains, so nothing is frozen
    assert uses_batch_statistics(net, "batch_statistics")
    assert frozen.loss() != loss


def test_batches_of_one_sample_say_what_to_do():
    landscape = LossLandscape(net_with(nn.BatchNorm1d(6)), batches(8, 1), cross_entropy)
    with pytest.raises(ValueError, match=r"of two or more samples .* got one of a single .* mode='eval'"):
        landscape.loss()


# ---------------------------------------------------------------------------------------------------------- the probe


def test_the_batches_of_the_probe_do_not_depend_on_the_loader_or_the_ranks():
    numbers: Dataset[Any] = range(1000)

    def drawn(batch_size: int, **options: Any) -> list[list[int]]:
        loader = DataLoader(numbers, batch_size=batch_size)
        return [b.tolist() for b in draw_probe(loader, 512, uses_batch_statistics=True, **options)]

    alone = drawn(16)
    assert [len(b) for b in alone] == [128] * 4
    assert drawn(512) == alone
    two = [drawn(64, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(map(sorted, two[0] + two[1])) == sorted(map(sorted, alone))
    assert [len(b) for b in drawn(1)] == [1] * 512


def test_a_stream_leaves_out_a_smaller_last_batch():
    seen, plain = SeenBatches(20, equal_batches=True), SeenBatches(20)
    for _ in range(4):
        seen.collect(torch.zeros(8))
        plain.collect(torch.zeros(8))
    assert seen.is_complete
    assert [len(b) for b in seen.batches] == [8, 8]
    assert [len(b) for b in plain.batches] == [8, 8, 4]


class Normalized(pl.LightningModule):
    """Learns digits with BatchNorm, by gradient descent."""

    def __init__(self, lr: float = 0.2) -> None:
        super().__init__()
        layers = [(nn.Linear(n, 32, bias=False), nn.BatchNorm1d(32), nn.Tanh()) for n in (64, 32)]
        self.net = nn.Sequential(*layers[0], *layers[1], nn.Linear(32, 10))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss: Tensor = 0.5 * (self.net(x) - F.one_hot(y, 10)).square().sum(dim=1).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def digits(num_samples: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:num_samples], dtype=torch.float32) / 16
    return list(zip((x - x.mean(dim=0)) / (x.std(dim=0) + 0.1), torch.tensor(labels[:num_samples]), strict=True))


@pytest.mark.slow
def test_full_batch_gradient_descent_with_batchnorm_meets_its_edge(tmp_path):
    """Where progressive sharpening ends, eta · lambda_max / 2 hovers around one: of the loss that is minimised."""
    torch.manual_seed(0)
    data: Any = DataLoader(digits(300), batch_size=300)
    monitor = FlatnessMonitor(every_n_epochs=None, every_n_steps=20, probe_size=300, probe_batch_size=300)
    run = fit(tmp_path, monitor, module=Normalized(), data=(data,), max_epochs=400)
    curve = {step: m["flatness/edge_of_stability"] for step, m in run.logger.records if "flatness/lambda_max" in m}
    rising, late = [[v for step, v in curve.items() if a <= step <= b] for a, b in ((40, 160), (260, 400))]
    assert rising[0] < 0.9
    assert rising[-1] > rising[0]
    assert all(0.8 < value < 1.25 for value in late)


def test_a_stream_and_a_monitor_with_batchnorm(tmp_path):
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Plain(40))

    class Module(Normalized):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    monitor = FlatnessMonitor(probe_size=20)
    run = fit(tmp_path, monitor, module=Module(), data=(DataLoader(Stream(), batch_size=8),), max_epochs=1)
    assert [len(batch[0]) for batch in monitor.run.probe or []] == [8, 8]
    assert run.callback_metrics["flatness/lambda_max"] > 0
