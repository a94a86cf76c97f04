"""What features are made of: a module, a dataset and a data pipeline to extend, and the registry."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

NUM_FEATURES, NUM_HIDDEN, NUM_CLASSES = 4, 6, 3
BATCH_SIZE, NUM_TRAIN, NUM_VAL = 4, 14, 6  # the last batch is smaller than the others


class Base(pl.LightningModule):
    """A small classifier with a place for every feature; features are mixins that call ``super()``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.make_encoder()
        self.middle = nn.Sequential(*self.make_middle())
        self.head = self.make_head()

    def make_encoder(self) -> nn.Module:
        return nn.Sequential(nn.Linear(NUM_FEATURES, NUM_HIDDEN), nn.Tanh())

    def make_middle(self) -> list[nn.Module]:
        """Return modules that keep the shape of the features."""
        return []

    def make_head(self) -> Any:
        return nn.Linear(NUM_HIDDEN, NUM_CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.middle(self.encoder(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def compute(self, batch: Any) -> Tensor:
        """Return the loss."""
        x, y = unpack(batch)
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.compute(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=BATCH_SIZE)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = unpack(batch)
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=BATCH_SIZE)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return what ``configure_optimizers`` returns."""
        return optimizer

    def configure_optimizers(self) -> Any:
        return self.make_schedule(self.make_optimizer())


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    """Return samples and labels of a batch in any of the formats of the features."""
    if isinstance(batch, Mapping):
        return (batch["x"], batch["y"]) if "x" in batch else unpack(next(iter(batch.values())))
    if hasattr(batch, "x"):
        return batch.x, batch.y
    return (batch[0], batch[1]) if torch.is_tensor(batch[0]) else unpack(batch[0])


class Data(Dataset[Any]):
    """Separable points; ``item`` is the place for features, ``index_of`` for unusual keys."""

    def __init__(self, size: int = NUM_TRAIN) -> None:
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, NUM_FEATURES, generator=generator)
        self.y = torch.randint(NUM_CLASSES, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def index_of(self, key: Any) -> int:
        return int(key)

    def item(self, index: int) -> tuple[Tensor, Any]:
        return self.x[index], self.y[index]

    def __getitem__(self, key: Any) -> Any:
        return self.item(self.index_of(key))


class Pipeline(pl.LightningDataModule):
    """Loaders of training and validation samples; those with transfer hooks are given to ``fit`` as a DataModule."""

    is_datamodule = False
    num_workers = 0

    def __init__(self, dataset: type[Data]) -> None:
        super().__init__()
        self.dataset_class = dataset
        self.train_set = self.make_train_set()
        self.val_set = dataset(NUM_VAL)
        self.loaders: list[Any] = []

    def make_train_set(self) -> Any:
        return self.dataset_class()

    def make_options(self) -> dict[str, Any]:
        """Return the arguments of the DataLoader."""
        return {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": self.num_workers}

    def train_dataloader(self) -> Any:
        loader = DataLoader(self.train_set, **self.make_options())
        self.loaders.append(loader)
        return loader

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_set, BATCH_SIZE)


def without(options: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    """Return options of a DataLoader with some left out and others added."""
    return {name: value for name, value in options.items() if name not in names} | changes


KINDS = ("monitor", "sam0", "sam", "sam_monitor", "sam_previous")


@dataclass
class Feature:
    """One thing that a run does."""

    name: str
    parts: tuple[Any, ...] = ()
    """Mixins of `Base`, `Data` or `Pipeline`; and functions that return a new callback each."""
    trainer: dict[str, Any] = field(default_factory=dict)
    slots: tuple[str, ...] = ()
    """Features that share a slot are not combined."""
    kinds: tuple[str, ...] = KINDS
    monitor: dict[str, Any] = field(default_factory=dict)
    """Arguments of the monitor that the feature takes, or that it is about."""
    warns: str = ""
    """A known limit: the warning that the monitor has to give if the run changes."""
    effects: bool = True
    """Whether counts and the like after SAM are those of the run without SAM (not if they depend on the loss)."""
    reference: bool = True
    """Whether the plain SAM of `reference.py`, which copies the module, can train it."""
    resume: str = ""
    """"epoch" or "step": the run is stopped there and resumed from a checkpoint by new objects."""
    fit: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    """Whether it is left out of random combinations (slow to start)."""


FEATURES: dict[str, Feature] = {}


def add(name: str, *parts: Any, slot: str | tuple[str, ...] = (), **options: Any) -> Feature:
    """Register a feature."""
    assert name not in FEATURES, name
    slots = (slot,) if isinstance(slot, str) else slot
    FEATURES[name] = Feature(name, parts, slots=slots, **options)
    return FEATURES[name]


def feature(*parts: Any, **options: Any) -> Callable[[Any], Any]:
    """Register a class, or a function that returns a callback, under its name in snake_case."""

    def register(part: Any) -> Any:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=A)(?=[A-Z][a-z])", "_", part.__name__).lower()
        add(name, part, *parts, **options)
        return part

    return register


@dataclass
class Case:
    """A run: some features."""

    features: tuple[Feature, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        return " + ".join(f.name for f in self.features) or "plain"

    def mixed(self, base: type) -> type:
        parts = [p for f in self.features for p in f.parts if inspect.isclass(p) and issubclass(p, base)]
        parts.sort(key=lambda p: not getattr(p, "is_outermost", False))
        return type(f"Case{base.__name__}", (*dict.fromkeys(parts), base), {"__module__": __name__})

    def callbacks(self) -> list[pl.Callback]:
        parts = [p for f in self.features for p in f.parts]
        return [p() for p in parts if not (inspect.isclass(p) and issubclass(p, Base | Data | Pipeline))]

    def merged(self, attribute: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for f in self.features:
            merged |= getattr(f, attribute)
        return merged

    @property
    def resume(self) -> str:
        return next((f.resume for f in self.features if f.resume), "")

    def all_features(self, attribute: str) -> bool:
        return all(getattr(f, attribute) for f in self.features)


def draw_case(seed: int, kind: str) -> Case:
    """Return the case of a seed: one to four features that do not shut each other out."""
    rng = random.Random(f"{kind} {seed}")
    candidates = _candidates(kind)
    return Case(_first_that_fit(rng.sample(candidates, len(candidates)), rng.choice((1, 2, 2, 3, 3, 4))), seed)


def covering_cases(kind: str, number: int) -> list[Case]:
    """Return random cases in which every feature of a kind occurs once, and more of `draw_case` up to a number."""
    candidates = _candidates(kind)
    left = random.Random(kind).sample(candidates, len(candidates))
    cases: list[Case] = []
    while left:
        chosen = _first_that_fit(left, 7)
        cases.append(Case(chosen, len(cases)))
        left = [f for f in left if f not in chosen]
    return [*cases, *(draw_case(seed, kind) for seed in range(number - len(cases)))]


def _candidates(kind: str) -> list[Feature]:
    return [f for f in FEATURES.values() if kind in f.kinds and not f.warns and not f.alone]


def _first_that_fit(candidates: list[Feature], wanted: int) -> tuple[Feature, ...]:
    chosen: list[Feature] = []
    taken: set[str] = set()
    for candidate in candidates:
        if len(chosen) == wanted:
            break
        if taken.isdisjoint(candidate.slots) and _fits(candidate, chosen):
            chosen.append(candidate)
            taken.update(candidate.slots)
    return tuple(chosen)


def _fits(candidate: Feature, chosen: list[Feature]) -> bool:
    try:
        for base in (Base, Data, Pipeline):
            Case((*chosen, candidate)).mixed(base)
    except TypeError:  # no order of the base classes
        return False
    settings = {key for f in chosen for key in f.trainer}
    return settings.isdisjoint(candidate.trainer)


def known_limits() -> list[str]:
    """Return the names of the features that are expected to leave no trace or to warn by name."""
    return [f.name for f in FEATURES.values() if f.warns]
