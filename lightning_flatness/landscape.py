"""The loss on a fixed set of samples as a function of the weights: value, gradient, Hessian-vector product.

Everything else in the package asks this class. It holds the two things that are easy to get wrong: the loss
is a mean over *samples* (of all batches and all ranks), and evaluating it leaves no trace in the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import reduce
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_flatness.batches import copy_batch, infer_batch_size, prepare_batch, slice_samples
from lightning_flatness.cost import Cost
from lightning_flatness.engines import EngineName, GraphStore, Products, check_engine
from lightning_flatness.gauss_newton import normalized_logits, output_loss_of
from lightning_flatness.geometry import Chart, Geometry, resolve_geometry
from lightning_flatness.isolation import DifferentiableWeightNorm, Isolation, Mode, isolated, preserved_rng
from lightning_flatness.loss import LossFunction, check_loss, loss_in, trainable_parameters, training_step_of
from lightning_flatness.per_sample import gradients_by_vmap
from lightning_flatness.ranks import rank_and_world_size, sum_over_ranks, total_count
from lightning_flatness.second_derivatives import Operators
from lightning_flatness.sharding import check_gathered, check_sharding, gathered, is_sharded, reshard


class LossLandscape:
    r"""The mean loss of a module over fixed samples, ``L(w) = 1/N sum_n loss_n(w)``, at its current weights.

    The weights are the trainable parameters, each once (tied parameters are one tensor), as one flat vector in
    the order of ``module.parameters()``. Batches are weighted by their number of samples. When a process group
    is initialised, the batches of each rank are its share of the samples, and the mean runs over all ranks with
    one all-reduce per evaluation; so all ranks have to make the same calls. Weights that ``fully_shard`` (FSDP2) or
    tensor parallelism have spread over the ranks are put together on every rank for a measurement, in the precision
    in which they are stored, and let go afterwards: besides its vectors it then holds the weights in full.

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
        engine: How Hessian-vector products are made. ``"auto"``: by differentiating twice, the graphs of batches kept
            between products as far as ``graph_memory`` goes and rebuilt in every product beyond that; by finite
            differences, with a warning, if an operator has no second derivative. ``"exact"``: the same, but an error
            instead of the warning. ``"kept"``, ``"rebuilt"``: all graphs, or none. ``"forward_over_reverse"`` (dual
            numbers) and ``"linearized"`` (``torch.func.linearize``) are compared with the former in every
            measurement; what they cannot do is left to ``"auto"``, with a warning. ``"finite_difference"``: central
            differences of the gradient, with ``product_error`` their relative error.
        graph_memory: Bytes of gradient graphs that are kept between Hessian-vector products of one measurement.
            Batches beyond that are differentiated anew in each product, which costs 1.5 times as much. The graph of
            the only batch is kept however large it is: it has to fit into memory anyway.
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
        ValueError: If there are no samples, no trainable parameters, or an option is not one of those named; or if the
            weights are spread over ranks in another way (FSDP1, DeepSpeed, pipelines).
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
        engine: EngineName = "auto",
        graph_memory: int = 2**30,
        batch_size_fn: Callable[[Any], int] | None = None,
        seed: int = 0,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> None:
        check_options(mode, engine)
        self.module = module.module if isinstance(module, DistributedDataParallel) else module
        self.loss_fn = loss_fn if loss_fn is not None else training_step_of(self.module)
        self.mode: Mode = mode
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
        self.num_samples = total_count(sum(self.batch_sizes), self.device)
        if self.num_samples == 0:
            raise ValueError("Expected at least one sample in `batches`, got none. Check the loader or the probe.")
        self.operators = Operators()
        self.graphs: GraphStore | None = None
        self._products = Products(engine)
        coarsest = max((p.dtype for p in self.parameters), key=lambda dtype: torch.finfo(dtype).eps)
        check_gathered(self.module, self._plain_loss, self.batches, self.device, coarsest)
        self._isolation: Isolation | None = None
        self._gradient: Tensor | None = None
        self._charts: dict[str | Geometry, Chart] = {}
        self.sharp_covectors: Tensor | None = None
        """What one geometry leaves to the next in a measurement; see :mod:`lightning_flatness.estimators.starts`."""

    @property
    def engine(self) -> str:
        """What made the last Hessian-vector product; before the first one what was asked for.

        ``"kept"``, ``"rebuilt"`` or ``"kept+rebuilt"`` (for some batches each), ``"forward_over_reverse"``,
        ``"linearized"`` or ``"finite_difference"``.
        """
        return self._products.engine

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
            self.graphs = GraphStore(self._products.budget(self.graph_memory), keeps_first=len(self.batches) == 1)
            try:
                yield self
            finally:
                self.parameters = held
                self._isolation = self.graphs = self._gradient = self.sharp_covectors = None
                self._charts.clear()

    @contextmanager
    def displaced(self, displacement: Tensor, scale: float = 1.0) -> Iterator[None]:
        """Evaluate at ``w + scale · displacement`` inside the block; the weights come back bit for bit.

        The parameters' storage is exchanged, not written to, so nothing is rounded.

        Args:
            displacement: Flat vector, shape (num_parameters,).
            scale: Factor of it.
        """
        self._check_vector("displacement", displacement)
        if self._isolation is None and any(is_sharded(p) for p in self.parameters):
            with self.measurement(), self.displaced(displacement, scale):
                yield
            return
        originals = [p.data for p in self.parameters]
        here = self.graphs, self._gradient, self._charts, self.sharp_covectors
        self.graphs, self._gradient, self._charts, self.sharp_covectors = None, None, {}, None
        try:
            for p, original, change in zip(self.parameters, originals, self.unflatten(displacement), strict=True):
                p.data = torch.add(original, change, alpha=scale).to(original.dtype)
            yield
        finally:
            for p, original in zip(self.parameters, originals, strict=True):
                p.data = original
            self.graphs, self._gradient, self._charts, self.sharp_covectors = here

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
        rank, world_size = rank_and_world_size()
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
        num_samples = total_count(sum(sizes), self.device)
        return self._derived(batches=batches, batch_sizes=sizes, num_samples=num_samples, cost=Cost())

    def with_normalized_logits(self) -> LossLandscape:
        """Return the landscape of the loss on logits divided by their standard deviation over the classes.

        Returns:
            A landscape at the same weights, with the same ``cost``; use it inside one :meth:`measurement`.

        Raises:
            TypeError: If the ``loss_fn`` does not tell the outputs from the loss.
        """
        loss_fn = normalized_logits(output_loss_of(self, "normalize_logits=True"))
        return self._derived(loss_fn=loss_fn, graphs=None if self.graphs is None else GraphStore(self.graphs.room))

    def _derived(self, **changes: Any) -> LossLandscape:
        derived = copy.copy(self)
        fresh = {
            "graphs": None,
            "_gradient": None,
            "sharp_covectors": None,
            "_products": self._products.fresh(),
            "operators": replace(self.operators),
        }
        derived.__dict__.update(fresh | changes)
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
                return [self.batch_loss(index, allow_non_finite=allow_non_finite)]

        with self.measurement():
            return self.mean_over_samples(local, 1)[0]

    def gradient(self, *, keep_graphs: bool = False) -> Tensor:
        """Return the gradient of ``L`` at ``w``, shape (num_parameters,).

        Costs one gradient; nothing where a Hessian-vector product of the same measurement left it behind, or for the
        second time in one measurement.

        Args:
            keep_graphs: Leave its graphs to the Hessian-vector products that will follow, as far as there is room.
        """
        if self._gradient is not None:
            return self._gradient.clone()

        with self.measurement():
            gradient = self.sum_over_ranks(lambda total: self._add_gradient(total, keep_graphs), self.num_parameters)
            if self.graphs is None:  # at displaced weights
                return gradient
            self._gradient, self.graphs.gradient_sum = gradient, None
            return gradient.clone()

    def leave_gradient(self, index: int, pieces: Sequence[Tensor | None]) -> None:
        """Take the gradient of a batch, which is a by-product of a Hessian-vector product, for :meth:`gradient`.

        Args:
            index: Which of this rank's batches.
            pieces: Its gradient, a piece per parameter.
        """
        if self.graphs is None or self._gradient is not None or index in self.graphs.summed:
            return
        if self.graphs.gradient_sum is None:
            self.graphs.gradient_sum = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        self._add_batch(self.unflatten(self.graphs.gradient_sum), index, pieces)
        self.graphs.summed.add(index)

    def _add_gradient(self, total: Tensor, keep_graphs: bool) -> None:
        if keep_graphs:
            self._products.keep_graphs(self)
        known = set() if self.graphs is None else self.graphs.summed
        if self.graphs is not None and self.graphs.gradient_sum is not None:
            total.add_(self.graphs.gradient_sum)
        views = self.unflatten(total)
        for index in range(len(self.batches)):
            if index not in known:
                self.cost.add_batch_gradient(index, self.batch_sizes)
                pieces = torch.autograd.grad(self.batch_loss(index), self.parameters, allow_unused=True)
                self._add_batch(views, index, pieces)

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return ``L(w)`` and its gradient, for the price of the gradient and with one all-reduce."""
        self.cost.gradient_evaluations += 1

        def local(index: int) -> Sequence[Tensor | None]:
            loss = self.batch_loss(index)
            return [loss, *torch.autograd.grad(loss, self.parameters, allow_unused=True)]

        with self.measurement():
            both = self.mean_over_samples(local, 1 + self.num_parameters)
            return both[0], both[1:]

    def hvp(self, v: Tensor) -> Tensor:
        """Return ``H v``, the product of the Hessian of ``L`` at ``w`` with a vector.

        Costs about two gradients while the graph is kept (see :meth:`measurement`), three otherwise. Beside ``v`` and
        the graph it takes memory for three vectors like ``v`` (the sum, the product of one batch, the gradient).

        Args:
            v: Flat vector, shape (num_parameters,).

        Returns:
            Flat vector, shape (num_parameters,).

        Raises:
            NotTwiceDifferentiableError: If an operator has no second derivative and
                the engine was chosen by name.
        """
        self._check_vector("v", v)
        with self.measurement():
            return self._products.hessian(self, v)

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
                the engine was chosen by name.
        """
        self._check_vector("v", v)
        output_loss_of(self, "the Gauss-Newton matrix, operator='ggn'")
        with self.measurement():
            return self._products.gauss_newton(self, v)

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
        batch, size = self.fresh_batch(index), self.batch_sizes[index]
        if vectorized:
            with self.forward_pass(index):
                return gradients_by_vmap(self.module, self.loss_fn, batch, size, start, stop).to(self.dtype)
        gradients = torch.zeros(stop - start, self.num_parameters, dtype=self.dtype, device=self.device)
        for i, row in enumerate(gradients, start=start):
            with self.forward_pass(index):
                output = self.loss_fn(self.module, copy_batch(slice_samples(batch, size, i, i + 1)))
            pieces = torch.autograd.grad(check_loss(loss_in(output)), self.parameters, allow_unused=True)
            for view, piece in zip(self.unflatten(row), pieces, strict=True):
                if piece is not None:
                    view.copy_(piece)
        return gradients

    # ------------------------------------------------------------------------------------------------- samples

    def batch_loss(self, index: int, *, allow_non_finite: bool = False) -> Tensor:
        """Return the mean loss over the samples of a batch, to be used inside one :meth:`measurement`.

        Args:
            index: Which of this rank's batches.
            allow_non_finite: See :meth:`loss`.

        Returns:
            A scalar, with its graph.
        """
        rewriting = DifferentiableWeightNorm() if self.operators.has_weight_norm else nullcontext()
        batch = self.fresh_batch(index)
        with self.forward_pass(index), rewriting:
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

    def forward_pass(self, index: int) -> AbstractContextManager[None]:
        """Guard one evaluation of the module on a batch, inside one :meth:`measurement`."""
        assert self._isolation is not None
        return self._isolation.forward_pass(index)

    def fresh_batch(self, index: int) -> Any:
        """Return a copy of a batch: user code may write into its batch, or pop from it."""
        return copy_batch(self.batches[index])

    def mean_over_samples(self, local: Callable[[int], Sequence[Tensor | None]], size: int) -> Tensor:
        """Return ``sum_b n_b f_b / N`` over the batches of all ranks, with one all-reduce.

        Args:
            local: Returns ``f_b`` of a batch: scalars, then a piece per parameter if ``size`` has room for them.
            size: Number of entries of ``f_b``.

        Returns:
            Shape (size,).
        """
        num_scalars = size - self.num_parameters if size >= self.num_parameters else size

        def add(total: Tensor) -> None:
            views = list(total[:num_scalars])
            views += self.unflatten(total[num_scalars:]) if size > num_scalars else []
            for index in range(len(self.batches)):
                self._add_batch(views, index, local(index))

        return self.sum_over_ranks(add, size)

    def _add_batch(self, views: Sequence[Tensor], index: int, pieces: Sequence[Tensor | None]) -> None:
        """Add what a batch contributes to a mean over all samples."""
        for view, piece in zip(views, pieces, strict=True):
            if piece is not None:
                view.add_(piece.detach(), alpha=self.batch_sizes[index] / self.num_samples)

    def sum_over_ranks(self, add: Callable[[Tensor], None], size: int) -> Tensor:
        """Return the sum over all ranks of what each adds to a vector of zeros, with one all-reduce.

        Args:
            add: Adds this rank's part to a vector of shape (size,), in place; what it raises, all ranks raise.
            size: Length of the vector.

        Returns:
            The sum, shape (size,), the same on all ranks.
        """
        total = sum_over_ranks(add, size, self.operators, self.dtype, self.device)
        if self.on_evaluation is not None:
            self.on_evaluation()
        return total

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


def check_options(mode: str, engine: str) -> None:
    """Check the options of a landscape that are one of a few words.

    Args:
        mode: See :class:`LossLandscape`.
        engine: See :class:`LossLandscape`.

    Raises:
        ValueError: If one is not.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"Expected `mode` to be 'eval' or 'train', got {mode!r}.")
    check_engine(engine)


def _vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
