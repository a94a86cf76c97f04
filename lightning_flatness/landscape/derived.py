"""Landscapes made of another one, at the same weights: of some of its samples, or of another loss."""

from __future__ import annotations

from lightning_flatness.landscape.cost import Cost
from lightning_flatness.landscape.loss_landscape import LossLandscape
from lightning_flatness.landscape.output_loss import normalized_logits, output_loss_of


def sub_batches(landscape: LossLandscape, num_samples: int) -> list[LossLandscape]:
    """Return landscapes of disjoint sub-batches of the samples, each with its ``cost``, for use in one measurement.

    A sub-batch has ``num_samples`` over all ranks; the last one may be smaller. With several ranks, sample ``i`` of
    rank ``r`` counts as sample ``i · world_size + r`` (as the probe and a ``DistributedSampler`` deal them out), and
    all ranks evaluate every sub-batch together. So the sub-batches do not depend on the number of ranks.

    Raises:
        ValueError: If a batch cannot be split.
        RuntimeError: If called outside of a measurement.
    """
    parts = landscape.batched_loss.samples.parts(num_samples, landscape.device)
    return [landscape.derived(0.0, samples=part, cost=Cost()) for part in parts]


def with_normalized_logits(landscape: LossLandscape) -> LossLandscape:
    """Return the landscape of the loss on logits over their standard deviation, with the same ``cost``.

    Raises:
        TypeError: If the ``loss_fn`` does not tell the outputs from the loss.
        RuntimeError: If called outside of a measurement.
    """
    loss_fn = normalized_logits(output_loss_of(landscape, "normalize_logits=True"))
    return landscape.derived(landscape.batched_loss.point.graphs.room, loss_fn=loss_fn)
