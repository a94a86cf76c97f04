"""Leave no trace: run a module's forward pass and put back everything that it touched.

A measurement runs the user's own code (``forward``, ``training_step``) many times. That code updates
BatchNorm statistics and torchmetrics, appends to lists, counts steps, logs, and draws random numbers; none
of it may reach the training run, and none of it may make the second evaluation of the loss differ from the
first, for then the loss would not be a function of the weights. So:

- ``isolated`` holds for one measurement: modes, RNG states, autocast, kernels, loggers, gradient hooks.
- ``Isolation.forward_pass`` holds for one forward pass: it starts from the same buffers, the same Python state
  and the same random numbers every time.
- ``ReplayedPass`` is for training that looks at a batch twice (SAM): the second pass starts where the first one
  started, and afterwards all is as the first one left it.

Buffers are swapped for copies, never written to: the originals keep their identity and their bits, and
several graphs can be alive although BatchNorm updates its statistics in place.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Mode = Literal["eval", "train"]

_MAX_COPIED_BYTES = 64 * 2**20
"""Tensors and arrays in plain attributes are copied up to this size; larger ones are taken to be data."""

_FOREIGN_PACKAGES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "tensorboard", "numpy"}
"""Objects of classes from these packages (and the standard library) are not the user's state."""


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw the same random numbers inside, and leave every generator outside as it was.

    Covers torch on the CPU and on ``device``, Python's ``random`` and NumPy's global generator.

    Args:
        seed: Seed of all generators inside the block.
        device: The accelerator whose generator is covered too.
    """
    with preserved_rng(device):
        seed_all(seed, device)
        yield


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Put back the states of torch's generators (CPU and ``device``), of ``random`` and of NumPy's on leaving."""
    restore = _remember_rng(device)
    try:
        yield
    finally:
        restore()


def _remember_rng(device: torch.device | None) -> Callable[[], None]:
    """Return what puts every generator back to where it is now."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    accelerator = _accelerator_module(device)
    accelerator_state = None if accelerator is None else accelerator.get_rng_state()

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if accelerator is not None:
            accelerator.set_rng_state(accelerator_state)

    return restore


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's generators (CPU and ``device``), ``random`` and NumPy's; other devices are left alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if (accelerator := _accelerator_module(device)) is not None:
        accelerator.manual_seed(seed)


def _accelerator_module(device: torch.device | None) -> Any:
    return None if device is None or device.type in ("cpu", "meta") else getattr(torch, device.type)


class Isolation:
    """Guard of the single forward passes of one measurement; made by :func:`isolated`.

    Args:
        module: The module whose state is guarded.
        device: Where the module's parameters are.
        seed: Seed of the random numbers of every forward pass (dropout masks, augmentation).
    """

    def __init__(self, module: nn.Module, device: torch.device, seed: int) -> None:
        self._module = module
        self._device = device
        self._seed = seed
        self._python_state = _PythonState(module)

    @contextmanager
    def forward_pass(self, index: int) -> Iterator[None]:
        """Guard one forward pass.

        Args:
            index: Number of the batch: the same batch sees the same random numbers in every pass.
        """
        with _copied_buffers(self._module):
            seed_all(self._seed + index, self._device)
            try:
                yield
            finally:
                self._python_state.restore()


class ReplayedPass:
    """A pass of training that can be run once more, from where it started and without a trace.

    Make it right before the pass. Inside :meth:`again` the generators, the buffers and the plain attributes of the
    module are as they were then, so that the second pass evaluates the same function of the weights (the same
    dropout mask, the same queue of a contrastive loss, the same count of calls). On leaving, all of it is as it was
    when ``again`` was entered: statistics, metrics and counters have seen the first pass only.

    Frozen parameters are covered too, for a ``training_step`` that moves a momentum encoder, but only as long as
    they take no more memory than the trainable ones: the frozen backbone of a fine-tuning run is not copied.
    Trainable parameters and their gradients are the caller's. Autocast, modes and hooks are left as they are.

    Args:
        module: The module whose state is guarded.
        device: Where the module's parameters are.
    """

    def __init__(self, module: nn.Module, device: torch.device | None) -> None:
        self._module = module
        self._device = device
        self._start_rng = _remember_rng(device)
        self._start = _PythonState(module)
        copies: dict[int, Tensor] = {}  # a buffer that is registered twice stays one tensor
        modules = list(module.modules())
        self._buffers = [
            (m._buffers, {name: _copy_once(b, copies) for name, b in m._buffers.items() if b is not None})
            for m in modules
            if m._buffers and _is_open(m)
        ]
        scripted = [b for m in modules if not _is_open(m) for b in m._buffers.values() if b is not None]
        self._exchanged = [(t, _copy_once(t, copies)) for t in (*_small_frozen_parameters(modules), *scripted)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Guard the second pass. Nothing is logged inside."""
        end = self._start.present()
        # The pass may have unfrozen some of them; those are the caller's now, who may have moved them.
        exchanged = [(t, t.data, copied) for t, copied in self._exchanged if not t.requires_grad]
        with preserved_rng(self._device):
            try:
                self._start.restore()
                self._start_rng()
                for buffers, copies in self._buffers:
                    buffers.update(copies)
                for tensor, _, copied in exchanged:
                    tensor.data = copied
                with _muted_logging(self._module):
                    yield
            finally:
                for tensor, original, _ in exchanged:
                    tensor.data = original
                end.restore()  # the dictionaries of buffers too


