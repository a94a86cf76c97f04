"""The frozen probe: on which samples the landscape is measured.

Samples, not batches, drawn once by a generator of their own: a large-batch and a small-batch run, or one rank
and two, measure the same loss. Drawing them leaves no trace in the run: no generator of the user is advanced,
no iterator of the training loader is touched, and random augmentation is seeded sample by sample, so that it, too,
is the same for every batch size and number of workers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_flatness.batches import first_samples, infer_batch_size, map_tensors
from lightning_flatness.isolation import seeded

MAX_DEFAULT_BATCH_SIZE = 128


def can_index(loader: Any) -> bool:
    """Return whether single samples can be drawn from a loader, which takes a dataset with a length."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.dataset, Sized)
        and loader.batch_sampler is not None
    )


def draw_probe(
    loader: DataLoader[Any],
    num_samples: int,
    *,
    batch_size: int | None = None,
    max_batches: float = math.inf,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> list[Any]:
    """Return this rank's share of a fixed random set of samples, as batches on the host.

    Args:
        loader: Where training (or validation) samples come from; its dataset, sampler and ``collate_fn`` are used.
        num_samples: Size of the set over all ranks; all samples there are, if there are fewer.
        batch_size: Samples per batch. Default: the loader's, 128 at most.
        max_batches: Batches of an epoch. A loader that does not shuffle shows only the samples of those.
        seed: Seed of the choice and of random augmentation.
        rank: This process.
        world_size: Number of processes; each gets the same number of batches where there are samples enough.

    Returns:
        The batches, collated as for training.

    Example:
        >>> loader = DataLoader(range(10), batch_size=4, shuffle=True)
        >>> draw_probe(loader, 5, seed=1)
        [tensor([5, 6, 1]), tensor([2, 0])]
    """
    with seeded(seed), _preserved_generators(loader):
        candidates = _candidates(loader, max_batches)
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        chosen = [candidates[i] for i in order[:num_samples].tolist()]
        share = torch.tensor(chosen[rank::world_size], dtype=torch.int64)
        if batch_size is None:
            batch_size = min(loader.batch_size or MAX_DEFAULT_BATCH_SIZE, MAX_DEFAULT_BATCH_SIZE)
        num_batches = math.ceil(math.ceil(len(chosen) / world_size) / batch_size) or 1
        chunks = [chunk.tolist() for chunk in torch.tensor_split(share, num_batches) if len(chunk) > 0]
        return list(_loader_of(loader, chunks, seed)) if chunks else []


class SeenBatches:
    """Collects the first samples that training sees, where a dataset cannot be indexed.

    Args:
        num_samples: How many samples to collect on this rank.
    """

    def __init__(self, num_samples: int) -> None:
        self._missing = num_samples
        self.batches: list[Any] = []

    @property
    def is_complete(self) -> bool:
        """Whether there are enough samples."""
        return self._missing <= 0

    def collect(self, batch: Any) -> None:
        """Keep a copy on the host of as many samples of a batch as are missing.

        Args:
            batch: A batch as the training step gets it.
        """
        if not self.is_complete:
            kept = first_samples(batch, self._missing)
            self._missing -= infer_batch_size(kept)
            self.batches.append(map_tensors(_host_copy, kept))


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


class _SeededSamples(Dataset[Any]):
    """A dataset whose random augmentation depends on the sample alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, index: int) -> Any:
        with seeded((1_000_003 * self._seed + index) % 2**63):
            return self._dataset[index]


def _loader_of(loader: DataLoader[Any], chunks: list[list[int]], seed: int) -> DataLoader[Any]:
    # Workers as in training: user code may open files that must not be opened in the main process.
    return DataLoader(
        _SeededSamples(loader.dataset, seed),
        batch_sampler=chunks,
        collate_fn=loader.collate_fn,
        num_workers=min(loader.num_workers, len(chunks)),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers > 0 else None,
        generator=torch.Generator().manual_seed(seed),
    )


def _candidates(loader: DataLoader[Any], max_batches: float) -> list[int]:
    """Return the indices of the dataset that the loader's sampler can yield, in increasing order."""
    everything = list(range(len(loader.dataset)))  # type: ignore[arg-type]
    if type(loader.batch_sampler) is not BatchSampler:
        return _iterated(loader.batch_sampler)
    sampler: Any = loader.batch_sampler.sampler
    if type(sampler) is SequentialSampler:
        num_shown = max_batches * loader.batch_sampler.batch_size
        return everything if num_shown >= len(everything) else everything[: int(num_shown)]
    if type(sampler) is RandomSampler or (type(sampler) is DistributedSampler and sampler.dataset is loader.dataset):
        return everything
    if type(sampler) is SubsetRandomSampler:
        return sorted(int(i) for i in sampler.indices)
    if type(sampler) is WeightedRandomSampler:
        return torch.as_tensor(sampler.weights).nonzero().flatten().tolist()
    return _iterated(sampler)


def _iterated(sampler: Any) -> list[int]:
    """Return what a sampler yields, on all ranks if it is distributed, by iterating over copies of it."""
    found: set[int] = set()
    num_replicas = getattr(sampler, "num_replicas", 1) if hasattr(sampler, "rank") else 1
    for rank in range(num_replicas):
        copied = copy.copy(sampler)
        if num_replicas > 1:
            copied.rank = rank
        for item in copied:
            found.update(int(i) for i in (item if isinstance(item, list | tuple) else [item]))
    return sorted(found)


@contextmanager
def _preserved_generators(loader: DataLoader[Any]) -> Iterator[None]:
    """Put back the states of the generators that a loader and its samplers hold."""
    states = [(generator, generator.get_state()) for generator in _generators(loader, depth=4)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(holder: Any, depth: int) -> Iterable[torch.Generator]:
    for value in list(vars(holder).values()):
        if isinstance(value, torch.Generator):
            yield value
        elif isinstance(value, Sampler | Dataset) and depth > 0 and hasattr(value, "__dict__"):
            yield from _generators(value, depth - 1)
