"""Loss functions that reach the module of the run by themselves: bound methods, closures, objects that hold it."""

from __future__ import annotations

import copy
import functools
import types
from operator import is_
from typing import Any

from torch import nn

_MAX_DEPTH = 4


def rebound(value: Any, copies: dict[int, Any], depth: int = 0) -> Any:
    """Return a function with the copies in the place of what it holds; the function itself if it holds none.

    Everything else stays the caller's: a list that a loss function appends to is the same list.

    Args:
        value: A function, bound method, partial, or an object that can be called.
        copies: Copies by the identity of the original.
        depth: How many objects lie around this one.
    """
    if id(value) in copies:
        return copies[id(value)]
    if depth > _MAX_DEPTH:
        return value

    def inner(item: Any) -> Any:
        return rebound(item, copies, depth + 1)

    if isinstance(value, types.MethodType):
        owner = inner(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, inner)
    if isinstance(value, functools.partial):
        keywords = {name: inner(item) for name, item in value.keywords.items()}
        return functools.partial(inner(value.func), *map(inner, value.args), **keywords)
    if type(value) in (list, tuple, dict):
        return _rebound_container(value, inner)
    if isinstance(value, nn.Module | type):
        return value
    attributes = getattr(value, "__dict__", {})
    changed = {name: new for name, old in attributes.items() if (new := inner(old)) is not old}
    if not changed:
        return value
    made = copy.copy(value)
    made.__dict__.update(changed)
    return made


def _rebound_container(value: Any, inner: Any) -> Any:
    if isinstance(value, dict):
        pairs = {key: inner(item) for key, item in value.items()}
        return value if all(pairs[key] is value[key] for key in value) else pairs
    items = [inner(item) for item in value]
    return value if all(map(is_, items, value)) else type(value)(items)


def _rebound_function(function: types.FunctionType, inner: Any) -> Any:
    original = getattr(function, "_torchdynamo_orig_callable", function)  # of a compiled function
    if original is not function and inner(original) is not original:
        return inner(original)
    cells = [_rebound_cell(cell, inner) for cell in function.__closure__ or ()]
    defaults = None if function.__defaults__ is None else inner(function.__defaults__)
    same = defaults is function.__defaults__
    if same and all(new is old for new, old in zip(cells, function.__closure__ or (), strict=True)):
        return function
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, tuple(cells))
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    return made


def _rebound_cell(cell: types.CellType, inner: Any) -> types.CellType:
    try:
        contents = inner(cell.cell_contents)
    except ValueError:  # nothing has been assigned yet
        return cell
    return cell if contents is cell.cell_contents else types.CellType(contents)
