"""Counts memory instead of sampling it: the bytes of all live storages that operators made."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountedMemory(TorchDispatchMode):
    """Counts the bytes of storages made inside the block: ``current`` ones and their ``peak``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # from before the block
                self._note(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0)
        return result

    def _note(self, tensor: Tensor, num_bytes: int) -> None:
        if tensor.layout != torch.strided or tensor.untyped_storage() in self._seen:
            return
        storage = tensor.untyped_storage()
        self._seen.add(storage)
        self.current += num_bytes
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self.current -= num_bytes
