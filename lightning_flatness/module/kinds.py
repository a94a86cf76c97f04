"""Kinds of Python state: how the contents of a container, a tensor or a generator are copied and put back in place.

Contents are exchanged, not cleared and filled: an interruption between two lines never leaves a container empty, and
putting back twice does the same as once.
"""

from __future__ import annotations

import io
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache
from operator import is_
from types import MemberDescriptorType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_NUM_CLASSES = 1024
"""Classes of which is remembered what they are: a second pass asks for each object in reach."""


class Kind(NamedTuple):
    """What can be done with the contents of one kind of object."""

    copy: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    """Say whether the contents are those of a copy. False where a comparison would cost as much as putting back."""
    refill: Callable[[Any, Any], object]


def _dictionary(base: Any) -> Kind:
    """Return the kind of the dictionaries of a class; its own methods, for a subclass may refuse ``update``."""

    def copy(target: Any) -> dict[Any, Any]:
        return dict(zip(base.keys(target), base.values(target), strict=True))

    def same(target: Any, saved: dict[Any, Any]) -> bool:
        return (
            len(saved) == base.__len__(target)
            and all(map(is_, base.values(target), saved.values()))
            and all(map(is_, base.keys(target), saved))
        )

    def refill(target: Any, saved: dict[Any, Any]) -> None:
        for key in [key for key in base.keys(target) if key not in saved]:
            base.__delitem__(target, key)
        for key, value in saved.items():
            if base.get(target, key, saved) is not value:
                base.__setitem__(target, key, value)
        if not all(map(is_, base.keys(target), saved)):  # the order has changed
            for key, value in saved.items():
                base.__delitem__(target, key), base.__setitem__(target, key, value)

    return Kind(copy, same, refill)


def _sequence(base: Any) -> Kind:
    """Return the kind of the sequences of a class."""

    def same(target: Any, saved: list[Any]) -> bool:
        return base.__len__(target) == len(saved) and all(map(is_, base.__iter__(target), saved))

    def refill(target: Any, saved: list[Any]) -> None:
        if base is list:
            list.__setitem__(target, slice(None), saved)
        else:
            base.clear(target), base.extend(target, saved)

    return Kind(lambda target: list(base.__iter__(target)), same, refill)


def _refill_set(target: Any, saved: set[Any]) -> None:
    set.intersection_update(target, saved)
    set.update(target, saved)


@lru_cache(_NUM_CLASSES)
def _slots_of(cls: type) -> list[Any]:
    """Return the descriptors of the slots of a class."""
    members = [m for c in cls.__mro__ for m in vars(c).values() if isinstance(m, MemberDescriptorType)]
    return [m for m in members if m.__name__ not in ("__dict__", "__weakref__")]


def slots_in(value: Any) -> dict[Any, Any]:
    """Return the values of the slots of an object that are set, by descriptor."""
    cls: Any = type(value)
    found = {}
    for member in _slots_of(cls):
        try:
            found[member] = member.__get__(value)
        except AttributeError:
            continue
    return found


def _refill_slots(target: Any, saved: dict[Any, Any]) -> None:
    for member in slots_in(target):
        if member not in saved:
            member.__delete__(target)
    for member, value in saved.items():
        member.__set__(target, value)


def _store(copy: Callable[[Any], Any], refill: Callable[[Any, Any], object]) -> Kind:
    return Kind(copy, lambda target, saved: False, refill)


def _same_tensor(target: Tensor, saved: Tensor) -> bool:
    """Compare bit by bit; only on the host, for elsewhere the answer would have to be waited for."""
    if type(target) is not Tensor or target.device.type != "cpu" or target.layout != torch.strided:
        return False
    if target.shape != saved.shape or target.dtype != saved.dtype or target.dtype not in _BITS:
        return False
    if _is_freed(target) or _is_freed(saved):
        return True
    return torch.equal(target.view(_BITS[target.dtype]), saved.view(_BITS[target.dtype]))


