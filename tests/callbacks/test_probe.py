"""Which samples are measured: the same whatever the batch size, workers or ranks, and drawn without a trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.modules import Augmented, Plain
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_flatness.callbacks.probe import SeenBatches, can_index, draw_probe


def samples(batches: list[Any]) -> Tensor:
    """All inputs, in a canonical order."""
    x = torch.cat([b[0] for b in batches])
    return x[torch.argsort(x[:, 0])]


def numbers(loader: DataLoader[Any], num_samples: int = 100, **options: Any) -> set[int]:
    return {int(i) for batch in draw_probe(loader, num_samples, **options) for i in batch}


@pytest.mark.parametrize(
    "options", [{"batch_size": 3}, {"batch_size": 64, "shuffle": True}, {"batch_size": 8, "num_workers": 2}]
)
def test_the_same_augmented_samples_for_every_batch_size_and_number_of_workers(options):
    expected = samples(draw_probe(DataLoader(Augmented(), batch_size=5, shuffle=True), 20))
    drawn = draw_probe(DataLoader(Augmented(), **options), 20)
    torch.testing.assert_close(samples(drawn), expected, rtol=0, atol=0)
    assert max(len(b[0]) for b in drawn) <= options["batch_size"]


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("num_samples", [3, 20, 41])
def test_ranks_share_the_samples_in_equally_many_batches(world_size, num_samples):
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    shares = [draw_probe(loader, num_samples, rank=r, world_size=world_size) for r in range(world_size)]
    whole = draw_probe(loader, num_samples)
    torch.testing.assert_close(samples([b for share in shares for b in share]), samples(whole), rtol=0, atol=0)
    if num_samples >= world_size:
        assert len({len(share) for share in shares}) == 1


def test_another_seed_draws_other_samples():
    loader = DataLoader(range(100), batch_size=4)
    assert numbers(loader, 10) == numbers(loader, 10)
    assert numbers(loader, 10) != numbers(loader, 10, seed=1)


def test_more_samples_than_there_are():
    assert numbers(DataLoader(range(7), batch_size=4), 1000) == set(range(7))


class EveryThird(Sampler[int]):
    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Any:
        self.epochs += 1
        return iter(range(0, 60, 3))

    def __len__(self) -> int:
        return 20


class Buckets(Sampler[list[int]]):
    def __iter__(self) -> Any:
        return iter([[0, 1, 2], [10, 11]])

    def __len__(self) -> int:
        return 2


NUMBERS: Any = range(60)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": SubsetRandomSampler([4, 8, 15, 16])}, {4, 8, 15, 16}),
        ({"sampler": WeightedRandomSampler([0.0, 1.0, 2.0] + [0.0] * 57, 10)}, {1, 2}),
        ({"sampler": EveryThird()}, set(range(0, 60, 3))),
        ({"batch_sampler": Buckets()}, {0, 1, 2, 10, 11}),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler([5, 6]), 2, False)}, {5, 6}),
        ({"sampler": DistributedSampler(NUMBERS, 2, 0)}, set(range(60))),
        ({"sampler": DistributedSampler(Subset(NUMBERS, range(20)), 2, 0)}, set(range(20))),
    ],
)
def test_only_samples_that_the_sampler_can_yield(options, expected):
    assert numbers(DataLoader(range(60), **options), 60) == expected


def test_a_loader_that_does_not_shuffle_shows_only_the_first_batches():
    assert numbers(DataLoader(range(60), batch_size=4), 60, max_batches=3) == set(range(12))
    assert numbers(DataLoader(range(60), batch_size=4, shuffle=True), 60, max_batches=3) == set(range(60))


def test_drawing_advances_no_generator_and_no_sampler():
    generator, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    sampler = EveryThird()
    loaders = [
        DataLoader(Augmented(), batch_size=4, shuffle=True, generator=generator),
        DataLoader(Augmented(), batch_size=4, sampler=RandomSampler(range(48), generator=own)),
        DataLoader(range(60), sampler=SubsetRandomSampler(range(9), generator=own)),
        DataLoader(range(60), sampler=sampler),
    ]
    states = [torch.get_rng_state(), generator.get_state(), own.get_state()]
    others = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    for loader in loaders:
        draw_probe(loader, 8)
    after = [torch.get_rng_state(), generator.get_state(), own.get_state()]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert others == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert sampler.epochs == 0


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


def test_what_can_be_indexed():
    assert can_index(DataLoader(Plain(), batch_size=4))
    assert not can_index(DataLoader(Stream(), batch_size=4))
    assert not can_index(DataLoader(Plain(), batch_size=None))
    assert not can_index([DataLoader(Plain())])


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


def test_a_dataset_without_a_length_cannot_be_indexed():
    assert not can_index(DataLoader(Unsized(), sampler=[1, 2]))


def test_seen_batches_are_copies_cut_to_the_number_of_samples():
    seen = SeenBatches(10)
    batches = [{"x": torch.randn(4, 2), "weights": torch.ones(3), "id": "a"} for _ in range(4)]
    for batch in batches:
        seen.collect(batch)
    assert seen.is_complete
    assert [len(b["x"]) for b in seen.batches] == [4, 4, 2]
    assert all(len(b["weights"]) == 3 for b in seen.batches)
    kept = seen.batches[0]["x"].clone()
    batches[0]["x"].zero_()
    assert torch.equal(seen.batches[0]["x"], kept)


class Endless(Sampler[int]):
    """Shuffles for ever, by a generator of NumPy's, and counts."""

    def __init__(self, size: int) -> None:
        self.rng = np.random.default_rng(0)
        self.size = size
        self.count = 0

    def __iter__(self) -> Any:
        while True:
            self.count += 1
            yield from self.rng.permutation(self.size).tolist()


