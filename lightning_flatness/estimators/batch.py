"""Batch sharpness: how the loss of a batch curves along its own gradient."""

from __future__ import annotations

import math

import torch

from lightning_flatness.estimators.arguments import check_arguments
from lightning_flatness.estimators.operators import check_finite
from lightning_flatness.estimators.result import Estimate, mean_and_error, scalar_estimate
from lightning_flatness.estimators.undefined import UndefinedMeasureError
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.derived import sub_batches


def batch_sharpness(landscape: LossLandscape, batch_size: int | None, *, tol: float = 0.2) -> Estimate:
    """Return the mean of ``g_B' H_B g_B / ‖g_B‖²`` over disjoint batches of the samples.

    Arguments, cost and errors as of :class:`lightning_flatness.BatchSharpness`.

    Raises:
        UndefinedMeasureError: If the batch size is not known, or above the number of samples.
    """
    check_arguments({"batch_size": batch_size, "tol": tol})
    if batch_size is None:
        raise UndefinedMeasureError(
            "Expected `batch_size`, the samples behind one optimizer step, which could not be told, got None. Use "
            "BatchSharpness(batch_size=...)."
        )
    if batch_size > landscape.num_samples:
        raise UndefinedMeasureError(
            f"Expected batches of at most the {landscape.num_samples} samples that are measured on, got a batch size "
            f"of {batch_size}. Raise `probe_size`."
        )
    quotients = []
    with landscape.measurement():
        for batch in sub_batches(landscape, batch_size):
            if batch.num_samples < batch_size:
                continue  # the rest, whose gradient is noisier
            gradient = batch.gradient(keep_graphs=True)
            length = torch.linalg.vector_norm(gradient)
            direction = gradient / length if length > 0 else gradient
            product = batch.hvp(direction)
            check_finite(product)
            quotients.append(torch.dot(direction, product))
            share = batch.num_samples / landscape.num_samples
            landscape.cost.gradient_evaluations += share * batch.cost.gradient_evaluations
    mean, error = map(float, mean_and_error(torch.stack(quotients)))
    standard_error = error
    if batch_size == landscape.num_samples:
        error = 16 * torch.finfo(landscape.dtype).eps * abs(mean)  # of these samples there is no other batch
    converged = not math.isnan(error) and error <= tol * abs(mean)
    return scalar_estimate(landscape, mean, error, converged=converged, standard_error=standard_error)
