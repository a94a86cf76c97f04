"""Standard errors of the traces of layers, from groups of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_flatness.estimators.operators import Operator, rademacher
from lightning_flatness.estimators.sampling import NUM_PROBES, known_in_advance
from lightning_flatness.geometry import Chart
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.sampling import SampleLosses


def layer_trace_standard_errors(
    landscape: LossLandscape, chart: Chart, blocks: Sequence[slice], operator: Operator, seed: int
) -> Tensor:
    """Return the standard errors that the samples give to the trace and to those of diagonal blocks.

    Of ``vᵀ P H_g v`` with random signs v and the projection P on a block, over groups g of samples: 25 gradients.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates.
        blocks: Coordinates of the blocks: of whole parameters.
        operator: Which one's; only the Hessian's errors are known.
        seed: Of the directions.

    Returns:
        Shape (1 + blocks,), in float64 on the CPU; not numbers where they are not known.
    """
    known = math.nan if operator != "hessian" else known_in_advance(landscape)
    if any(p.dtype != landscape.dtype for p in landscape.parameters) or landscape.engine == "finite_difference":
        known = math.nan  # autograd cannot differentiate twice, and may not notice
    if known is not None:
        return torch.full((1 + len(blocks),), known, dtype=torch.float64, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    losses, found = SampleLosses(landscape), []
    for _ in range(NUM_PROBES):
        v = rademacher(chart.num_coordinates, generator, landscape.dtype, landscape.device)
        found.append(losses.second_derivatives_by_tensor(chart.displacement(v)))
    of_tensors = torch.stack(found)  # (probes, tensors, groups)
    ends = torch.tensor([p.numel() for p in landscape.parameters], device="cpu").cumsum(0)
    inside = [[block.start < int(end) <= block.stop for end in ends] for block in blocks]
    chosen = torch.tensor([[True] * len(ends), *inside], dtype=torch.float64, device="cpu")
    by_block = torch.einsum("bt,ptg->bpg", chosen, of_tensors)
    errors = [losses.standard_error(bends) for bends in by_block]
    return torch.tensor(errors, dtype=torch.float64, device="cpu")
