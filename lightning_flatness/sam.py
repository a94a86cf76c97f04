"""Sharpness-aware minimisation: descend with the gradient at the worst weights nearby.

What the optimizer for plain loops and the Lightning callback share is :func:`perturbed`: move the weights up the
gradient by ``rho`` in a geometry, and put them back bit for bit. The weights are saved and copied back, for
``(w + e) - e`` is not ``w`` in floating point, and training would drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import LBFGS, Optimizer

from lightning_flatness.geometry import Geometry, LinearGeometry, resolve_geometry
from lightning_flatness.isolation import ReplayedPass


@contextmanager
def perturbed(
    parameters: Sequence[Tensor],
    rho: float,
    geometry: str | Geometry = "euclidean",
    module: nn.Module | None = None,
) -> Iterator[float]:
    r"""Move weights up their gradients by ``rho`` inside the block, and put them back bit for bit.

    The change of the weights is ``rho S² g / ‖S g‖`` with the gradient ``g`` in ``.grad`` and the diagonal ``S`` of
    the geometry's chart ``w = w0 + S z``: one step of length ``rho`` up the gradient in ``z``. It does not depend on
    the scale of the gradient, so a scaled loss (``GradScaler``) needs no unscaling.

    The gradients are used up: inside the block and after it ``.grad`` is what the block makes it, None at first.
    Parameters that are frozen or have no gradient stay where they are; if the gradient of all is zero or not
    finite, nothing moves. Costs two extra copies of the weights at its peak (one for ``"euclidean"``, ``"layer"``
    and ``"filter"``), one while the block runs.

    Args:
        parameters: The weights, each with its gradient in ``.grad``.
        rho: Length of the step in the coordinates ``z`` of the geometry, >= 0.
        geometry: One of the linear geometries: ``"euclidean"`` (SAM), ``"element"`` (ASAM), ``"layer"``,
            ``"filter"``, or an object.
        module: The module of the parameters. Only ``"filter"`` needs it, to know transposed convolutions, whose
            output units are on the second axis; without it all tensors have them on the first.

    Yields:
        The Euclidean length of the change of the weights; 0.0 if nothing moved.

    Raises:
        ValueError: If ``rho`` is negative or not finite, or the geometry is not linear.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.square().sum().backward()
        >>> with perturbed([w], rho=0.5):
        ...     print(w.data)
        tensor([3.3000, 4.4000])
        >>> w.data
        tensor([3., 4.])
    """
    check_rho(rho)
    scales_of = linear_geometry(geometry).scales
    active = _distinct(p for p in parameters if p.requires_grad and p.grad is not None)
    gradients = [_take_gradient(p) for p in active]
    saved: list[Tensor] = []
    try:
        with torch.no_grad():
            scales = scales_of(module if module is not None else nn.Module(), active) if active else None
            factor, norm = _ascend_(gradients, scales, rho)
            del scales
            if norm > 0:
                saved = [p.detach().clone() for p in active]
                _add_(active, gradients, factor)
        gradients.clear()  # their memory is for the block
        torch.clear_autocast_cache()  # a cast of the weights made before would still be used
        yield norm
    finally:
        with torch.no_grad():
            for parameter, original in zip(active, saved, strict=False):
                parameter.copy_(original)
        torch.clear_autocast_cache()


def _take_gradient(parameter: Tensor) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient.detach()
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def _ascend_(gradients: list[Tensor], scales: list[Tensor] | None, rho: float) -> tuple[float, float]:
    """Turn the gradients, in place, into the direction of the ascent step.

    Args:
        gradients: What becomes ``S² g``, up to a positive factor.
        scales: The diagonal of ``S``, one tensor per gradient, broadcastable; None for ones.
        rho: Length of the step in the coordinates of the geometry.

    Returns:
        What the direction is to be multiplied with, and the Euclidean length of the step; both 0.0 if the
        gradient is zero or not finite.
    """
    if scales is not None:
        _multiply_(gradients, scales)
    length = float(get_total_norm(gradients)) if gradients and rho > 0 else 0.0
    if not _SAFE_LENGTH[0] < length < _SAFE_LENGTH[1]:
        length = _normalise_(gradients, length)
    if length == 0:
        return 0.0, 0.0
    if scales is None:
        return rho / length, rho
    for gradient in gradients:  # first to the length rho, then to the weights: the square of S could overflow
        gradient.mul_(rho / length)
    _multiply_(gradients, scales)
    return 1.0, float(get_total_norm(gradients))


_SAFE_LENGTH = (1e-15, 1e15)
"""Between these the sum of squares neither underflows nor overflows in float32, where that would matter."""


def _normalise_(gradients: list[Tensor], length: float) -> float:
    """Divide by the largest entry and return the length then; 0.0 if there is nothing to divide by."""
    if not gradients or math.isnan(length):
        return 0.0
    largest = float(get_total_norm(gradients, norm_type=math.inf))
    if largest == 0 or not math.isfinite(largest):
        return 0.0
    for gradient in gradients:
        gradient.div_(largest)
    return float(get_total_norm(gradients))


def _multiply_(tensors: list[Tensor], factors: list[Tensor]) -> None:
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


def _add_(tensors: list[Tensor], changes: list[Tensor], factor: float) -> None:
    for tensor, change in zip(tensors, changes, strict=True):
        tensor.add_(change, alpha=factor)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def optimized_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer, each once.

    Args:
        optimizer: Any optimizer.

    Returns:
        The parameters, in the order of the groups.
    """
    return _distinct(p for group in optimizer.param_groups for p in group["params"])


