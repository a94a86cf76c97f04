"""Test problems: a module, a loss and batches each, small enough for a dense Hessian in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness.module.modes import Mode


@dataclass
class Problem:
    """A landscape in the making, with the dense Hessian of an independent implementation."""

    module: nn.Module
    batches: list[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    mode: Mode = "eval"

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def mean_loss(self, flat: Tensor) -> Tensor:
        """The mean loss over all samples as a function of the flat weights, by ``torch.func``."""
        self.module.train(self.mode == "train")
        names = [name for name, p in self.module.named_parameters() if p.requires_grad]
        pieces = torch.split(flat, [p.numel() for p in self.parameters])
        weights = {n: piece.view_as(p) for n, piece, p in zip(names, pieces, self.parameters, strict=True)}
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        sizes = [len(_first_tensor(batch)) for batch in self.batches]
        loss: Any = 0.0
        for batch, size in zip(self.batches, sizes, strict=True):
            holder = _Holder(self.module, self.loss_fn)
            state = {f"module.{n}": t for n, t in (weights | buffers).items()}
            loss = loss + size * torch.func.functional_call(holder, state, (batch,))
        return loss / sum(sizes)

    def dense_hessian(self) -> Tensor:
        """The Hessian at the current weights, shape (num_parameters, num_parameters).

        Not ``torch.func.hessian``: its forward mode is wrong for BatchNorm in training mode (torch 2.13 returns an
        asymmetric matrix there).
        """
        self.module.train(self.mode == "train")
        flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        hessian = torch.func.jacrev(torch.func.grad(self.mean_loss))(flat)
        self.module.eval()
        return hessian

    def scale(self, geometry: str) -> Tensor:
        """The diagonal of S in the chart w0 + S z, written down anew from the table in the paper trail."""
        parts = []
        for p in self.parameters:
            w = p.detach()
            if geometry == "euclidean":
                s = torch.ones_like(w)
            elif geometry == "layer":
                s = torch.full_like(w, float(w.pow(2).sum().sqrt()))
            elif geometry == "element" or w.dim() < 2:
                s = w.abs()
            else:
                s = torch.stack([torch.full_like(row, float(row.pow(2).sum().sqrt())) for row in w])
            parts.append(s.reshape(-1))
        return torch.cat(parts)


class _Holder(nn.Module):
    def __init__(self, module: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.module, batch)


def _first_tensor(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    return _first_tensor(next(iter(batch.values()))) if isinstance(batch, dict) else _first_tensor(batch[0])


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x), y)


def squared_error(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(module(x), y)


def classification(sizes: tuple[int, ...], shape: tuple[int, ...], num_classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, *shape), torch.randint(num_classes, (n,))) for n in sizes]


def linear_regression() -> Problem:
    """Two outputs, so that every eigenvalue is there twice."""
    batches = [(torch.randn(n, 4), torch.randn(n, 2)) for n in (8, 5)]
    return Problem(nn.Linear(4, 2), batches, squared_error)


def logistic_regression() -> Problem:
    return Problem(nn.Linear(5, 3), classification((9, 4), (5,)), cross_entropy)


def tanh_mlp() -> Problem:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return Problem(module, classification((8, 8, 3), (4,)), cross_entropy)


def relu_convnet() -> Problem:
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return Problem(module, classification((7, 4), (1, 6, 6)), cross_entropy)


def _batchnorm_net() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        module[1].running_mean.normal_()
        module[1].running_var.uniform_(0.5, 2)
        module[1].weight.normal_()
    return module


def batchnorm_eval() -> Problem:
    return Problem(_batchnorm_net(), classification((8, 5), (4,)), cross_entropy)


def batchnorm_train() -> Problem:
    return Problem(_batchnorm_net(), classification((8, 5), (4,)), cross_entropy, mode="train")


def dropout() -> Problem:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    return Problem(module, classification((8, 5), (4,)), cross_entropy)


class _Tied(nn.Module):
    """An autoencoder whose two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5)
        self.decoder = nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


def tied_weights() -> Problem:
    batches = [torch.randn(n, 5) for n in (6, 3)]
    return Problem(_Tied(), batches, lambda module, x: F.mse_loss(module(x), x))


def frozen_parameters() -> Problem:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    module[0].weight.requires_grad_(False)
    return Problem(module, classification((8, 5), (4,)), cross_entropy)


def dict_batches() -> Problem:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [{"inputs": x, "meta": {"labels": y}} for x, y in classification((8, 3), (4,))]
    return Problem(module, batches, lambda m, b: F.cross_entropy(m(b["inputs"]), b["meta"]["labels"]))


def zero_bias() -> Problem:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for name in ("0.bias", "2.bias"):
        nn.init.zeros_(module.get_parameter(name))
    return Problem(module, classification((8, 5), (4,)), cross_entropy)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    f.__name__: f
    for f in (
        linear_regression,
        logistic_regression,
        tanh_mlp,
        relu_convnet,
        batchnorm_eval,
        batchnorm_train,
        dropout,
        tied_weights,
        frozen_parameters,
        dict_batches,
        zero_bias,
    )
}


def make_problem(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Build a problem of the table with all its tensors in ``dtype``."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return PROBLEMS[name]()
    finally:
        torch.set_default_dtype(previous)


def wanted(eigenvalues: Tensor, which: str, k: int) -> Tensor:
    """The k most wanted of all eigenvalues, the most wanted first."""
    key = {"LA": -eigenvalues, "SA": eigenvalues, "LM": -eigenvalues.abs()}[which]
    return eigenvalues[torch.argsort(key)][:k]


all_problems = pytest.mark.parametrize("name", list(PROBLEMS))
