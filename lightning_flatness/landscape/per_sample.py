"""The gradients of single samples: ``vmap`` over the gradient of the loss of a batch of one, or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.loss_landscape import LossLandscape
from lightning_flatness.module.batches import copy_batch, map_tensors, slice_samples, tensors_in
from lightning_flatness.module.loss import check_loss, loss_in

_CHUNK_BYTES = 2**27
"""Gradients of so many bytes are made at once."""


def sum_over_samples(landscape: LossLandscape, add: Callable[[Tensor, Tensor], None], size: int) -> Tensor:
    """Return the sum over all samples of a function of their gradients. Costs one gradient, more without ``vmap``.

    ``add(gradients, total)`` adds to ``total``, shape (size,), in place, the part of some samples, whose gradients have
    the shape (any, num_parameters). The sum is the same on all ranks.
    """
    with landscape.measurement(), landscape.batched_loss.summed(size) as total:
        for gradients in _gradients_of_samples(landscape.batched_loss):
            add(gradients, total)
    landscape.cost.gradient_evaluations += 1
    return total


def _gradients_of_samples(loss: BatchedLoss) -> Iterator[Tensor]:
    """Yield the gradients of this rank's samples, shape (any, num_parameters)."""
    chunk = max(1, _CHUNK_BYTES // (loss.num_parameters * loss.dtype.itemsize))
    vmap_works = not loss.measured.has_hidden_weights  # written to inside a transform they crash torch
    for index in loss.indices:
        size = loss.samples.sizes[index]
        for start in range(0, size, chunk):
            stop = min(start + chunk, size)
            if vmap_works:
                try:
                    yield _gradients_by_vmap(loss, index, start, stop)
                    continue
                except Exception:  # a branch on data, a buffer written in place, an operator without a rule …
                    vmap_works = False  # … or an error of the user's, which comes up again below
            yield _gradients_one_by_one(loss, index, start, stop)


def _gradients_one_by_one(loss: BatchedLoss, index: int, start: int, stop: int) -> Tensor:
    batch, size = loss.samples.fresh(index), loss.samples.sizes[index]
    gradients = torch.zeros(stop - start, loss.num_parameters, dtype=loss.dtype, device=loss.device)
    for i, row in enumerate(gradients, start=start):
        with loss.measured.forward_pass(index):
            output = loss.loss_fn(loss.module, copy_batch(slice_samples(batch, size, i, i + 1)))
        pieces = loss.batch_gradient(check_loss(loss_in(output)))
        for view, piece in zip(loss.unflatten(row), pieces, strict=True):
            if piece is not None:
                view.copy_(piece)
    return gradients


def _gradients_by_vmap(loss: BatchedLoss, index: int, start: int, stop: int) -> Tensor:
    batch, size = loss.samples.fresh(index), loss.samples.sizes[index]
    at = LossModule(loss).at
    is_sliced = [leaf.dim() > 0 and leaf.shape[0] == size for leaf in tensors_in(batch)]
    chosen = list(tensors_in(slice_samples(batch, size, start, stop)))

    def loss_of(values: Sequence[Tensor], *sample: Tensor) -> Tensor:
        pieces = iter([t.unsqueeze(0) if sliced else t for t, sliced in zip(sample, is_sliced, strict=True)])
        one = map_tensors(lambda _: next(pieces).clone(), batch)  # the user's code may write into its batch
        return at(values, one)

    in_dims = (None, *(0 if sliced else None for sliced in is_sliced))
    with loss.measured.forward_pass(index), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that vmap has to loop over
        gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=in_dims, randomness="same")(
            loss.parameters, *chosen
        )
    return torch.cat([gradient.detach().flatten(1) for gradient in gradients], dim=1).to(loss.dtype)


class LossModule(nn.Module):
    """A module whose output is the loss, as a function of the parameters: ``functional_call`` takes modules."""

    def __init__(self, loss: BatchedLoss) -> None:
        super().__init__()
        self.module = loss.module
        self.loss_fn = loss.loss_fn
        index_of = {id(p): i for i, p in enumerate(loss.parameters)}
        # Each place once. With `tie_weights`, torch visits a layer that has two names twice, and in the end puts back
        # there what it had put in the first time.
        self._places = [
            (name, index_of[id(p)])
            for prefix, layer in self.named_modules()
            for name, p in layer.named_parameters(prefix, recurse=False, remove_duplicate=False)
            if id(p) in index_of
        ]

    def forward(self, batch: Any) -> Any:
        """Return the loss of a batch."""
        return loss_in(self.loss_fn(self.module, batch))

    def at(self, values: Sequence[Tensor], batch: Any) -> Tensor:
        """Return the loss of a batch where the parameters have these values."""
        named = {name: values[i] for name, i in self._places}
        value: Tensor = torch.func.functional_call(self, named, (batch,), tie_weights=False)
        return value.reshape(())
