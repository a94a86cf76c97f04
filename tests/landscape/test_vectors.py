"""Sharded vectors have the entries of whole ones, whatever the slices."""

from __future__ import annotations

import pytest
import torch

from lightning_flatness.landscape import vectors as module
from lightning_flatness.landscape.vectors import ShardedVectors, Vectors

CPU = torch.device("cpu")
SLICES = [[(0, 10), (40, 41), (70, 70), (77, 100)], [(10, 40), (41, 77)]]


def sharded(dtype: torch.dtype = torch.float64) -> list[ShardedVectors]:
    return [ShardedVectors(slices, 100, dtype, CPU, 66) for slices in SLICES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strip", [16, 32, 48, 96, 2**20])
def test_random_vectors_are_those_of_one_process(dtype, strip, monkeypatch):
    monkeypatch.setattr(module, "_STRIP", strip)
    whole = Vectors(100, dtype, CPU).gaussian(torch.Generator().manual_seed(3))
    for vectors in sharded(dtype):
        part = vectors.gaussian(torch.Generator().manual_seed(3))
        assert torch.equal(part, torch.cat([whole[a:b] for a, b in vectors.slices]))


def test_random_vectors_do_not_depend_on_the_size_of_strips():
    """The real size, with a last strip that is too short to stand alone."""
    size = module._STRIP + 5
    whole = Vectors(size, torch.float32, CPU).gaussian(torch.Generator().manual_seed(0))
    last = ShardedVectors([(size - 30, size)], size, torch.float32, CPU, size)
    assert torch.equal(last.gaussian(torch.Generator().manual_seed(0)), whole[-30:])


def test_in_one_process_sums_are_those_of_its_entries():
    vectors = ShardedVectors([(0, 3)], 3, torch.float32, CPU, 3)
    v, w = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([1.0, 1.0, 5.0])
    assert float(vectors.norm(v)) == 5
    assert float(vectors.dot(v, w)) == 7
    assert vectors.normalized(v).tolist() == pytest.approx([0.6, 0.8, 0])
    assert vectors.agreed(True)
    assert not vectors.agreed(False)
