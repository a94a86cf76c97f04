"""The loss on a fixed set of samples as a function of the weights: value, gradient, Hessian-vector product.

Everything else in the package asks this class. It holds the two things that are easy to get wrong: the loss
is a mean over *samples* (of all batches and all ranks), and evaluating it leaves no trace in the module.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from lightning_flatness.batches import infer_batch_size, prepare_batch
from lightning_flatness.geometry import Chart, Geometry, resolve_geometry
from lightning_flatness.isolation import DifferentiableWeightNorm, Isolation, Mode, isolated, preserved_rng

LossFunction: TypeAlias = Callable[[nn.Module, Any], Any]
"""``loss_fn(module, batch)``: the mean loss over the samples of ``batch``, a scalar tensor or a dict with "loss"."""

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


class NotTwiceDifferentiableError(RuntimeError):
    """An operator of the module has no second derivative."""


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
            tensor, or a dict with the key ``"loss"``. Default: the ``training_step`` of a LightningModule.
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
    ) -> None:
        check_options(mode, differentiation)
        self.module = module.module if isinstance(module, DistributedDataParallel) else module
        self.loss_fn = loss_fn if loss_fn is not None else _training_step_of(self.module)
        self.mode: Mode = mode
        self.differentiation: Differentiation = differentiation
        self.graph_memory = graph_memory
        self.seed = seed
        self.parameters = _trainable_parameters(self.module)
        self.num_parameters = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        self.dtype = _vector_dtype(self.parameters)
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
        self._isolation: Isolation | None = None
        self._graphs: list[_Graph | None] | None = None
        self._charts: dict[str | Geometry, Chart] = {}
        self._step_factor: float | None = None
        self._is_inspected = self._has_custom_functions = self._has_weight_norm = self._is_verified = False

    # ----------------------------------------------------------------------------------------- one measurement

    @contextmanager
    def measurement(self) -> Iterator[LossLandscape]:
        """Hold the module still for several evaluations at the same weights.

        Inside the block the module stays isolated, and the graphs of the gradient are kept between
        Hessian-vector products (as far as ``graph_memory`` goes). Metrics open it themselves; open it around
        several of them to let them share the graphs. The weights must not be trained inside. Blocks nest.

        Yields:
            The landscape itself.
        """
        if self._isolation is not None:
            with torch.inference_mode(False), torch.enable_grad():  # Metric.update has turned gradients off again
                yield self
            return
        with isolated(self.module, self.mode, self.device, self.seed) as self._isolation:
            self._graphs = [None] * len(self.batches)
            try:
                yield self
            finally:
                self._isolation = self._graphs = None
                self._charts.clear()

    @contextmanager
    def displaced(self, displacement: Tensor) -> Iterator[None]:
        """Evaluate at ``w + displacement`` inside the block; the weights come back bit for bit.

        The parameters' storage is exchanged, not written to, so nothing is rounded.

        Args:
            displacement: Flat vector, shape (num_parameters,).
        """
        self._check_vector("displacement", displacement)
        originals = [p.data for p in self.parameters]
        graphs = self._graphs
        self._graphs = None
        try:
            for p, original, change in zip(self.parameters, originals, self.unflatten(displacement), strict=True):
                p.data = (original + change).to(original.dtype)
            yield
        finally:
            for p, original in zip(self.parameters, originals, strict=True):
                p.data = original
            self._graphs = graphs

    def chart(self, geometry: str | Geometry) -> Chart:
        """Return the coordinates of ``geometry`` around the current weights.

        Args:
            geometry: A geometry or its name.

        Returns:
            The chart; inside one :meth:`measurement` the same object is returned again.
        """
        if geometry in self._charts:
            return self._charts[geometry]
        chart = resolve_geometry(geometry).chart(self.module, self.parameters, self.dtype)
        if self._isolation is not None:
            self._charts[geometry] = chart
        return chart

    # ---------------------------------------------------------------------------------------------- quantities

    def loss(self) -> Tensor:
        """Return ``L(w)``, a scalar. Costs one forward pass over the samples."""
        self.cost.gradient_evaluations += 1 / 3

        def local(index: int) -> list[Tensor]:
            with torch.no_grad():
                return [self._batch_loss(index)]

        with self.measurement():
            return self._mean_over_samples(local, 1)[0]

    def gradient(self) -> Tensor:
        """Return the gradient of ``L`` at ``w``, shape (num_parameters,). Costs one gradient."""
        self.cost.gradient_evaluations += 1

        def local(index: int) -> Sequence[Tensor | None]:
            kept = None if self._graphs is None else self._graphs[index]
            if kept is not None:
                return kept.gradient
            return torch.autograd.grad(self._batch_loss(index), self.parameters, allow_unused=True)

        with self.measurement():
            return self._mean_over_samples(local, self.num_parameters)

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

    # ------------------------------------------------------------------------------------------------ products

    def _exact_hvp(self, v: Tensor) -> Tensor:
        pieces = self.unflatten(v)
        product = self._mean_over_samples(lambda index: self._batch_hvp(index, pieces), self.num_parameters)
        self.cost.num_products += 1
        self.cost.gradient_evaluations += 2
        return product

    def _batch_hvp(self, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        kept = None if self._graphs is None else self._graphs[index]
        graph = kept if kept is not None else self._differentiated_batch(index)
        if kept is None and self._graphs is not None:
            spent = sum(g.num_bytes for g in self._graphs if g is not None)
            if spent + graph.num_bytes <= self.graph_memory:
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
            raise _from_autograd(error) from error

    def _differentiated_batch(self, index: int) -> _Graph:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._batch_loss(index)
            if not self._is_inspected and self._must_rewrite(loss):
                loss = self._batch_loss(index)
            try:
                gradient = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise _from_autograd(error) from error
        self.cost.gradient_evaluations += self.batch_sizes[index] / max(1, sum(self.batch_sizes))
        return _Graph(gradient, sum(storages.values()))

    def _must_rewrite(self, loss: Tensor) -> bool:
        """Look for operators whose second derivative may be wrong; return whether one was replaced."""
        operators = [type(node) if isinstance(node, BackwardCFunction) else node.name() for node in _graph_nodes(loss)]
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
            raise _second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")

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
        weights = math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.parameters))
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

    def _batch_loss(self, index: int) -> Tensor:
        assert self._isolation is not None
        rewriting = DifferentiableWeightNorm() if self._has_weight_norm else nullcontext()
        with self._isolation.forward_pass(index), rewriting:
            output = self.loss_fn(self.module, self.batches[index])
        loss = _check_loss(output["loss"] if isinstance(output, Mapping) and "loss" in output else output)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RuntimeError(
                "Expected a loss that depends on the trainable parameters, got one that does not. Check for `detach`, "
                "`no_grad` or `item` between the parameters and the loss."
            )
        return loss

    def _mean_over_samples(self, local: Callable[[int], Sequence[Tensor | None]], size: int) -> Tensor:
        """Return ``sum_b n_b f_b / N`` over the batches of all ranks, with one all-reduce.

        Three more entries tell the other ranks what all of them have to react to: a failure, an operator without a
        second derivative, a custom function. Without them one rank would leave the others waiting.
        """
        total = torch.zeros(size + 3, dtype=self.dtype, device=self.device)
        views = self.unflatten(total[:size]) if size == self.num_parameters else [total[:size]]
        failure: Exception | None = None
        try:
            for index, num_samples in enumerate(self.batch_sizes):
                for view, piece in zip(views, local(index), strict=True):
                    if piece is not None:
                        view.add_(piece.detach(), alpha=num_samples / self.num_samples)
        except Exception as error:
            failure = error
            total[size + int(isinstance(error, NotTwiceDifferentiableError))] = 1
        if _is_distributed():
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
        if not _is_distributed():
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


def _from_autograd(error: RuntimeError) -> RuntimeError:
    """Return the error to raise when differentiating twice failed: ours if that is the reason, else the same."""
    return _second_derivative_error(str(error)) if _NO_SECOND_DERIVATIVE.search(str(error)) else error


def _second_derivative_error(reason: str) -> NotTwiceDifferentiableError:
    return NotTwiceDifferentiableError(
        f"Expected operators with a second derivative, got one without: {reason} Replace the operator, or pass "
        "differentiation='finite_difference' to differentiate the gradient numerically."
    )


_VERIFICATION_TOLERANCE = 0.05

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for .* is not implemented|differentiate twice|once_differentiable|double.?backward",
    re.IGNORECASE,
)


def _graph_nodes(loss: Tensor) -> set[Any]:
    """Return the nodes of the graph of a loss."""
    nodes: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return nodes


def _check_loss(loss: Any) -> Tensor:
    if loss is None:
        raise TypeError(
            "Expected the loss function (or training_step) to return a scalar tensor or a dict with 'loss', got "
            "None. Return the loss for every batch of the probe, or pass a `loss_fn` that does."
        )
    if not isinstance(loss, Tensor):
        raise TypeError(f"Expected the loss to be a scalar tensor or a dict with 'loss', got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(
            f"Expected the loss to be a scalar, got a tensor of shape {tuple(loss.shape)}. Take the mean over the "
            "samples of the batch."
        )
    if not torch.isfinite(loss):
        raise ValueError(
            f"Expected a finite loss, got {loss.item()}. The flatness of a diverged run is not defined: check the "
            "weights and the samples of the probe."
        )
    return loss.reshape(())


def _training_step_of(module: nn.Module) -> LossFunction:
    step = getattr(module, "training_step", None)
    if step is None:
        raise TypeError(
            f"Expected a `loss_fn`, or a LightningModule with a `training_step`, got {type(module).__name__} without "
            "either. Pass loss_fn=lambda module, batch: ... that returns the mean loss of a batch."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "Expected a `loss_fn` for a module with manual optimization, whose `training_step` updates the weights "
            "itself, got None. Pass loss_fn=lambda module, batch: ... that returns the mean loss of a batch."
        )
    names = list(inspect.signature(step).parameters)
    if "dataloader_iter" in names:
        raise ValueError(
            "Expected a `training_step` that takes a batch, got one that takes `dataloader_iter`. Pass "
            "loss_fn=lambda module, batch: ... that returns the mean loss of a batch."
        )
    arguments = (0,) if len(names) > 1 else ()
    return lambda module, batch: module.training_step(batch, *arguments)  # type: ignore[operator]


def _trainable_parameters(module: nn.Module) -> list[Tensor]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(
            f"Expected trainable parameters, got {type(module).__name__} with none. Set requires_grad=True on the "
            "parameters whose landscape is to be measured."
        )
    for name, p in named.items():
        if is_lazy(p):
            raise ValueError(f"Expected initialised parameters, got the lazy {name!r}. Run a forward pass first.")
        if not p.is_floating_point():
            raise ValueError(f"Expected real parameters, got {name!r} of {p.dtype}. Freeze it, or use real tensors.")
    devices = {p.device for p in named.values()}
    if len(devices) > 1:
        raise ValueError(f"Expected all trainable parameters on one device, got {sorted(map(str, devices))}.")
    return list(named.values())


def _vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
