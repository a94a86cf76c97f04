"""Users set a default device; ours is the module's. On ``meta`` every tensor made without a device would show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.registry import METRICS, make_landscape

from lightning_flatness import SAM, loss_surface


@pytest.fixture(params=["set_default_device", "with"])
def elsewhere(request) -> Iterator[None]:
    if request.param == "with":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("make", list(METRICS.values()), ids=list(METRICS))
def test_metrics(make, elsewhere):
    with torch.device("cpu"):
        metric, expected = make(), make()
        expected.update(make_landscape())
    metric.update(make_landscape())
    torch.testing.assert_close(metric.compute(), expected.compute(), rtol=0, atol=0)


def test_surfaces(elsewhere):
    assert loss_surface(make_landscape(), num_points=3).losses.isfinite().all()


def test_steps_of_sam(elsewhere):
    with torch.device("cpu"):
        module, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
        before = module.weight.detach().clone()
    sam = SAM(torch.optim.SGD(module.parameters(), lr=0.1), geometry="element")

    def closure() -> torch.Tensor:
        sam.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        return loss

    sam.step(closure)
    assert not torch.equal(module.weight, before)
