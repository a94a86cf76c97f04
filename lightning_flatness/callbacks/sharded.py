"""Whether a run is measured with weights and vectors sharded over the ranks, or gathered on each."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_flatness.landscape import LossLandscape, ShardedLandscape
from lightning_flatness.metrics import FlatnessMetric


def kind_of_landscape(metrics: Mapping[str, FlatnessMetric], sharded: bool) -> type[LossLandscape]:
    """Return the kind of landscape to measure, the same for all metrics; say so if a metric does not take the other.

    Args:
        metrics: What is measured, by name.
        sharded: Whether it was asked for sharded weights.
    """
    needing = [name for name, metric in metrics.items() if not metric.takes_shards]
    if sharded and needing:
        rank_zero_info(
            f"FlatnessMonitor: {', '.join(map(repr, needing))} cannot be measured with sharded weights: every rank "
            "gathers them for all metrics. HINT: leave these metrics out."
        )
    return ShardedLandscape if sharded and not needing else LossLandscape
