"""Sharded weights: gathered on every rank for a measurement, and freed afterwards.

``fully_shard`` (FSDP2) leaves each rank a slice of every parameter, and puts hooks around ``forward`` that gather a
layer's weights, and around ``backward`` that scatter its gradient; second derivatives do not pass through these hooks.
Tensor parallelism computes with the slices. A measurement replaces the slices by the whole weights and suspends the
hooks, so the module is the plain one on every rank, as under DDP. Slices and their gradients do not change. Every
rank holds the whole weights, beside the vectors of the measurement, which are as long. The module ``shards`` has the
way that leaves both sharded.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_flatness.module.batches import prepare_batch

_HOOKS_OF = ("torch.distributed.fsdp.", "torch.distributed.tensor.")
"""Where the forward hooks come from that gather weights, or make sharded tensors of inputs and outputs."""


def check_sharding(module: nn.Module, num_parameters: int, device: torch.device) -> None:
    """Raise an error if the weights are spread over ranks and cannot be gathered.

    Args:
        module: The module to measure.
        num_parameters: How many trainable weights this rank sees, slices counted whole.
        device: Where they are.

    Raises:
        ValueError: If it is one.
    """
    problem = _problem_of(module)
    if is_distributed():
        least = torch.tensor([num_parameters, -num_parameters], device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        if int(least[0]) != -int(least[1]):
            problem = problem or "one with other weights on every rank (a stage of a pipeline, say)"
    if problem is not None:
        raise ValueError(
            "Expected a module with all weights on every rank, or one sharded by torch.distributed.fsdp.fully_shard "
            f"(FSDP2) or by tensor parallelism, got {problem}. Train it with one of those or with DDP, or measure a "
            "checkpoint of the full weights in one process."
        )


def _problem_of(module: nn.Module) -> str | None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes time; without it nothing is wrapped
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in module.modules()):
        return "one wrapped in FullyShardedDataParallel (FSDP1), which keeps slices of flattened tensors"
    if any(hasattr(p, "ds_id") for p in module.parameters()):
        return "one partitioned by DeepSpeed (ZeRO stage 3)"
    if _fsdp_modules(module) and is_tensor_parallel(module):
        return "one with both FSDP2 and tensor parallelism"
    return None


def is_distributed() -> bool:
    """Return whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def has_sharded_weights(module: nn.Module) -> bool:
    """Return whether weights of a module are spread over ranks, be they gathered just now or not."""
    return bool(_fsdp_modules(module)) or any(is_sharded(p) for p in module.parameters())


def is_tensor_parallel(module: nn.Module) -> bool:
    """Return whether a module computes with slices of its weights, rather than gather them first as FSDP2 does."""
    sharded: list[Any] = [p for p in module.parameters() if is_sharded(p)]
    if not _fsdp_modules(module):
        return bool(sharded)
    if any("distributed.tensor" in _origin(h) for m in module.modules() for h in m._forward_pre_hooks.values()):
        return True
    # FSDP2 on its own replicates over the first axis of a mesh of two, and shards over the second one.
    return any(p.device_mesh.ndim > 1 and not p.placements[0].is_replicate() for p in sharded)


