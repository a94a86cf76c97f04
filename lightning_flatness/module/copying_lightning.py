"""Copies of what Lightning attaches to a module: a Trainer of which parts are copied on use, and silent loggers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from lightning_flatness.module.copying import MAKERS, Copier

_PLACES = ("name", "version", "save_dir", "log_dir", "root_dir", "sub_dir")
_ATOMS = (type(None), bool, int, float, str, PurePath)


class Silent:
    """Stands for anything of a logger's: takes every call and item, and writes nothing.

    Args:
        original: The object it stands for; its plain values (names, directories) can be read.
    """

    def __init__(self, original: Any = None) -> None:
        self._original = original
        self._items: dict[Any, Any] = {}

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for ``isinstance``
        return Silent if self._original is None else type(self._original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._original, name, None)
        return value if value is not None and isinstance(value, _ATOMS) else Silent(value)

    def __call__(self, *_args: Any, **_kwargs: Any) -> Silent:
        """Do nothing."""
        return Silent()

    def __getitem__(self, key: Any) -> Any:
        return self._items.setdefault(key, Silent())

    def __setitem__(self, key: Any, value: Any) -> None:
        self._items[key] = value

    def __contains__(self, key: Any) -> bool:
        return key in self._items

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def __fspath__(self) -> str:
        return os.devnull


class _SilentLogger:
    """Mixed into the class of a logger, so that ``isinstance`` holds: keeps names and places, and writes nothing.

    Lightning's ``DummyLogger`` has neither the class nor the directories of the logger it stands for.
    """

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in own or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(self, name)
        original = own["_silent_original"]
        if name == "experiment":
            own[name] = Silent(vars(original).get("_experiment"))
            return own[name]
        value = getattr(original, name) if name in _PLACES else vars(original).get(name)
        return value if isinstance(value, _ATOMS) and (value is not None or name in _PLACES) else Silent(value)


def silent(logger: Any) -> Any:
    """Return a logger of the same class that writes nothing."""
    made: Any = object.__new__(_subclass(_SilentLogger, logger.__class__))
    object.__getattribute__(made, "__dict__")["_silent_original"] = logger
    return made


@functools.cache
def _subclass(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _CopiedOnUse:
    """Mixed into the class of a Trainer or loop: attributes are copied from the original when first looked at."""

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        original = vars(own["_twin_original"]) if "_twin_original" in own else {}
        if name not in original:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        _outside_transforms(lambda: own["_twin_copier"].attributes({name: original[name]}, own))
        return own[name]


def _outside_transforms(copy: Callable[[], None]) -> None:
    """Copy where ``torch.func`` does not wrap new tensors, which then have no storage: its levels are of a thread."""
    try:
        torch.empty(0, device="cpu").data_ptr()
    except RuntimeError:
        with ThreadPoolExecutor(1) as other:
            other.submit(copy).result()
    else:
        copy()


def _copy_on_use(copier: Copier, original: Any) -> Any:
    made: Any = object.__new__(_subclass(_CopiedOnUse, original.__class__))
    atoms = {name: value for name, value in vars(original).items() if isinstance(value, _ATOMS)}
    made.__dict__.update(atoms, _twin_original=original, _twin_copier=copier)
    return made


def mute(module: nn.Module, made: nn.Module) -> None:
    """Let ``self.log``, ``self.log_dict`` and ``self.print`` do nothing in (a copy of) a LightningModule."""
    if hasattr(type(module), "training_step"):
        made.__dict__.update(dict.fromkeys(("log", "log_dict", "print"), _do_nothing))


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


MAKERS += [
    ("DummyLogger", lambda _, logger: logger),  # of ``Trainer(fast_dev_run=True)``
    ("Logger", lambda _, logger: silent(logger)),
    ("SummaryWriter", lambda _, writer: Silent(writer)),
    ("Trainer", _copy_on_use),
    ("_Loop", _copy_on_use),  # ``self.global_step`` asks one; the results that it holds are many objects
    ("_DataFetcher", lambda _, fetcher: fetcher),
]
