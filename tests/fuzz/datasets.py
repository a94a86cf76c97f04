"""Data pipelines: datasets, transforms, samplers, collate functions, loaders and transfer hooks with a state."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import itertools
import random
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fuzz.base import BATCH_SIZE, Base, Data, Pipeline, add, feature, unpack, without

# ------------------------------------------------------------------------------------------------------- datasets


def dataset(name: str, make: Any, touch: Any, **options: Any) -> None:
    """Register a state of the dataset; `touch` changes it and returns a shift of the sample."""

    class Stateful(Data):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            setattr(self, f"held_{name}", make())

        def item(self, index: int) -> Any:
            x, y = super().item(index)
            return x + 0.1 * touch(getattr(self, f"held_{name}")), y

    add(name, Stateful, **options)


class Transform:
    """An augmentation with numbers of its own."""

    def __init__(self) -> None:
        self.rng, self.calls = np.random.default_rng(2), 0

    def __call__(self) -> float:
        self.calls += 1
        return float(self.rng.normal()) + 0.01 * self.calls


class Compose:
    def __init__(self) -> None:
        self.transforms = [Transform(), Transform()]

    def __call__(self) -> float:
        return sum(t() for t in self.transforms)


def _increment(values: Any) -> float:
    values[0] += 1
    return 0.1 * float(values[0])


dataset("dataset_counter", lambda: [0], _increment)
dataset("dataset_tensor", lambda: torch.zeros(1), _increment)
dataset("dataset_array", lambda: np.zeros(1), _increment)
dataset("dataset_numpy_generator", lambda: np.random.default_rng(1), lambda r: float(r.normal()))
dataset("dataset_random_state", lambda: np.random.RandomState(1), lambda r: float(r.normal()))
dataset("dataset_python_random", lambda: random.Random(1), lambda r: r.random())
dataset(
    "dataset_torch_generator", lambda: torch.Generator().manual_seed(1), lambda g: float(torch.rand((), generator=g))
)
dataset("dataset_global_torch", lambda: None, lambda _: float(torch.randn(())))
dataset("dataset_global_numpy", lambda: None, lambda _: float(np.random.normal()))
dataset("dataset_global_python", lambda: None, lambda _: random.gauss(0, 1))
dataset("dataset_transform", Transform, lambda t: t())
dataset("dataset_composed_transforms", Compose, lambda t: t())
dataset("dataset_iterator", lambda: itertools.count(), lambda i: 0.01 * next(i))
dataset("dataset_deque", lambda: collections.deque(maxlen=3), lambda d: (d.append(1), 0.1 * len(d))[1])
dataset("dataset_lock", threading.Lock, lambda lock: float(lock.acquire() and lock.release() is None))
dataset("dataset_lambda", lambda: lambda: float(torch.rand(())), lambda f: f())
OPEN_FILES = contextlib.ExitStack()
atexit.register(OPEN_FILES.close)  # a file that is collected open warns in whatever test runs then
dataset(
    "dataset_open_file", lambda: OPEN_FILES.enter_context(tempfile.TemporaryFile("w+")), lambda f: 0.01 * f.write("x")
)


@feature()
class DatasetCache(Data):
    """Random decodes, kept from their first use on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: dict[int, Any] = {}

    def item(self, index: int) -> Any:
        if index not in self.cache:
            x, y = super().item(index)
            self.cache[index] = (x + 0.1 * torch.randn(4), y)
        return self.cache[index]


@feature()
class DatasetReadAhead(Data):
    """The order of access is what counts."""

    last = -1

    def item(self, index: int) -> Any:
        x, y = super().item(index)
        x = x + 0.1 * (index - self.last > 0)
        self.last = index
        return x, y


@feature()
class DatasetWithMixup(Data):
    def item(self, index: int) -> Any:
        x, y = super().item(index)
        return x.lerp(self.x[random.randrange(len(self))], 0.2), y


