"""Everything that a run left, as nested tuples that can be compared bit for bit."""

from __future__ import annotations

import array
import collections
import copy
import functools
import io
import itertools
import queue
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

_ATOMS = (type(None), bool, int, bytes, bytearray, complex, torch.dtype, torch.device, torch.Size)
_SKIPPED = {
    "_trainer", "_fabric", "trainer", "_log_hyperparams", "_example_input_array", "_param_requires_grad_state",
    "_compiler_ctx", "_current_fx_name", "_metric_attributes", "_fabric_optimizers", "_last_time_checked",
}  # fmt: skip
"""Ways up to the Trainer, and Lightning's caches of names."""
_OURS = ("flatness", "sam/")


def fingerprint(run: Any, module: Any, pipeline: Any, callbacks: list[Any], records: list[Any]) -> dict[str, Any]:
    """Return what a finished run left.

    Args:
        run: The Trainer.
        module: Its LightningModule.
        pipeline: Its data.
        callbacks: The callbacks of the case, without those under test.
        records: What was logged.
    """
    take = Snapshot(run.default_root_dir)
    result = {
        "rng/torch": take(torch.get_rng_state()),
        "rng/cuda": take(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []),
        "rng/numpy": take(np.random.mtrand._rand),
        "rng/python": take(random.getstate()),
        "module": take(module),
        "optimizers": [take(o) for o in run.optimizers],
        "optimized": [_are_of(o, module) for o in run.optimizers],
        "schedulers": [take(c.scheduler.state_dict()) for c in run.lr_scheduler_configs],
        "data": take(pipeline),
        "callbacks": [take(c) for c in callbacks],
        "num_callbacks": len([c for c in run.callbacks if not _is_ours(c)]),
        "logged": take([r for r in map(_without_ours, records) if r is not None]),
        "metrics": take(_without_ours((0, dict(run.callback_metrics)))),
        "epochs": take(run.fit_loop.epoch_progress.state_dict()),
        "batches": take(run.fit_loop.epoch_loop.batch_progress.state_dict()),
        "modes": [m.training for m in module.modules()],
        "backend": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.mkldnn.enabled,
                    torch.backends.cuda.flash_sdp_enabled(), torch.are_deterministic_algorithms_enabled()),
    }  # fmt: skip
    for name in ("global_step", "current_epoch", "should_stop", "max_epochs", "num_training_batches",
                 "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches"):  # fmt: skip
        result[f"trainer/{name}"] = take(getattr(run, name))
    result["trainer/own"] = take({k: v for k, v in vars(run).items() if k.startswith("user_")})
    return result


def _is_ours(callback: Any) -> bool:
    return type(callback).__module__.startswith(("lightning_flatness", "fuzz.reference"))


def _without_ours(record: tuple[int | None, dict[str, Any]]) -> tuple[int | None, dict[str, Any]] | None:
    step, metrics = record
    kept = {k: v for k, v in metrics.items() if not k.startswith(_OURS)}
    return None if set(kept) <= {"epoch"} else (step, kept)


def _are_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[bool]:
    own = {id(p) for p in module.parameters()}
    return [id(p) in own for group in optimizer.param_groups for p in group["params"]]


