"""A pretend accelerator "fakegpu" in pure Python: real values, checked devices, counted host synchronisations.

How to use (once per process, before or after other imports; torch cannot take a backend back)::

    import pretend_device as fakegpu
    fakegpu.install()                              # registers the device; a second call does nothing
    model.to("fakegpu"); torch.zeros(3, device="fakegpu"); x.cpu()
    with fakegpu.record("/path/to/package") as log:
        ...                                        # code under test
    log.blocking                                   # how often a CUDA host would have waited for its device
    log.table()                                    # [(count, kind, "file.py:line in function"), ...]

How it works. Tensors are ordinary ``torch.Tensor`` objects with the dispatch key PrivateUse1 whose storage *is* CPU
memory: a DLPack capsule of a CPU tensor gets the device type kDLExtDev, which torch imports as PrivateUse1. So views,
``.data =``, ``detach``, version counters, double backward, ``torch.func`` and forward mode are torch's own; nothing is
a subclass. One boxed fallback turns arguments into CPU aliases (the same trick backwards), runs the CPU kernel and
wraps what is new. The autograd engine runs its backward passes in the device's own thread, as on CUDA.

What it checks, as CUDA does:
  - all tensor arguments of an operator on the device; CPU tensors raise RuntimeError, but for 0-dim CPU tensors in
    pointwise operators, values of ``index_put``/``fill_``, and CPU index tensors;
  - ``generator=`` of a random operator is on the device; ``.numpy()`` and friends raise (torch's own check);
  - random numbers come from the device's generator (``torch.fakegpu.get_rng_state/set_rng_state/manual_seed``),
    never from the CPU's. With the same seed both give the same stream, so CPU and device runs can be compared.

What it counts (``Sync.kind``): "item" (item, float, bool, int, is_nonzero), "equal", "nonzero" (and boolean masks),
"d2h" (cpu, tolist, copies to the host), "h2d" (``torch.tensor(x, device=...)``, ``.to(device)`` of pageable memory:
CUDA waits for the stream after these too, ``memcpy_and_sync``), "other" (``linalg.eigh`` and what else waits inside).
"h2d_async" and "d2h_async" (``non_blocking=True``) are listed and not counted as blocking.

Another device as the current one: ``torch.fakegpu.set_device(1)`` lets ``get_rng_state()``, ``set_rng_state(state)`` and
``manual_seed(seed)`` without a device mean a generator that no tensor draws from, as ``torch.cuda.set_device`` does
for a model on another GPU.

TF32: with ``fakegpu.has_tf32 = True`` the float32 factors of matrix products and convolutions are rounded to 10 bits, as
Ampere and later GPUs do, where ``torch.backends.cuda.matmul.allow_tf32`` (False by default, True after
``torch.set_float32_matmul_precision("high")``) and ``torch.backends.cudnn.allow_tf32`` (True by default) say so.

Limits: tensors live on index 0 only; no streams, no memory limits, no asynchrony (a d2h_async copy is complete at
once); no kernels of its own, so neither CUDA's rounding, nor its float atomics, nor its missing kernels (what CUDA lacks
and the CPU has works here); no NCCL; ``torch.Generator(device="fakegpu")`` does not exist (the Python hooks of torch
2.13 cannot make one). Composite operators that ask ``is_cuda`` take their generic path (cuDNN's RNN, flash attention,
fused layers). ``Module.to`` puts new parameters in the place of the old ones (PrivateUse1 is not among the types that
torch exchanges in place): tie weights and make optimizers after moving. Autocast is emulated for the usual operators,
with a cache of casts of leaves like CUDA's. ``_setup_privateuseone_for_python_backend`` is experimental torch API; this
was written for torch 2.13.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

NAME = "fakegpu"
_CPU, _EXT = 1, 12  # device types of DLPack
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _moved(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor)
    (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + 8)[:] = (device_type, 0)
    return torch._C._from_dlpack(capsule)


def as_fake(tensor: torch.Tensor) -> torch.Tensor:
    """Return a device tensor over the memory of a CPU tensor."""
    return _moved(tensor, _EXT)


def as_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor over the memory of a device tensor, without counting anything."""
    return _moved(tensor.detach(), _CPU)


