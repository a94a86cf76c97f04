"""What a copy of a module does not isolate: class attributes and global variables that its methods use.

They are compared before and after the first measurement of a module, and named in a warning if they have changed.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MISSING = object()
_MAX_ITEMS = 100
_MAX_DEPTH = 3
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "torchvision", "builtins")


class Outside:
    """A fingerprint of what lies outside of some modules but belongs to their code."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._classes = {c for m in modules for c in type(m).__mro__ if c.__module__.partition(".")[0] not in _FOREIGN}
        self._before = dict(self._fingerprints())

    def changed(self) -> list[str]:
        """Return the names of what has changed since."""
        return sorted(name for name, found in self._fingerprints() if found != self._before.get(name, _MISSING))

    def _fingerprints(self) -> Iterator[tuple[str, Any]]:
        for kind in self._classes:
            for name, value in list(vars(kind).items()):
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(function, types.FunctionType):
                    yield from _globals_of(function)
                elif not name.startswith("__") and not name.startswith("_abc_"):
                    yield f"{kind.__name__}.{name}", _fingerprint(value)


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if value is not None and not isinstance(value, type | types.ModuleType) and not callable(value):
            yield f"{function.__module__}.{name}", _fingerprint(value)


def _fingerprint(value: Any, depth: int = 0) -> Any:
    """Return something that compares unequal when an object has changed, as far as that is cheap to see."""
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return value
    if isinstance(value, Tensor):
        return (0 if value.is_inference() else value._version), value.shape
    if isinstance(value, np.ndarray):
        return value.shape, value.ravel()[:_MAX_ITEMS].tobytes()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if depth == _MAX_DEPTH or isinstance(value, type | types.ModuleType | types.FunctionType | nn.Module):
        return type(value)
    if isinstance(value, dict):
        return len(value), [_fingerprint(item, depth + 1) for _, item in zip(range(_MAX_ITEMS), value.values())]  # noqa: B905
    if isinstance(value, list | tuple):
        return len(value), [_fingerprint(item, depth + 1) for item in value[-_MAX_ITEMS:]]
    if hasattr(value, "__len__"):
        return type(value), len(value)
    return type(value), _fingerprint(getattr(value, "__dict__", {}), depth + 1)
