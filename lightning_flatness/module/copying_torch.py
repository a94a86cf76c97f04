"""Copies of modules, optimizers and data loaders: what of them belongs to the loss, and what only to the run."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter  # the class of iter(loader) has no public name

from lightning_flatness.module.copying import MAKERS, Copier
from lightning_flatness.module.kinds import script_attributes, set_script_attributes

_DROPPED_HOOKS = {
    *("_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
}
"""Where ``register_full_backward_hook`` and the like write to: hooks that change or record the gradients of training,
and those of checkpoints. Forward hooks are part of the computation, and those that record do so in copies."""

_OF_EVERY_MODULE = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


def copy_module(copier: Copier, module: nn.Module) -> nn.Module:
    """Return a copy of a module: of a compiled or wrapped one, of the module underneath."""
    if isinstance(module, DistributedDataParallel):
        return copier.copy(module.module)  # type: ignore[no-any-return]
    if "_orig_mod" in module._modules:  # where torch.compile keeps the module that it wraps
        return copier.copy(module._orig_mod)  # type: ignore[no-any-return]
    if isinstance(module, torch.jit.ScriptModule):
        return _copy_script_module(copier, module)  # type: ignore[no-any-return]
    made: nn.Module = object.__new__(unsharded_class(type(module)))
    copier.memo[id(module)] = made
    copier.modules.append((module, made))
    fill_module(copier, module, made)
    return made


def fill_module(copier: Copier, module: nn.Module, made: nn.Module) -> None:
    """Give a copy of a module the attributes of the module, copied anew."""
    if isinstance(module, torch.jit.ScriptModule):
        set_script_attributes(made, script_attributes(module))
        return
    source = dict(module.__dict__)
    empty = {name: type(source.pop(name))() for name in _OF_EVERY_MODULE if not source.get(name, True)}
    dropped = {name: type(source.pop(name))() for name in _DROPPED_HOOKS & source.keys()}
    attributes: dict[str, Any] = empty | dropped
    if source.get("_compiled_call_impl") is not None:  # of ``module.compile()``
        source["_compiled_call_impl"] = None
    copier.attributes(source, attributes)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):  # the gradient of the loss, dense and not rescaled
        attributes |= {"sparse": False, "scale_grad_by_freq": False}
    object.__setattr__(made, "__dict__", attributes)


def unsharded_class(kind: type) -> type:
    """Return the class of a module before ``fully_shard`` has put one of its own in front."""
    fsdp = [c for c in kind.__mro__ if c.__module__.startswith("torch.distributed.fsdp")]
    return next((c for c in kind.__mro__ if not any(issubclass(c, f) for f in fsdp)), kind)


def _copy_script_module(copier: Copier, module: Any) -> Any:
    with torch.no_grad():  # else the copies of parameters have the originals in their history
        made = copy.deepcopy(module)
    for old, new in zip(module.modules(), made.modules(), strict=True):
        copier.note(old, new)
        copier.modules.append((old, new))
    for (_, old), (_, new) in zip(module.named_parameters(), made.named_parameters(), strict=True):
        copier.note(old, new.requires_grad_(old.requires_grad))
    return made


class _LazyState(defaultdict[Any, Any]):
    """The state of an optimizer; that of a parameter is copied when it is looked at."""

    def __init__(self, copier: Copier, state: dict[Any, Any]) -> None:
        super().__init__(dict)
        self._missing_states = {copier.copy(p): s for p, s in state.items()}
        self._copier = copier

    def __missing__(self, parameter: Any) -> Any:
        state = self._missing_states.pop(parameter, None)
        self[parameter] = {} if state is None else self._copier.copy(state)
        return self[parameter]


def _copy_optimizer(copier: Copier, optimizer: Optimizer) -> Optimizer:
    made: Optimizer = object.__new__(type(optimizer))
    copier.memo[id(optimizer)] = made
    attributes = dict(vars(optimizer))
    state = attributes.pop("state", None)
    copier.attributes(attributes, vars(made))
    if state is not None:
        made.state = _LazyState(copier, state)
    return made


def _copy_data(copier: Copier, data: Any) -> Any:
    inside, copier.in_dataset = copier.in_dataset, True
    try:
        return copier.object(data)
    finally:
        copier.in_dataset = inside


class Restarted:
    """Iterates over a copy of the loader that an iterator came from; its first sample is that of a new epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Restarted:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)


def _copy_loader_iterator(copier: Copier, iterator: Any) -> Restarted:
    dataset, sampler = copier.copy(iterator._dataset), copier.copy(iterator._index_sampler)
    collate_fn = copier.copy(iterator._collate_fn)
    if not iterator._auto_collation:
        return Restarted(DataLoader(dataset, batch_size=None, collate_fn=collate_fn))
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return Restarted(DataLoader(dataset, sampler.batch_size, drop_last=sampler.drop_last, collate_fn=collate_fn))
    return Restarted(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn))


MAKERS[:0] = [
    (nn.Module, copy_module),
    (Optimizer, _copy_optimizer),
    (_BaseDataLoaderIter, _copy_loader_iterator),
    ((DataLoader, Dataset), _copy_data),
]
