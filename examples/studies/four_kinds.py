"""Four kinds of networks, three for images of 14x14 pixels and one for text, trained by plain loops to the same loss.

All hidden units but those of the attention are ReLUs, so that the geometries of paths are defined where the network has
no attention.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from training import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
import fashion
from attention_invariance import standard_library
from digits import DigitsDataModule
from fashion_mnist import FOLDER

from lightning_flatness import SAM

KINDS = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet", "transformer": "transformer"}
NUM_TEST = 10_000
CONTEXT = 32
"""Characters from which the transformer tells the next one."""


@dataclass(frozen=True)
class Data:
    """Images (samples, 1, 14, 14) or characters (samples, 32), and classes.

    Attributes:
        train: To train on, and to measure on.
        test: To see the gap.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def to(self, device: str) -> Data:
        """Return the same on a device."""
        (x, y), (x_test, y_test) = self.train, self.test
        return Data((x.to(device), y.to(device)), (x_test.to(device), y_test.to(device)))


@dataclass(frozen=True)
class Trained:
    """A network where its training stopped.

    Attributes:
        module: The network.
        optimizer: What trained it, with its state.
        step: Optimizer steps.
        reached: Whether the loss on all training samples has come down to that of the recipe.
    """

    module: nn.Module
    optimizer: Optimizer
    step: int
    reached: bool


@cache
def data_of(name: str, num_train: int, folder: Path = FOLDER) -> Data:
    """Return data, read once per process: Fashion-MNIST from a folder, the digits in a black frame, or text.

    Args:
        name: ``"fashion"``, ``"digits"``, or ``"sources"``: pieces of the standard library's sources and the characters
            that follow them.
        num_train: Training samples. Those of the text are spread over its first three quarters, those to test on over
            the last.
        folder: Of Fashion-MNIST.

    Returns:
        The data.
    """
    if name == "sources":
        text = standard_library()
        border = 3 * len(text) // 4
        return Data(pieces(text[:border], num_train), pieces(text[border:], NUM_TEST))
    if name == "fashion":
        return Data(fashion.images(num_train, folder), fashion.images_to_test(NUM_TEST, num_train, folder))
    if name != "digits":
        raise ValueError(f"Expected the data to be 'fashion', 'digits' or 'sources', got {name!r}.")
    data = DigitsDataModule()
    (x, y), (x_test, y_test) = data.train_set.tensors, data.test_set.tensors
    return Data((framed(x[:num_train]), y[:num_train]), (framed(x_test), y_test))


def framed(x: Tensor) -> Tensor:
    """Return images of 8x8 pixels in a frame of their lowest value, 14x14."""
    return F.pad(x, (3, 3, 3, 3), value=float(x.min()))


def pieces(text: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return evenly spaced pieces of a text, in random order, and the character that follows each."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, num).long()
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    found = text.unfold(0, CONTEXT + 1, 1)[starts[order]]
    return found[:, :-1].contiguous(), found[:, -1].contiguous()


class Block(nn.Module):
    """Two convolutions with BatchNorm, added to what goes in."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.skip(x))


class TextTransformer(nn.Module):
    """One layer of attention over characters, and the next one from what it makes of the last."""

    def __init__(self, size: int = 24, num_heads: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, size)
        self.positions = nn.Parameter(0.1 * torch.randn(CONTEXT, size))
        layer = nn.TransformerEncoderLayer(size, num_heads, 2 * size, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(size, 128)

    def forward(self, x: Tensor) -> Tensor:
        h = self.characters(x) + self.positions
        logits: Tensor = self.head(self.layers(h)[:, -1])
        return logits


def network(kind: str) -> nn.Module:
    """Return a network with new weights for images of 14x14 pixels in 10 classes, or for text.

    Args:
        kind: ``"mlp"``, ``"cnn"``, ``"resnet"`` (with BatchNorm) or, for text, ``"transformer"``.

    Returns:
        The network.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind == "mlp":
        hidden = nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))
    if kind == "cnn":
        first = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10))
    if kind == "resnet":
        stem = nn.Conv2d(1, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        return nn.Sequential(*stem, Block(8, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    if kind == "transformer":
        return TextTransformer()
    raise ValueError(f"Expected `kind` to be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")


def augmented(x: Tensor) -> Tensor:
    """Return images, each mirrored with probability one half, and all shifted by up to one pixel."""
    mirrored = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
    rows, columns = torch.randint(0, 3, (2,)).tolist()
    size = x.shape[-1]
    return F.pad(mirrored, (1, 1, 1, 1), mode="replicate")[..., rows : rows + size, columns : columns + size]


def train(recipe: Recipe, seed: int, data: Data | None = None) -> Trained:
    """Train from the weights that belong to ``seed`` until the loss on all training samples is that of the recipe.

    Args:
        recipe: How to train.
        seed: Of the initial weights and of the order of the samples.
        data: That of the recipe, where it is on another device or from another folder.

    Returns:
        The network, on the device of the data.
    """
    target = float(recipe.points[0].removeprefix("loss="))
    data = data or data_of(recipe.data, recipe.num_train)
    x, y = data.train
    torch.manual_seed(seed)
    module = network(recipe.network).to(x.device)
    optimizer = optimizer_of(recipe, module)
    num_batches = -(-len(x) // recipe.batch_size)
    step, next_look, loss = 0, num_batches, float("inf")
    while step < recipe.max_steps:
        for chosen in torch.randperm(len(x)).to(x.device).split(recipe.batch_size):
            descend(module, optimizer, augmented(x[chosen]) if recipe.augmentation else x[chosen], y[chosen])
            step += 1
            if step >= min(next_look, recipe.max_steps):
                loss, _ = loss_and_accuracy(module, data.train, data.train[0])
                if loss <= target or step >= recipe.max_steps or loss != loss:
                    return Trained(module, optimizer, step, loss <= target)
                next_look += max(1, num_batches // (8 if loss < 1.5 * target else 1))
    return Trained(module, optimizer, step, False)


def optimizer_of(recipe: Recipe, module: nn.Module) -> Optimizer:
    """Return the optimizer of a recipe, within SAM if it has a radius."""
    optimizer: Optimizer
    parameters = module.parameters()
    if recipe.optimizer == "adam":
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    return SAM(optimizer, rho=recipe.rho, module=module) if recipe.rho else optimizer


def descend(module: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """Take one step on a batch."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


@torch.no_grad()
def loss_and_accuracy(module: nn.Module, tensors: tuple[Tensor, Tensor], train_images: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy in percent in evaluation mode, with BatchNorm's statistics of all training images.

    The running statistics of training lag behind the weights, by the more the fewer steps an epoch has: they would make
    networks of large batches stop late.
    """
    x, y = tensors
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all that comes
        for part in train_images.split(500):
            module.train()(part)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    logits = torch.cat([module.eval()(part) for part in x.split(500)])
    module.train()
    return float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(dim=1) == y).double().mean())
