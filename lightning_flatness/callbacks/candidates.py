"""Which samples a DataLoader can show: the keys that its sampler can yield, in an order of their own."""

from __future__ import annotations

import copy
import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def candidates(loader: DataLoader[Any], max_batches: float) -> Sequence[Any]:
    """Return the keys of the dataset that the loader's sampler can yield, each once, in an order without shuffling.

    A sampler of an unknown class is iterated, on copies: its state can move. Such a sampler, or one that does not
    shuffle, shows only the samples of an epoch of ``max_batches``.
    """
    everything = range(len(loader.dataset))  # type: ignore[arg-type]
    if type(loader.batch_sampler) is not BatchSampler:
        batches = _of_all_ranks(loader.batch_sampler, _limit(loader.batch_sampler, max_batches, 1, len(everything)))
        return _sorted(key for batch in batches for key in batch)
    sampler: Any = loader.batch_sampler.sampler
    batch_size = loader.batch_sampler.batch_size
    num_shown = max_batches * batch_size
    if type(sampler) is SequentialSampler:
        return everything if num_shown >= len(everything) else everything[: int(num_shown)]
    if type(sampler) is RandomSampler or (type(sampler) is DistributedSampler and sampler.dataset is loader.dataset):
        return everything
    if type(sampler) is SubsetRandomSampler:
        return sorted(int(i) for i in sampler.indices)
    if type(sampler) is WeightedRandomSampler:
        return torch.as_tensor(sampler.weights).nonzero().flatten().tolist()
    return _sorted(_of_all_ranks(sampler, _limit(sampler, max_batches, batch_size, len(everything))))


def seed_of(key: Any, seed: int) -> int:
    """Return the seed of the random augmentation of one sample, given its key; the same in every process."""
    plain = _plain(key)
    if not isinstance(plain, int):
        plain = int.from_bytes(hashlib.sha256(repr(plain).encode()).digest()[:8], "big")
    return (1_000_003 * seed + plain) % 2**63


def _limit(sampler: Any, max_batches: float, batch_size: int, size: int) -> int:
    """Return how many items to take at most. Some samplers never end; an epoch of those has as many as the dataset."""
    try:
        length = len(sampler)
    except (TypeError, NotImplementedError):
        return int(max_batches * batch_size) if math.isfinite(max_batches) else size
    # Without the last batch if it is dropped, an epoch still shows the whole sampler in the course of time.
    return length if max_batches >= length // batch_size else int(max_batches * batch_size)


def _of_all_ranks(sampler: Any, limit: int) -> Iterator[Any]:
    num_replicas = getattr(sampler, "num_replicas", 1) if hasattr(sampler, "rank") else 1
    for rank in range(num_replicas):
        copied = copy.copy(sampler)
        if num_replicas > 1:
            copied.rank = rank
        yield from islice(copied, limit)


def _sorted(keys: Iterable[Any]) -> list[Any]:
    found = {_plain(key): key for key in keys}
    if all(isinstance(plain, int) for plain in found):
        return [found[plain] for plain in sorted(found)]
    return [found[plain] for plain in sorted(found, key=repr)]


def _plain(key: Any) -> Any:
    """Return what identifies a key: a number, a string, or tuples of those."""
    if isinstance(key, Tensor | np.ndarray):
        return _plain(key.tolist())
    if isinstance(key, list | tuple):
        return tuple(_plain(part) for part in key)
    try:
        return operator.index(key)
    except TypeError:
        return key if isinstance(key, str | bytes | float) else repr(key)
