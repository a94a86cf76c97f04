"""Plain attributes of a module that its step changes, and from which its loss depends."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import queue
import random
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fuzz.base import Base, Data, add, feature, unpack


def state(name: str, make: Callable[[], Any], touch: Callable[[Any], float], **options: Any) -> None:
    """Register an attribute, made with ``make``; ``touch`` changes it and returns what the loss is scaled by."""

    class Holder(Base):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, f"held_{name}", make())

        def compute(self, batch: Any) -> Tensor:
            return super().compute(batch) * (1 + 0.05 * touch(getattr(self, f"held_{name}")))

    if not options.get("reference", True):
        options.setdefault("slot", "copies")  # nor can other callbacks copy it
    add(name, Holder, **options)


def _append(values: Any, value: Any = 1) -> float:
    values.append(value)
    return float(len(values))


class Slotted:
    __slots__ = ("count", "seen")

    def __init__(self) -> None:
        self.count = 0
        self.seen: list[Any] = []

    def touch(self) -> float:
        self.count += 1
        self.seen.append(self.count)
        return float(self.count)


class SlottedChild(Slotted):
    __slots__ = ("__dict__",)


class Counter:
    """A plain object, with a list and a reference to itself."""

    def __init__(self) -> None:
        self.count, self.me = 0, self
        self.seen: dict[str, list[int]] = {"all": []}

    def touch(self) -> float:
        self.count += 1
        self.seen["all"].append(self.count)
        return float(self.count)


class RecentValues(collections.deque):
    """A deque with an attribute."""

    count: Any  # not the method

    def __init__(self, values: Any = (), maxlen: int | None = 3) -> None:
        super().__init__(values, maxlen)
        self.count = 0

    def append(self, value: Any) -> None:
        self.count += 1
        super().append(value)


class StubbornDict(dict):
    """As `BatchEncoding` and `ModelOutput`: refuses to be emptied and refilled."""

    def clear(self) -> None:
        raise RuntimeError("You cannot use `clear` on this dict")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("You cannot use `update` on this dict")


class StubbornList(list):
    def clear(self) -> None:
        raise RuntimeError("You cannot use `clear` on this list")

    def extend(self, *args: Any) -> None:
        raise RuntimeError("You cannot use `extend` on this list")


class CountingList(list):
    """A list with an attribute."""

    count: Any = 0

    def append(self, value: Any) -> None:
        self.count += 1
        super().append(value)


@dataclasses.dataclass
class Record:
    count: int = 0
    values: list[int] = dataclasses.field(default_factory=list)

    def touch(self) -> float:
        self.count += 1
        self.values.append(self.count)
        return float(self.count)


class Property:
    """Keeps its count behind a property that checks."""

    def __init__(self) -> None:
        self._count = 0

    @property
    def count(self) -> int:
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        if value < self._count:
            raise ValueError("counts do not fall")
        self._count = value

    def touch(self) -> float:
        self.count += 1
        return float(self.count)


def _count(values: dict[str, Any]) -> float:
    values["n"] = values.get("n", 0) + 1
    return float(values["n"])


def _add_one(tensor: Any) -> float:
    tensor += 1
    return float(tensor.sum()) / 10


def _through_data(tensor: Tensor) -> float:
    tensor.data.add_(1)
    return float(tensor.sum()) / 10


def _through_numpy(tensor: Tensor) -> float:
    tensor.numpy()[:] += 1
    return float(tensor.sum()) / 10


def _put(values: Any) -> float:
    values.put(1)
    return float(values.qsize())


def _set_attribute(values: Any) -> float:
    values.count = values.count + 1
    return float(values.count)


def _replace_first(values: list[Any]) -> float:
    values[0] = values[0] + 1
    return float(values[0].sum())


def _next(values: Any) -> float:
    return float(next(values))


def _read(file: Any) -> float:
    return float(len(file.read(2)))


def _write(file: Any) -> float:
    file.write("x")
    return float(file.tell())


def _touch(value: Any) -> float:
    return value.touch()


def _nested(values: dict[str, Any]) -> float:
    values["a"][0]["b"].append(1)
    return float(len(values["a"][0]["b"]))


def _visit(values: set[int]) -> float:
    values.add(len(values))
    return float(len(values))


def _partial() -> Any:
    return functools.partial(_append, [])


state("list_attribute", list, _append)
state("dict_attribute", dict, _count)
state("set_attribute", set, _visit)
state("deque_attribute", lambda: collections.deque(maxlen=3), _append)
state("deque_subclass", RecentValues, _append)
state("list_subclass", CountingList, _append)
state("defaultdict_attribute", lambda: collections.defaultdict(list), lambda d: _append(d["a"]))
state("counter_attribute", collections.Counter, _count)
state("ordered_dict", collections.OrderedDict, _count)
state("user_dict", collections.UserDict, _count)
state("dict_that_refuses_clear", lambda: StubbornDict(n=0), lambda d: _count(d))
state("list_that_refuses_clear", lambda: StubbornList([1]), _append)
state("nested_containers", lambda: {"a": [{"b": []}]}, _nested)
state("shared_between_containers", lambda: (lambda s: {"a": [{"b": s}], "s": s})([]), _nested)
state("plain_object", Counter, _touch)
state("slots_object", Slotted, _touch)
state("slots_and_dict_object", SlottedChild, _touch)
state("dataclass_object", Record, _touch)
state("property_object", Property, _touch)
state("simple_namespace", lambda: types.SimpleNamespace(count=0), _set_attribute)
state("array_attribute", lambda: array.array("i", [0, 0]), lambda a: (a.append(1), float(len(a)))[1])
state("bytearray_attribute", bytearray, lambda b: _append(b, 65))
state("queue_attribute", queue.Queue, _put, reference=False)
state("lifo_queue", queue.LifoQueue, _put, reference=False)
state("list_iterator", lambda: iter(range(1, 100)), _next)
state("iterator_of_a_list", lambda: iter(list(range(1, 100))), _next)
state("count_iterator", lambda: itertools.count(1), _next)
state("cycle_iterator", lambda: itertools.cycle([1.0, 2.0, 3.0]), _next)
state("partial_attribute", _partial, lambda f: f())
state("string_file", lambda: io.StringIO("abcdef" * 9), _read)
state("string_file_written", io.StringIO, _write)
state("tensor_in_place", lambda: torch.zeros(3), _add_one)
state("tensor_through_data", lambda: torch.zeros(3), _through_data)
state("tensor_through_numpy", lambda: torch.zeros(3), _through_numpy)
state("tensors_in_a_list", lambda: [torch.zeros(3)], _replace_first)
state("view_of_a_tensor", lambda: (lambda t: [t, t[1:]])(torch.zeros(3)), lambda v: _add_one(v[1]))
state("numpy_array", lambda: np.zeros(3), _add_one)
state("numpy_view", lambda: (lambda t: [t, t[1:]])(np.zeros(3)), lambda v: _add_one(v[1]))
state("sparse_tensor", lambda: torch.eye(3).to_sparse(), lambda t: (t.mul_(2), float(t.to_dense().sum()) / 99)[1])
state("numpy_generator", lambda: np.random.default_rng(0), lambda r: float(r.normal()))
state("numpy_random_state", lambda: np.random.RandomState(0), lambda r: float(r.normal()))
state("python_random", lambda: random.Random(0), lambda r: r.random())
state("torch_generator", lambda: torch.Generator().manual_seed(0), lambda g: float(torch.rand((), generator=g)))
state("global_numpy_numbers", lambda: None, lambda _: float(np.random.normal()))
state("global_python_numbers", lambda: None, lambda _: random.random())
state("global_torch_numbers", lambda: None, lambda _: float(torch.rand(())))
state("exit_stack", contextlib.ExitStack, lambda s: (s.callback(int), 1.0)[1], reference=False)
state("lock_attribute", threading.Lock, lambda lock: float(lock.acquire(blocking=False) and lock.release() is None),
      reference=False)  # fmt: skip
state("object_with_a_lock", lambda: types.SimpleNamespace(lock=threading.RLock(), count=0), _set_attribute,
      reference=False)  # fmt: skip


@feature()
class CountsSteps(Base):
    def __init__(self) -> None:
        super().__init__()
        self.num_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.num_steps += 1
        return super().training_step(batch, batch_idx)

    def compute(self, batch: Any) -> Tensor:
        return super().compute(batch) * (1 + 0.01 * self.num_steps)


@feature()
class CountingBuffer(Base):
    num_forwards: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        return super().forward(x) * (1 + 0.01 * self.num_forwards)


@feature()
class ReplacedBuffer(Base):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean(0)
        return logits - 0.1 * self.mean


@feature()
class NonPersistentBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(1.01)
        return super().forward(x) * self.scale


@feature()
class AttributeMadeInTheStep(Base):
    def compute(self, batch: Any) -> Tensor:
        if not hasattr(self, "late"):
            self.late = []
        self.late.append(1)
        return super().compute(batch) * (1 + 0.01 * len(self.late))


@feature()
class AttributeDeletedInTheStep(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = True

    def compute(self, batch: Any) -> Tensor:
        scale = 2.0 if hasattr(self, "first") else 1.0
        self.__dict__.pop("first", None)
        return scale * super().compute(batch)


@feature(reference=False, slot="copies")
class CachedActivations(Base):
    """A tensor with a graph stays on the module after the step."""

    def features(self, x: Tensor) -> Tensor:
        self.last_features = super().features(x)
        return self.last_features

    def compute(self, batch: Any) -> Tensor:
        loss = super().compute(batch)
        return loss + 0.01 * self.last_features.square().mean()


@feature(reference=False, slot="copies")
class LossesInAList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def compute(self, batch: Any) -> Tensor:
        loss = super().compute(batch)
        self.losses.append(loss)
        return loss

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("mean_of_losses", torch.stack(self.losses).mean())
        self.losses.clear()


@feature()
class LastBatchAttribute(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.last_batch = batch
        return super().training_step(batch, batch_idx)


@feature(effects=False)
class TorchmetricsAccuracy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)

    def compute(self, batch: Any) -> Tensor:
        x, y = unpack(batch)
        self.accuracy(self(x), y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return super().compute(batch)


@feature()
class TorchmetricsMean(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mean_loss = MeanMetric()

    def compute(self, batch: Any) -> Tensor:
        loss = super().compute(batch)
        self.mean_loss.update(loss.detach())
        self.log("running_mean", self.mean_loss.compute())
        return loss


@feature(effects=False)
class TorchmetricsInAList(Base):
    """Not a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_metrics = [MulticlassAccuracy(3)]

    def compute(self, batch: Any) -> Tensor:
        x, y = unpack(batch)
        self.hidden_metrics[0].update(self(x), y)
        return super().compute(batch)


