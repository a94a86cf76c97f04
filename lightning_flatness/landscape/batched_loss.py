"""The mean loss over batches of samples within one measurement: what engines differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_flatness.geometry import FirstBatch
from lightning_flatness.landscape.cost import Cost
from lightning_flatness.landscape.engines.second_derivatives import Operators, counted_bytes
from lightning_flatness.landscape.point import Point
from lightning_flatness.landscape.ranks import sum_over_ranks
from lightning_flatness.landscape.samples import Samples
from lightning_flatness.landscape.update import OptimizerStep
from lightning_flatness.landscape.vectors import Vectors
from lightning_flatness.module.cross_entropy import CompactCrossEntropy
from lightning_flatness.module.kernels import DifferentiableWeightNorm
from lightning_flatness.module.loss import LossFunction, check_finite_loss, check_loss, loss_in
from lightning_flatness.module.twin import Twin

_LOW_PRECISION = 2
_Pass = TypeVar("_Pass")


@dataclass
class BatchedLoss:
    """The loss of a module over samples, at its current weights.

    Attributes:
        measured: The module, its parameters and the guard of its forward passes.
        loss_fn: The mean loss of a batch.
        samples: The batches.
        cost: Counts what is evaluated.
        operators: Operators of the loss whose second derivatives may be wrong.
        on_evaluation: Called after every sum over the samples.
        point: Results at the current weights.
        module: The module that is evaluated.
        parameters: The variables of the derivatives.
        num_parameters: Length of flat vectors.
        parameter_sizes: Number of entries of each parameter.
        vectors: Where flat vectors are.
        dtype: Of flat vectors.
        device: Of flat vectors.
    """

    measured: Twin
    loss_fn: LossFunction
    samples: Samples
    cost: Cost
    operators: Operators
    on_evaluation: Callable[[], None] | None
    point: Point
    module: nn.Module = field(init=False)
    parameters: list[Tensor] = field(init=False)
    num_parameters: int = field(init=False)
    parameter_sizes: list[int] = field(init=False)
    vectors: Vectors = field(init=False)
    dtype: torch.dtype = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.module, self.parameters = self.measured.module, self.measured.parameters
        self.loss_fn = self.measured.rebound(self.loss_fn)
        self.parameter_sizes = [p.numel() for p in self.parameters]
        self.num_parameters = sum(self.parameter_sizes)
        self.dtype, self.device = vector_dtype(self.parameters), self.parameters[0].device
        self.vectors = Vectors(self.num_parameters, self.dtype, self.device)

    @contextmanager
    def displaced(self, displacement: Tensor, scale: float = 1.0) -> Iterator[None]:
        """Evaluate at ``w + scale · displacement`` inside the block; the weights come back bit for bit.

        The parameters' storage is exchanged, not written to, so nothing is rounded.
        """
        changes = self.unflatten(self.checked("displacement", displacement))
        here, self.point = self.point, Point()
        weights = zip(self.measured.weights(), changes, strict=True)
        try:
            with self.measured.at([torch.add(w, change, alpha=scale).to(w.dtype) for w, change in weights]):
                yield
        finally:
            self.point = here

    def change_of(self, step: OptimizerStep) -> Tensor:
        """Return the weights before an optimizer step minus those after it, a flat vector."""
        return step.change(self.parameters)

    @property
    def first_batch(self) -> FirstBatch | None:
        """The loss of this rank's first batch, for geometries that look at it; None without any."""
        if not self.samples.batches:
            return None
        guard = partial(self.measured.forward_pass, 0)
        return FirstBatch(self.loss_fn, self.samples.batches[0], self.samples.sizes[0], guard)

    # ------------------------------------------------------------------------------------------------ one batch

    def batch_loss(self, index: int, *, allow_non_finite: bool = False) -> Tensor:
        """Return the mean loss over the samples of a batch.

        Args:
            index: Which of this rank's batches.
            allow_non_finite: Whether it may be infinite or not a number.

        Returns:
            A scalar with its graph.

        Raises:
            RuntimeError: If it does not depend on the parameters.
        """
        rewriting = DifferentiableWeightNorm() if self.operators.has_weight_norm else nullcontext()
        batch = self.samples.fresh(index)
        compact = CompactCrossEntropy() if torch.is_grad_enabled() else nullcontext()
        with self.measured.forward_pass(index), rewriting, compact, _explained():
            output = self.loss_fn(self.module, batch)
        if self.measured.moves_parameters:
            self.point.graphs.close()
        loss = check_loss(loss_in(output), allow_non_finite)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RuntimeError(
                "Expected a loss that depends on the trainable parameters, got one that does not. Check for `detach`, "
                "`no_grad` or `item` between the parameters and the loss, and for a module that `loss_fn` uses in the "
                "place of the one it is given."
            )
        self.measured.check(loss)
        return loss

    objective = batch_loss
    """What is differentiated of a batch: its loss."""

    def recorded(self, *, is_counted: bool) -> AbstractContextManager[dict[int, int]]:
        """Return a block for a graph that is differentiated later; it yields the storages kept, if they are counted."""
        return counted_bytes(self.parameters) if is_counted else nullcontext(dict[int, int]())

    def in_step(self, passes: Sequence[_Pass]) -> Sequence[_Pass]:
        """Return what this rank is to go over, given what it wants to; more where others wait for it."""
        return passes

    def agreed_bytes(self, storages: dict[int, int]) -> int:
        """Return the bytes of a graph, from what :meth:`recorded` has yielded."""
        return sum(storages.values())

    def batch_gradient(self, loss: Tensor) -> Sequence[Tensor | None]:
        """Return the gradient of a batch's loss, a piece per parameter."""
        return torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def leave_gradient(self, index: int, pieces: Sequence[Tensor | None]) -> None:
        """Keep the gradient of a batch, a by-product of a Hessian-vector product, for :meth:`gradient`."""
        point = self.point
        if point.gradient is not None or index in point.summed:
            return
        if point.gradient_sum is None:
            point.gradient_sum = torch.zeros(self.vectors.local_size, dtype=self.dtype, device=self.device)
        self.add(self.unflatten(point.gradient_sum), index, pieces)
        point.summed.add(index)

    # ---------------------------------------------------------------------------------------------- all samples

    def value(self, *, allow_non_finite: bool = False) -> Tensor:
        """Return the loss, for one forward pass."""
        self.cost.gradient_evaluations += 1 / 3
        with self.summed(1) as total:
            for index in self.indices:
                self.add([total[0]], index, [self._batch_value(index)])
        if not allow_non_finite:
            check_finite_loss(total[0])
        return total[0]

    def _batch_value(self, index: int) -> Tensor:
        if not self.operators.differentiates:
            try:
                with torch.no_grad():
                    return self.batch_loss(index, allow_non_finite=True)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            self.operators.differentiates = True  # the loss takes a gradient itself, for a penalty on it, say
        return self.batch_loss(index, allow_non_finite=True).detach()

    def gradient(self, prepare: Callable[[BatchedLoss], None] | None = None) -> Tensor:
        """Return the gradient, for the price of those batches whose gradients no product has left behind.

        Args:
            prepare: Called first; what it raises, all ranks raise.
        """
        with self.summed_vector() as total:
            if prepare is not None:
                prepare(self)
            if self.point.gradient_sum is not None:
                total.add_(self.point.gradient_sum)
            views = self.unflatten(total)
            for index in self.indices:
                if index not in self.point.summed:
                    self.cost.add_batch_gradient(index, self.samples.sizes)
                    self.add(views, index, self.batch_gradient(self.objective(index)))
        return total

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return loss and gradient with one all-reduce."""
        self.cost.gradient_evaluations += 1
        with self.summed(1 + self.num_parameters) as total:
            views = [total[0], *self.unflatten(total[1:])]
            for index in self.indices:
                loss = self.batch_loss(index, allow_non_finite=True)
                self.add(views, index, [loss, *self.batch_gradient(loss)])
        check_finite_loss(total[0])
        return total[0], total[1:]

    @property
    def indices(self) -> range:
        """The numbers of this rank's batches."""
        return range(len(self.samples.sizes))

    def summed(self, size: int) -> AbstractContextManager[Tensor]:
        """Return a block that starts with zeros, shape (size,), and ends with the sum over all ranks.

        Inside, every rank adds its part in place. What one rank raises, all ranks raise.
        """
        return sum_over_ranks(size, self.operators, self.dtype, self.device, self.on_evaluation)

    def summed_vector(self) -> AbstractContextManager[Tensor]:
        """Return the same for a flat vector."""
        return self.summed(self.num_parameters)

    def norm(self, v: Tensor) -> float:
        """Return the norm of a flat vector."""
        return float(self.vectors.norm(v))

    def add(self, views: Sequence[Tensor], index: int, pieces: Sequence[Tensor | None]) -> None:
        """Add what a batch contributes to a mean over all samples; None stands for zeros.

        A piece that nobody else holds is freed as soon as it is added.
        """
        share, left = self.samples.sizes[index] / self.samples.num_samples, [*pieces][::-1]
        del pieces
        for view in views:
            if (piece := left.pop()) is not None:
                view.add_(piece.detach(), alpha=share)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return views of a flat vector, one in the shape of each parameter."""
        return unflatten(vector, self.parameters)

    def checked(self, name: str, vector: Tensor) -> Tensor:
        """Return a flat vector that was passed under a name.

        Raises:
            ValueError: If it has another shape.
        """
        size = self.vectors.local_size
        if vector.shape != (size,):
            raise ValueError(
                f"Expected `{name}` to be a flat vector of shape ({size},), one entry per measured parameter, got "
                f"shape {tuple(vector.shape)}."
            )
        return vector


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "Expected batches of two or more samples for layers that normalise by the statistics of the batch, got one "
            f"of a single sample ({error}). Raise `probe_size` and `probe_batch_size`, or measure in mode='eval'."
        ) from error


def unflatten(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a flat vector, one in the shape of each parameter."""
    pieces = torch.split(vector, [p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of flat vectors: the parameters' dtype, float32 at least."""
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


def precision_error(parameters: Sequence[Tensor]) -> float:
    """Return the relative error of Hessian-vector products in the lowest precision of the parameters; 0 for float32.

    In bfloat16 and float16, products were off by up to 2 units of the machine precision.
    """
    coarsest = max(torch.finfo(p.dtype).eps for p in parameters)
    return _LOW_PRECISION * coarsest if coarsest > torch.finfo(torch.float32).eps else 0.0