def _copy_once(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone()
    return copies[id(tensor)]


def _is_open(module: nn.Module) -> bool:
    """Return whether tensors of the module can be exchanged in its dictionaries: not in those of TorchScript."""
    return isinstance(module._buffers, dict)


def _small_frozen_parameters(modules: Iterable[nn.Module]) -> list[Tensor]:
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
    frozen: list[Tensor] = [p for p in parameters if not p.requires_grad]
    if not frozen:
        return []
    trainable_bytes = sum(p.nbytes for p in parameters if p.requires_grad)
    return frozen if sum(p.nbytes for p in frozen) <= trainable_bytes else []


@contextmanager
def isolated(module: nn.Module, mode: Mode, device: torch.device, seed: int) -> Iterator[Isolation]:
    """Guard a measurement of ``module``: evaluate it in ``mode`` and leave nothing changed.

    Args:
        module: The module to evaluate.
        mode: ``"eval"``, or ``"train"`` for batch statistics and dropout as in training (submodules that are
            in evaluation mode by the user's choice stay so).
        device: Where the module's parameters are.
        seed: Seed of the random numbers of every forward pass.

    Yields:
        The guard of single forward passes.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(device))
        stack.enter_context(_in_mode(module, mode))
        stack.enter_context(_muted_logging(module))
        stack.enter_context(_without_backward_hooks(module))
        stack.enter_context(twice_differentiable(module, device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield Isolation(module, device, seed)


@contextmanager
def _in_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    flags = [(m, m.training) for m in module.modules()]
    if mode == "eval" or not module.training:
        for submodule, _ in flags:
            submodule.training = mode == "train"
    try:
        yield
    finally:
        for submodule, training in flags:
            submodule.training = training


@contextmanager
def twice_differentiable(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Choose kernels that have second derivatives, in full precision and without compilation."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_mha_fastpath_disabled())
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(_disabled(torch.backends.cudnn))
            stack.enter_context(_disabled(torch.backends.mkldnn))
        stack.enter_context(_eager())
        yield


class DifferentiableWeightNorm(TorchFunctionMode):
    """Computes ``torch._weight_norm`` from elementary operators: the second derivative of the fused one is wrong.

    (torch 2.13 takes the norm for a constant there. A test fails when that is mended or the name moves.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


@contextmanager
def _disabled(backend: Any) -> Iterator[None]:
    # Not backend.flags(enabled=False), which sets the other flags, too, and warns of them on some machines.
    enabled = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = enabled


@contextmanager
def _mha_fastpath_disabled() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _eager() -> AbstractContextManager[Any]:
    # Where nothing has imported dynamo nothing is compiled, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _without_backward_hooks(module: nn.Module) -> Iterator[None]:
    """Suspend backward hooks of parameters and submodules: they change or record the gradients of training.

    There is no public way to suspend a hook. ``_backward_hooks`` is the attribute that ``register_hook`` and
    ``register_full_backward_hook`` set themselves.
    """
    holders: list[Any] = [*module.parameters(), *module.modules()]
    hooked: list[tuple[Any, Any]] = [(holder, holder._backward_hooks) for holder in holders if holder._backward_hooks]
    for holder, hooks in hooked:
        holder._backward_hooks = None if isinstance(holder, Tensor) else type(hooks)()
    try:
        yield
    finally:
        for holder, hooks in hooked:
            holder._backward_hooks = hooks


@contextmanager
def _copied_buffers(module: nn.Module) -> Iterator[None]:
    """Let the module work on copies of its buffers; a buffer that is registered twice stays one tensor.

    ``_buffers`` is the dictionary behind ``register_buffer``: writing to it keeps what is persistent persistent.
    """
    saved = [(m, dict(m._buffers)) for m in module.modules() if m._buffers]
    copies: dict[int, Tensor] = {}
    for submodule, buffers in saved:
        for name, buffer in buffers.items():
            if buffer is not None:
                submodule._buffers[name] = _copy_once(buffer, copies)
    try:
        yield
    finally:
        for submodule, buffers in saved:
            submodule._buffers.clear()
            submodule._buffers.update(buffers)


class _MutedLogger:
    """Stands in for a logger: keeps its places and names, takes every call and does nothing."""

    _KEPT = ("name", "version", "save_dir", "log_dir", "root_dir")

    def __init__(self, logger: Any = None) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        if name in self._KEPT and self._logger is not None:
            return getattr(self._logger, name)
        return _MutedLogger()

    def __call__(self, *args: Any, **kwargs: Any) -> _MutedLogger:
        return _MutedLogger()

    def __enter__(self) -> _MutedLogger:
        return self

    def __exit__(self, *args: object) -> None:
        return None


@contextmanager
def _muted_logging(module: nn.Module) -> Iterator[None]:
    """Let ``self.log``, ``self.log_dict``, ``self.print`` and the loggers of a LightningModule do nothing."""
    steppers = [m for m in module.modules() if hasattr(m, "training_step")]
    shadowed = [(m, {name: m.__dict__[name] for name in _LOGGING if name in m.__dict__}) for m in steppers]
    trainer = _attached_trainer(module)
    loggers: list[Any] = [] if trainer is None else trainer.loggers
    try:
        for stepper in steppers:
            stepper.__dict__.update(dict.fromkeys(_LOGGING, _do_nothing))
        if trainer is not None:
            trainer.loggers = [_MutedLogger(logger) for logger in loggers]
        yield
    finally:
        for stepper, attributes in shadowed:
            for name in _LOGGING:
                stepper.__dict__.pop(name, None)
            stepper.__dict__.update(attributes)
        if trainer is not None:
            trainer.loggers = loggers


_LOGGING = ("log", "log_dict", "print")


def _attached_trainer(module: nn.Module) -> Any:
    try:
        trainer = getattr(module, "trainer", None)
    except RuntimeError:  # what a LightningModule raises that no Trainer runs
        return None
    return trainer if hasattr(trainer, "loggers") else None


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Kept(NamedTuple):
    """One thing to be put back: ``refill(target, saved)``, where ``saved`` came from ``copy(target, earlier)``."""

    target: Any
    copy: Callable[[Any, Any], Any]
    refill: Callable[[Any, Any], object]
    saved: Any


class _PythonState:
    """The plain attributes of a module and all that can be reached from them, to be put back in place.

    Containers, tensors (torchmetrics keep their states so), arrays, generators and objects of the user's own
    classes get their contents back and keep their identity. Parameters are never written to.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[_Kept] = []
        seen: set[int] = set()
        pending: list[Any] = [module]
        while pending:
            value = pending.pop()
            if type(value) not in _ATOMS and id(value) not in seen:
                seen.add(id(value))
                pending.extend(self._keep(value))

    def restore(self) -> None:
        for kept in self._kept:
            kept.refill(kept.target, kept.saved)

    def present(self) -> _PythonState:
        """Return the state now of what this one holds. Cheaper than a new one: nothing is searched through."""
        state = _PythonState.__new__(_PythonState)
        state._kept = [_Kept(k.target, k.copy, k.refill, k.copy(k.target, k.saved)) for k in self._kept]
        return state

    def _keep(self, value: Any) -> Iterable[Any]:
        """Remember what ``value`` holds; return what is to be remembered next."""
        if isinstance(value, nn.Module):
            return self._keep_module(value)
        if isinstance(value, dict):
            self._remember(value, _copy_dict, _refill_dict)
            return value.values()
        if isinstance(value, list | deque):
            self._remember(value, _copy_list, _refill_list)
            return value
        if isinstance(value, set):
            self._remember(value, _copy_set, _refill_dict)
        elif isinstance(value, tuple):
            return value
        elif isinstance(value, Tensor):
            # Parameters belong to the optimizer and a tensor with a history cannot be written to in place.
            if not value.requires_grad and value.layout == torch.strided and value.nbytes <= _MAX_COPIED_BYTES:
                self._remember(value, _copy_tensor, _refill_tensor)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _MAX_COPIED_BYTES and value.flags.writeable:
                self._remember(value, _copy_array, np.copyto)
        elif isinstance(value, torch.Generator):
            self._remember(value, _get_torch_generator, torch.Generator.set_state)
        elif isinstance(value, np.random.Generator):
            self._remember(value, _get_bit_generator, _set_bit_generator)
        elif isinstance(value, random.Random):
            self._remember(value, _get_python_generator, random.Random.setstate)
        elif _is_user_object(value):
            return (vars(value),)
        return ()

    def _keep_module(self, module: nn.Module) -> Iterable[Any]:
        attributes = module.__dict__
        dictionaries = [attributes, attributes["_parameters"], attributes["_buffers"]][: 3 if _is_open(module) else 1]
        self._remember(dictionaries, _copy_dicts, _refill_dicts)
        values = [v for name, v in attributes.items() if name not in _SKIPPED and not name.endswith("_hooks")]
        return [*values, attributes["_modules"]]

    def _remember(self, target: Any, copy: Callable[[Any, Any], Any], refill: Callable[[Any, Any], object]) -> None:
        self._kept.append(_Kept(target, copy, refill, copy(target, None)))


_ATOMS = {type(None), bool, str, bytes, int, float, complex, type, FunctionType, MethodType, torch.dtype, torch.device}
"""Types of values that hold nothing to be put back. What is not found here is looked at in more detail."""

_SKIPPED = {*vars(nn.Module()), "_trainer", "_fabric"}
"""Attributes of modules that are not searched: those that every module has, whose contents are kept apart, and the way
up to the Trainer."""


def _copy_dicts(target: list[dict[Any, Any]], earlier: Any) -> list[dict[Any, Any]]:
    return [dict(d) for d in target]


def _refill_dicts(target: list[dict[Any, Any]], saved: list[dict[Any, Any]]) -> None:
    for d, contents in zip(target, saved, strict=True):
        d.clear()
        d.update(contents)


def _copy_dict(target: dict[Any, Any], earlier: Any) -> dict[Any, Any]:
    return dict(target)


def _copy_list(target: Iterable[Any], earlier: Any) -> list[Any]:
    return list(target)


def _copy_set(target: set[Any], earlier: Any) -> set[Any]:
    return set(target)


def _copy_tensor(target: Tensor, earlier: tuple[int | None, Tensor] | None) -> tuple[int | None, Tensor]:
    version = None if target.is_inference() else target._version
    if earlier is not None and version is not None and version == earlier[0]:
        return earlier
    return version, target.clone()


def _copy_array(target: np.ndarray[Any, Any], earlier: Any) -> np.ndarray[Any, Any]:
    return target.copy()


def _get_torch_generator(target: torch.Generator, earlier: Any) -> Tensor:
    return target.get_state()


def _get_bit_generator(target: np.random.Generator, earlier: Any) -> Any:
    return target.bit_generator.state


def _get_python_generator(target: random.Random, earlier: Any) -> Any:
    return target.getstate()


def _refill_dict(target: Any, saved: Any) -> None:
    target.clear()
    target.update(saved)


def _refill_list(target: Any, saved: list[Any]) -> None:
    target.clear()
    target.extend(saved)


def _refill_tensor(target: Tensor, saved: tuple[int | None, Tensor]) -> None:
    version, values = saved
    if target.is_inference():
        with torch.inference_mode():
            target.copy_(values)
    elif target._version != version:
        with torch.no_grad():
            target.copy_(values)


def _set_bit_generator(target: np.random.Generator, state: Any) -> None:
    target.bit_generator.state = state


def _is_user_object(value: Any) -> bool:
    package = type(value).__module__.partition(".")[0]
    foreign = package in _FOREIGN_PACKAGES or package in sys.stdlib_module_names
    return hasattr(value, "__dict__") and not foreign and not isinstance(value, torch.utils.data.Dataset)
