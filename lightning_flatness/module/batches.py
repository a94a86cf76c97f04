"""Batches of any nesting: how many samples they hold, where their tensors are, and the first samples of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor


class Probe(list[Any]):
    """Batches of samples that were drawn from a larger set.

    Args:
        batches: The samples.
        num_total: Number of samples of the whole set; None if it is not known.
    """

    def __init__(self, batches: Iterable[Any], num_total: int | None) -> None:
        super().__init__(batches)
        self.num_total = num_total


def infer_batch_size(batch: Any) -> int:
    """Return the number of samples of a batch: the length of the first axis of the first tensor in it.

    An object with an integer attribute ``batch_size`` or ``num_graphs`` is asked for it.

    Raises:
        ValueError: If there is no tensor with at least one axis.

    Example:
        >>> infer_batch_size({"x": torch.zeros(3, 8), "y": torch.zeros(3)})
        3
    """
    for attribute in ("batch_size", "num_graphs"):
        size = getattr(batch, attribute, None)
        if isinstance(size, int):
            return size
    for tensor in tensors_in(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ValueError(
        f"Expected a batch with a tensor whose first axis counts the samples, got {type(batch).__name__} without "
        "one. Pass batch_size_fn=lambda batch: ... to say how many samples a batch has."
    )


def prepare_batch(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on ``device`` and fit for autograd.

    Tensors made under ``torch.inference_mode`` cannot be saved for a backward pass; those are copied.
    """

    def prepare(tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return (tensor.clone() if tensor.is_inference() else tensor).to(device)

    return map_tensors(prepare, batch)


def first_samples(batch: Any, num_samples: int) -> Any:
    """Return the first samples of a batch; what has not one entry per sample is kept whole."""
    return slice_samples(batch, infer_batch_size(batch), 0, num_samples)


def slice_samples(batch: Any, size: int, start: int, stop: int) -> Any:
    """Return the samples ``start`` to ``stop`` of a batch of ``size``; what has not one entry per sample is kept whole.

    Raises:
        ValueError: If no tensor has one entry per sample.
    """
    if start <= 0 and stop >= size:
        return batch
    if not any(tensor.dim() > 0 and tensor.shape[0] == size for tensor in tensors_in(batch)):
        raise ValueError(
            f"Expected a batch of {size} samples that can be split, got {type(batch).__name__} without a tensor whose "
            "first axis counts them. Pass batches of the size that the measure needs."
        )
    return map_tensors(lambda t: t[start:stop] if t.dim() > 0 and t.shape[0] == size else t, batch)


def join_samples(batches: Sequence[Any], sizes: Sequence[int]) -> Any | None:
    """Return the samples of several batches in one; what has not one entry per sample is that of the first.

    Args:
        batches: Of one kind.
        sizes: Number of samples of each.

    Returns:
        A batch; None if their tensors do not fit together.
    """
    joined = []
    for leaves in zip_longest(*map(tensors_in, batches)):
        if len({None if leaf is None else (leaf.dtype, leaf.shape[1:]) for leaf in leaves}) > 1:
            return None
        has_entries = all(leaf.dim() > 0 and leaf.shape[0] == size for leaf, size in zip(leaves, sizes, strict=True))
        joined.append(torch.cat(leaves) if has_entries else leaves[0])
    pieces = iter(joined)
    return map_tensors(lambda _: next(pieces), batches[0])


def copy_batch(batch: Any) -> Any:
    """Return a batch that can be written to and taken apart without changing the original.

    Objects of unknown classes are copied one level deep if they have a ``to`` method (graphs, the encodings of
    tokenizers), and shared otherwise.
    """

    def copied(tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):
            copied = tensor.detach().clone()
        return copied.requires_grad_() if tensor.requires_grad else copied

    return map_tensors(copied, batch, copy.copy)


def map_tensors(function: Callable[[Tensor], Tensor], data: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """Return nested lists, tuples, mappings and dataclasses with a function applied to every tensor.

    An object with a ``to`` method and no nesting that is known here (a packed sequence, a graph) is moved to where a
    tensor would go, or given to ``other``.
    """
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):  # a named tuple
        return type(data)(*(map_tensors(function, item, other) for item in data))
    if isinstance(data, list | tuple):
        return type(data)(map_tensors(function, item, other) for item in data)
    if isinstance(data, MutableMapping):
        return _like_mapping(data, {key: map_tensors(function, item, other) for key, item in data.items()})
    if is_dataclass(data) and not isinstance(data, type):
        changes = {f.name: map_tensors(function, getattr(data, f.name), other) for f in fields(data) if f.init}
        return replace(data, **changes)
    if callable(getattr(data, "to", None)):
        return data.to(function(torch.empty(0)).device) if other is None else other(data)
    return data


def _like_mapping(original: Any, items: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return items
    copied = copy.copy(original)
    copied.update(items)
    return copied


def tensors_in(data: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, mappings and dataclasses, in the order of :func:`map_tensors`."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for item in data.values():
            yield from tensors_in(item)
    elif isinstance(data, list | tuple):
        for item in data:
            yield from tensors_in(item)
    elif is_dataclass(data):
        for field in fields(data):
            yield from tensors_in(getattr(data, field.name))