@feature()
class ModulesInAList(Base):
    """BatchNorm that is no submodule: `parameters()` and `modules()` do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.BatchNorm1d(6, affine=False)]

    def features(self, x: Tensor) -> Tensor:
        return self.hidden[0](super().features(x)).to(x.dtype)


@feature(kinds=("monitor",), slot="copies")
class AuxiliaryLoader(Base):
    """``iter(loader)`` as an attribute: more samples in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.more = iter(torch.utils.data.DataLoader(Data(200), batch_size=2))

    def compute(self, batch: Any) -> Tensor:
        x, _ = next(self.more)
        x = x.to(next(self.parameters()).dtype)
        return super().compute(batch) + 0.01 * self(x).square().mean()


@feature()
class SaveHyperparameters(Base):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def compute(self, batch: Any) -> Tensor:
        self.hparams["width"] += 1
        return super().compute(batch) * (1 + 0.01 * self.hparams.width)


@feature()
class BoundMethodOfItself(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.own_scale = self._scale

    def _scale(self) -> float:
        self.calls += 1
        return 1 + 0.01 * self.calls

    def compute(self, batch: Any) -> Tensor:
        return super().compute(batch) * self.own_scale()


@feature()
class DictionaryOfParameters(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(3))])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales["a"] + self.shifts[0]


