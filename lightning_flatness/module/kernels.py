"""Kernels that have second derivatives, in full precision and without compilation."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_flatness.module.batches import map_tensors, tensors_in


@contextmanager
def twice_differentiable(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Choose kernels that have second derivatives, in full precision and without compilation."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            # Not cudnn.flags(enabled=False), which sets the other flags, too, and warns of them on some machines.
            _set(stack, torch.backends.cudnn, "enabled", False)
            _set(stack, torch.backends.mkldnn, "enabled", False)
        for owner, name, value in _full_precision():
            _set(stack, owner, name, value)
        _set(stack, torch.utils.checkpoint, "CheckpointFunction", _NotReentrant)
        stack.enter_context(_eager())
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, to be put back by the stack: without a line of ours that a signal could interrupt."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _full_precision() -> list[tuple[Any, str, Any]]:
    """Return the settings that keep multiplications from TF32; old and new ones of torch must not be mixed."""
    if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9
        owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(owner, "allow_tf32", False) for owner in (torch.backends.cuda.matmul, torch.backends.cudnn)]


class LossFunctions(TorchFunctionMode):
    """Runs a loss without hooks on the gradients of training, and with operands of one dtype where autocast made it so.

    Args:
        mixes_precisions: Whether training runs under autocast, which makes operands of different dtypes alike. A
            measurement takes the most precise one.
    """

    def __init__(self, mixes_precisions: bool) -> None:
        super().__init__()
        self._mixes_precisions = mixes_precisions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _REGISTER_HOOK:
            return RemovableHandle(OrderedDict())
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            dtypes = {t.dtype for t in tensors_in([args, kwargs or {}]) if t.is_floating_point()}
            if not self._mixes_precisions or len(dtypes) < 2:
                raise
            widest = reduce(torch.promote_types, dtypes)
        args, kwargs = map_tensors(lambda t: t.to(widest) if t.is_floating_point() else t, (args, kwargs or {}), _same)
        return func(*args, **kwargs)


_REGISTER_HOOK = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)


def _same(value: Any) -> Any:
    return value


class _NotReentrant:
    """Stands for the class behind ``checkpoint(use_reentrant=True)``, and runs its function as it is.

    The backward of that class refuses ``torch.autograd.grad``, and gives parameters no gradient where no input has one.
    """

    @staticmethod
    def apply(function: Any, _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


class DifferentiableWeightNorm(TorchFunctionMode):
    """Computes ``torch._weight_norm`` from elementary operators: the second derivative of the fused one is wrong.

    (torch 2.13 takes the norm for a constant there. A test fails when that is mended or the name moves.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


def _eager() -> AbstractContextManager[Any]:
    # Where nothing has imported dynamo nothing is compiled, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