class Snapshot:
    """Turns objects into nested tuples; an object seen before becomes a reference to its first place."""

    def __init__(self, path: str) -> None:
        self._path = path  # another one in every run
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(self._path, "")
        if isinstance(value, _ATOMS):
            return value
        if isinstance(value, float):
            return Float(value)
        if isinstance(value, type):
            return value.__qualname__
        if id(value) in self._seen:
            return ("seen", self._seen[id(value)])
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return self._take(value)

    def _take(self, value: Any) -> Any:
        kind = type(value).__name__
        if isinstance(value, torch.Tensor):
            return (kind, *self._tensor(value))
        if isinstance(value, np.ndarray):
            return (kind, Bits(value.dtype.str, value.shape, value.tobytes(), value.dtype.kind == "f"))
        if isinstance(value, np.generic):
            return (kind, Bits(value.dtype.str, (), value.tobytes(), value.dtype.kind == "f"))
        if isinstance(value, dict | collections.UserDict | types.MappingProxyType):
            own = self._own(value) if type(value) is not dict else ()
            return (
                kind,
                {self(k) if isinstance(k, str | int) else repr(type(k)): self(v) for k, v in value.items()},
                own,
            )
        if isinstance(value, list | tuple | collections.deque | collections.UserList | array.array):
            own = self._own(value) if type(value) not in (list, tuple) else ()
            return (kind, [self(v) for v in value], own)
        if isinstance(value, set | frozenset):
            return (kind, sorted(map(repr, value)))
        return self._object(value, kind)

    def _object(self, value: Any, kind: str) -> Any:
        if isinstance(value, torch.Generator):
            return (kind, self(value.get_state()))
        if isinstance(value, np.random.Generator):
            return (kind, self(value.bit_generator.state))
        if isinstance(value, np.random.RandomState):
            return (kind, self(value.get_state(legacy=False)))
        if isinstance(value, random.Random):
            return (kind, self(value.getstate()))
        if isinstance(value, queue.Queue):
            return (kind, self(list(value.queue)))
        if isinstance(value, functools.partial):
            return (kind, self(value.func), self(value.args), self(value.keywords))
        if isinstance(value, types.MethodType):
            return (kind, value.__name__, self(value.__self__))
        if isinstance(value, types.ModuleType):
            return (kind, value.__name__)
        if isinstance(value, torch.utils.hooks.RemovableHandle):
            return (kind,)
        if isinstance(value, types.FunctionType):
            return (kind, value.__qualname__, [self(c.cell_contents) for c in value.__closure__ or ()])
        if isinstance(value, io.IOBase):
            return (kind, "closed" if value.closed else value.tell())
        if isinstance(value, nn.Module):
            return (kind, self._module(value))
        if isinstance(value, torch.optim.Optimizer):
            return (kind, self(value.state_dict()), self(getattr(value, "user_state", None)))
        if isinstance(value, DataLoader):
            names = ("dataset", "sampler", "batch_sampler", "generator", "collate_fn", "batch_size")
            return (kind, [self(getattr(value, name)) for name in names])
        if isinstance(value, types.GeneratorType):
            return (kind, self(list(itertools.islice(value, 3))))
        if isinstance(value, Iterator):
            try:
                return (kind, self(list(itertools.islice(copy.copy(value), 20))))
            except (TypeError, NotImplementedError):
                return (kind, getattr(value, "_num_yielded", None))
        return (f"{type(value).__module__}.{kind}", self._own(value))

    def _own(self, value: Any) -> Any:
        module = type(value).__module__.partition(".")[0]
        if module in ("threading", "_thread", "_io", "multiprocessing", "weakref"):
            return ()
        slots = [s for c in type(value).__mro__ for s in _names(vars(c).get("__slots__", ())) if s[:2] != "__"]
        state = {s: self(getattr(value, s)) for s in slots if hasattr(value, s)}
        state |= {k: self(v) for k, v in getattr(value, "__dict__", {}).items() if k not in _SKIPPED}
        return state

    def _module(self, module: nn.Module) -> Any:
        if isinstance(module, torch.jit.ScriptModule):
            own = {f"{k}.{n}": self(getattr(m, n)) for k, m in module.named_modules() for n in _script_names(m)}
            return own | {k: self(v) for k, v in module.state_dict().items()}
        state = {}
        for name, value in vars(module).items():
            if name in _SKIPPED:
                continue
            state[name] = len(value) if name.endswith("_hooks") else self(value)
        return state

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if tensor.layout != torch.strided:
            return ("sparse", self(tensor.coalesce().indices()), self(tensor.coalesce().values()))
        flat = tensor.detach().cpu().contiguous()
        content = flat.view(torch.uint8) if flat.dim() and flat.numel() else flat
        bits = Bits(str(tensor.dtype), tuple(tensor.shape), _bytes(content), tensor.is_floating_point())
        gradient = self(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None
        hooks = len(tensor._backward_hooks or ())
        return (bits, tensor.requires_grad, tensor.is_leaf, gradient, hooks)


def _script_names(module: Any) -> list[str]:
    return sorted(module._concrete_type.get_attributes()) if isinstance(module, torch.jit.ScriptModule) else []


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes() if tensor.dtype != torch.bfloat16 else tensor.float().numpy().tobytes()


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


class Float(float):
    """A number whose value, not only its presence, is compared bit for bit: NaN equals NaN."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and (self.hex() == other.hex())

    __hash__ = float.__hash__


class Bits:
    """The content of an array."""

    def __init__(self, dtype: str, shape: tuple[int, ...], content: bytes, is_floating: bool) -> None:
        self.dtype, self.shape, self.content, self.is_floating = dtype, shape, content, is_floating

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bits) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.is_floating and "bfloat16" not in self.dtype:
            kind = np.dtype(self.dtype.replace("torch.", "").replace("<", ""))
            return f"{self.dtype}{list(self.shape)} {np.frombuffer(self.content, kind)[:4]}"
        return f"{self.dtype}{list(self.shape)} {self.content[:24].hex()}"


def difference(one: Any, other: Any, counts_only: bool = False, path: str = "") -> str:
    """Return where two fingerprints differ first, with both values; empty if they are equal.

    Args:
        one: A fingerprint.
        other: Another.
        counts_only: Whether floating point values may differ: for runs with and without SAM.
        path: Where in the fingerprint this is.
    """
    if type(one) is not type(other):
        return f"{path}: {_short(one)} against {_short(other)}"
    if isinstance(one, dict):
        if list(one) != list(other):
            return f"{path}: keys {_short(_missing(one, other))} against {_short(_missing(other, one))}"
        pairs = [(str(k), one[k], other[k]) for k in one]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{path}: {len(one)} items {_short(one)} against {len(other)} {_short(other)}"
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        if counts_only and isinstance(one, Float):
            return ""
        if counts_only and isinstance(one, Bits) and one.is_floating:
            return "" if (one.dtype, one.shape) == (other.dtype, other.shape) else f"{path}: {one} against {other}"
        return "" if one == other else f"{path}: {_short(one)} against {_short(other)}"
    return next((found for k, a, b in pairs if (found := difference(a, b, counts_only, f"{path}/{k}"))), "")


def _missing(one: dict[Any, Any], other: dict[Any, Any]) -> list[Any]:
    return [k for k in one if k not in other] or list(one)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:160]}…"
