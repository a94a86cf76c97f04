"""The state of a module that is neither parameter nor gradient: attributes and all that they reach, at one moment."""

from __future__ import annotations

import queue
import sys
from bisect import bisect_right
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy, deepcopy
from functools import lru_cache, partial
from itertools import accumulate, chain, compress, count, cycle
from operator import is_not
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_flatness.module.kinds import (
    DEQUE,
    DICT,
    LIST,
    ORDERED,
    SCRIPT,
    SET,
    SLOTS,
    TENSOR,
    Kind,
    container_kind,
    slots_in,
    store_kind,
)

_MAX_BYTES = 64 * 2**20
"""Tensors and arrays in plain attributes are copied up to this size; larger ones are taken to be data."""

_MAX_DATA_BYTES, _MAX_DATA_ENTRIES = 2**16, 1000
"""The same below data sets, data modules and callbacks, for tensors and for containers."""

_FOREIGN_PACKAGES = {
    "lightning",
    "lightning_fabric",
    "lightning_flatness",
    "numpy",
    "pytorch_lightning",
    "rich",
    "tensorboard",
    "torch",
    "tqdm",
}
"""Objects of classes from these packages (and the standard library) are not the user's state."""

_SEARCHED = (ExitStack, SimpleNamespace, UserDict, UserList, Optimizer, LRScheduler, DataLoader, Sampler, Dataset)
"""Except for these classes."""

_ATOMS = {type(None), bool, str, bytes, int, float, complex, type, FunctionType, BuiltinFunctionType}
_ATOMS |= {torch.dtype, torch.device, torch.Size, nn.Parameter}
"""Types of values that hold nothing to put back. Parameters are the business of the caller."""

_CHUNK = 512
"""How many containers are compared at once."""

Entry = tuple[Any, Any, Kind]
"""An object, a copy of its contents, and its kind."""


class _Contents:
    """The contents of many containers of one class, side by side.

    A module can hold tens of thousands of containers. As many copies would take their time, in which Python's garbage
    collector would look at them again and again.

    Args:
        kind: The kind of the containers.
        views: What to remember of each: its items, or its keys and its values.
        make: Makes the copy of one container from that.
    """

    def __init__(self, kind: Kind, views: Sequence[Callable[[Any], Iterable[Any]]], make: Callable[..., Any]) -> None:
        self._kind, self._views, self._make = kind, views, make
        self._holders: list[Any] = []
        self._starts = [0]
        self._items: list[list[Any]] = [[] for _ in views]

    def add(self, holders: list[Any]) -> list[Any]:
        """Remember the contents of some containers; return what they hold."""
        start = self._starts.pop()
        self._holders += holders
        self._starts += accumulate(map(len, holders), initial=start)
        for view, items in zip(self._views, self._items, strict=True):
            items += chain.from_iterable(map(view, holders))
        held = self._items[-1][start:]
        if not _ITERATORS.keys().isdisjoint(map(type, held)):
            self._items[-1][start:] = map(_started, held)
        return held

    def changed(self) -> Iterator[Entry]:
        """Return the containers whose contents are others now."""
        for low in range(0, len(self._holders), _CHUNK):
            yield from self._changed_within(low, min(low + _CHUNK, len(self._holders)))

    def _changed_within(self, low: int, high: int) -> Iterator[Entry]:
        holders, starts = self._holders[low:high], self._starts[low : high + 1]
        sizes = list(map(len, holders))
        changed = set()
        if list(accumulate(sizes, initial=starts[0])) != starts:  # item by item only where there are as many
            changed = {n for n, size in enumerate(sizes) if size != starts[n + 1] - starts[n]}
        same = [n for n in range(len(holders)) if n not in changed] if changed else range(len(holders))
        others = [holders[n] for n in same] if changed else holders
        ends = list(accumulate(map(len, others))) if changed else [end - starts[0] for end in starts[1:]]
        for view, items in zip(self._views, self._items, strict=True):
            saved: Iterable[Any] = items[starts[0] : starts[-1]]
            if changed:
                saved = chain.from_iterable(items[starts[n] : starts[n + 1]] for n in same)
            differing = compress(count(), map(is_not, chain.from_iterable(map(view, others)), saved))
            changed |= {same[bisect_right(ends, position)] for position in differing}
        for n in sorted(changed):
            contents = [items[starts[n] : starts[n + 1]] for items in self._items]
            yield holders[n], self._make(*contents), self._kind


def _pairs(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, values, strict=True))