def check_rho(rho: float) -> None:
    """Refuse a radius that is no radius.

    Args:
        rho: Length of the ascent step.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not (rho >= 0 and math.isfinite(rho)):
        raise ValueError(f"Expected `rho` to be >= 0 and finite, got {rho}. Use 0.0 to train without SAM.")


def linear_geometry(geometry: str | Geometry) -> LinearGeometry:
    """Return a geometry in which SAM's step has a closed form.

    Args:
        geometry: A geometry or its name.

    Returns:
        The geometry.

    Raises:
        ValueError: If it is not linear.
    """
    resolved = resolve_geometry(geometry)
    if not isinstance(resolved, LinearGeometry):
        raise ValueError(
            f"Expected `geometry` to be linear (a chart w = w0 + S z with a diagonal S), got {resolved!r}. Use "
            "'euclidean', 'layer', 'filter' or 'element' for SAM; other geometries can be measured in."
        )
    return resolved


class SAM(Optimizer):
    r"""Sharpness-aware minimisation around an optimizer, for plain loops, Fabric and manual optimization.

    One step takes the gradient ``g`` at the weights ``w``, moves to ``w + rho S² g / ‖S g‖``, takes the gradient
    there, moves back and lets the wrapped optimizer descend with it. ``S`` is the diagonal of a geometry's chart
    ``w = w0 + S z``: ones for SAM (arXiv 2010.01412), ``|w|`` for ASAM (``geometry="element"``, arXiv 2102.11600).

    ``param_groups``, ``state``, ``defaults``, ``state_dict``, ``load_state_dict``, ``zero_grad`` and
    ``add_param_group`` are those of the wrapped optimizer: schedulers work, and checkpoints can be loaded with and
    without SAM.

    Costs two gradients per step and one extra copy of the weights (two at the peak in geometry ``"element"``).

    With the Lightning Trainer and automatic optimization use the callback ``SharpnessAwareMinimization`` instead.
    ``GradScaler.step`` takes no closure: in a loop with a loss scaler write the two passes yourself, the second one
    inside :func:`perturbed`.

    Args:
        optimizer: The optimizer instance to wrap.
        rho: Length of the ascent step in the coordinates of the geometry, >= 0; 0.0 is the wrapped optimizer alone.
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, or a linear ``Geometry``.
        module: The module that is trained. With it, the second pass leaves no trace in it (BatchNorm statistics,
            torchmetrics and plain attributes have seen the first pass only), and geometry ``"filter"`` knows
            transposed convolutions. Without it, both passes update what the closure updates. The random numbers
            are in either case the same in both passes.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer instance.
        ValueError: If ``rho`` or the geometry is out of range, or the optimizer calls closures itself.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, module=model)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> losses = [optimizer.step(closure).item() for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rho: float = 0.05,
        geometry: str | Geometry = "euclidean",
        module: nn.Module | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Expected `optimizer` to be an instance of torch.optim.Optimizer, got {_name(optimizer)}. Make the "
                "optimizer first: SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)."
            )
        if isinstance(optimizer, LBFGS | SAM):
            raise ValueError(
                f"Expected `optimizer` to take one step per gradient, got {_name(optimizer)}, which calls the closure "
                "itself. Wrap e.g. torch.optim.SGD or torch.optim.AdamW."
            )
        check_rho(rho)
        # What Optimizer.__init__ prepares, except for groups and state: those are the wrapped optimizer's.
        self.__setstate__(
            {
                "base_optimizer": optimizer,
                "rho": rho,
                "geometry": linear_geometry(geometry),
                "module": module.module if isinstance(module, DistributedDataParallel) else module,
            }
        )

    base_optimizer: Optimizer
    rho: float
    geometry: LinearGeometry
    module: nn.Module | None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Gradients from before the call are dropped: both passes start without, whether or not the closure zeroes.

        Args:
            closure: Computes the loss, calls backward and returns the loss. It is called twice.

        Returns:
            What the closure returned in the first pass: the loss at the weights before the step.

        Raises:
            ValueError: If there is no closure.
            RuntimeError: If the closure leaves no gradient; the weights are then as before.
        """
        if closure is None:
            raise ValueError(
                "Expected a `closure` that computes the loss and calls backward, got None: SAM needs the gradient "
                "twice. Call optimizer.step(closure)."
            )
        parameters = optimized_parameters(self)
        first_pass = ReplayedPass(self.module if self.module is not None else nn.Module(), _device_of(parameters))
        loss = self._evaluate(closure, parameters, "at the weights")
        if self.rho > 0:
            with perturbed(parameters, self.rho, self.geometry, self.module), first_pass.again():
                self._evaluate(closure, parameters, "at the perturbed weights")
        self.base_optimizer.step()
        return loss

    def _evaluate(self, closure: Callable[[], Any], parameters: list[Tensor], where: str) -> Any:
        self.zero_grad()
        with torch.enable_grad():
            output = closure()
        if all(p.grad is None for p in parameters):
            raise RuntimeError(
                f"Expected the closure to leave gradients in the parameters of the optimizer, got none {where}. Call "
                "loss.backward() inside the closure, and no zero_grad() after it."
            )
        return output

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the wrapped optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the wrapped optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of the wrapped optimizer."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients of the wrapped optimizer's parameters."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimizer."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the wrapped optimizer."""
        self.base_optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register a hook of the wrapped optimizer."""
        return self.base_optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register a hook of the wrapped optimizer."""
        return self.base_optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register a hook of the wrapped optimizer."""
        return self.base_optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register a hook of the wrapped optimizer."""
        return self.base_optimizer.register_load_state_dict_post_hook(hook, prepend)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("base_optimizer", "rho", "geometry", "module")}

    def __repr__(self) -> str:
        return f"SAM({self.base_optimizer!r}, rho={self.rho}, geometry={self.geometry!r})"


def _device_of(parameters: Sequence[Tensor]) -> torch.device | None:
    return parameters[0].device if parameters else None


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
