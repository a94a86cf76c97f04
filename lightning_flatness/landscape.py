"""The loss on a fixed set of samples as a function of the weights: value, gradient, Hessian-vector product.

Everything else in the package asks this class. It holds the two things that are easy to get wrong: the loss
is a mean over *samples* (of all batches and all ranks), and evaluating it leaves no trace in the module.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_flatness.batches import copy_batch, infer_batch_size, prepare_batch, slice_samples, tensors_in
from lightning_flatness.gauss_newton import Linearization, OutputLoss, normalized_logits
from lightning_flatness.geometry import Chart, Geometry, resolve_geometry
from lightning_flatness.isolation import DifferentiableWeightNorm, Isolation, Mode, isolated, preserved_rng
from lightning_flatness.loss import LossFunction, check_loss, loss_in, trainable_parameters, training_step_of
from lightning_flatness.per_sample import gradients_by_vmap
from lightning_flatness.second_derivatives import (
    NotTwiceDifferentiableError,
    counted_bytes,
    from_autograd,
    graph_nodes,
    second_derivative_error,
)
from lightning_flatness.sharding import check_gathered, check_sharding, gathered, is_distributed, is_sharded, reshard

Differentiation = Literal["auto", "exact", "finite_difference"]


@dataclass
class Cost:
    """What has been evaluated on the whole set of samples.

    Attributes:
        num_products: Hessian-vector products.
        gradient_evaluations: Everything, in gradients: a loss counts one third, a Hessian-vector product two,
            and one more where its graph had to be built.
    """

    num_products: int = 0
    gradient_evaluations: float = 0.0


@dataclass
class _Graph:
    """The gradient of one batch's loss with its graph, ready to be differentiated again."""

    gradient: tuple[Tensor | None, ...]
    num_bytes: int


@dataclass
class _OutputGraph:
    """The outputs of one batch with their graph, ready for Gauss-Newton products."""

    linearization: Linearization
    num_bytes: int


