"""The examples of invariance: transformed networks compute the same, and the numbers that should stay do stay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _import_path():
    folders = [str(EXAMPLES), str(EXAMPLES / "basis_paths")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


def test_heads_in_other_coordinates():
    import attention_invariance as example

    from lightning_flatness import LossLandscape

    torch.manual_seed(0)
    before = example.Transformer(size=8, num_heads=2).eval()
    after = example.with_other_bases(before, condition=30.0)
    probe = example.windows(example.standard_library(5_000), 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(probe[:, :-1]), before(probe[:, :-1]), rtol=0, atol=1e-4)
    values = []
    for network in (before, after):
        metrics = example.metrics()
        chosen = [metrics[name] for name in ("attention", "layer (invariant sharpness)")]
        for metric in chosen:
            metric.update(LossLandscape(network, [probe], example.loss_fn))
        values.append([float(metric.compute()) for metric in chosen])
    assert values[1][0] == pytest.approx(values[0][0], rel=1e-3)
    assert abs(values[1][1] / values[0][1] - 1) > 0.01


def test_units_rescaled_and_shuffled():
    import psi_flatness as example
    from digits import ConvNet

    torch.manual_seed(0)
    before = ConvNet().eval()
    after = example.rescaled(before)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4)
    first = next(before.parameters())
    assert not torch.allclose(next(after.parameters()), first, rtol=0.1)