def test_a_sampler_that_never_ends_shows_one_epoch_or_the_batches_of_the_limit():
    sampler = Endless(60)
    state = sampler.rng.bit_generator.state
    assert numbers(DataLoader(range(60), sampler=sampler, batch_size=4), 60) == set(range(60))
    assert len(numbers(DataLoader(range(60), sampler=sampler, batch_size=4), 60, max_batches=3)) == 12
    assert sampler.count == 0
    assert sampler.rng.bit_generator.state == state


class Named(Dataset[tuple[Tensor, str]]):
    """Samples by name, or by any other key."""

    def __init__(self, keys: list[Any]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key: Any) -> Any:
        assert any(type(key) is type(k) for k in self.keys)
        return torch.tensor(float(sum(map(ord, str(key))))), str(key)


@pytest.mark.parametrize(
    "keys",
    [
        ["a", "b", "c", "d"],
        [("a", 1), ("b", 2), ("c", 3)],
        [torch.tensor(3), torch.tensor(1), torch.tensor(2)],
        [torch.tensor([3, 1]), torch.tensor([1, 2])],
        [np.int64(2), np.int64(5)],
    ],
)
def test_samplers_of_keys_of_any_kind(keys):
    dataset = Named(keys)
    drawn = [draw_probe(DataLoader(dataset, sampler=order, batch_size=2), 3) for order in (keys, keys[::-1])]
    names = [[name for _, batch in batches for name in batch] for batches in drawn]
    assert names[0] == names[1]
    assert set(names[0]) <= {str(key) for key in keys}
    assert len(set(names[0])) == min(3, len(keys))


def test_a_batch_sampler_of_tensors():
    batches = [torch.tensor([0, 1, 2]), torch.tensor([10, 11])]
    assert numbers(DataLoader(range(60), batch_sampler=batches), 60) == {0, 1, 2, 10, 11}


class BatchesOnly(Dataset[Tensor]):
    """Loads whole batches, not single samples."""

    def __len__(self) -> int:
        return 20

    def __getitems__(self, keys: list[int]) -> list[Tensor]:
        return [torch.tensor(k) for k in keys]


@pytest.mark.parametrize("dataset", [BatchesOnly(), Subset(BatchesOnly(), range(10, 20))])
def test_a_dataset_that_loads_batches_only(dataset):
    assert numbers(DataLoader(dataset, batch_size=4, shuffle=True), 20) <= set(range(20))
    assert len(numbers(DataLoader(dataset, batch_size=4, shuffle=True), 8)) == 8