class LossLandscape:
    r"""The mean loss of a module over fixed samples, ``L(w) = 1/N sum_n loss_n(w)``, at its current weights.

    The weights are the trainable parameters, each once (tied parameters are one tensor), as one flat vector in
    the order of ``module.parameters()``. Batches are weighted by their number of samples. When a process group
    is initialised, the batches of each rank are its share of the samples, and the mean runs over all ranks with
    one all-reduce per evaluation; so all ranks have to make the same calls.

    The module is evaluated in isolation: modes, buffers, ``.grad``, random number generators, torchmetrics,
    plain attributes and loggers are as before afterwards, also when an evaluation raises. The same batch sees the
    same random numbers in every evaluation, so that with dropout, too, the loss is one function of the weights.

    Args:
        module: Any ``nn.Module``. Its weights may change between measurements; see :meth:`measurement`.
        batches: The samples, as an iterable of batches. It is read once; an iterable of its own length is best.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss over the samples of ``batch`` as a scalar
            tensor, or a dict with the key ``"loss"``. Default: the ``training_step`` of a LightningModule. An
            :class:`OutputLoss` is needed for what looks at the outputs (:meth:`ggnvp`, normalised logits).
        mode: ``"eval"`` (dropout off, running statistics) or ``"train"`` (dropout with fixed masks, batch
            statistics).
        differentiation: How Hessian-vector products are made. ``"exact"``: by differentiating twice.
            ``"finite_difference"``: central differences of the gradient. ``"auto"``: exact, and finite
            differences, with a warning, if an operator has no second derivative.
        graph_memory: Bytes of gradient graphs that are kept between Hessian-vector products of one measurement.
            Batches beyond that are differentiated anew in each product, which costs 1.5 times as much.
        batch_size_fn: ``batch_size_fn(batch)`` returns the number of samples of a batch. Default: the length
            of the first axis of the first tensor in it.
        seed: Seed of the random numbers that the module draws.
        optimizer: The optimizer that trains the module, or several of them; the geometry ``"optimizer"`` asks for it.

    Attributes:
        num_samples: Number of samples N, over all ranks.
        num_parameters: Length of flat vectors.
        device: Where the module's parameters are and where vectors are made.
        dtype: Of flat vectors: the parameters' dtype, float32 at least.
        cost: What has been evaluated so far.

    Raises:
        ValueError: If there are no samples, no trainable parameters, or an option is not one of those named.
        TypeError: If there is neither a ``loss_fn`` nor a ``training_step``.

    Example:
        Least squares in one weight, ``L(w) = mean (w x)²``, has the Hessian ``2 mean x²``.

        >>> import torch
        >>> from lightning_flatness import LossLandscape
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
        >>> landscape = LossLandscape(module, batches, lambda module, x: module(x).square().mean())
        >>> landscape.num_samples
        3
        >>> landscape.hvp(torch.tensor([3.0]))
        tensor([28.])
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFunction | None = None,
        *,
        mode: Mode = "eval",
        differentiation: Differentiation = "auto",
        graph_memory: int = 2**30,
        batch_size_fn: Callable[[Any], int] | None = None,
        seed: int = 0,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> None:
        check_options(mode, differentiation)
        self.module = module.module if isinstance(module, DistributedDataParallel) else module
        self.loss_fn = loss_fn if loss_fn is not None else training_step_of(self.module)
        self.mode: Mode = mode
        self.differentiation: Differentiation = differentiation
        self.graph_memory = graph_memory
        self.seed = seed
        self.optimizer = optimizer
        reshard(self.module)
        self.parameters = trainable_parameters(self.module)
        self.num_parameters = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        self.dtype = _vector_dtype(self.parameters)
        check_sharding(self.module, self.num_parameters, self.device)
        self.cost = Cost()
        self.product_error = 0.0
        """Estimated relative error of Hessian-vector products; above zero where finite differences are used."""
        self.on_evaluation: Callable[[], None] | None = None
        """Called after every loss, gradient and Hessian-vector product, e.g. to report progress."""
        with preserved_rng(self.device):
            self.batches = [prepare_batch(batch, self.device) for batch in batches]
        size_of = batch_size_fn if batch_size_fn is not None else infer_batch_size
        self.batch_sizes = [size_of(batch) for batch in self.batches]
        self.num_samples = self._total(sum(self.batch_sizes))
        if self.num_samples == 0:
            raise ValueError("Expected at least one sample in `batches`, got none. Check the loader or the probe.")
        coarsest = max((p.dtype for p in self.parameters), key=lambda dtype: torch.finfo(dtype).eps)
        check_gathered(self.module, self._plain_loss, self.batches, self.device, coarsest)
        self._isolation: Isolation | None = None
        self._graphs: list[_Graph | None] | None = None
        self._output_graphs: list[_OutputGraph | None] | None = None
        self._gradient: Tensor | None = None
        self._charts: dict[str | Geometry, Chart] = {}
        self._step_factor: float | None = None
        self._is_inspected = self._has_custom_functions = self._has_weight_norm = self._is_verified = False

    # ----------------------------------------------------------------------------------------- one measurement

    @contextmanager
    def measurement(self) -> Iterator[LossLandscape]:
        """Hold the module still for several evaluations at the same weights.

        Inside the block the module stays isolated, the gradient is kept, and its graphs are kept between
        Hessian-vector products (as far as ``graph_memory`` goes). Metrics open it themselves; open it around
        several of them to let them share the graphs. The weights must not be trained inside. Blocks nest.

        Yields:
            The landscape itself.
        """
        if self._isolation is not None:
            with torch.inference_mode(False), torch.enable_grad():  # Metric.update has turned gradients off again
                yield self
            return
        held = self.parameters
        guard = isolated(self.module, self.mode, self.device, self.seed)
        with gathered(self.module, held) as whole_parameters, guard as self._isolation:
            self.parameters = whole_parameters
            self._graphs = [None] * len(self.batches)
            self._output_graphs = [None] * len(self.batches)
            try:
                yield self
            finally:
                self.parameters = held
                self._isolation = self._graphs = self._output_graphs = self._gradient = None
                self._charts.clear()

    @contextmanager
    def displaced(self, displacement: Tensor) -> Iterator[None]:
        """Evaluate at ``w + displacement`` inside the block; the weights come back bit for bit.

        The parameters' storage is exchanged, not written to, so nothing is rounded.

        Args:
            displacement: Flat vector, shape (num_parameters,).
        """
        self._check_vector("displacement", displacement)
        if self._isolation is None and any(is_sharded(p) for p in self.parameters):
            with self.measurement(), self.displaced(displacement):
                yield
            return
        originals = [p.data for p in self.parameters]
        here = self._graphs, self._output_graphs, self._gradient, self._charts
        self._graphs, self._output_graphs, self._gradient, self._charts = None, None, None, {}
        try:
            for p, original, change in zip(self.parameters, originals, self.unflatten(displacement), strict=True):
                p.data = (original + change).to(original.dtype)
            yield
        finally:
            for p, original in zip(self.parameters, originals, strict=True):
                p.data = original
            self._graphs, self._output_graphs, self._gradient, self._charts = here

    def chart(self, geometry: str | Geometry) -> Chart:
        """Return the coordinates of ``geometry`` around the current weights.

        Args:
            geometry: A geometry or its name.

        Returns:
            The chart; inside one :meth:`measurement` the same object is returned again.
        """
        if geometry in self._charts:
            return self._charts[geometry]
        bound = resolve_geometry(geometry).for_optimizer(self.optimizer)
        with gathered(self.module, self.parameters) as parameters:
            chart = bound.chart(self.module, parameters, self.dtype)
        if self._isolation is not None:
            self._charts[geometry] = chart
        return chart

    def sub_batches(self, num_samples: int) -> list[LossLandscape]:
        """Return the landscapes of disjoint sub-batches of the samples, to be used inside one :meth:`measurement`.

        With several ranks, sample ``i`` of rank ``r`` counts as sample ``i · world_size + r`` (the way the probe and
        a ``DistributedSampler`` deal them out), and every sub-batch is evaluated by all ranks together. So the
        sub-batches do not depend on the number of ranks.

        Args:
            num_samples: Samples of a sub-batch, over all ranks; the last one may be smaller.

        Returns:
            A landscape for each, at the same weights, with a ``cost`` of its own.

        Raises:
            ValueError: If a batch cannot be split.
            RuntimeError: If called outside of a measurement.
        """
        if self._isolation is None:
            raise RuntimeError("Expected `sub_batches` inside a measurement. Open `with landscape.measurement():`.")
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if is_distributed() else (1, 0)
        num_local = sum(self.batch_sizes)
        bounds = [max(0, -(-(i - rank) // world_size)) for i in range(0, self.num_samples, num_samples)]
        stops = [*bounds[1:], max(num_local, bounds[-1])]
        return [self._restricted(start, stop) for start, stop in zip(bounds, stops, strict=True)]

    def _restricted(self, start: int, stop: int) -> LossLandscape:
        """Return the landscape of this rank's samples ``start`` to ``stop``, together with those of the others."""
        batches, sizes, first = [], [], 0
        for batch, size in zip(self.batches, self.batch_sizes, strict=True):
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                batches.append(slice_samples(batch, size, low, high))
                sizes.append(high - low)
            first += size
        num_samples = self._total(sum(sizes))
        return self._derived(batches=batches, batch_sizes=sizes, num_samples=num_samples, cost=Cost(), _graphs=None)

    def with_normalized_logits(self) -> LossLandscape:
        """Return the landscape of the loss on logits divided by their standard deviation over the classes.

        Returns:
            A landscape at the same weights, with the same ``cost``; use it inside one :meth:`measurement`.

        Raises:
            TypeError: If the ``loss_fn`` does not tell the outputs from the loss.
        """
        loss_fn = normalized_logits(self._output_loss("normalize_logits=True"))
        return self._derived(loss_fn=loss_fn, _graphs=None if self._graphs is None else [None] * len(self.batches))

    def _derived(self, **changes: Any) -> LossLandscape:
        derived = copy.copy(self)
        derived.__dict__.update(_output_graphs=None, _gradient=None, _step_factor=None, **changes)
        return derived

    # ---------------------------------------------------------------------------------------------- quantities

    def loss(self, *, allow_non_finite: bool = False) -> Tensor:
        """Return ``L(w)``, a scalar. Costs one forward pass over the samples.

        Args:
            allow_non_finite: Return a loss that is infinite or not a number (far from the weights of a network the
                loss overflows) instead of raising.

        Returns:
            The mean over the samples.

        Raises:
            ValueError: If the loss is not finite, unless that is allowed.
        """
        self.cost.gradient_evaluations += 1 / 3

        def local(index: int) -> list[Tensor]:
            with torch.no_grad():
                return [self._batch_loss(index, allow_non_finite)]

        with self.measurement():
            return self._mean_over_samples(local, 1)[0]

    def gradient(self) -> Tensor:
        """Return the gradient of ``L`` at ``w``, shape (num_parameters,).

        Costs one gradient; nothing where a Hessian-vector product of the same measurement left it behind, or for the
        second time in one measurement.
        """
        if self._gradient is not None:
            return self._gradient.clone()

        def local(index: int) -> Sequence[Tensor | None]:
            kept = None if self._graphs is None else self._graphs[index]
            if kept is not None:
                return kept.gradient
            self.cost.gradient_evaluations += self.batch_sizes[index] / max(1, sum(self.batch_sizes))
            return torch.autograd.grad(self._batch_loss(index), self.parameters, allow_unused=True)

        with self.measurement():
            gradient = self._mean_over_samples(local, self.num_parameters)
            if self._graphs is not None:  # not at displaced weights
                self._gradient = gradient
            return gradient.clone()

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return ``L(w)`` and its gradient, for the price of the gradient and with one all-reduce."""
        self.cost.gradient_evaluations += 1

        def local(index: int) -> Sequence[Tensor | None]:
            loss = self._batch_loss(index)
            return [loss, *torch.autograd.grad(loss, self.parameters, allow_unused=True)]

        with self.measurement():
            both = self._mean_over_samples(local, 1 + self.num_parameters)
            return both[0].clone(), both[1:].clone()

    def hvp(self, v: Tensor) -> Tensor:
        """Return ``H v``, the product of the Hessian of ``L`` at ``w`` with a vector.

        Costs about two gradients while the graph is kept (see :meth:`measurement`), three otherwise.

        Args:
            v: Flat vector, shape (num_parameters,).

        Returns:
            Flat vector, shape (num_parameters,).

        Raises:
            NotTwiceDifferentiableError: If an operator has no second derivative and
                ``differentiation="exact"``.
        """
        self._check_vector("v", v)
        with self.measurement():
            if self.differentiation != "finite_difference":
                try:
                    product = self._exact_hvp(v)
                    self._verify_custom_functions(v, product)
                    return product
                except NotTwiceDifferentiableError as error:
                    self._fall_back(error)
            return self._finite_difference_hvp(v)

    def ggnvp(self, v: Tensor) -> Tensor:
        """Return ``Jᵀ B J v``, the product of the Gauss-Newton matrix of ``L`` at ``w`` with a vector.

        ``J`` is the Jacobian of the network's outputs and ``B`` the Hessian of the loss in them. Costs about two
        gradients while the graph is kept (see :meth:`measurement`), four otherwise.

        Args:
            v: Flat vector, shape (num_parameters,).

        Returns:
            Flat vector, shape (num_parameters,).

        Raises:
            TypeError: If the ``loss_fn`` is not an :class:`OutputLoss`.
            NotTwiceDifferentiableError: If an operator has no second derivative and
                ``differentiation="exact"``.
        """
        self._check_vector("v", v)
        output_loss = self._output_loss("the Gauss-Newton matrix, operator='ggn'")
        pieces = self.unflatten(v)
        with self.measurement():
            if self.differentiation != "finite_difference":
                try:
                    return self._gauss_newton(lambda index: self._batch_ggnvp(output_loss, index, pieces))
                except NotTwiceDifferentiableError as error:
                    self._fall_back(error)
            return self._gauss_newton(lambda index: self._finite_difference_ggnvp(output_loss, index, v))

    def gradients_of_samples(self, index: int, start: int, stop: int, *, vectorized: bool) -> Tensor:
        """Return the gradients of the losses of single samples, to be used inside one :meth:`measurement`.

        Args:
            index: Which of this rank's batches.
            start: The first sample of the batch to take.
            stop: The first sample not to take.
            vectorized: All at once, by ``torch.func.vmap``, which not every module allows; else one by one.

        Returns:
            Shape (stop - start, num_parameters).
        """
        assert self._isolation is not None
        batch, size = self._fresh_batch(index), self.batch_sizes[index]
        if vectorized:
            with self._isolation.forward_pass(index):
                return gradients_by_vmap(self.module, self.loss_fn, batch, size, start, stop).to(self.dtype)
        gradients = torch.zeros(stop - start, self.num_parameters, dtype=self.dtype, device=self.device)
        for i, row in enumerate(gradients, start=start):
            with self._isolation.forward_pass(index):
                output = self.loss_fn(self.module, copy_batch(slice_samples(batch, size, i, i + 1)))
            loss = check_loss(loss_in(output))
            for view, piece in zip(
                self.unflatten(row), torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True
            ):
                if piece is not None:
                    view.copy_(piece)
        return gradients

    # ------------------------------------------------------------------------------------------------ products

    def _gauss_newton(self, local: Callable[[int], Sequence[Tensor | None]]) -> Tensor:
        product = self._mean_over_samples(local, self.num_parameters)
        self.cost.num_products += 1
        self.cost.gradient_evaluations += 2
        return product

    def _batch_ggnvp(self, output_loss: OutputLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        kept = None if self._output_graphs is None else self._output_graphs[index]
        graph = kept if kept is not None else self._linearized_batch(output_loss, index)
        if kept is None and self._output_graphs is not None and self._has_room_for(graph.num_bytes):
            self._output_graphs[index] = kept = graph
        try:
            return graph.linearization.product(pieces, keep=kept is not None)
        except RuntimeError as error:
            raise from_autograd(error) from error

    def _linearized_batch(self, output_loss: OutputLoss, index: int) -> _OutputGraph:
        assert self._isolation is not None
        with counted_bytes() as storages:
            with self._isolation.forward_pass(index), DifferentiableWeightNorm():
                linearization = Linearization(output_loss, self.module, self._fresh_batch(index), self.parameters)
            check_loss(linearization.loss)
            try:
                linearization.pulled_back()
            except RuntimeError as error:
                raise from_autograd(error) from error
        nodes = (node for f in linearization.outputs for node in graph_nodes(f))
        if any(isinstance(node, BackwardCFunction) for node in nodes) and not linearization.is_adjoint():
            raise second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")
        self.cost.gradient_evaluations += self.batch_sizes[index] / max(1, sum(self.batch_sizes))
        return _OutputGraph(linearization, sum(storages.values()))

    def _finite_difference_ggnvp(self, output_loss: OutputLoss, index: int, v: Tensor) -> Sequence[Tensor | None]:
        """Take ``J v`` as a central difference of the outputs; ``Jᵀ`` and ``B`` need no second derivative of them."""
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0:
            return [None] * len(self.parameters)
        weights = math.hypot(*(float(torch.linalg.vector_norm(p.detach())) for p in self.parameters))
        step = torch.finfo(self.dtype).eps ** (1 / 3) * (1 + weights) / norm
        self.product_error = max(self.product_error, 10 * torch.finfo(self.dtype).eps ** (2 / 3))
        sides = []
        for sign in (1, -1):
            with self.displaced(sign * step * v), torch.no_grad():
                assert self._isolation is not None
                with self._isolation.forward_pass(index):
                    outputs = output_loss.outputs(self.module, self._fresh_batch(index))
                sides.append([t.clone() for t in tensors_in(outputs)])
        assert self._isolation is not None
        with self._isolation.forward_pass(index):
            linearization = Linearization(output_loss, self.module, self._fresh_batch(index), self.parameters)
        jv = [(f - b) / (2 * step) for f, b, used in zip(*sides, linearization.is_used, strict=True) if used]
        return linearization.product_from(jv, keep=False)

    def _output_loss(self, purpose: str) -> OutputLoss:
        if isinstance(self.loss_fn, OutputLoss):
            return self.loss_fn
        raise TypeError(
            f"Expected an OutputLoss as `loss_fn` for {purpose}, which has to know the outputs of the network, got "
            f"{'a training_step' if hasattr(self.module, 'training_step') else type(self.loss_fn).__name__}. Pass "
            "loss_fn=OutputLoss(torch.nn.functional.cross_entropy), with outputs=lambda module, batch: ... and "
            "targets=lambda batch: ... where batches are not (inputs, targets)."
        )

    def _has_room_for(self, num_bytes: int) -> bool:
        kept: list[_Graph | _OutputGraph | None] = [*(self._graphs or ()), *(self._output_graphs or ())]
        return sum(graph.num_bytes for graph in kept if graph is not None) + num_bytes <= self.graph_memory

    def _exact_hvp(self, v: Tensor) -> Tensor:
        pieces = self.unflatten(v)
        product = self._mean_over_samples(lambda index: self._batch_hvp(index, pieces), self.num_parameters)
        self.cost.num_products += 1
        self.cost.gradient_evaluations += 2
        return product

    def _batch_hvp(self, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        kept = None if self._graphs is None else self._graphs[index]
        graph = kept if kept is not None else self._differentiated_batch(index)
        if kept is None and self._graphs is not None and self._has_room_for(graph.num_bytes):
            self._graphs[index] = kept = graph
        active = [(g, v) for g, v in zip(graph.gradient, pieces, strict=True) if g is not None and g.requires_grad]
        if not active:  # the loss is linear in the weights
            return [None] * len(pieces)
        outputs, directions = zip(*active, strict=True)
        try:
            return torch.autograd.grad(
                outputs, self.parameters, directions, retain_graph=kept is not None, allow_unused=True
            )
        except RuntimeError as error:
            raise from_autograd(error) from error

    def _differentiated_batch(self, index: int) -> _Graph:
        with counted_bytes() as storages:
            loss = self._batch_loss(index)
            if not self._is_inspected and self._must_rewrite(loss):
                loss = self._batch_loss(index)
            try:
                gradient = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise from_autograd(error) from error
        self.cost.gradient_evaluations += self.batch_sizes[index] / max(1, sum(self.batch_sizes))
        return _Graph(gradient, sum(storages.values()))

    def _must_rewrite(self, loss: Tensor) -> bool:
        """Look for operators whose second derivative may be wrong; return whether one was replaced."""
        operators = [type(node) if isinstance(node, BackwardCFunction) else node.name() for node in graph_nodes(loss)]
        self._is_inspected = True
        self._has_custom_functions = any(isinstance(operator, type) for operator in operators)
        self._has_weight_norm = "WeightNormInterfaceBackward0" in operators
        return self._has_weight_norm

    def _verify_custom_functions(self, v: Tensor, product: Tensor) -> None:
        """Compare the first product with finite differences if the module uses ``torch.autograd.Function``.

        The derivative of such a function's ``backward`` can be missing without an error (even where it is marked as
        ``once_differentiable``, autograd skips the node that would raise); built-in operators have it or raise.
        """
        if self._is_verified or not self._has_custom_functions:
            return
        self._is_verified = True
        numeric = self._finite_difference_hvp(v)
        error, self.product_error = self.product_error, 0.0
        difference = torch.linalg.vector_norm(product - numeric)
        if difference > max(_VERIFICATION_TOLERANCE, 5 * error) * torch.linalg.vector_norm(numeric):
            self.product_error = error
            raise second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")

    def _fall_back(self, error: NotTwiceDifferentiableError) -> None:
        if self.differentiation == "exact":
            raise error
        self.differentiation = "finite_difference"
        warnings.warn(
            f"{error} Using central finite differences of the gradient instead; their estimated error is added to "
            "the reported one. Pass differentiation='finite_difference' to choose them without this warning.",
            stacklevel=4,
        )

    def _finite_difference_hvp(self, v: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0:
            return torch.zeros_like(v)
        if self._step_factor is None:
            self._choose_step(v / norm)
        product = norm * self._central_difference(v / norm, self._step_factor)
        self.cost.num_products += 1
        return product

    def _central_difference(self, direction: Tensor, step: float | None) -> Tensor:
        assert step is not None
        with self.displaced(step * direction):
            forward = self.gradient()
        with self.displaced(-step * direction):
            backward = self.gradient()
        return (forward - backward) / (2 * step)

    def _choose_step(self, direction: Tensor) -> None:
        """Halve the step as long as that changes the result less each time; keep the change as the error.

        Truncation shrinks with the square of the step and rounding grows with its inverse, so the change
        between neighbouring steps has its minimum where the two balance.
        """
        weights = math.hypot(*(float(torch.linalg.vector_norm(p.detach())) for p in self.parameters))
        step = torch.finfo(self.dtype).eps ** (1 / 4) * (1 + weights)
        previous = self._central_difference(direction, step)
        best = math.inf
        for _ in range(12):
            current = self._central_difference(direction, step / 4)
            change = float(torch.linalg.vector_norm(current - previous))
            if change >= best:
                break
            scale = float(torch.linalg.vector_norm(current))
            best, step, previous = change, step / 4, current
            self._step_factor, self.product_error = step, change / scale if scale > 0 else 0.0
        if self._step_factor is None:
            self._step_factor = step

    # ------------------------------------------------------------------------------------------------- samples

    def _batch_loss(self, index: int, allow_non_finite: bool = False) -> Tensor:
        assert self._isolation is not None
        rewriting = DifferentiableWeightNorm() if self._has_weight_norm else nullcontext()
        batch = self._fresh_batch(index)
        with self._isolation.forward_pass(index), rewriting:
            output = self.loss_fn(self.module, batch)
        loss = check_loss(loss_in(output), allow_non_finite)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RuntimeError(
                "Expected a loss that depends on the trainable parameters, got one that does not. Check for `detach`, "
                "`no_grad` or `item` between the parameters and the loss."
            )
        return loss

    def _plain_loss(self, batch: Any) -> Tensor:
        """Return the loss on a batch in evaluation mode, whatever the module's weights are held in."""
        guard = isolated(self.module, "eval", self.device, self.seed)
        with guard as isolation, torch.no_grad(), isolation.forward_pass(0):
            return check_loss(loss_in(self.loss_fn(self.module, copy_batch(batch))), allow_non_finite=True)

    def _fresh_batch(self, index: int) -> Any:
        """Return a copy of a batch: user code may write into its batch, or pop from it."""
        return copy_batch(self.batches[index])

    def _mean_over_samples(self, local: Callable[[int], Sequence[Tensor | None]], size: int) -> Tensor:
        """Return ``sum_b n_b f_b / N`` over the batches of all ranks, with one all-reduce.

        ``local`` returns the scalars of a batch, then a piece per parameter if ``size`` has room for them.
        """
        num_scalars = size - self.num_parameters if size >= self.num_parameters else size

        def add(total: Tensor) -> None:
            views = list(total[:num_scalars])
            views += self.unflatten(total[num_scalars:]) if size > num_scalars else []
            for index, num_samples in enumerate(self.batch_sizes):
                for view, piece in zip(views, local(index), strict=True):
                    if piece is not None:
                        view.add_(piece.detach(), alpha=num_samples / self.num_samples)

        return self.sum_over_ranks(add, size)

    def sum_over_ranks(self, add: Callable[[Tensor], None], size: int) -> Tensor:
        """Return the sum over all ranks of what each adds to a vector of zeros, with one all-reduce.

        Three more entries tell the other ranks what all of them have to react to: a failure, an operator without a
        second derivative, a custom function. Without them one rank would leave the others waiting.

        Args:
            add: Adds this rank's part to a vector of shape (size,), in place; what it raises, all ranks raise.
            size: Length of the vector.

        Returns:
            The sum, shape (size,), the same on all ranks.
        """
        total = torch.zeros(size + 3, dtype=self.dtype, device=self.device)
        failure: Exception | None = None
        try:
            add(total[:size])
        except Exception as error:
            failure = error
            total[size + int(isinstance(error, NotTwiceDifferentiableError))] = 1
        if is_distributed():
            total[size + 2] = self._has_custom_functions
            dist.all_reduce(total)
            *num_failures, num_custom = total[size:].tolist()
            failure = _common_failure(failure, num_failures)
            self._has_custom_functions = num_custom > 0
        if failure is not None:
            raise failure
        if self.on_evaluation is not None:
            self.on_evaluation()
        return total[:size]

    def _total(self, count: int) -> int:
        if not is_distributed():
            return count
        total = torch.tensor([count], dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total)

    # ------------------------------------------------------------------------------------------------- vectors

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return views of a flat vector, one in the shape of each trainable parameter.

        Args:
            vector: Shape (num_parameters,).

        Returns:
            One view per parameter.
        """
        pieces = torch.split(vector, [p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _check_vector(self, name: str, vector: Tensor) -> None:
        if vector.shape != (self.num_parameters,):
            raise ValueError(
                f"Expected `{name}` to be a flat vector of shape ({self.num_parameters},), one entry per trainable "
                f"parameter, got shape {tuple(vector.shape)}."
            )


def check_options(mode: str, differentiation: str) -> None:
    """Check the options of a landscape that are one of a few words.

    Args:
        mode: See :class:`LossLandscape`.
        differentiation: See :class:`LossLandscape`.

    Raises:
        ValueError: If one is not.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"Expected `mode` to be 'eval' or 'train', got {mode!r}.")
    if differentiation not in get_args(Differentiation):
        raise ValueError(
            f"Expected `differentiation` to be 'auto', 'exact' or 'finite_difference', got {differentiation!r}."
        )


def _common_failure(own: Exception | None, counts: list[float]) -> Exception | None:
    """Return what this rank is to raise, so that all ranks raise, or fall back, together."""
    num_failed, num_without_second_derivative = counts
    if num_failed:
        is_own = own is not None and not isinstance(own, NotTwiceDifferentiableError)
        return own if is_own else RuntimeError("Evaluating the loss failed on another rank; see its error.")
    if num_without_second_derivative:
        return own or NotTwiceDifferentiableError("An operator on another rank has no second derivative.")
    return None


_VERIFICATION_TOLERANCE = 0.05


def _vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
