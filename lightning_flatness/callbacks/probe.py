"""The frozen probe: on which samples the landscape is measured.

Samples, not batches, drawn once by a generator of their own: a large-batch and a small-batch run, or one rank
and two, measure the same loss. Random augmentation is seeded sample by sample, so that it, too, is the same for every
batch size and number of workers.

A forked child draws them and sends them back: generators, caches, counters and samplers that it moves are copies.
Where a child cannot be forked or fails, the training process draws them. It puts back global generators and torch's
generators in samplers and datasets, but no other state of the pipeline. Workers that the user starts without a fork
(``"spawn"``) load the samples as in training. A dataset without a length is not drawn from: :class:`SeenBatches` keeps
what training sees.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_flatness.callbacks.candidates import candidates, seed_of
from lightning_flatness.callbacks.child import ChildFailed, can_fork, in_child
from lightning_flatness.callbacks.transfer import host_copy
from lightning_flatness.module.batches import Probe, first_samples, infer_batch_size, map_tensors
from lightning_flatness.module.rng import seeded

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
    loader: Iterable[Any],
    num_samples: int = 512,
    *,
    batch_size: int | None = None,
    uses_batch_statistics: bool = False,
    max_batches: float = math.inf,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> list[Any]:
    """Return this rank's share of a fixed random set of samples, as batches on the host.

    These are the samples that :class:`FlatnessMonitor` measures on, given the same loader, ``probe_size``, ``seed``
    and dataset: a number measured later stands beside the curve of the run. Drawing does not move the state of the
    loader: it happens in a forked child where that is possible.

    Args:
        loader: Where training (or validation) samples come from; its dataset, sampler and ``collate_fn`` are used. Of
            what has no length or is no DataLoader, the first samples are taken, in the batches in which they come.
        num_samples: Size of the set over all ranks; all samples there are, if there are fewer.
        batch_size: Samples per batch, at most. Default: the loader's, 128 at most; where the statistics of batches
            matter, 128 whatever the loader's, unless that is 1.
        uses_batch_statistics: Whether it matters which samples are together in a batch, as for a module with BatchNorm.
            Then that depends neither on the loader's batch size nor, where all ranks together have as many batches, on
            the number of ranks.
        max_batches: Batches of an epoch. A loader that does not shuffle shows only the samples of those.
        seed: Seed of the choice and of random augmentation.
        rank: This process.
        world_size: Number of processes; each gets the same number of batches where there are samples enough.
        device: The module's. Where samples that lie on it cannot be drawn in a child, its generator is left as it was.

    Returns:
        The batches, collated as for training. The list knows how many samples there are (``num_total``), which the
        standard errors of measures need.

    Example:
        >>> loader = DataLoader(range(10), batch_size=4, shuffle=True)
        >>> draw_probe(loader, 5, seed=1)
        [tensor([2, 1, 4]), tensor([0, 3])]
    """
    if not can_index(loader):
        return _first(loader, -(-num_samples // world_size), equal_batches=uses_batch_statistics)
    assert isinstance(loader, DataLoader)

    def batches(device: torch.device | None = None) -> Iterator[Any]:
        """Yield the number of samples that there are, then batches."""
        with seeded(seed, device), _preserved_generators(loader):
            keys = candidates(loader, max_batches)
            yield len(keys)
            # Not a permutation of all keys, which for a large dataset would not fit into memory.
            chosen = random.Random(seed).sample(keys, min(num_samples, len(keys)))
            size = batch_size or _batch_size(loader, fixed=uses_batch_statistics)
            chunks = _chunks(chosen, rank, world_size, size, interleaved=uses_batch_statistics)
            if chunks:
                with torch.device("cpu"):  # where a DataLoader with this generator draws a seed for its workers
                    loaded = iter(_loader_of(loader, chunks, seed, device))
                yield from loaded

    if not can_fork() or _refuses_fork(loader):
        return _probe_of(batches(device))
    try:
        return _probe_of(in_child(batches))
    except ChildFailed as failure:
        warnings.warn(
            f"The samples of {type(loader.dataset).__name__} to measure on could not be drawn in a child process, "
            "and are drawn in the training process. This moves what the dataset, its samplers and `collate_fn` count, "
            f"cache or draw from generators of their own. Of the child: {failure}",
            stacklevel=2,
        )
        return _probe_of(batches(device))  # outside of `try`, an error here would not show the child's


class SeenBatches:
    """Collects the first samples that training sees, where a dataset cannot be indexed.

    Args:
        num_samples: How many samples to collect on this rank.
        equal_batches: Whether to stop before a batch that is smaller than the first: where the statistics of batches
            matter, it would count for something else.
    """

    def __init__(self, num_samples: int, *, equal_batches: bool = False) -> None:
        self._missing = num_samples
        self._equal_batches = equal_batches
        self._size = 0
        self.batches: list[Any] = []

    @property
    def is_complete(self) -> bool:
        """Whether there are enough samples."""
        return self._missing <= 0

    def collect(self, batch: Any) -> None:
        """Keep a copy on the host of as many samples of a training batch as are missing."""
        if not self.is_complete:
            kept = first_samples(batch, self._missing)
            size = infer_batch_size(kept)
            self._missing -= size
            if self.batches and self._equal_batches and size < self._size:
                return
            self._size = self._size or size
            self.batches.append(map_tensors(host_copy, kept))


def _probe_of(items: Iterable[Any]) -> Probe:
    num_total, *batches = items
    return Probe(batches, num_total)


def _first(batches: Iterable[Any], num_samples: int, *, equal_batches: bool) -> list[Any]:
    seen = SeenBatches(num_samples, equal_batches=equal_batches)
    for batch in batches:
        seen.collect(batch)
        if seen.is_complete:
            break
    return seen.batches


def _batch_size(loader: DataLoader[Any], *, fixed: bool) -> int:
    if fixed and loader.batch_size != 1:  # samples of different shapes are loaded one by one
        return MAX_DEFAULT_BATCH_SIZE
    return min(loader.batch_size or MAX_DEFAULT_BATCH_SIZE, MAX_DEFAULT_BATCH_SIZE)


def _chunks(
    chosen: list[Any], rank: int, world_size: int, batch_size: int, *, interleaved: bool = False
) -> list[list[Any]]:
    """Divide this rank's share into batches of nearly equal size, on every rank equally many."""
    share = chosen[rank::world_size]
    num_batches = math.ceil(math.ceil(len(chosen) / world_size) / batch_size) or 1
    if interleaved:  # a batch has every K-th of all samples, so that one rank and two have the same batches
        return [share[i::num_batches] for i in range(min(num_batches, len(share)))]
    sizes = [len(share) // num_batches + (i < len(share) % num_batches) for i in range(num_batches)]
    ends = list(accumulate(sizes))
    return [share[end - size : end] for size, end in zip(sizes, ends, strict=True) if size > 0]


class _SeededSamples(Dataset[Any]):
    """A dataset whose random augmentation depends on the sample alone."""

    def __init__(self, dataset: Any, seed: int, device: torch.device | None) -> None:
        self._dataset = dataset
        self._seed = seed
        self._device = device

    def __getitem__(self, key: Any) -> Any:
        with seeded(seed_of(key, self._seed), self._device):
            try:
                return self._dataset[key]
            except (NotImplementedError, TypeError):  # a dataset that loads batches only, or a subset of one
                if not callable(getattr(self._dataset, "__getitems__", None)):
                    raise
        with seeded(seed_of(key, self._seed), self._device):
            return self._dataset.__getitems__([key])[0]


def _refuses_fork(loader: DataLoader[Any]) -> bool:
    """Return whether the user has asked for workers that are not forked; these then draw, as in training."""
    context = loader.multiprocessing_context
    return loader.num_workers > 0 and context is not None and context.get_start_method() != "fork"


def _loader_of(
    loader: DataLoader[Any], chunks: list[list[int]], seed: int, device: torch.device | None
) -> DataLoader[Any]:
    # Workers as in training: user code may open files that must not be opened in the main process.
    return DataLoader(
        _SeededSamples(loader.dataset, seed, None if loader.num_workers > 0 else device),  # of no use to a worker
        batch_sampler=chunks,
        collate_fn=loader.collate_fn,
        num_workers=min(loader.num_workers, len(chunks)),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers > 0 else None,
        generator=torch.Generator("cpu").manual_seed(seed),
    )


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