def _fsdp_modules(module: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes time; without it nothing is sharded by it
    return [] if fsdp is None else [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]


def check_gathered(
    module: nn.Module, loss: Callable[[Any], Tensor], batches: Sequence[Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Check that a tensor-parallel module computes the same with whole weights as with slices.

    It may not: ``forward`` can rely on the shape of a slice, or communicate itself.

    Args:
        module: The module; nothing is done if it is not tensor-parallel. All ranks have to call this together.
        loss: Returns the loss on a batch, without dropout.
        batches: Those of this rank. One batch of the first rank that has any is looked at on all ranks.
        device: Where the weights are.
        dtype: Of the weights, the least precise one.

    Raises:
        ValueError: If it does not.
    """
    if not is_tensor_parallel(module):
        return
    batch = prepare_batch(_common_batch(batches, device), device)
    slices = float(loss(batch))
    try:
        with gathered(module, ()):
            full = float(loss(batch))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{_NOT_GATHERABLE}, got {type(error).__name__}: {error}. {_HINT}") from error
    if not abs(full - slices) <= torch.finfo(dtype).eps ** 0.5 * max(abs(full), abs(slices)):
        raise ValueError(f"{_NOT_GATHERABLE}, got the loss {full:.8g} instead of {slices:.8g}. {_HINT}")


_NOT_GATHERABLE = "Expected a tensor-parallel module to compute the same with whole weights as with slices of them"
_HINT = (
    "Let `forward` read sizes off its tensors and leave the communication to DTensor, or use FSDP2, or measure a "
    "checkpoint of the full weights in one process."
)


def _common_batch(batches: Sequence[Any], device: torch.device) -> Any:
    """Return the first batch of the first rank that has one; tensor-parallel ranks have to see the same samples."""
    if not is_distributed():
        return batches[0]
    source = torch.tensor(dist.get_rank() if batches else dist.get_world_size(), device=device)
    dist.all_reduce(source, dist.ReduceOp.MIN)
    batch = [batches[0] if batches else None]
    dist.broadcast_object_list(batch, int(source))
    return batch[0]


def reshard(module: nn.Module) -> None:
    """Free gathered weights, which submodules of FSDP2 keep after a forward pass without backward."""
    for submodule in _fsdp_modules(module):
        submodule.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, of which every rank holds a part."""
    # Importing it takes more than a second; where nothing has done so there are none.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its entries on this rank, without history; the tensor itself if it is not sharded.

    All ranks have to call this for the same tensors.
    """
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def sharded_form(parameter: Tensor) -> Tensor:
    """Return the parameter that the optimizer holds of one that :func:`gathered` put in its place, else the same."""
    form: Tensor = getattr(parameter, _FORM, parameter)
    return form


def set_form(parameter: Tensor, original: Tensor) -> None:
    """Say which parameter of the run a copy stands for, to be found by :func:`sharded_form`."""
    setattr(parameter, _FORM, sharded_form(original))


_FORM = "_sharded_form"


@contextmanager
def gathered(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Let a module hold whole weights inside the block, and no hooks that would gather them or scatter gradients.

    Args:
        module: The module. All ranks have to do this together.
        parameters: Some of its parameters.

    Yields:
        What the module holds in the place of ``parameters``; the same where nothing is sharded.
    """
    reshard(module)
    exchanged = [(m, name, t) for m in module.modules() for name, t in named_tensors(m) if is_sharded(t)]
    if not exchanged:
        present = {id(sharded_form(p)): p for p in module.parameters()}  # inside another block of another landscape
        yield [present.get(id(p), p) for p in parameters]
        return
    with without_hooks(module):
        try:
            forms = _whole_forms([t for _, _, t in exchanged])
            for submodule, name, tensor in exchanged:
                setattr(submodule, name, forms[id(tensor)])  # not in the dictionary: RNNs keep a list beside it
            yield [forms.get(id(p), p) for p in parameters]
        finally:
            for submodule, name, tensor in exchanged:
                setattr(submodule, name, tensor)


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a module itself, under each of their names."""
    own: list[tuple[str, Tensor]] = list(module.named_parameters(recurse=False, remove_duplicate=False))
    return [*own, *module.named_buffers(recurse=False, remove_duplicate=False)]


def _whole_forms(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the gathered form of each tensor by its identity: tied parameters stay one."""
    forms: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            if id(tensor) in forms:
                continue
            forms[id(tensor)] = form = whole(tensor)
            if isinstance(tensor, nn.Parameter):
                forms[id(tensor)] = form = nn.Parameter(form, requires_grad=tensor.requires_grad)
                setattr(form, _FORM, tensor)
    return forms


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Suspend the forward hooks of FSDP2 and tensor parallelism.

    There is no public way to suspend them, and the states that hold their handles are private, too. These dictionaries
    are what ``register_forward_hook`` and ``register_forward_pre_hook`` write to. (A test of two ranks fails if that
    changes: the hooks would put their own weights in the place of the gathered ones.)
    """
    held = [(m, name, getattr(m, name)) for m in module.modules() for name in ("_forward_pre_hooks", "_forward_hooks")]
    suspended = [(m, name, hooks) for m, name, hooks in held if any(map(_is_foreign, hooks.values()))]
    for m, name, hooks in suspended:
        setattr(m, name, OrderedDict((i, hook) for i, hook in hooks.items() if not _is_foreign(hook)))
    try:
        yield
    finally:
        for m, name, hooks in suspended:
            setattr(m, name, hooks)


def _is_foreign(hook: Any) -> bool:
    return _origin(hook).startswith(_HOOKS_OF)


def _origin(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""