class Snapshot:
    """The contents of all that can be reached from some objects, to be compared and put back in place.

    Containers, tensors (torchmetrics keep their states so), arrays, generators, optimizers, schedulers and objects of
    the user's own classes get their contents back and keep their identity. Parameters are never written to.

    Args:
        roots: What is searched.
        data: What is searched for small things only: data sets, callbacks.
        without: Objects that are left out.
    """

    def __init__(self, roots: Iterable[Any], data: Iterable[Any] = (), without: Iterable[Any] = ()) -> None:
        self.modules: list[nn.Module] = []
        self._contents = {
            dict: _Contents(DICT, (iter, dict.values), _pairs),
            OrderedDict: _Contents(ORDERED, (iter, OrderedDict.values), _pairs),
            list: _Contents(LIST, (iter,), list),
            deque: _Contents(DEQUE, (iter,), list),
            set: _Contents(SET, (iter,), set),
        }
        self._others: list[Entry] = []
        self._seen = {id(value) for value in without}
        self._data = list(data)
        self._search(list(roots), _MAX_BYTES, sys.maxsize)
        self._search(self._data, _MAX_DATA_BYTES, _MAX_DATA_ENTRIES)

    def changed(self) -> list[Entry]:
        """Return what no longer is as it was, and what may not be."""
        containers = chain.from_iterable(contents.changed() for contents in self._contents.values())
        return [*containers, *(entry for entry in self._others if not entry[2].same(entry[0], entry[1]))]

    def add(self, target: Any, kind: Kind) -> None:
        """Remember the contents of one more object."""
        self._others.append((target, kind.copy(target), kind))

    def _search(self, level: list[Any], max_bytes: int, max_entries: int) -> None:
        """Remember some objects, what they hold, what those hold, and so on."""
        while level:
            found = {id(value): value for value in level if type(value) not in _ATOMS}
            by_class: dict[type, list[Any]] = {}
            for key in [key for key in found if key not in self._seen]:
                by_class.setdefault(type(found[key]), []).append(found[key])
            self._seen.update(found)
            level = []
            for cls, values in by_class.items():
                if cls is tuple:
                    level += chain.from_iterable(values)
                elif cls in self._contents:
                    level += self._contents[cls].add([v for v in values if len(v) <= max_entries])
                else:
                    level += chain.from_iterable(self._keep(value, max_bytes, max_entries) for value in values)

    def _keep(self, value: Any, max_bytes: int, max_entries: int) -> Iterable[Any]:
        """Remember what ``value`` holds; return what is to be searched next."""
        cls: Any = type(value)
        if isinstance(value, nn.Module):
            return self._keep_module(value) if max_entries == sys.maxsize else ()
        if isinstance(value, Tensor):
            # A tensor with a history cannot be written to in place.
            if not value.requires_grad and (value.layout != torch.strided or value.nbytes <= max_bytes):
                self.add(value, TENSOR)
            return ()
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, MethodType):
            return (value.__self__,)
        if isinstance(value, partial):
            return (value.func, value.args, value.keywords)
        if (kind := container_kind(value)) is not None:
            if len(value) > max_entries:
                return ()
            self.add(value, kind)
            held = self._others[-1][1]
            return (*(held.values() if isinstance(held, dict) else held), *_attributes_of(value))
        if (kind := store_kind(value)) is not None:
            if getattr(value, "nbytes", 0) <= max_bytes:
                self.add(value, kind)
        elif isinstance(value, queue.Queue):
            self.add(vars(value), DICT)
            return (value.queue,)
        elif isinstance(value, Dataset) and max_entries == sys.maxsize:
            self._seen.discard(id(value))
            self._data.append(value)
        elif _is_searched(cls):
            if slots := slots_in(value):
                self.add(value, SLOTS)
            return (*_attributes_of(value), *slots.values())
        return ()

    def _keep_module(self, module: nn.Module) -> Iterable[Any]:
        self.modules.append(module)
        if isinstance(module, torch.jit.ScriptModule):  # whose dictionaries are of another kind
            self.add(module, SCRIPT)
            return module.children()
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in self._seen:
                self._seen.add(id(buffer))
                self.add(buffer, TENSOR)
        return (module.__dict__,)


_ITERATORS: dict[type, Callable[[Any], Any]] = {
    **{type(values): copy for values in (iter([]), iter(()), iter(range(1)), iter(range(2**64)), iter(""))},
    count: copy,
    **dict.fromkeys((cycle, enumerate, zip), deepcopy),  # a copy would share the iterators inside
}
"""Iterators cannot be set back: a snapshot holds a copy, which stands in for them in the second pass."""


def _started(value: Any) -> Any:
    """Return a copy of an iterator; anything else as it is."""
    try:
        return _ITERATORS[type(value)](value) if type(value) in _ITERATORS else value
    except TypeError:  # those of itertools cannot be copied from Python 3.14 on
        return value


def _attributes_of(value: Any) -> tuple[Any, ...]:
    return (vars(value),) if hasattr(value, "__dict__") else ()


@lru_cache(1024)
def _is_searched(cls: type) -> bool:
    package = cls.__module__.partition(".")[0]
    return issubclass(cls, _SEARCHED) or not (package in _FOREIGN_PACKAGES or package in sys.stdlib_module_names)


def exchange(snapshot: Snapshot, more: Sequence[Entry]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what puts everything back to a snapshot, and what undoes that and all that happens until then.

    Both can be called again if they were interrupted.

    Args:
        snapshot: What was remembered.
        more: More of the kind.
    """
    first = [*snapshot.changed(), *more]
    present = [(target, kind.copy(target), kind) for target, _, kind in first]
    known = {(id(target), kind) for target, _, kind in present}

    def back() -> None:
        _refill(first)

    def forth() -> None:
        _refill(present)
        _refill(entry for entry in snapshot.changed() if (id(entry[0]), entry[2]) not in known)

    return back, forth


def _refill(entries: Iterable[Entry]) -> None:
    for target, saved, kind in entries:
        kind.refill(target, saved)