@feature()
class AliasOfAParameter(Base):
    """The same parameter under a second, plain name, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.aliases = [self.head.weight]

    def compute(self, batch: Any) -> Tensor:
        return super().compute(batch) + 0.01 * self.aliases[0].square().sum()


# ------------------------------------------------------------------------------------------------- known limits


class _CountsInItsClass(Base):
    total = 0

    def on_train_start(self) -> None:
        super().on_train_start()
        type(self).total = 0

    def compute(self, batch: Any) -> Tensor:
        type(self).total += 1
        return super().compute(batch) * (1 + 0.01 * type(self).total)


def _closure() -> Callable[[], float]:
    calls = []

    def scale() -> float:
        calls.append(1)
        return float(len(calls))

    return scale


def _bound_method() -> Any:
    return Counter().touch


def _generator() -> Any:
    def running() -> Any:
        i = 1.0
        while True:
            yield i
            i += 1

    return running()


COUNTS_OF_THE_FILE: list[int] = []


class _CountsInAGlobal(Base):
    def compute(self, batch: Any) -> Tensor:
        COUNTS_OF_THE_FILE.append(1)
        return super().compute(batch)

    def on_train_start(self) -> None:
        super().on_train_start()
        COUNTS_OF_THE_FILE.clear()

    def on_train_end(self) -> None:
        super().on_train_end()
        self.num_counts = len(COUNTS_OF_THE_FILE)


class Worker:
    """A thread that counts what it is given."""

    def __init__(self) -> None:
        self.tasks: queue.Queue[Any] = queue.Queue()
        self.count = 0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while True:
            self.tasks.get()
            self.count += 1
            self.tasks.task_done()

    def touch(self) -> float:
        self.tasks.put(1)
        self.tasks.join()
        return float(self.count)


add("limit_global_variable", _CountsInAGlobal, kinds=("monitor",), warns="COUNTS_OF_THE_FILE")
state("limit_thread", Worker, _touch, kinds=("monitor",), warns="thread", reference=False)
add("limit_class_attribute", _CountsInItsClass, kinds=("monitor",), warns="total")
state("closure", _closure, lambda f: f(), kinds=("monitor",))
state("bound_method_of_an_object", _bound_method, lambda f: f())
state("limit_running_generator", _generator, _next, kinds=("monitor",), warns="limit_running_generator")