@feature()
class DatasetThatShrinks(Data):
    """Hard examples get weights that access changes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weights = torch.ones(len(self))

    def item(self, index: int) -> Any:
        self.weights[index] *= 0.9
        x, y = super().item(index)
        return x * self.weights[index], y


@feature(slot="getitem")
class GetItemsOnly(Data):
    """`__getitems__` and nothing else."""

    def __getitems__(self, keys: Any) -> list[Any]:
        self.calls = getattr(self, "calls", 0) + 1
        return [self.item(self.index_of(k)) for k in keys]

    def __getitem__(self, key: Any) -> Any:
        raise TypeError("this dataset is read in batches")


class _Concatenated(Pipeline):
    def make_train_set(self) -> Any:
        return ConcatDataset([self.dataset_class(8), self.dataset_class(6)])


class _Subset(Pipeline):
    def make_train_set(self) -> Any:
        return Subset(super().make_train_set(), [1, 3, 4, 5, 7, 8, 9, 12])


class _Tensors(Pipeline):
    def make_train_set(self) -> Any:
        return TensorDataset(Data().x, Data().y)


add("concat_dataset", _Concatenated, slot="set")
add("subset", _Subset, slot="set")
add("tensor_dataset", _Tensors, slot=("set", "getitem"))


class Wrapper(Dataset[Any]):
    """A dataset around another, with a generator and `__getattr__`."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rng = inner, random.Random(4)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "rng") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, key: Any) -> Any:
        x, y = self.inner[key]
        return x + 0.1 * self.rng.random(), y


class _Wrapped(Pipeline):
    def make_train_set(self) -> Any:
        return Wrapper(super().make_train_set())


add("wrapped_dataset", _Wrapped, slot=("set", "getitem"))


class Stream(IterableDataset[Any]):
    """Samples without an index, from a generator of its own; and how often it was started."""

    def __init__(self, data: Any) -> None:
        self.data, self.rng, self.starts = data, np.random.default_rng(3), 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        for i in self.rng.permutation(len(self.data)):
            x, y = self.data[int(i)]
            yield x + 0.1 * float(self.rng.normal()), y


class _Streaming(Pipeline):
    def make_train_set(self) -> Any:
        return Stream(super().make_train_set())

    def make_options(self) -> dict[str, Any]:
        return without(super().make_options(), "shuffle", "sampler", "batch_sampler", batch_size=BATCH_SIZE)


STREAM = ("set", "sampler", "batch_sampler", "getitem")
add("iterable_dataset", _Streaming, slot=STREAM)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.data)


add(
    "iterable_dataset_with_length",
    type("SizedStreaming", (_Streaming,), {"make_train_set": lambda self: SizedStream(Data())}),
    slot=STREAM,
)


class EndlessStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


add("endless_stream", type("Endless", (_Streaming,), {"make_train_set": lambda self: EndlessStream(Data())}),
    slot=(*STREAM, "epochs"), trainer={"limit_train_batches": 3})  # fmt: skip


# ------------------------------------------------------------------------------------------------------- samplers


class Own(Sampler[Any]):
    """Shuffles with a generator of its own; counts its epochs."""

    def __init__(self, size: int, shuffle: Any, key: Any = int) -> None:
        self.size, self.shuffle, self.key, self.epochs = size, shuffle, key, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        order = list(range(self.size))
        self.shuffle.shuffle(order)
        for i in order:
            yield self.key(i)


class TorchShuffle:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def shuffle(self, order: list[int]) -> None:
        order[:] = torch.randperm(len(order), generator=self.generator).tolist()


def sampler(name: str, make: Any, *parts: Any, **options: Any) -> None:
    """Register a sampler; `make` takes the dataset."""

    class Sampled(Pipeline):
        def make_options(self) -> dict[str, Any]:
            self.user_sampler = make(self.train_set)
            return without(super().make_options(), "shuffle", sampler=self.user_sampler)

    options = {"slot": ("sampler", *(("getitem",) if parts else ()))} | options
    add(name, Sampled, *parts, **options)


