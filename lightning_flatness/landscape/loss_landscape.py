"""The loss on a fixed set of samples as a function of the weights: value, gradient, Hessian-vector product.

The loss is a mean over *samples* (of all batches and all ranks), and evaluating it leaves no trace in the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_flatness.geometry import Chart, Geometry, resolve_geometry
from lightning_flatness.landscape.batched_loss import BatchedLoss, precision_error, unflatten, vector_dtype
from lightning_flatness.landscape.cost import Cost
from lightning_flatness.landscape.engines.graphs import GraphStore
from lightning_flatness.landscape.engines.second_derivatives import Operators
from lightning_flatness.landscape.engines.selection import Products
from lightning_flatness.landscape.measured_module import measured_module, plain_loss
from lightning_flatness.landscape.options import EngineName, check_options
from lightning_flatness.landscape.output_loss import output_loss_of
from lightning_flatness.landscape.point import Point
from lightning_flatness.landscape.samples import Samples
from lightning_flatness.landscape.update import OptimizerStep
from lightning_flatness.landscape.vectors import Vectors
from lightning_flatness.module.loss import LossFunction, measured_parameters, training_step_of
from lightning_flatness.module.modes import Mode
from lightning_flatness.module.sharding import check_gathered, check_sharding, reshard


class LossLandscape:
    r"""The mean loss of a module over fixed samples, ``L(w) = 1/N sum_n loss_n(w)``, at its current weights.

    The weights are the trainable parameters, or those named, each once (tied ones are one tensor), as one flat vector
    in the order of ``module.parameters()``. Batches are weighted by their number of samples. When a process group
    is initialised, the batches of each rank are its share of the samples, and the mean runs over all ranks with
    one all-reduce per evaluation; so all ranks have to make the same calls. Weights sharded by ``fully_shard`` (FSDP2)
    or tensor parallelism are gathered on every rank for a measurement, in the precision in which they are stored: it
    then holds the weights in full besides its vectors; those of a :class:`ShardedLandscape` stay sharded.

    Evaluations leave modes, buffers, ``.grad``, generators, torchmetrics, attributes and loggers as they were, even if
    one raises. A batch sees the same random numbers in every evaluation: the loss is one function, with dropout too.

    Args:
        module: Any ``nn.Module``. Its weights may change between measurements; see :meth:`measurement`.
        batches: The samples, as an iterable of batches, which is read once.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss over the samples of ``batch`` as a scalar
            tensor, or a dict with the key ``"loss"``. Default: the ``training_step`` of a LightningModule. An
            :class:`OutputLoss` is needed for what looks at the outputs (:meth:`ggnvp`, normalised logits).
        mode: ``"batch_statistics"``, the loss that training minimises without its noise: BatchNorm and the like
            normalise by the statistics of the batch (its size matters), dropout is off. ``"eval"``: by running
            statistics. ``"train"``: with fixed dropout masks, too. Layers in eval mode while others train stay so.
        engine: How Hessian-vector products are made. ``"auto"``: by differentiating twice, the graphs of batches kept
            between products as far as ``graph_memory`` goes and rebuilt in every product beyond that; by finite
            differences, with a warning, if an operator has no second derivative. ``"exact"``: the same, but an error
            instead of the warning. ``"kept"``, ``"rebuilt"``: all graphs, or none. ``"finite_difference"``: central
            differences of the gradient, with ``product_error`` their relative error.
        graph_memory: Bytes of gradient graphs that are kept between the products of a measurement. Batches beyond that
            are differentiated anew in each, which costs 1.5 times as much. That of a single batch is kept in any case.
        batch_size_fn: Returns the number of samples of a batch. Default: the length of the first tensor's first axis.
        seed: Seed of the random numbers that the module draws.
        optimizer: The optimizer that trains the module, or several of them; the geometry ``"optimizer"`` needs it.
        num_total: Number of samples of the whole training set, for standard errors; :func:`draw_probe` knows it.
        parameters: The weights by name, frozen ones too: patterns such as ``"encoder.*,head.*"`` or a list of them;
            ``"*"`` means all. Default: the trainable ones.
        update: The last optimizer step, for measures along its update.

    Attributes:
        samples: The batches and their number of samples.
        num_parameters: Length of flat vectors.
        device: Where the parameters are and vectors are made.
        dtype: Of flat vectors: the parameters' dtype, float32 at least.
        cost: The evaluations so far.
        operators: Operators of the loss whose second derivatives may be wrong.
        on_evaluation: Called after every loss, gradient and Hessian-vector product, e.g. to report progress.

    Raises:
        ValueError: If there are no samples or no such parameters, an option is not one of those named, or the
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

    _loss_class: ClassVar[type[BatchedLoss]] = BatchedLoss
    _measured_module = staticmethod(measured_module)

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFunction | None = None,
        *,
        mode: Mode = "batch_statistics",
        engine: EngineName = "auto",
        graph_memory: int = 2**30,
        batch_size_fn: Callable[[Any], int] | None = None,
        seed: int = 0,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        num_total: int | None = None,
        parameters: str | Sequence[str] | None = None,
        update: OptimizerStep | None = None,
    ) -> None:
        check_options(mode, engine)
        self._module = module.module if isinstance(module, DistributedDataParallel) else module
        self.loss_fn = loss_fn if loss_fn is not None else training_step_of(self._module)
        self.mode: Mode = mode
        self.graph_memory, self.seed = graph_memory, seed
        self.optimizer, self.update = optimizer, update
        reshard(self._module)
        self._parameters = measured_parameters(self._module, parameters)
        self.num_parameters = sum(p.numel() for p in self._parameters)
        self.device, self.dtype = self._parameters[0].device, vector_dtype(self._parameters)
        check_sharding(self._module, self.num_parameters, self.device)
        self.samples = Samples.read(batches, batch_size_fn, self.device, num_total)
        self.cost, self.operators = Cost(), Operators()
        self.on_evaluation: Callable[[], None] | None = None
        self._products = Products(engine)
        self._loss: BatchedLoss | None = None  # in a measurement
        coarsest = max((p.dtype for p in self._parameters), key=lambda dtype: torch.finfo(dtype).eps)
        plain = partial(plain_loss, self._module, self.loss_fn, seed=seed)
        check_gathered(self._module, plain, self.samples.batches, self.device, coarsest)

    @property
    def engine(self) -> str:
        """The engine of the last product: ``"kept"``, ``"rebuilt"``, ``"kept+rebuilt"``, ``"finite_difference"``."""
        return self._products.engine

    @property
    def product_error(self) -> float:
        """Estimated relative error of Hessian-vector products by finite differences and weights of low precision."""
        return self.operators.product_error + precision_error(self.parameters)

    @property
    def num_samples(self) -> int:
        """Number of samples N, over all ranks."""
        return self.samples.num_samples

    @property
    def module(self) -> nn.Module:
        """The module; within a measurement the one that is evaluated."""
        return self._module if self._loss is None else self._loss.module

    @property
    def parameters(self) -> list[Tensor]:
        """The measured parameters of :attr:`module`, each once."""
        return self._parameters if self._loss is None else self._loss.parameters

    @property
    def batched_loss(self) -> BatchedLoss:
        """The loss of the measurement that is open; an error if none is."""
        if self._loss is None:
            raise RuntimeError("Expected a call inside a measurement. Open `with landscape.measurement():`.")
        return self._loss

    def measurement(self, *, on_shards: bool = False) -> AbstractContextManager[LossLandscape]:  # noqa: ARG002
        """Hold the module still for several evaluations at the same weights.

        Inside the block the module stays isolated, and the gradient and its graphs are kept (as far as
        ``graph_memory`` goes). Metrics open it themselves; open it around several of them to let them share the
        graphs. Do not train the weights inside. Blocks nest.

        Args:
            on_shards: Whether the block takes vectors of which each rank holds a part; :class:`ShardedLandscape` asks.

        Returns:
            The block. It yields the landscape itself.
        """
        return self._measurement()

    @contextmanager
    def _measurement(self) -> Iterator[LossLandscape]:
        if self._loss is not None:
            with torch.inference_mode(False), torch.enable_grad():  # Metric.update has turned gradients off again
                yield self
            return
        graphs = GraphStore(self._products.budget(self.graph_memory), keeps_first=len(self.samples.batches) == 1)
        own = self.loss_fn, self.samples, self.cost, self.operators, self.on_evaluation, Point(graphs)
        with self._measured_module(self._module, self._parameters, self.mode, self.seed) as measured:
            self._loss = self._loss_class(measured, *own)
            try:
                yield self
            finally:
                self._loss = None

    @contextmanager
    def displaced(self, displacement: Tensor, scale: float = 1.0) -> Iterator[None]:
        """Evaluate at ``w + scale · displacement`` inside the block; the weights come back bit for bit."""
        with self._measurement(), self.batched_loss.displaced(displacement, scale):
            yield

    def chart(self, geometry: str | Geometry) -> Chart:
        """Return the coordinates of a geometry around the current weights, once made in each :meth:`measurement`."""
        with self._measurement():
            charts = self.batched_loss.point.charts
            if geometry not in charts:
                bound = resolve_geometry(geometry).for_optimizer(self.optimizer).for_loss(self.batched_loss.first_batch)
                charts[geometry] = self._chart(bound)
            return charts[geometry]

    def _chart(self, geometry: Geometry) -> Chart:
        return geometry.chart(self.module, self.parameters, self.dtype)

    def vectors_in(self, chart: Chart) -> Vectors:
        """Return where the vectors of coordinates are: whole in each process, here."""
        return Vectors(chart.num_coordinates, self.dtype, self.device)

    def derived(self, graph_memory: float, **changes: Any) -> LossLandscape:
        """Return a landscape at the same weights, for use inside the same :meth:`measurement`.

        It may keep graphs of ``graph_memory`` bytes; ``changes`` are of ``samples``, ``loss_fn`` or ``cost``.
        """
        derived = copy.copy(self)
        changes["operators"] = replace(self.operators)
        for name, value in changes.items():
            setattr(derived, name, value)
        point = Point(GraphStore(graph_memory), charts=self.batched_loss.point.charts)
        derived._loss, derived._products = replace(self.batched_loss, point=point, **changes), self._products.fresh()
        return derived

    def loss(self, *, allow_non_finite: bool = False) -> Tensor:
        """Return ``L(w)``, a scalar. Costs one forward pass over the samples.

        Args:
            allow_non_finite: Return a loss that is infinite or not a number instead of raising: far from the weights
                of a network the loss overflows.

        Raises:
            ValueError: If the loss is not finite, unless that is allowed.
        """
        with self._measurement():
            return self.batched_loss.value(allow_non_finite=allow_non_finite)

    def gradient(self, *, keep_graphs: bool = False) -> Tensor:
        """Return the gradient of ``L`` at ``w``, shape (num_parameters,).

        Costs one gradient; nothing where the same measurement has made it or a Hessian-vector product before.

        Args:
            keep_graphs: Leave its graphs to the Hessian-vector products that follow, as far as there is room.
        """
        with self._measurement():
            point = self.batched_loss.point
            if point.gradient is None:
                point.gradient = self.batched_loss.gradient(self._products.keep_graphs if keep_graphs else None)
                point.gradient_sum = None
            return point.gradient.clone()

    def loss_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return ``L(w)`` and its gradient, for the price of the gradient."""
        with self._measurement():
            return self.batched_loss.value_and_gradient()

    def hvp(self, v: Tensor) -> Tensor:
        """Return ``H v``, the product of the Hessian of ``L`` at ``w`` with a flat vector, shape (num_parameters,).

        Costs about two gradients while the graph is kept (see :meth:`measurement`), three otherwise. Beside ``v`` and
        the graph it takes memory for three vectors like ``v`` (the sum, the product of one batch, the gradient).

        Raises:
            NotTwiceDifferentiableError: If an operator has no second derivative and the engine was chosen by name.
        """
        with self._measurement():
            return self._products.hessian(self.batched_loss, self.batched_loss.checked("v", v))

    def ggnvp(self, v: Tensor) -> Tensor:
        """Return ``Jᵀ B J v``, the product of the Gauss-Newton matrix of ``L`` at ``w`` with a flat vector.

        ``J`` is the Jacobian of the network's outputs and ``B`` the Hessian of the loss in them. Costs about two
        gradients while the graph is kept (see :meth:`measurement`), four otherwise.

        Raises:
            TypeError: If the ``loss_fn`` is not an :class:`OutputLoss`.
            NotTwiceDifferentiableError: If an operator has no second derivative and the engine was chosen by name.
        """
        output_loss_of(self, "the Gauss-Newton matrix, operator='ggn'")
        with self._measurement():
            return self._products.gauss_newton(self.batched_loss, self.batched_loss.checked("v", v))

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return views of a flat vector, one in the shape of each measured parameter."""
        return unflatten(vector, self.parameters)