# ------------------------------------------------------------------------------------------------ synchronisations


@dataclass
class Sync:
    kind: str
    op: str
    where: str  # innermost frame in the watched path
    stack: tuple[str, ...] = ()
    pending: int = 0  # operators since the last wait: what the device may still be busy with


@dataclass
class Log:
    path: str
    events: list[Sync] = field(default_factory=list)
    ops: Counter = field(default_factory=Counter)
    num_seen: int = 0  # operators up to the last wait

    @property
    def blocking(self) -> int:
        return sum(not e.kind.endswith("_async") for e in self.events)

    def table(self) -> list[tuple[int, str, str]]:
        counts = Counter((e.kind, e.where) for e in self.events)
        return sorted(((n, k, w) for (k, w), n in counts.items()), reverse=True)


_logs: list[Log] = []


@contextlib.contextmanager
def record(path: str = "") -> Iterator[Log]:
    """Record what synchronises inside; ``path`` says whose lines are to be named."""
    log = Log(path)
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


def _note(kind: str, op: Any) -> None:
    for log in _logs:
        frame, where, stack = sys._getframe(2), None, []
        while frame is not None:
            name = frame.f_code.co_filename
            if log.path and log.path in name and name != __file__:
                at = f"{name.split(log.path)[-1].lstrip('/')}:{frame.f_lineno} in {frame.f_code.co_name}"
                where = where or at
                stack.append(at)
            frame = frame.f_back
        if where is None:
            thread = threading.current_thread()
            where = "elsewhere" if thread is threading.main_thread() else "autograd thread"
        num_ops = log.ops.total()
        log.events.append(Sync(kind, str(op), where, tuple(stack), num_ops - log.num_seen))
        if not kind.endswith("_async"):
            log.num_seen = num_ops


# ------------------------------------------------------------------------------------------------ random numbers


