"""Operators without a second derivative, in a network that has a twin with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helpers.problems import make_problem


class OnceDifferentiable(torch.autograd.Function):
    """tanh, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class OnceNet(nn.Module):
    function: type[torch.autograd.Function] = OnceDifferentiable

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function.apply(self.first(x)))


class TwiceDifferentiable(OnceDifferentiable):
    """The same, with a backward made of differentiable operators."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class SilentlyOnce(OnceDifferentiable):
    """The same, with a backward that autograd cannot see through, and no mark that says so."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(gradient.detach().numpy() * (1 - x.detach().tanh().numpy() ** 2))


def once_differentiable_twin() -> tuple[nn.Module, Any]:
    problem = make_problem("tanh_mlp")
    module = OnceNet().double()
    module.load_state_dict(dict(zip(module.state_dict(), problem.module.state_dict().values(), strict=True)))
    return module, problem
