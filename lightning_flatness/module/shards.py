"""Weights that stay sharded while they are measured: each rank has a slice of each, and gathers it where it is read.

A :class:`StandIn` takes the place of a parameter in the module. It has its shape and type, but no entries: an operator
that reads it gets the whole weights, gathered for this operator, and the backward pass leaves each rank the gradient of
its slice, summed over the ranks. Gathering and that sum are each other's derivatives, so gradients can be
differentiated again, which FSDP2's hooks do not allow. What autograd keeps of gathered weights for a backward pass is
gathered again then. So no rank holds the whole weights at any time, but those of one operator.

All ranks have to run the same operators on weights in the same order. Those of one module on batches of any size do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_flatness.module.batches import map_tensors
from lightning_flatness.module.sharding import (
    is_distributed,
    is_sharded,
    named_tensors,
    reshard,
    set_form,
    whole,
    without_hooks,
)


class Shard:
    """This rank's slice of a tensor of weights: a contiguous part of its entries.

    Args:
        weights: The tensor; all ranks have to do this together.
        before: Called before every communication.

    Attributes:
        leaf: The entries, the variable of derivatives.
        start: The first of them.
        num_entries: Entries of the whole tensor.
        largest: Entries on the rank that has most.
    """

    def __init__(self, weights: Tensor, before: Callable[[], None]) -> None:
        rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        self._before = before
        self._shape = weights.shape
        self.num_entries = weights.numel()
        self.largest = -(-self.num_entries // self._world_size)
        self.start = min(rank * self.largest, self.num_entries)
        self.leaf = self.own(whole(weights).detach()).clone().requires_grad_(weights.requires_grad)

    def own(self, tensor: Tensor) -> Tensor:
        """Return this rank's entries of a whole tensor."""
        return tensor.reshape(-1)[self.start : self.start + self.largest]

    def gather(self, entries: Tensor) -> Tensor:
        """Return the whole tensor, given each rank's entries."""
        self._before()
        padded = entries.contiguous()
        if len(entries) < self.largest:
            padded = torch.cat([entries, entries.new_zeros(self.largest - len(entries))])
        if self._world_size == 1:
            gathered = padded.clone()
        else:
            gathered = padded.new_empty(self._world_size * self.largest)
            _collective("all_gather_single", "all_gather_into_tensor")(gathered, padded)
        return gathered[: self.num_entries].view(self._shape)

    def scatter(self, tensor: Tensor) -> Tensor:
        """Return this rank's entries of the sum of one tensor per rank: the transpose of :meth:`gather`."""
        self._before()
        padded = tensor.reshape(-1)
        if self._world_size == 1:
            return padded.clone()
        if (num_missing := self._world_size * self.largest - self.num_entries) > 0:
            padded = torch.cat([padded, padded.new_zeros(num_missing)])
        entries = padded.new_empty(self.largest)
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(entries, padded.contiguous())
        return entries[: len(self.leaf)]

    def gathered(self) -> Tensor:
        """Return the whole weights, to be differentiated."""
        if not torch.is_grad_enabled():
            return self.gather(self.leaf)
        weights: Tensor = _Gather.apply(self.leaf, self)  # type: ignore[no-untyped-call]
        return weights


def _collective(name: str, old_name: str) -> Callable[[Tensor, Tensor], Any]:
    """Return a function of torch.distributed, whose name has changed in torch 2.13."""
    function: Callable[[Tensor, Tensor], Any] = getattr(dist, name, None) or getattr(dist, old_name)
    return function


_origins: WeakKeyDictionary[Any, tuple[Shard, Tensor]] = WeakKeyDictionary()
"""What gathered tensors were gathered from, by their storage."""


def _gather_and_note(shard: Shard, entries: Tensor) -> Tensor:
    tensor = shard.gather(entries)
    _origins[tensor.untyped_storage()] = shard, entries
    return tensor


class _Gather(torch.autograd.Function):
    """Gathers a tensor; its derivative adds up the gradients of all ranks and scatters them."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return _gather_and_note(shard, entries.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        scattered: Tensor = _Scatter.apply(gradients[0], ctx.shard)  # type: ignore[no-untyped-call]
        return scattered, None


class _Scatter(torch.autograd.Function):
    """The transpose of :class:`_Gather`, which is its derivative."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return shard.scatter(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gathered: Tensor = _Gather.apply(gradients[0], ctx.shard)  # type: ignore[no-untyped-call]
        return gathered, None


