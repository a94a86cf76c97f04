"""Full-batch training climbs to the edge of stability and hovers there: the example, in a size for tests."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import edge_of_stability

    yield edge_of_stability
    sys.path.remove(str(EXAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("gradient_descent", 500), ("adam", 440)])
def test_sharpness_rises_to_the_edge_and_hovers_while_the_loss_falls(example, tmp_path, name, steps):
    curves = example.train(name, tmp_path, steps=steps, every=20, num_samples=400, seed=0)
    ratio = dict(curves["flatness/edge_of_stability"])
    early = [r for step, r in ratio.items() if 20 <= step <= 100]
    late = [r for step, r in ratio.items() if step >= steps - 120]
    assert max(early) < 0.8
    assert 0.9 < statistics.mean(late) < 1.15
    assert max(ratio.values()) < 1.5
    loss = [value for _, value in curves["train_loss"]]
    assert loss[-1] < loss[0] / 4
    edge = {"gradient_descent": 2 / 0.5, "adam": 3.8 / (0.1 * 0.005)}[name]
    assert {round(v, 2) for _, v in curves["flatness/stability_edge"]} == {round(edge, 2)}
    assert "| step | loss | sharpness | edge | sharpness/edge |" in example.table(name, curves)
    example.draw({name: curves}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_under_cross_entropy_the_edge_is_reached_and_left(example, tmp_path):
    curves = example.train("cross_entropy", tmp_path, steps=400, every=10, num_samples=400, seed=0)
    ratio = dict(curves["flatness/edge_of_stability"])
    assert max(ratio.values()) > 1
    assert ratio[40] < 0.4
    assert "cross-entropy" in example.table("cross_entropy", curves)
