"""Changes of the weights that leave the function of a network as it is: what a measure survives is tried out."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from four_kinds import Block, TextTransformer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from attention_invariance import Transformer, with_other_bases


@dataclass(frozen=True)
class Hidden:
    """A layer of hidden ReLU units.

    Attributes:
        into: Tensors whose rows grow with what the units compute.
        beside: Tensors whose rows belong to the units, too, but do not change what they compute: in front of BatchNorm.
        out_of: The weight whose columns lead out of the units.
    """

    into: list[Tensor]
    beside: list[Tensor]
    out_of: Tensor

    @property
    def num_units(self) -> int:
        """How many there are."""
        return len(self.into[0])

    @property
    def columns(self) -> Tensor:
        """A view with an axis of units: a linear layer behind a flattened image has several columns for each."""
        return self.out_of.view(len(self.out_of), self.num_units, -1)

    def multiply(self, factors: Tensor) -> None:
        """Multiply what leads into each unit by its factor, and divide what leads out of it."""
        for tensor in self.into:
            tensor.mul_(factors.view(-1, *[1] * (tensor.dim() - 1)))
        self.columns.div_(factors[:, None])


def hidden_layers(module: nn.Module) -> list[Hidden]:
    """Return the layers of hidden ReLU units of a network of ``four_kinds``; of a residual block those within it."""
    if isinstance(module, TextTransformer):
        layers = [cast(nn.TransformerEncoderLayer, layer) for layer in module.layers.layers]
        return [Hidden([*layer.linear1.parameters()], [], layer.linear2.weight) for layer in layers]
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    if blocks:
        return [Hidden([*b.norm1.parameters()], [b.conv1.weight, *b.norm1.buffers()], b.conv2.weight) for b in blocks]
    chain = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return [Hidden([*a.parameters()], [], b.weight) for a, b in pairwise(chain)]


def rescale_layers(module: nn.Module, generator: torch.Generator) -> None:
    """Multiply what leads into each hidden layer by one factor from 2 to 5, and divide what leads out of it."""
    for hidden in hidden_layers(module):
        hidden.multiply((2 + 3 * torch.rand(1, generator=generator)).expand(hidden.num_units))


def rescale_units(module: nn.Module, generator: torch.Generator) -> None:
    """Multiply what leads into each hidden unit by a factor of its own from 0.2 to 5, and divide what leads out."""
    for hidden in hidden_layers(module):
        hidden.multiply(5 ** (2 * torch.rand(hidden.num_units, generator=generator) - 1))


def reorder_units(module: nn.Module, generator: torch.Generator) -> None:
    """Shuffle the units of each hidden layer."""
    for hidden in hidden_layers(module):
        order = torch.randperm(hidden.num_units, generator=generator)
        for tensor in (*hidden.into, *hidden.beside, hidden.columns.transpose(0, 1)):
            if tensor.dim():  # not the number of batches that BatchNorm has seen
                tensor.copy_(tensor[order])


def rescale_filters(module: nn.Module, generator: torch.Generator) -> None:
    """Multiply each filter in front of a BatchNorm by a factor from 0.5 to 2, which that divides out."""
    for block in module.modules():
        for layer in (block.conv1, block.conv2) if isinstance(block, Block) else ():
            layer.weight.mul_(2 ** (2 * torch.rand(len(layer.weight), 1, 1, 1, generator=generator) - 1))


def change_bases(module: nn.Module, generator: torch.Generator) -> None:
    """Give every head other coordinates of its queries and keys, and of its values and output projection."""
    seed = int(torch.randint(2**31, (), generator=generator))
    changed = with_other_bases(cast(Transformer, module), condition=10.0, seed=seed)
    module.load_state_dict(changed.state_dict())


CHANGES: dict[str, tuple[Callable[[nn.Module, torch.Generator], None], tuple[str, ...]]] = {
    "layers": (rescale_layers, ("mlp", "cnn", "resnet", "transformer")),
    "units": (rescale_units, ("mlp", "cnn", "resnet", "transformer")),
    "order": (reorder_units, ("mlp", "cnn", "resnet", "transformer")),
    "filters": (rescale_filters, ("resnet",)),
    "heads": (change_bases, ("transformer",)),
}
"""By a name: what is changed, and in which kinds of networks there is such a thing."""


@torch.no_grad()
def changed(module: nn.Module, change: str, seed: int = 0) -> nn.Module:
    """Return a copy with other weights that computes the same.

    Args:
        module: A network of ``four_kinds``.
        change: A name out of ``CHANGES``.
        seed: Of the random factors and orders.

    Returns:
        The copy.
    """
    copied = copy.deepcopy(module)
    CHANGES[change][0](copied, torch.Generator().manual_seed(seed))
    return copied
