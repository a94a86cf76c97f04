"""Copies of Python's own objects: containers, closures, iterators, generators of random numbers, queues."""

from __future__ import annotations

import copy
import functools
import queue
import threading
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_flatness.module.copying import ATOMS, EXACT, MAKERS, MAX_COPIED_BYTES, Copier

MAX_COPIED_ITEMS = 10_000
"""Longer lists and dictionaries of a dataset are shared with the run."""

# ----------------------------------------------------------------------------------------------- containers


def _dict(copier: Copier, value: dict[Any, Any]) -> Any:
    if copier.in_dataset and len(value) > MAX_COPIED_ITEMS:
        return value
    made: Any = defaultdict(copier.copy(value.default_factory)) if isinstance(value, defaultdict) else type(value)()
    copier.memo[id(value)] = made
    copier.attributes(value, made)
    return _with_copied_keys(copier, made) if any(id(key) in copier.memo for key in value) else made


def _with_copied_keys(copier: Copier, made: Any) -> Any:
    items = list(made.items())
    made.clear()
    made.update((copier.memo.get(id(key), key), item) for key, item in items)
    return made


def _list(copier: Copier, value: Any) -> Any:
    if copier.in_dataset and len(value) > MAX_COPIED_ITEMS:
        return value
    made: Any = type(value)(maxlen=value.maxlen) if isinstance(value, deque) else []
    copier.memo[id(value)] = made
    made.extend([item if type(item) in ATOMS else copier.copy(item) for item in value])
    return made


def _tuple(copier: Copier, value: tuple[Any, ...]) -> Any:
    items = [copier.copy(item) for item in value]
    if id(value) in copier.memo:  # a tuple that contains itself
        return copier.memo[id(value)]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return tuple(items) if type(value) is tuple else tuple.__new__(type(value), items)


def _set(copier: Copier, value: Any) -> Any:
    return type(value)(copier.copy(item) for item in value)


def _weak_dict(copier: Copier, value: Any) -> Any:
    made = type(value)()
    for key, item in list(value.items()):
        made[copier.copy(key)] = copier.copy(item)
    return made


REPLACED = "_lightning_flatness_replaced"
"""Attribute of a function that stands in for another one during training: the other one, which a copy gets."""


def _function(copier: Copier, value: Any) -> Any:
    """Return a function whose closure and defaults hold copies; the same one if nothing in them is copied."""
    copier.memo[id(value)] = value  # where its attributes lead back to it
    original = getattr(value, REPLACED, getattr(value, "_torchdynamo_orig_callable", value))
    if copier.copy(original) is not original:
        return copier.copy(original)
    cells = [_cell(copier, cell) for cell in value.__closure__ or ()]
    defaults = None if value.__defaults__ is None else _tuple(copier, value.__defaults__)
    wrapped = {name: copier.copy(item) for name, item in vars(value).items()}
    same_cells = all(new is old for new, old in zip(cells, value.__closure__ or (), strict=True))
    if same_cells and defaults is value.__defaults__ and all(wrapped[n] is i for n, i in vars(value).items()):
        return value
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, tuple(cells))
    made.__kwdefaults__, made.__qualname__ = value.__kwdefaults__, value.__qualname__
    made.__doc__, made.__module__ = value.__doc__, value.__module__
    made.__dict__.update(wrapped)
    return made


def _cell(copier: Copier, cell: types.CellType) -> types.CellType:
    """Return a cell of its own, so that ``nonlocal`` stays in the copy; shared by the functions that share the cell."""
    if id(cell) in copier.memo:
        return copier.memo[id(cell)]  # type: ignore[no-any-return]
    copier.memo[id(cell)] = made = types.CellType()
    try:
        contents = cell.cell_contents
    except ValueError:  # nothing has been assigned yet
        return made
    made.cell_contents = copier.copy(contents)
    return made


def _method(copier: Copier, value: Any) -> Any:
    owner = copier.copy(value.__self__)
    if owner is value.__self__:
        return value
    return types.MethodType(copier.copy(value.__func__), owner)


def _builtin(copier: Copier, value: Any) -> Any:
    owner = value.__self__
    if owner is None or isinstance(owner, type | types.ModuleType) or copier.copy(owner) is owner:
        return value
    return getattr(copier.copy(owner), value.__name__)


def _partial(copier: Copier, value: functools.partial[Any]) -> Any:
    made = type(value)(copier.copy(value.func), *map(copier.copy, value.args))
    made.keywords.update({name: copier.copy(item) for name, item in value.keywords.items()})
    copier.attributes(vars(value), vars(made))
    return made


def _cache(copier: Copier, value: Any) -> Any:
    function = copier.copy(value.__wrapped__)
    return value if function is value.__wrapped__ else functools.lru_cache(**value.cache_parameters())(function)


def _generator(_copier: Copier, value: torch.Generator) -> torch.Generator:
    return torch.Generator(value.device).set_state(value.get_state())


def _array(copier: Copier, value: np.ndarray[Any, Any]) -> Any:
    return value if value.nbytes > MAX_COPIED_BYTES else copy.deepcopy(value, copier.memo)


def _queue(copier: Copier, value: queue.Queue[Any]) -> Any:
    made = type(value)(value.maxsize)
    made.queue = copier.copy(value.queue)
    return made


def _weak_reference(copier: Copier, value: weakref.ref[Any]) -> Any:
    target = value()
    return value if target is None or (made := copier.copy(target)) is target else weakref.ref(made)


def _uncopyable(copier: Copier, value: Any) -> Any:
    return copier.share(value)


def _iterator(copier: Copier, value: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of itertools, whose iterators lose ``__reduce__`` in 3.14
        return copier.object(value)


EXACT |= {dict: _dict, OrderedDict: _dict, defaultdict: _dict, list: _list, deque: _list, tuple: _tuple}
EXACT |= {set: _set, frozenset: _set}
MAKERS += [
    ((type, types.ModuleType, Enum, np.generic), lambda _, value: value),
    (Tensor, Copier.small_tensor),
    (types.FunctionType, _function),
    (types.MethodType, _method),
    (types.BuiltinFunctionType, _builtin),
    (functools.partial, _partial),
    (type(functools.lru_cache(lambda: None)), _cache),
    (types.GeneratorType, _uncopyable),
    (torch.Generator, _generator),
    (np.ndarray, _array),
    (queue.Queue, _queue),
    (type(threading.Lock()), lambda *_: threading.Lock()),
    (type(threading.RLock()), lambda *_: threading.RLock()),
    (weakref.ref, _weak_reference),
    ((weakref.WeakKeyDictionary, weakref.WeakValueDictionary), _weak_dict),
    (Iterator, _iterator),
]