_BITS = {torch.bool: torch.uint8, torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
_BITS |= {torch.float16: torch.int16} | {kind: kind for kind in (torch.uint8, torch.int32, torch.int64)}


def _is_freed(tensor: Tensor) -> bool:
    """Whether the memory of a tensor has been given back, as FSDP2 does with gathered weights."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _copy_tensor(target: Tensor) -> Tensor:
    return target.detach() if _is_freed(target) else target.detach().clone()


def _refill_tensor(target: Tensor, saved: Tensor) -> None:
    if _is_freed(target) or _is_freed(saved):
        return
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        if target.layout == torch.strided and target.shape == saved.shape:
            target.detach().copy_(saved)
        else:
            target.data = saved.clone()


_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""What ``register_hook`` and ``register_post_accumulate_grad_hook`` write to. There is no public way to list the hooks
of a tensor. (A test fails if these attributes move.)"""


def _copy_marks(parameter: Any) -> tuple[bool, list[dict[Any, Any]]]:
    return parameter.requires_grad, [dict(getattr(parameter, name) or {}) for name in _HOOKS]


def _refill_marks(parameter: Any, saved: tuple[bool, list[dict[Any, Any]]]) -> None:
    parameter.requires_grad_(saved[0])
    for name, hooks in zip(_HOOKS, saved[1], strict=True):
        if getattr(parameter, name) is not None:
            ORDERED.refill(getattr(parameter, name), hooks)


def script_attributes(module: Any) -> dict[str, Any]:
    """Return the attributes of a TorchScript module, buffers included. There is no public list of their names."""
    kinds = module._concrete_type.get_attributes()
    values = {name: getattr(module, name) for name, (_, is_parameter) in kinds.items() if not is_parameter}
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in values.items()}


def set_script_attributes(module: Any, saved: dict[str, Any]) -> None:
    """Give a TorchScript module attributes; buffers stay the same tensors."""
    buffers = dict(module.named_buffers(recurse=False))
    for name, value in saved.items():
        if name in buffers:
            _refill_tensor(buffers[name], value)
        else:
            setattr(module, name, value)


def _refill_buffer(target: Any, saved: Any) -> None:
    target[:] = saved


def _refill_array(target: Any, saved: Any) -> None:
    np.copyto(target, saved)


DICT, ORDERED = _dictionary(dict), _dictionary(OrderedDict)
LIST, DEQUE = _sequence(list), _sequence(deque)
SET = Kind(set, lambda target, saved: set.__eq__(target, saved) is True, _refill_set)
SLOTS = Kind(slots_in, lambda target, saved: False, _refill_slots)
TENSOR = Kind(_copy_tensor, _same_tensor, _refill_tensor)
SCRIPT = _store(script_attributes, set_script_attributes)
ARRAY = _store(np.array, _refill_array)
MARKS = Kind(_copy_marks, lambda parameter, saved: _copy_marks(parameter) == saved, _refill_marks)
"""Of a parameter: whether it is trained, and its hooks."""
BYTES = _store(lambda target: target[:], _refill_buffer)

_GENERATORS: dict[type, Kind] = {
    torch.Generator: _store(torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: _store(lambda g: g.bit_generator.state, lambda g, s: setattr(g.bit_generator, "state", s)),
    np.random.BitGenerator: _store(lambda g: g.state, lambda g, s: setattr(g, "state", s)),
    np.random.RandomState: _store(lambda g: g.get_state(legacy=False), lambda g, s: g.set_state(s)),
    random.Random: _store(random.Random.getstate, random.Random.setstate),
}

_FILES: dict[type, Kind] = {
    kind: _store(lambda f: f.__getstate__(), lambda f, s: f.__setstate__(s)) for kind in (io.StringIO, io.BytesIO)
}

_CONTAINERS: tuple[tuple[type, Kind], ...] = (
    (OrderedDict, ORDERED),
    (dict, DICT),
    (list, LIST),
    (deque, DEQUE),
    (set, SET),
)


@lru_cache(_NUM_CLASSES)
def _container_kind_of(cls: type) -> Kind | None:
    return next((kind for base, kind in _CONTAINERS if issubclass(cls, base)), None)


def container_kind(value: Any) -> Kind | None:
    """Return the kind of a container whose contents are compared by identity."""
    cls: Any = type(value)
    return _container_kind_of(cls)


def store_kind(value: Any) -> Kind | None:
    """Return the kind of an object that holds numbers: an array, a generator, a file in memory."""
    if isinstance(value, np.ndarray):
        return ARRAY if value.flags.writeable else None
    if isinstance(value, array | bytearray):
        return BYTES
    cls: Any = type(value)
    return _store_kind_of(cls)


@lru_cache(_NUM_CLASSES)
def _store_kind_of(cls: type) -> Kind | None:
    return next((kind for base, kind in (_GENERATORS | _FILES).items() if issubclass(cls, base)), None)
