"""Watching a run moves nothing in its data pipeline: every kind of state, compared bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.modules import Classifier, Plain, loader, trainer
from helpers.training import Recorder, everything
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Sampler
from torch.utils.data import default_collate as collate

from lightning_flatness import FlatnessMonitor


class Generators:
    """Draws from generators of its own of every kind, counts, and caches what it has drawn."""

    def __init__(self) -> None:
        self.numpy = np.random.default_rng(1)
        self.legacy = np.random.RandomState(2)
        self.python = random.Random(3)
        self.torch = torch.Generator().manual_seed(4)
        self.count = 0
        self.cache: dict[int, float] = {}

    def draw(self, key: int) -> float:
        self.count += 1
        drawn = self.numpy.normal() + self.legacy.normal() + self.python.gauss(0, 1)
        drawn += float(torch.randn((), generator=self.torch))
        return self.cache.setdefault(key, 0.1 * float(drawn))

    def state(self) -> Any:
        states = self.numpy.bit_generator.state, self.legacy.get_state(), self.python.getstate()
        return repr((*states, self.torch.get_state().tolist(), self.count, self.cache))


class Jittered(Plain):
    def __init__(self, generators: Generators) -> None:
        super().__init__()
        self.generators = generators

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + self.generators.draw(index), self.y[index]


class Transformed(Plain):
    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.x[index]), self.y[index]


class Shuffle(Sampler[int]):
    def __init__(self, generators: Generators) -> None:
        self.generators = generators

    def __iter__(self) -> Any:
        return iter(sorted(range(40), key=lambda i: (self.generators.draw(i), i)))

    def __len__(self) -> int:
        return 40


class Buckets(Shuffle):
    def __iter__(self) -> Any:
        return iter([[i, (i + 1) % 40] for i in super().__iter__()])


class Endless(Shuffle):
    def __iter__(self) -> Any:
        while True:
            self.generators.cache.clear()
            yield from super().__iter__()

    __len__ = None  # type: ignore[assignment]


def jittering_collate(generators: Generators) -> Callable[[Any], Any]:
    def jitter(samples: Any) -> Any:
        x, y = collate(samples)
        return x + generators.draw(len(samples)), y

    return jitter


PIPELINES: dict[str, Callable[[Generators], DataLoader[Any]]] = {
    "dataset": lambda g: loader(Jittered(g)),
    "transform": lambda g: loader(Transformed(lambda x: x + g.draw(0))),
    "member of a ConcatDataset": lambda g: loader(ConcatDataset([Plain(), Jittered(g)])),
    "collate_fn": lambda g: loader(collate_fn=jittering_collate(g)),
    "sampler": lambda g: loader(shuffle=False, sampler=Shuffle(g)),
    "sampler in a BatchSampler": lambda g: DataLoader(Plain(), batch_sampler=BatchSampler(Shuffle(g), 8, False)),
    "batch sampler": lambda g: DataLoader(Plain(), batch_sampler=Buckets(g)),
}


def fit(path: Path, data: Any, generators: Generators, *monitors: pl.Callback, **options: Any) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    module, recorder = Classifier(), Recorder()
    run = trainer(path, *monitors, logger=recorder, **({"max_epochs": 2} | options))
    run.fit(
        module, **({"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data})
    )
    left = everything(module, run)
    left["metrics"] = {k: v for k, v in left["metrics"].items() if not k.startswith("flatness")}
    left["logged"] = [r for r in recorder.records if not any("flatness/" in k for k in r[1])]
    left["watched"] = [r for r in recorder.records if any("flatness/" in k for k in r[1])]
    left["generators"] = generators.state()
    return left


def assert_same(watched: dict[str, Any], plain: dict[str, Any]) -> None:
    assert watched.pop("watched")
    assert not plain.pop("watched")
    for (name, one), other in zip(watched.items(), plain.values(), strict=True):
        assert repr(one) == repr(other), name
    torch.testing.assert_close(watched["weights"], plain["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", PIPELINES)
def test_state_of_the_pipeline_stays(tmp_path, kind, num_workers):
    results = []
    for monitors in ([FlatnessMonitor(probe_size=12, top_k=1)], []):
        generators = Generators()
        data = PIPELINES[kind](generators)
        if num_workers:
            options = {name: getattr(data, name) for name in ("dataset", "collate_fn", "batch_sampler")}
            data = DataLoader(**options, num_workers=num_workers)
        results.append(fit(tmp_path, data, generators, *monitors))
    assert_same(*results)


@pytest.mark.parametrize("options", [{"limit_train_batches": 4}, {"max_steps": 9, "max_epochs": -1}])
def test_a_sampler_that_never_ends(tmp_path, options):
    results = []
    for monitors in ([FlatnessMonitor(probe_size=12, top_k=1, every_n_steps=3)], []):
        generators = Generators()
        data = DataLoader(Plain(), sampler=Endless(generators), batch_size=8)
        results.append(fit(tmp_path, data, generators, *monitors, **options))
    assert_same(*results)


class Hooked(pl.LightningDataModule):
    """Augments on the device, by generators of its own."""

    def __init__(self, generators: Generators, hook: str) -> None:
        super().__init__()
        self.generators = generators
        self.dataset = Plain()
        self._hook = hook

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.dataset)

    def _jitter(self, hook: str, batch: Any) -> Any:
        return [batch[0] + self.generators.draw(0), batch[1]] if hook == self._hook else batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._jitter("before", batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self._jitter("move", super().transfer_batch_to_device(batch, device, dataloader_idx))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._jitter("after", batch)


@pytest.mark.parametrize("hook", ["before", "move", "after"])
def test_transfer_hooks_of_a_data_module(tmp_path, hook):
    results = []
    for monitors in ([FlatnessMonitor(probe_size=12, top_k=1)], []):
        generators = Generators()
        results.append(fit(tmp_path, Hooked(generators, hook), generators, *monitors))
    assert_same(*results)


def test_the_hooks_run_once_on_a_copy(tmp_path):
    generators, calls = Generators(), []

    class Counts(Hooked):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append(self is data)
            return super().on_after_batch_transfer(batch, dataloader_idx)

    data = Counts(generators, "after")
    fit(tmp_path, data, generators, FlatnessMonitor(probe_size=16, top_k=1))
    assert calls == [False] * 2 + [True] * 10


def test_validation_data_that_is_loaded_after_training_has_started(tmp_path):
    options = {"max_epochs": 4, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    results, steps = [], []
    for monitors in ([FlatnessMonitor(split="val", probe_size=12, top_k=1)], []):
        generators = Generators()
        pl.seed_everything(7, verbose=False)
        module, recorder = Classifier(), Recorder()
        run = trainer(tmp_path, *monitors, logger=recorder, **options)
        run.fit(module, loader(), loader(Jittered(generators), shuffle=False))
        steps.append({step for step, metrics in recorder.records if any("flatness/" in k for k in metrics)})
        results.append((copy.deepcopy(module.state_dict()), generators.state(), torch.get_rng_state()))
    assert steps == [{10, 15, 20}, set()]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])
