"""The published costs of the measures have one source."""

from __future__ import annotations

import re

from lightning_flatness.metrics.presets import TYPICAL_COSTS, preset_metrics


def test_the_table_of_costs_is_that_of_the_data():
    rows = re.findall(r"^    (\w+) +(\d+(?:, \d+, \d+)?) +``(\w+)\(", preset_metrics.__doc__, flags=re.MULTILINE)
    costs = {name: tuple(map(int, cost.split(", "))) for name, cost, _ in rows}
    assert {name: cost * 3 if len(cost) == 1 else cost for name, cost in costs.items()} == TYPICAL_COSTS
    assert {name: kind for name, _, kind in rows} == {n: type(m).__name__ for n, m in preset_metrics("all").items()}
    total = round(sum(costs[0] for costs in TYPICAL_COSTS.values()), -2)
    assert f"about {total:,} gradients" in preset_metrics.__doc__