class Endless(Own):
    """Never stops: the Trainer does."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


class EndlessWithoutLength(Sampler[Any]):
    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(6))


class KeyedByText(Data):
    def index_of(self, key: Any) -> int:
        return int(str(key).removeprefix("sample "))


class KeyedByPair(Data):
    def index_of(self, key: Any) -> int:
        return int(key[0]) + int(key[1]) if isinstance(key, tuple) else int(key)


sampler("sampler_numpy_generator", lambda d: Own(len(d), np.random.default_rng(1)))
sampler("sampler_random_state", lambda d: Own(len(d), np.random.RandomState(1)))
sampler("sampler_python_random", lambda d: Own(len(d), random.Random(1)))
sampler("sampler_torch_generator", lambda d: Own(len(d), TorchShuffle()))
sampler("sampler_global_numpy", lambda d: Own(len(d), np.random))
sampler("sampler_global_python", lambda d: Own(len(d), random))
sampler("sampler_of_strings", lambda d: Own(len(d), random.Random(1), lambda i: f"sample {i}"), KeyedByText,
        slot=("sampler", "set", "getitem"))  # fmt: skip
sampler("sampler_of_tuples", lambda d: Own(len(d), random.Random(1), lambda i: (i, 0)), KeyedByPair,
        slot=("sampler", "set", "getitem"))  # fmt: skip
sampler("sampler_of_tensors", lambda d: Own(len(d), random.Random(1), torch.tensor))
sampler("endless_sampler", lambda d: Endless(len(d), random.Random(1)), trainer={"limit_train_batches": 3},
        slot=("sampler", "epochs"))  # fmt: skip
sampler("endless_sampler_without_length", lambda d: EndlessWithoutLength(), trainer={"limit_train_batches": 3},
        slot=("sampler", "epochs"))  # fmt: skip
sampler("weighted_sampler", lambda d: WeightedRandomSampler([0.0] + [1.0] * (len(d) - 1), len(d)))
sampler("subset_sampler", lambda d: SubsetRandomSampler(range(2, len(d))))
sampler("random_sampler_with_generator", lambda d: RandomSampler(d, generator=torch.Generator().manual_seed(1)))
sampler("sampler_with_replacement", lambda d: RandomSampler(d, replacement=True, num_samples=10))
sampler("list_as_sampler", lambda d: list(range(len(d) - 1, -1, -1)))


class Groups:
    """A batch sampler with a generator, a count and buckets; no subclass of torch's."""

    def __init__(self, size: int, rng: Any) -> None:
        self.size, self.rng, self.epochs = size, rng, 0

    def __len__(self) -> int:
        return self.size // 3

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        order = list(range(self.size))
        self.rng.shuffle(order)
        for i in range(len(self)):
            yield order[3 * i : 3 * i + 3]


def batch_sampler(name: str, make: Any, **options: Any) -> None:
    """Register a batch sampler; `make` takes the dataset."""

    class BatchSampled(Pipeline):
        def make_options(self) -> dict[str, Any]:
            self.user_batch_sampler = make(self.train_set)
            return without(super().make_options(), "shuffle", "sampler", "batch_size",
                           batch_sampler=self.user_batch_sampler)  # fmt: skip

    add(name, BatchSampled, slot=("sampler", "batch_sampler"), **options)


batch_sampler("batch_sampler_numpy_generator", lambda d: Groups(len(d), np.random.default_rng(2)))
batch_sampler("batch_sampler_python_random", lambda d: Groups(len(d), random.Random(2)))
batch_sampler("batch_sampler_torch_generator", lambda d: Groups(len(d), TorchShuffle()))
batch_sampler("batch_sampler_around_own_sampler",
              lambda d: BatchSampler(Own(len(d), random.Random(3)), 3, drop_last=False))  # fmt: skip
batch_sampler("list_as_batch_sampler", lambda d: [[0, 1, 2], [3, 4], [5, 6, 7]])

# ------------------------------------------------------------------------------------------- loaders and collation


def options(name: str, change: Any, **others: Any) -> None:
    """Register arguments of the loader; `change` takes those so far and the pipeline."""

    class Changed(Pipeline):
        def make_options(self) -> dict[str, Any]:
            return change(super().make_options(), self)

    add(name, Changed, **others)