def pack(tensor: Tensor) -> Any:
    """Return what autograd is to keep of a tensor: of gathered weights where they came from."""
    origin = _origins.get(tensor.untyped_storage()) if tensor.layout == torch.strided else None
    # Autograd restores the history; an output kept with it by its own node would never be freed.
    return tensor.detach() if origin is None else (*origin, tensor.size(), tensor.stride(), tensor.storage_offset())


def unpack(kept: Any) -> Tensor:
    """Return the tensor of which :func:`pack` has kept something; gathered weights are gathered again."""
    if isinstance(kept, Tensor):
        return kept
    shard, entries, size, stride, offset = kept
    return _gather_and_note(shard, entries).as_strided(size, stride, offset)


class StandIn(nn.Parameter):
    """Stands for a sharded parameter in a module; see the top of this file. Its entries are not numbers."""

    shard: Shard

    @classmethod
    def of(cls, parameter: Tensor, shard: Shard) -> StandIn:
        """Return a stand-in with the shape, type and device of a parameter."""
        with torch.inference_mode(False), torch.no_grad():
            nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=shard.leaf.device)
            stand_in: StandIn = cls(nothing.expand(parameter.shape), requires_grad=parameter.requires_grad)
        stand_in.shard = shard
        set_form(stand_in, parameter)
        return stand_in

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the whole weights; only what asks for shape and type gets the stand-in."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
            if name not in _ATTRIBUTES_WITH_ENTRIES:
                return _on_itself(func, types, args, kwargs or {})
        elif name in _WITHOUT_ENTRIES:
            return _on_itself(func, types, args, kwargs or {})
        elif _writes(name, args, kwargs or {}):
            raise RuntimeError(
                f"Expected a loss that only reads weights which stay sharded, got one that writes to them ({name}). "
                "Measure the whole weights: LossLandscape in the place of ShardedLandscape, or "
                "FlatnessMonitor(sharded=False)."
            )
        args, kwargs = map_tensors(_weights_of, (args, kwargs or {}), lambda value: value)
        return func(*args, **kwargs)


_on_itself: Callable[..., Any] = nn.Parameter.__torch_function__
"""Runs an operator as if the class had no say."""


def _weights_of(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, StandIn):
        return tensor
    shard = getattr(tensor, "shard", None)
    return tensor.as_subclass(Tensor) if shard is None else shard.gathered()  # a copy that somebody made has entries


_ATTRIBUTES_WITH_ENTRIES = {"data", "T", "mT", "H", "mH", "real", "imag"}
_WITHOUT_ENTRIES = {
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "__len__", "as_subclass"),
    *("is_floating_point", "is_complex", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook"),
}


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operator writes to a stand-in."""
    changes = (
        name in ("__setitem__", "__set__") or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    )
    return (changes and len(args) > 0 and isinstance(args[0], StandIn)) or isinstance(kwargs.get("out"), StandIn)


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


@contextmanager
def standing_in(module: nn.Module, parameters: Sequence[Tensor], before: Callable[[], None]) -> Iterator[list[StandIn]]:
    """Let a module hold stand-ins inside the block, and no hooks that would gather weights or scatter gradients.

    Args:
        module: The module. All ranks have to do this together.
        parameters: Those of its parameters that are measured. Others get a stand-in if they are sharded.
        before: Called before every communication.

    Yields:
        The stand-ins of ``parameters``.

    Raises:
        RuntimeError: If the module holds other tensors in the place of ``parameters``.
    """
    reshard(module)
    measured = {id(p) for p in parameters}
    exchanged = [
        (m, name, t) for m in module.modules() for name, t in named_tensors(m) if id(t) in measured or is_sharded(t)
    ]
    if measured - {id(t) for _, _, t in exchanged}:
        raise RuntimeError(
            "Expected a module that is not being measured, got one inside a measurement of its whole weights. Close "
            "that first."
        )
    with without_hooks(module):
        try:
            forms = _forms([t for _, _, t in exchanged], before)
            for submodule, name, tensor in exchanged:
                setattr(submodule, name, forms[id(tensor)])  # not in the dictionary: RNNs keep a list beside it
            yield [forms[id(p)] for p in parameters]
        finally:
            for submodule, name, tensor in exchanged:
                setattr(submodule, name, tensor)


def _forms(tensors: Sequence[Tensor], before: Callable[[], None]) -> dict[int, Any]:
    """Return what takes the place of each tensor, by its identity: tied parameters stay one."""
    forms: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            if id(tensor) not in forms:
                is_parameter = isinstance(tensor, nn.Parameter)
                forms[id(tensor)] = StandIn.of(tensor, Shard(tensor, before)) if is_parameter else whole(tensor)
    return forms
