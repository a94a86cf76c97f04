"""The gradients of single samples, many at a time: ``vmap`` over the gradient of the loss of a batch of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.batches import map_tensors, slice_samples, tensors_in


def gradients_by_vmap(
    module: nn.Module, loss_fn: Callable[[nn.Module, Any], Any], batch: Any, size: int, start: int, stop: int
) -> Tensor:
    """Return the flat gradients of the losses of some samples of a batch, each as a batch of one.

    Args:
        module: The module.
        loss_fn: Returns the mean loss of a batch, or a dict with ``"loss"``.
        batch: The samples; what has not one entry per sample is the same for all.
        size: How many samples the batch holds.
        start: The first sample to take.
        stop: The first sample not to take.

    Returns:
        Shape (stop - start, number of trainable parameters).

    Raises:
        Exception: Whatever ``vmap`` says to a module that it cannot vectorise.
    """
    holder = _LossModule(module, loss_fn)
    weights: dict[str, Tensor] = {name: p for name, p in holder.named_parameters() if p.requires_grad}
    leaves = list(tensors_in(batch))
    is_sliced = [leaf.dim() > 0 and leaf.shape[0] == size for leaf in leaves]
    chosen = list(tensors_in(slice_samples(batch, size, start, stop)))

    def loss_of(values: dict[str, Tensor], *sample: Tensor) -> Tensor:
        pieces = iter([t.unsqueeze(0) if sliced else t for t, sliced in zip(sample, is_sliced, strict=True)])
        one = map_tensors(lambda _: next(pieces).clone(), batch)  # the user's code may write into its batch
        loss: Tensor = torch.func.functional_call(holder, values, (one,))
        return loss.reshape(())

    in_dims = (None, *(0 if sliced else None for sliced in is_sliced))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that vmap has to loop over
        gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=in_dims, randomness="same")(weights, *chosen)
    return torch.cat([gradients[name].detach().flatten(1) for name in weights], dim=1)


class _LossModule(nn.Module):
    """A module whose output is the loss: ``functional_call`` takes modules."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Any:
        output = self.loss_fn(self.module, batch)
        return output["loss"] if isinstance(output, Mapping) and "loss" in output else output
