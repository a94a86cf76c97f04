"""A deep copy of everything that a module reaches, where ``copy.deepcopy`` stops or copies the wrong things.

``copy.deepcopy`` fails at tensors with a history, locks and generators, copies what has no state of its own (gigabytes
of data, tokenizers), and shares closures, which then still call the original. :class:`Copier` knows the kinds of
objects where that matters; ``copying_builtin``, ``copying_torch`` and ``copying_lightning`` say how to copy them. All
others follow the protocol of ``copy`` (``__deepcopy__``, ``__reduce_ex__``).
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import types
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.module.sharding import is_sharded

MAX_COPIED_BYTES = 64 * 2**20
"""Larger tensors and arrays that are not trained are shared with the run."""


class Copier:
    """Copies objects; an object that it has copied before gives the same copy again.

    Args:
        memo: Copies that exist already, by the identity of the original.
        storages: Copies of tensors' storages that exist already, by the address of the original.

    Attributes:
        memo: The same, with all copies made since; the memo of ``copy.deepcopy`` has this form.
        shared: Places of objects that cannot be copied, with the names of their classes.
        large: Places of tensors that are shared because of their size, with the tensors.
        modules: The modules that have been copied, with their copies.
        in_dataset: Whether the objects to be copied belong to a dataset.
    """

    def __init__(self, memo: dict[int, Any], storages: dict[int, Any] | None = None) -> None:
        self.memo = memo
        self.shared: dict[str, str] = {}
        self.large: dict[str, Tensor] = {}
        self._storages = {} if storages is None else storages
        self.modules: list[tuple[nn.Module, nn.Module]] = []
        self.in_dataset = False
        self._path: list[str] = []
        self._alive: list[Any] = []  # the originals; those made on the way have to keep their identity

    def copy(self, value: Any) -> Any:
        """Return a copy of an object, or the object itself if it has no state or cannot be copied."""
        kind: Any = type(value)
        if kind in ATOMS:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        self._alive.append(value)
        self.memo[id(value)] = made = _maker_of(kind)(self, value)
        return made

    def attributes(self, source: dict[Any, Any], target: dict[Any, Any]) -> None:
        """Copy the attributes of an object into those of its copy."""
        depth = len(self._path)
        for name, value in list(source.items()):
            if type(value) in ATOMS:
                target[name] = value
                continue
            self._path.append(str(name))
            try:
                target[name] = self.copy(value)
            finally:
                del self._path[depth:]

    def copies_of(self, kind: type) -> list[tuple[Any, Any]]:
        """Return the objects of a class that have been copied, each with its copy."""
        return [(old, self.memo[id(old)]) for old in self._alive if isinstance(old, kind) and id(old) in self.memo]

    def note(self, original: Any, made: Any) -> None:
        """Let a copy stand for an object from now on."""
        self._alive.append(original)
        self.memo[id(original)] = made

    def share(self, value: Any) -> Any:
        """Return an object that cannot be copied, and remember its place."""
        self.shared[".".join(self._path) or type(value).__name__] = type(value).__name__
        return value

    # -------------------------------------------------------------------------------------------------- tensors

    def tensor(self, value: Tensor) -> Tensor:
        """Return a copy of a tensor without history; of a parameter a parameter. Views of one storage stay views."""
        with torch.inference_mode(False), torch.no_grad():
            if is_plain(value) and value.untyped_storage().nbytes() <= max(value.nbytes, MAX_COPIED_BYTES):
                made = self._on_copied_storage(value)
            elif isinstance(value, nn.Parameter) and type(value) is not nn.Parameter and not is_sharded(value):
                made = copy.deepcopy(value)
            else:
                made = value.detach().clone()
            if isinstance(value, nn.Parameter) and not isinstance(made, nn.Parameter):
                made = nn.Parameter(made, requires_grad=value.requires_grad)
        if value.is_leaf and value.requires_grad:
            made.requires_grad_()
        self.memo[id(value)] = made
        if attributes := getattr(value, "__dict__", None):
            self.attributes(attributes, made.__dict__)
        return made

    def _on_copied_storage(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._storages:
            if value.nbytes == storage.nbytes():
                made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
                self._storages[storage.data_ptr()] = made.untyped_storage()
                return made.copy_(value)
            whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            self._storages[storage.data_ptr()] = whole.clone().untyped_storage()
        place = self._storages[storage.data_ptr()], value.storage_offset(), value.size(), value.stride()
        return torch.empty(0, dtype=value.dtype, device=value.device).set_(*place)

    def small_tensor(self, value: Tensor) -> Tensor:
        """Return a copy of a tensor, or the same one if it is large and not trained."""
        if is_released(value):
            return value
        num_bytes = value.nbytes if value.layout == torch.strided else 0
        if num_bytes > MAX_COPIED_BYTES and not (isinstance(value, nn.Parameter) and value.requires_grad):
            self.large[".".join(self._path)] = value
            return value
        return self.tensor(value)

    # ------------------------------------------------------------------------------------------------------ objects

    def object(self, value: Any) -> Any:
        """Copy an object of any class; share it if it has no state that Python can see, or cannot be copied."""
        kind: Any = type(value)
        if not _has_attributes(kind) and kind.__module__.partition(".")[0] not in _OPEN_PACKAGES:
            return value
        depth = len(self._path)
        try:
            if deep := getattr(kind, "__deepcopy__", None):
                return deep(value, self.memo)
            if any(isinstance(item, _RUNNING) for item in getattr(value, "__dict__", {}).values()):
                return self.share(value)
            if _is_plain(kind):
                made = object.__new__(kind)
                self.memo[id(value)] = made
                self.attributes(vars(value), vars(made))
                return made
            return self._reduced(value)
        except MemoryError:
            raise
        except Exception:
            del self._path[depth:]
            return self.share(value)

    def _reduced(self, value: Any) -> Any:
        """Copy an object by the protocol of ``pickle``, as ``copy.deepcopy`` does."""
        recipe = value.__reduce_ex__(4)
        if isinstance(recipe, str):
            return value
        make, arguments, state, items, pairs = (*recipe, None, None, None)[:5]
        arguments = [self.copy(argument) for argument in arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of a constructor have been given where the original was made
            made = make(*arguments)
        if made is value:
            return value
        self.memo[id(value)] = made
        if state is not None:
            self._set_state(made, state)
        for item in items or ():
            made.append(self.copy(item))
        for key, item in pairs or ():
            made[self.copy(key)] = self.copy(item)
        return made

    def _set_state(self, made: Any, state: Any) -> None:
        if hasattr(type(made), "__setstate__"):
            made.__setstate__(self.copy(state))
            return
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        if attributes:
            self.attributes(attributes, made.__dict__)
        for name, item in (slots or {}).items():
            object.__setattr__(made, name, self.copy(item))


def is_released(tensor: Tensor) -> bool:
    """Return whether the storage of a tensor has been taken away, as FSDP does between two uses of gathered weights."""
    is_strided = type(tensor) in _PLAIN_CLASSES and tensor.layout == torch.strided and tensor.device.type != "meta"
    return is_strided and tensor.untyped_storage().nbytes() < tensor.nbytes and tensor.is_contiguous()


def is_plain(tensor: Tensor) -> bool:
    """Return whether all there is to a tensor is a part of a storage."""
    return (
        type(tensor) in _PLAIN_CLASSES
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and tensor.nbytes > 0
        and not is_released(tensor)
    )


_PLAIN_CLASSES = (Tensor, nn.Parameter, nn.Buffer)

_RUNNING = (threading.Thread, BaseProcess, Executor)
"""What works for its owner; a copy of the owner would wait for it in vain."""

ATOMS: set[Any] = {
    *(type(None), bool, str, bytes, int, float, complex, type, range, slice, type(Ellipsis), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, types.ModuleType),
    *(types.CodeType, property),
}
"""Types of values without state."""

_OPEN_PACKAGES = {"builtins", "numpy", "torch", *sys.stdlib_module_names}
"""Objects without attributes of classes from other packages are written in C: tables of data, tokenizers. Shared."""

EXACT: dict[Any, Callable[[Copier, Any], Any]] = {}
"""How to copy the objects of a class, but not those of its subclasses."""

MAKERS: list[tuple[Any, Callable[[Copier, Any], Any]]] = []
"""How to copy the objects of a class; the first entry that fits counts. A name stands for the classes of that name in
Lightning (under each of its package names) and torch."""


_OF_RANKS = ("torch.distributed.", "torch._C._distributed")
"""Process groups, meshes, and the state of sharding, which holds freed storage. Shared."""


def _itself(_copier: Copier, value: Any) -> Any:
    return value


@functools.cache
def _maker_of(kind: Any) -> Callable[[Copier, Any], Any]:
    if kind in EXACT:
        return EXACT[kind]
    if kind.__module__.startswith(_OF_RANKS) and not issubclass(kind, nn.Module | Tensor):
        return _itself
    for classes, make in MAKERS:
        if issubclass(kind, classes) if not isinstance(classes, str) else _has_base(kind, classes):
            return make
    return Copier.object


def _has_base(kind: type, name: str) -> bool:
    bases = [c for c in kind.__mro__ if c.__name__ == name]
    return any(c.__module__.partition(".")[0] in _TRAINING_PACKAGES for c in bases)


_TRAINING_PACKAGES = {"lightning", "pytorch_lightning", "lightning_fabric", "torch", "tensorboardX"}


@functools.cache
def _has_attributes(kind: Any) -> bool:
    return any("__dict__" in vars(c) or "__slots__" in vars(c) for c in kind.__mro__)


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Return whether all there is to objects of a class are their attributes."""
    default = all(getattr(kind, name, None) is getattr(object, name, None) for name in _PROTOCOL)
    native = [c for c in kind.__mro__ if c is not object and not c.__flags__ & _IS_PYTHON_CLASS]
    return default and not native and not any(vars(c).get("__slots__") for c in kind.__mro__)


_PROTOCOL = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")
_IS_PYTHON_CLASS = 1 << 9  # Py_TPFLAGS_HEAPTYPE
