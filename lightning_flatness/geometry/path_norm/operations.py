"""Operations of positively homogeneous networks, on the squares of everything.

A path multiplies the weights of its edges. In the network of squared weights on an input of ones every operation adds
up the squared products of the paths that lead to a unit. Sums stay sums; the maximum over units lets all their paths
pass; a mean has the weight 1/n on every edge, a normalisation with fixed statistics the weight gamma/sigma.

Each function takes tensors that hold squares already (of weights, of constants) or sums over paths (units); numbers
come as they are in the user's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Rule = Literal["first", "all", "product"]
"""Which operands may be units: the first one, all of them (sums, maxima), or one that all others multiply."""


def _square(value: Any) -> Any:
    return value if isinstance(value, Tensor) else value**2


def _identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _add(x: Any, other: Any, *, alpha: float = 1) -> Any:
    return _square(x) + alpha**2 * _square(other)


def _mul(x: Any, other: Any) -> Any:
    return _square(x) * _square(other)


def _div(x: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise NotImplementedError
    return _square(x) / _square(other)


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if max is not None or isinstance(min, Tensor) or min != 0:
        raise NotImplementedError
    return x


def _threshold(x: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:  # noqa: ARG001
    if (threshold, value) != (0, 0):
        raise NotImplementedError
    return x


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    if mode == "constant" and value:
        raise NotImplementedError
    return F.pad(x, list(pad), mode)


def _interpolate(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any
) -> Tensor:
    if mode not in ("nearest", "nearest-exact"):
        raise NotImplementedError
    resized: Tensor = F.interpolate(x, size, scale_factor, mode)
    return resized


def _embedding(index: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return weight.sum(dim=0).expand(*index.shape, -1)  # an input of ones: all tokens at once


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    x = x / (variance.to(x) + eps).view(shape)
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


# ------------------------------------------------------------------------------------------------------- reductions


def _dims(x: Tensor, dim: Any) -> list[int]:
    dims = [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))]
    if 0 in dims:  # a mean over the batch is no part of a network
        raise NotImplementedError
    return dims


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return x.sum(_dims(x, dim), keepdim)


def _max(x: Tensor, dim: Any = None, keepdim: bool = False) -> tuple[Tensor]:
    """Return the values of a maximum with indices."""
    if not isinstance(dim, int):
        raise NotImplementedError
    return (_sum(x, dim, keepdim),)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _sum(x, dim, keepdim) / math.prod(x.shape[d] for d in _dims(x, dim)) ** 2


# ---------------------------------------------------------------------------------------------------------- pooling


def _per_axis(value: Any, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value) * (n if len(value) == 1 else 1)


def _windows(x: Tensor, n: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor:
    """Return the sums over the windows of a pooling operation with ``n`` axes of positions."""
    kernel, padding, dilation = (_per_axis(value, n) for value in (kernel, padding, dilation))
    stride = _per_axis(stride, n) if stride is not None and stride != [] else kernel
    shape, sizes = x.shape[-n:], []
    for size, k, s, p, d in zip(shape, kernel, stride, padding, dilation, strict=True):
        reach = size + 2 * p - d * (k - 1) - 1
        out = (-(-reach // s) if ceil_mode else reach // s) + 1
        if ceil_mode and (out - 1) * s >= size + p:  # a window that would start behind the padding
            out -= 1
        sizes.append(out)
    ends = [(o - 1) * s + d * (k - 1) + 1 for o, s, k, d in zip(sizes, stride, kernel, dilation, strict=True)]
    pads = [side for size, p, end in zip(shape, padding, ends, strict=True) for side in (p, max(0, end - size - p))]
    flat = F.pad(x.reshape(-1, 1, *shape), [p for i in reversed(range(n)) for p in pads[2 * i : 2 * i + 2]])
    for axis, end in zip(range(-n, 0), ends, strict=True):
        flat = flat.narrow(axis, 0, end)
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    sums: Tensor = convolution(flat, x.new_ones(1, 1, *kernel), stride=stride, dilation=dilation)
    return sums.reshape(*x.shape[:-n], *sizes)


def _max_pool(n: int) -> Callable[..., Tensor]:
    def pool(
        x: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if return_indices:
            raise NotImplementedError
        return _windows(x, n, kernel_size, stride, padding, dilation, ceil_mode)

    return pool


def _avg_pool(n: int) -> Callable[..., Tensor]:
    native: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]

    def pool(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any, **options: Any) -> Tensor:
        ceil_mode = bool(options.get("ceil_mode", rest[0] if rest else False))
        ones = x.new_ones(1, 1, *x.shape[-n:])
        count = _windows(ones, n, kernel_size, stride, padding, 1, ceil_mode)
        weight: Tensor = (
            native(ones, kernel_size, stride, padding, *rest, **options) / count
        )  # the inverse of the divisor
        sums = _windows(x, n, kernel_size, stride, padding, 1, ceil_mode)
        return sums * weight.square().view(count.shape[-n:])

    return pool


def _adaptive(n: int, *, mean: bool) -> Callable[..., Tensor]:
    def pool(x: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        if return_indices:
            raise NotImplementedError
        for axis, size in zip(range(-n, 0), _per_axis(output_size, n), strict=True):
            length = x.shape[axis]
            parts = [
                x.narrow(axis, start, stop - start).sum(axis, keepdim=True) / ((stop - start) ** 2 if mean else 1)
                for start, stop in _bins(length, length if size is None else size)
            ]
            x = torch.cat(parts, axis)
        return x

    return pool


def _bins(length: int, size: int) -> Iterator[tuple[int, int]]:
    for i in range(size):
        yield i * length // size, -(-(i + 1) * length // size)


# ------------------------------------------------------------------------------------------------------------ table

_UNCHANGED = (
    "relu leaky_relu prelu rrelu abs dropout dropout1d dropout2d dropout3d feature_dropout neg positive clone "
    "contiguous detach to float double half bfloat16 type_as cpu cuda data alias requires_grad_"
)
"""Units pass as they are: an activation has slope one on the paths of positive numbers."""

SHAPES = (
    "view reshape flatten unflatten squeeze unsqueeze transpose permute swapaxes swapdims movedim moveaxis t T mT "
    "expand expand_as repeat repeat_interleave tile getitem narrow select index_select chunk split unbind "
    "tensor_split flip roll pixel_shuffle pixel_unshuffle channel_shuffle view_as reshape_as unfold diagonal"
)
"""Entries change places. The same functions serve units and weights."""

CONSTANTS = "ones_like zeros_like full_like empty_like rand_like randn_like new_ones new_zeros new_full new_empty"
"""New tensors that take no more than shape and device from a unit."""

_JOINED = "cat concat concatenate stack hstack vstack dstack"


def _place(name: str) -> Callable[..., Any]:
    if name == "getitem":
        return lambda x, index: x[index]
    if name in ("T", "mT"):
        return lambda x: getattr(x, name)
    function: Callable[..., Any] = getattr(Tensor, name, None) or getattr(F, name)
    return function


OPERATIONS: dict[str, tuple[Callable[..., Any], Rule]] = {
    **dict.fromkeys(_UNCHANGED.split(), (_identity, "first")),
    **{name: (_place(name), "first") for name in SHAPES.split()},
    **{name: (getattr(torch, name), "all") for name in _JOINED.split()},
    **{f"conv{n}d": (getattr(F, f"conv{n}d"), "product") for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (getattr(F, f"conv_transpose{n}d"), "product") for n in (1, 2, 3)},
    **{f"max_pool{n}d": (_max_pool(n), "first") for n in (1, 2, 3)},
    **{f"avg_pool{n}d": (_avg_pool(n), "first") for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": (_adaptive(n, mean=True), "first") for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": (_adaptive(n, mean=False), "first") for n in (1, 2, 3)},
    **dict.fromkeys(("add", "iadd", "radd", "sub", "isub", "rsub", "subtract"), (_add, "all")),
    **dict.fromkeys(("maximum", "minimum"), (_add, "all")),
    **dict.fromkeys(("mul", "imul", "rmul", "multiply"), (_mul, "product")),
    **dict.fromkeys(("div", "divide", "truediv", "itruediv"), (_div, "first")),
    **{name: (getattr(torch, name), "product") for name in ("matmul", "mm", "bmm", "einsum", "addmm", "mv")},
    "rmatmul": (lambda x, other: other @ x, "product"),
    "linear": (F.linear, "product"),
    "bilinear": (F.bilinear, "product"),
    "embedding": (_embedding, "product"),
    "batch_norm": (_batch_norm, "product"),
    "clamp": (_clamp, "first"),
    "clamp_min": (_clamp, "first"),
    "threshold": (_threshold, "first"),
    "pad": (_pad, "first"),
    "interpolate": (_interpolate, "first"),
    "sum": (_sum, "first"),
    "mean": (_mean, "first"),
    "amax": (_sum, "first"),
    "amin": (_sum, "first"),
    "max": (_max, "first"),
    "min": (_max, "first"),
}
"""Functions by name, with the operands that may be units. ``NotImplementedError``: not with these arguments."""
