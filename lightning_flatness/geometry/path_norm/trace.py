"""Trace which operations a loss consists of: a mode that watches torch functions while the user's code runs.

The code runs as it is, on the first batch. Every tensor is known as data (from the batch), a weight, a unit (computed
from weights by operations of the table) or the result of something else. What is not positively homogeneous may come
behind the network, as losses do; where a layer follows it, the error names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_flatness.geometry.base import UndefinedGeometryError
from lightning_flatness.geometry.path_norm.operations import CONSTANTS, OPERATIONS, SHAPES
from lightning_flatness.geometry.path_norm.program import Node, Program, Ref
from lightning_flatness.module.batches import tensors_in

LAYERS = {"linear", "bilinear", "embedding", "batch_norm", "matmul", "mm", "bmm", "addmm", "einsum", "mv", "rmatmul"}
LAYERS |= {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_HINT = "Use the geometry 'element' or 'layer'; for attention, 'attention'."


def not_homogeneous(found: str) -> UndefinedGeometryError:
    """Return the error for a network that has something else than positively homogeneous units."""
    return UndefinedGeometryError(
        "Expected a network of positively homogeneous units (linear layers, convolutions, BatchNorm, ReLU, pooling, "
        f"sums) for the geometry 'path_norm', got {found}. {_HINT}"
    )


Kind = Literal["data", "weight", "unit", "other"]


@dataclass(frozen=True)
class _Value:
    """Properties of a tensor.

    Attributes:
        kind: ``"data"``, ``"weight"``, ``"unit"`` or ``"other"``.
        node: Its number in the program, where it is in it.
        is_trained: Whether it depends on trainable weights.
        source: The operation that is not homogeneous, for error messages.
    """

    kind: Kind
    node: int = -1
    is_trained: bool = False
    source: str = ""


class Trace(TorchFunctionMode):
    """Writes a :class:`Program` while a loss is computed.

    Args:
        module: The module. Inside the block it has hooks that know which layer runs.
        parameters: The tensor to read at evaluation, for each parameter of the module, by its ``id``.
        buffers: The same for its buffers.
    """

    def __init__(self, module: nn.Module, parameters: dict[int, Tensor], buffers: dict[int, Tensor]) -> None:
        super().__init__()
        self._parameters = parameters
        self._buffers = buffers
        self._values: dict[int, tuple[Tensor, _Value]] = {}  # with the tensors, so that no id is used again
        self._stack: list[tuple[str, str]] = [("", type(module).__name__)]
        self.program = Program()
        self.seen: set[int] = set()
        self._module = module
        self._hooks: list[Any] = []

    def __enter__(self) -> Trace:
        for name, child in self._module.named_modules():
            if name and not isinstance(child, torch.jit.ScriptModule):
                self._hooks.append(child.register_forward_pre_hook(self._enter(name, child)))
                self._hooks.append(child.register_forward_hook(self._leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str, child: nn.Module) -> Callable[..., None]:
        return lambda *_: self._stack.append((name, type(child).__name__))

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def mark_data(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors for inputs of the network."""
        for tensor in tensors:
            self._set(tensor, _Value("data"))

    def finish(self, loss: Any, num_samples: int) -> Program:
        """Return the program, given what the loss function returned for so many samples."""
        for tensor in tensors_in(loss):
            value = self._get(tensor)
            if value is not None and value.kind == "unit":
                self.program.outputs.add(value.node)
        self.program.finish(num_samples)
        return self.program

    # --------------------------------------------------------------------------------------------------- watching

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name == "backward":
            return None
        inputs = list(tensors_in([args, kwargs]))
        values = [value for tensor in inputs if (value := self._get(tensor)) is not None]
        base = _base(args[0]) if args and isinstance(args[0], Tensor) else None
        statistics = self._statistics(func, args, kwargs) if name == "batch_norm" and values else None
        result = func(*args, **kwargs)
        if values and name not in CONSTANTS.split():
            results = list(tensors_in(result)) if not isinstance(result, torch.Size) else []
            is_written = name == "setitem" or (func.__name__.endswith("_") and not func.__name__.endswith("__"))
            if is_written or results:
                self._record(name, statistics or (args, kwargs), values, results, args[0] if is_written else None, base)
        return result

    def _record(
        self,
        name: str,
        call: tuple[Any, Any],
        values: list[_Value],
        results: list[Tensor],
        written: Any,
        base: Tensor | None,
    ) -> None:
        kinds = {value.kind for value in values}
        is_trained = any(value.is_trained for value in values)
        others = [value for value in values if value.kind == "other"]
        if not others and kinds == {"data"}:
            value: _Value | None = _Value("data")
        elif not others:
            value = self._operation(name, call, values, is_trained, results)
        elif name in LAYERS and (kinds & {"weight"} or others[0].source.startswith("weights")):
            raise not_homogeneous(others[0].source)
        else:
            value = None
        if value is None:
            for unit in (v for v in values if v.kind == "unit"):
                self.program.outputs.add(unit.node)
            source = others[0].source if others else self._place(name, kinds)
            value = _Value("other", -1, is_trained, source) if is_trained else _Value("data")
        if value.kind == "other" and isinstance(written, Tensor):
            self._set(written, value)
        if base is not None and isinstance(written, Tensor) and name not in ("relu", "leaky_relu", "dropout"):
            self._set(base, _Value("other", -1, True, self._place(name, kinds)))
        if value.kind in ("data", "other"):
            for tensor in results:
                self._set(tensor, value)

    def _operation(
        self, name: str, call: tuple[Any, Any], values: list[_Value], is_trained: bool, results: list[Tensor]
    ) -> _Value | None:
        """Add an operation to the program; return None if it is none of a positively homogeneous network."""
        function, rule = OPERATIONS.get(name, (None, "all"))
        kinds = [value.kind for value in values]
        num_units = kinds.count("unit")
        fits = {"all": True, "product": num_units <= 1, "first": num_units + kinds.count("weight") <= 1}[rule]
        if name == "prelu":
            fits = num_units <= 1
        if name in ("div", "divide", "truediv", "itruediv") and not (
            isinstance(call[0][0], Tensor) and self._get(call[0][0]) is not None
        ):
            fits = False
        is_weight = not num_units and "data" not in kinds
        if is_weight and name not in SHAPES.split() and name not in ("mul", "imul", "rmul", "cat", "stack", "clone"):
            fits = False  # the weights of a parametrization, a penalty
        if function is not None and fits:
            try:
                node = Node(function, *self._operands(call))
                units = [i for i, tensor in enumerate(results) if tensor.is_floating_point()]
                numbers = [self.program.add(node if len(results) == 1 else node.part(i)) for i in units]
            except (NotImplementedError, TypeError):
                pass
            else:
                for tensor in results:  # indices of a maximum
                    self._set(tensor, _Value("other", -1, is_trained, self._place(name, set(kinds))))
                for number, i in zip(numbers, units, strict=True):
                    self._set(results[i], _Value("weight" if is_weight else "unit", number, is_trained))
                return _Value("weight" if is_weight else "unit", -1, is_trained)
        if is_trained and "weight" in kinds and not is_weight:
            raise not_homogeneous(self._place(name, set(kinds)))
        return None

    def _operands(self, call: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the arguments with references to nodes in the place of tensors, and squares of constants."""

        def operand(tensor: Tensor) -> Any:
            value = self._get(tensor)
            if value is not None and value.kind != "data":
                return Ref(value.node)
            if not tensor.is_floating_point():
                return tensor.detach()
            if value is not None:
                return Ref(self.program.add(Node(_ones, (tensor.shape, tensor.device), {})))
            return Ref(self.program.add(Node(_squared, (self._buffers.get(id(tensor), tensor).detach(),), {})))

        return _mapped(operand, call[0]), _mapped(operand, call[1])

    def _statistics(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return the arguments of a normalisation with the variance that it divides by."""
        names = "input weight bias running_mean running_var training momentum eps"
        if func is not torch.batch_norm:
            names = "input running_mean running_var weight bias training momentum eps"
        given = {**dict(zip(names.split(), args, strict=False)), **kwargs}
        x, running = given["input"], given.get("running_var")
        if given.get("training") or running is None:
            axes = [d for d in range(x.dim()) if d != 1]
            variance = x.detach().var(axes, correction=0)
        else:
            variance = self._buffers.get(id(running), running)
        return (x, given.get("weight"), given.get("bias")), {
            "variance": _Constant(variance),
            "eps": given.get("eps", 1e-5),
        }

    # ------------------------------------------------------------------------------------------------------ values

    def _get(self, tensor: Tensor) -> _Value | None:
        known = self._values.get(id(tensor))
        if known is not None and known[0] is tensor:
            return known[1]
        original = self._parameters.get(id(tensor))
        if original is None:
            return None
        self.seen.add(id(tensor))
        value = _Value("weight", self.program.parameter(original), tensor.requires_grad)
        self._set(tensor, value)
        return value

    def _set(self, tensor: Tensor, value: _Value) -> None:
        self._values[id(tensor)] = (tensor, value)

    def _place(self, name: str, kinds: set[Kind]) -> str:
        where, owner = self._stack[-1]
        place = f"{owner} ({where!r})" if where else owner
        what = f"the operation {name!r} in {place}"
        return what if kinds != {"weight"} else f"weights that are computed from parameters by {what}"


@dataclass(frozen=True)
class _Constant:
    tensor: Tensor


def _ones(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _squared(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.device.type == "mps" else tensor.double()).square()


def _mapped(function: Callable[[Tensor], Any], data: Any) -> Any:
    if isinstance(data, _Constant):
        return data.tensor
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, dict):
        return {key: _mapped(function, item) for key, item in data.items()}
    if isinstance(data, list | tuple) and not isinstance(data, torch.Size):
        return type(data)(_mapped(function, item) for item in data)
    return data


def _base(tensor: Tensor) -> Tensor | None:
    return tensor._base if tensor._is_view() else None


def _name(func: Any) -> str:
    """Return the bare name of a function, method, operator or property."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
    return str(name).strip("_")