class _Random:
    """A generator for each device index; tensors live on index 0, and others can be current (see the top)."""

    def __init__(self) -> None:
        self.current = 0
        self.generators = [torch.Generator().manual_seed(i) for i in range(2)]

    def of(self, device: Any = None) -> torch.Generator:
        if isinstance(device, str):
            device = torch.device(device)
        index = device.index if isinstance(device, torch.device) else device
        return self.generators[self.current if index is None else index]

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let CPU kernels draw from the generator of device 0."""
        host = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generators[0].get_state())
        try:
            yield
        finally:
            self.generators[0].set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(host)


_random = _Random()


class Backend:
    """What ``torch.fakegpu`` is."""

    _is_in_bad_fork = staticmethod(lambda: False)
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    is_bf16_supported = staticmethod(lambda *a, **k: True)
    device_count = staticmethod(lambda: 2)
    synchronize = staticmethod(lambda device=None: None)
    empty_cache = staticmethod(lambda: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])

    @staticmethod
    def current_device() -> int:
        return _random.current

    @staticmethod
    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        _random.current = 0 if index is None else index

    @classmethod
    @contextlib.contextmanager
    def device(cls, device: Any) -> Iterator[None]:
        before = _random.current
        cls.set_device(device)
        try:
            yield
        finally:
            _random.current = before

    @staticmethod
    def manual_seed(seed: int) -> None:
        _random.of().manual_seed(int(seed))

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        for generator in _random.generators:
            generator.manual_seed(int(seed))

    @staticmethod
    def get_rng_state(device: Any = NAME) -> torch.Tensor:
        return _random.of(device).get_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = NAME) -> None:
        _random.of(device).set_state(state)

    @property
    def default_generators(self) -> list[torch.Generator]:
        return _random.generators


# ------------------------------------------------------------------------------------------------ operators

_SYNC = {
    "aten::_local_scalar_dense": "item", "aten::equal": "equal", "aten::nonzero": "nonzero",
    "aten::masked_select": "nonzero", "aten::count_nonzero": "", "aten::_unique2": "other",
    "aten::unique_dim": "other", "aten::unique_consecutive": "other", "aten::bincount": "other",
    "aten::_linalg_eigh": "other", "aten::_linalg_svd": "other", "aten::linalg_lstsq": "other",
    "aten::linalg_eig": "other", "aten::multinomial": "other", "aten::repeat_interleave": "other",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index"}
_CPU_SCALAR_TOO = {"aten::fill_", "aten::fill", "aten::masked_fill_", "aten::masked_fill"}


@dataclass
class _Info:
    name: str
    writes: list[tuple[int | None, str]]
    returns_writes: list[str | None]
    is_random: bool
    has_cpu_scalars: bool
    is_view: bool
    sync: str
    names: list[str]
    tensors: set[str]


_infos: dict[Any, _Info] = {}


def _info(op: Any) -> _Info:
    if op not in _infos:
        schema = op._schema
        letters: dict[str, str] = {}
        writes = []
        for i, a in enumerate(schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                writes.append((None if a.kwarg_only else i, a.name))
                for letter in a.alias_info.before_set:
                    letters[letter] = a.name
        returns = []
        for r in schema.returns:
            is_write = r.alias_info is not None and r.alias_info.is_write
            returns.append(
                next((letters[x] for x in r.alias_info.before_set if x in letters), None) if is_write else None
            )
        name = schema.name
        _infos[op] = _Info(
            name=name,
            writes=writes,
            returns_writes=returns,
            is_random=torch.Tag.nondeterministic_seeded in op.tags,
            has_cpu_scalars=torch.Tag.pointwise in op.tags or name in _CPU_SCALAR_TOO,
            is_view=any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns),
            sync=_SYNC.get(name, ""),
            names=[a.name for a in schema.arguments],
            tensors={a.name for a in schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")},
        )
    return _infos[op]


def _is_fake(t: torch.Tensor) -> bool:
    return t.device.type == NAME


has_tf32 = False
"""Whether float32 factors are rounded to TF32 where the flags of ``torch.backends.cuda`` and ``cudnn`` allow it."""

_PRODUCTS = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"), torch._C._get_cublas_allow_tf32),
    **dict.fromkeys(("aten::convolution", "aten::convolution_backward"), torch._C._get_cudnn_allow_tf32),
}


def _as_tf32(t: torch.Tensor) -> torch.Tensor:
    if t.dtype != torch.float32:
        return t
    values = np.array(t.numpy(), order="C")  # not by torch: this also runs inside of forward mode
    bits = values.view(np.int32)
    bits += 0x1000
    bits &= ~0x1FFF
    return torch.from_numpy(values)


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    info = _info(op)
    for log in _logs:
        log.ops[info.name] += 1
    if info.sync:
        _note(info.sync, op)
    if info.name in _INDEXING:
        _check_indexing(op, info, args, kwargs)
    base: list[torch.Tensor] = []
    outs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_cpu(value: Any, position: int | None = None) -> Any:
        if isinstance(value, torch.Tensor):
            if not _is_fake(value):
                return _checked_cpu(op, info, value, position)
            alias = _moved(value, _CPU)
            base.append(value)
            return alias
        if isinstance(value, (list, tuple)):
            return type(value)(to_cpu(v, position) for v in value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type != NAME:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device.type}'")
        return value

    written = {n for _, n in info.writes}

    def convert(name: str, value: Any, position: int | None) -> Any:
        if name in written and isinstance(value, torch.Tensor) and _is_fake(value) and value.numel() == 0:
            fresh = torch.empty(0, dtype=value.dtype)  # the kernel may resize it
            if value.shape != (0,):
                fresh = fresh.new_empty(value.shape)
            outs.append((value, fresh))
            return fresh
        if name in info.tensors and isinstance(value, (bool, int, float)):  # a wrapped number, unwrapped by torch
            return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None, device="cpu")
        return to_cpu(value, position)

    with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunction():
        cpu_args = [convert(info.names[i], a, i) for i, a in enumerate(args)]
        cpu_kwargs = {k: convert(k, v, None) for k, v in kwargs.items()}
        if has_tf32 and info.name in _PRODUCTS and _PRODUCTS[info.name]():
            # Not what is added to the product: the first argument of addmm and baddbmm, the bias of a convolution.
            skipped = {"aten::addmm": 0, "aten::baddbmm": 0, "aten::convolution": 2}.get(info.name)
            for i, a in enumerate(cpu_args):
                if isinstance(a, torch.Tensor) and i != skipped:
                    cpu_args[i] = _as_tf32(a)
        with _random.drawing() if info.is_random else contextlib.nullcontext():
            result = op(*cpu_args, **cpu_kwargs)
        for fake, fresh in outs:
            if fresh.numel() or fresh.shape != fake.shape:
                _adopt(fake, fresh)
        return _wrapped(op, info, result, args, kwargs, base)


def _wrapped(op: Any, info: _Info, result: Any, args: Any, kwargs: Any, base: list[torch.Tensor]) -> Any:
    def wrap(value: Any, writes: str | None) -> Any:
        if writes is not None:
            return kwargs[writes] if writes in kwargs else args[info.names.index(writes)]
        if isinstance(value, torch.Tensor):
            if info.is_view and base and value.numel():
                first = base[0]
                if value.dtype != first.dtype:
                    raise NotImplementedError(f"{NAME}: view to another dtype, {op}")
                offset = first.storage_offset() + (value.data_ptr() - first.data_ptr()) // value.element_size()
                return _strided(first, value.shape, value.stride(), offset)
            return as_fake(value)
        if isinstance(value, (list, tuple)):
            return [wrap(v, None) for v in value]
        return value

    if isinstance(result, tuple) and len(info.returns_writes) > 1:
        return tuple(wrap(v, w) for v, w in zip(result, info.returns_writes, strict=True))
    return wrap(result, info.returns_writes[0] if info.returns_writes else None)


def _checked_cpu(op: Any, info: _Info, value: torch.Tensor, position: int | None) -> torch.Tensor:
    is_scalar = value.device.type == "cpu" and value.dim() == 0
    if is_scalar and info.has_cpu_scalars:
        return value
    if info.name in _INDEXING and value.device.type == "cpu" and position in (1, 2):
        if position == 1 or is_scalar:
            return value
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
        f"{value.device}! (when checking argument {position} of {op}, shape {tuple(value.shape)})"
    )


def _check_indexing(op: Any, info: _Info, args: Any, kwargs: Any) -> None:
    indices = args[1] if len(args) > 1 else kwargs["indices"]
    for index in indices:
        if index is None:
            continue
        if index.dtype in (torch.bool, torch.uint8) and info.name != "aten::index":  # whose structured part has told
            value = args[2] if len(args) > 2 else kwargs.get("values")
            if not (len(indices) == 1 and value is not None and value.numel() == 1):  # else it is a masked_fill
                _note("nonzero", op)
        if not _is_fake(index):
            _note("h2d", op)


def _strided(base: torch.Tensor, size: Any, stride: Any, offset: int) -> torch.Tensor:
    return torch.ops.aten.as_strided.default.redispatch(_CPU_KEYS, base, list(size), list(stride), offset)


def _adopt(fake: torch.Tensor, cpu: torch.Tensor) -> None:
    """Give a device tensor the memory and the shape of a CPU tensor."""
    source = as_fake(cpu)
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(
        _CPU_KEYS, fake, source.untyped_storage(), 0, list(cpu.shape), list(cpu.stride())
    )


def _as_strided(self: torch.Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> torch.Tensor:
    offset = self.storage_offset() if storage_offset is None else storage_offset
    return _strided(self, size, stride, offset)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return as_fake(torch.empty(size, dtype=dtype, memory_format=memory_format, device="cpu"))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return as_fake(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _zeros(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return as_fake(torch.zeros(size, dtype=dtype, device="cpu"))  # torch's own has no memory that could be aliased


def _copy_from(self: torch.Tensor, dst: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    source, target = _is_fake(self), _is_fake(dst)
    if source != target and self.numel():
        _note(("d2h" if source else "h2d") + ("_async" if non_blocking else ""), "aten::_copy_from")
    with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunction():
        a = _moved(self, _CPU) if source else self
        b = _moved(dst, _CPU) if target else dst
        torch.ops.aten.copy_.default(b, a)
    return dst


def _resize_(self: torch.Tensor, size: Any, *, memory_format=None) -> torch.Tensor:
    if list(self.shape) == list(size):
        return self
    fresh = torch.empty(size, dtype=self.dtype)
    if self.numel() and fresh.numel():
        n = min(self.numel(), fresh.numel())
        fresh.view(-1)[:n] = as_cpu(self).reshape(-1)[:n]
    _adopt(self, fresh)
    return self


def _set_tensor(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.set_.source_Storage_storage_offset.redispatch(
        _CPU_KEYS, self, source.untyped_storage(), source.storage_offset(), list(source.shape), list(source.stride())
    )


def _set_storage(self, source, storage_offset, size, stride=()):
    return torch.ops.aten.set_.source_Storage_storage_offset.redispatch(
        _CPU_KEYS, self, source, storage_offset, list(size), list(stride)
    )


def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    return _fallback(
        torch.ops.aten.convolution.default,
        input, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
    )  # fmt: skip


def _convolution_backward(
    grad_output, input, weight, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    bias_sizes = [grad_output.shape[1]] if output_mask[2] else None
    return _fallback(
        torch.ops.aten.convolution_backward.default,
        grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups,
        list(output_mask),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ autocast

_LOWER = (
    "linear matmul mm bmm addmm baddbmm addbmm mv addmv convolution conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d.input conv_transpose3d.input scaled_dot_product_attention"
).split()
_FULL = (
    "exp log pow.Tensor_Scalar softplus layer_norm group_norm nll_loss_nd kl_div l1_loss smooth_l1_loss mse_loss "
    "binary_cross_entropy_with_logits logsumexp softmax.int log_softmax.int cross_entropy_loss norm.Scalar sum "
    "sum.dim_IntList cumsum rsqrt reciprocal"
).split()
_casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def _install_autocast(lib: Any) -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, torch.Tensor):
            if not _is_fake(value) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
                return value
            is_cached = value.dtype == torch.float32 and value.is_leaf and value.requires_grad
            if not (is_cached and torch.is_autocast_cache_enabled()):
                return value.to(dtype)
            if id(value) not in _casts:
                _casts[id(value)] = (value, value.to(dtype))
            return _casts[id(value)][1]
        return type(value)(cast(v, dtype) for v in value) if isinstance(value, (list, tuple)) else value

    def make(op: Any, lower: bool) -> Any:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                dtype = torch.get_autocast_dtype(NAME) if lower else torch.float32
                return op(*(cast(a, dtype) for a in args), **{k: cast(v, dtype) for k, v in kwargs.items()})

        return kernel

    for lower, names in ((True, _LOWER), (False, _FULL)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            lib.impl(name, make(op, lower), "AutocastPrivateUse1")
    original = torch.clear_autocast_cache

    def clear_autocast_cache() -> None:
        _casts.clear()
        original()

    torch.clear_autocast_cache = clear_autocast_cache


# ------------------------------------------------------------------------------------------------ the rest


def _install_storage_clone() -> None:
    """Let ``copy.deepcopy`` of a tensor or a module work: torch would ask for an allocator of the device."""
    original = torch.storage._StorageBase.clone

    def clone(self: Any) -> Any:
        if self.device.type != NAME:
            return original(self)
        fresh = torch.empty(self.nbytes(), dtype=torch.uint8, device="cpu")
        ctypes.memmove(fresh.data_ptr(), self.data_ptr(), self.nbytes())
        return as_fake(fresh).untyped_storage()

    torch.storage._StorageBase.clone = clone


_libraries: list[Any] = []


def install() -> None:
    """Register the device; once per process."""
    if _libraries:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(_fallback, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name, kernel in {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_efficientzerotensor": _zeros,
        "_copy_from": _copy_from,
        "as_strided": _as_strided,
        "resize_": _resize_,
        "set_.source_Tensor": _set_tensor,
        "set_.source_Storage_storage_offset": _set_storage,
        "convolution_overrideable": _convolution,
        "convolution_backward_overrideable": _convolution_backward,
    }.items():
        aten.impl(name, kernel, "PrivateUse1")
    through = torch.library.Library("_", "IMPL")
    through.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _install_autocast(aten)
    _install_storage_clone()
    _libraries.extend([rest, aten, through])