class Collate:
    """Draws and counts, and is an object."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.calls = draw, 0

    def __call__(self, samples: list[Any]) -> Any:
        self.calls += 1
        x, y = default_collate(samples)
        return [x + 0.1 * self.draw() + 0.01 * self.calls, y]


class Buffering:
    """Mixes each batch with the one before."""

    def __init__(self) -> None:
        self.before: Tensor | None = None

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        mixed = x if self.before is None else x + 0.1 * self.before.mean(0)
        self.before = x
        return [mixed, y]


def _collating(make: Any) -> Any:
    def change(values: dict[str, Any], pipeline: Any) -> dict[str, Any]:
        pipeline.collate = make()
        return values | {"collate_fn": pipeline.collate}

    return change


options("shuffle_off", lambda o, _: o | ({"shuffle": False} if "shuffle" in o else {}))
options("drop_last", lambda o, _: o if "batch_sampler" in o else o | {"drop_last": True})
options(
    "loader_generator", lambda o, p: o | {"generator": p.__dict__.setdefault("g", torch.Generator().manual_seed(1))}
)
options("collate_numpy_generator",
        _collating(lambda: Collate(np.random.default_rng(1).normal)), slot="collate")  # fmt: skip
options("collate_python_random", _collating(lambda: Collate(random.Random(1).random)), slot="collate")
options("collate_global_numbers", _collating(lambda: Collate(random.random)), slot="collate")
options("collate_that_buffers", _collating(Buffering), slot="collate")


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor


Pair = collections.namedtuple("Pair", ["x", "y"])


class StubbornBatch(collections.UserDict):
    """As `BatchEncoding`."""


options("dict_batches", lambda o, _: o | {"collate_fn": lambda s: dict(zip("xy", default_collate(s)))}, slot="collate")
options("dataclass_batches", lambda o, _: o | {"collate_fn": lambda s: Batch(*default_collate(s))}, slot="collate")
options("named_tuple_batches", lambda o, _: o | {"collate_fn": lambda s: Pair(*default_collate(s))}, slot="collate")
options(
    "user_dict_batches",
    lambda o, _: o | {"collate_fn": lambda s: StubbornBatch(zip("xy", default_collate(s)))},
    slot="collate",
)
options("two_workers", lambda o, _: o | {"num_workers": 2}, slot="workers")


class _Persistent(Pipeline):
    persistent = True

    def make_options(self) -> dict[str, Any]:
        return super().make_options() | {"num_workers": 1, "persistent_workers": True}


add("persistent_workers", _Persistent, slot="workers")


def _seed_worker(worker: int) -> None:
    np.random.seed(torch.initial_seed() % 2**32)
    random.seed(worker)


options("worker_with_seed", lambda o, _: o | {"num_workers": 1, "worker_init_fn": _seed_worker}, slot="workers")


class _TwoLoaders(Pipeline):
    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader(), "b": DataLoader(Data(8), 3, shuffle=True)}


class _Combined(Pipeline):
    def train_dataloader(self) -> Any:
        return CombinedLoader([super().train_dataloader(), DataLoader(Data(20), 3)], "max_size_cycle")


class Batches:
    """An iterable of batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.starts = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        return iter([[t.clone() for t in batch] for batch in self.batches])


class _PlainIterable(Pipeline):
    """No DataLoader at all."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        self.kept = Batches([default_collate([loader.dataset[i] for i in range(k, k + 4)]) for k in (0, 4, 8)])
        return self.kept


add("dict_of_loaders", _TwoLoaders, slot=("sampler", "batch_sampler", "set", "getitem", "loaders", "workers"))
add("combined_loader", _Combined,
    slot=("sampler", "batch_sampler", "set", "getitem", "loaders", "collate", "workers"))  # fmt: skip
add("plain_iterable", _PlainIterable, slot=("sampler", "batch_sampler", "set", "getitem", "loaders", "workers"))


class _Fresh(Pipeline):
    """A new loader, with a new order, for every epoch."""

    is_datamodule = True

    def train_dataloader(self) -> Any:
        self.train_set.user_epochs = getattr(self.train_set, "user_epochs", 0) + 1
        return super().train_dataloader()


add("reloaded_every_epoch", _Fresh, trainer={"reload_dataloaders_every_n_epochs": 1}, slot="loaders")
add("datamodule", type("AsModule", (Pipeline,), {"is_datamodule": True}))


class EpochSampler(Own):
    def set_epoch(self, epoch: int) -> None:
        self.shuffle = random.Random(epoch)


sampler("sampler_with_set_epoch", lambda d: EpochSampler(len(d), random.Random(0)))


class Curriculum(Own):
    """Grows with what its owner tells it."""

    level = 8

    def __iter__(self) -> Iterator[Any]:
        self.level = min(self.level + 2, self.size)
        return itertools.islice(super().__iter__(), self.level)


sampler("curriculum_sampler", lambda d: Curriculum(len(d), random.Random(0)))

# ------------------------------------------------------------------------------------------------- transfer hooks


class _After(Pipeline):
    is_datamodule = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.after_rng, self.after_calls = np.random.default_rng(6), 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        self.after_calls += 1
        x, _ = unpack(batch)
        x += 0.1 * float(self.after_rng.normal())
        return batch


class _Before(Pipeline):
    is_datamodule = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.before_rng = random.Random(6)
        self.before_calls: list[int] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        self.before_calls.append(1)
        x, _ = unpack(batch)
        x += 0.1 * self.before_rng.random()
        return batch


class _Transfer(Pipeline):
    is_datamodule = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.transfers = 0

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.transfers += 1
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


add("datamodule_after_transfer", _After)
add("datamodule_before_transfer", _Before)
add("datamodule_transfer", _Transfer)


class _ModuleTransfer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.transfer_generator = torch.Generator().manual_seed(8)
        self.num_transfers = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.num_transfers += 1
        x, _ = unpack(batch)
        x += 0.1 * float(torch.randn((), generator=self.transfer_generator))
        return batch


add("module_after_transfer", _ModuleTransfer)


@feature()
class LabelsAsNumbers(Data):
    def item(self, index: int) -> Any:
        x, y = super().item(index)
        return x, int(y)
