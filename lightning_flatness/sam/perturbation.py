"""Sharpness-aware minimisation: descend with the gradient at the worst weights nearby.

The optimizer for plain loops and the Lightning callback share :class:`Displacement`: move the weights along a
direction by ``rho`` in a geometry, and put them back bit for bit. The weights are saved and copied back, for
``(w + e) - e`` is not ``w`` in floating point, and training would drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_flatness.geometry import Geometry, LinearGeometry, resolve_geometry
from lightning_flatness.module.undo import undone


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
    finite, nothing moves. Writes of the block to trainable ones (clamping, normalising) are undone as well.
    Costs two extra copies of the weights at its peak (one for ``"euclidean"``, ``"layer"``
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
    trained = [p for p in parameters if p.requires_grad]
    displacement = Displacement(rho, geometry, module)
    active = [p for p in _distinct(trained) if p.grad is not None]
    gradients = [_take_gradient(p) for p in active]
    with undone(displacement.put_back):
        displacement.move(active, gradients, kept=trained)
        yield displacement.norm


class Displacement:
    """Weights moved by ``rho`` along a direction, until they are put back bit for bit.

    :func:`perturbed` is this as a block; the callback moves them in one hook and puts them back in another.

    Args:
        rho: Length of the step in the coordinates ``z`` of the geometry, >= 0.
        geometry: One of the linear geometries.
        module: The module of the parameters.

    Attributes:
        norm: The Euclidean length of the change of the weights; 0.0 if nothing moved.
    """

    def __init__(self, rho: float, geometry: str | Geometry, module: nn.Module | None) -> None:
        self.norm = 0.0
        self._rho, self._module = rho, module if module is not None else nn.Module()
        self._multiplier_of = linear_geometry(geometry).multiplier
        self._saved: list[tuple[Tensor, Tensor]] = []

    def move(
        self,
        parameters: list[Tensor],
        directions: list[Tensor],
        *,
        kept: Sequence[Tensor] = (),
        sign: float = 1.0,
        shared: bool = False,
    ) -> None:
        """Move weights, or leave them if the directions are zero or not finite.

        Args:
            parameters: The weights.
            directions: Gradients, one for each; the list is emptied.
            kept: More weights to put back; these and ``parameters`` are copied even if nothing moves.
            sign: 1.0 moves up the gradients, -1.0 down.
            shared: Whether somebody else needs the directions, so that they must not be written to.
        """
        with torch.no_grad():
            multiply_ = self._multiplier_of(self._module, parameters) if parameters else None
            if shared and multiply_ is not None:
                directions[:] = [direction.clone() for direction in directions]
            factor, self.norm = _ascend_(directions, multiply_, self._rho)
            del multiply_
            if self.norm > 0 or kept:
                self._saved = [(p, p.detach().clone()) for p in _distinct((*kept, *parameters))]
            if self.norm > 0:
                _add_(parameters, directions, sign * factor)
        directions.clear()  # their memory is for the pass
        torch.clear_autocast_cache()  # a cast of the weights made before would still be used

    def put_back(self) -> None:
        """Put the weights back; once more does no harm, also if the first time was cut short."""
        with torch.no_grad():
            for parameter, original in self._saved:
                parameter.copy_(original)
        self._saved = []
        torch.clear_autocast_cache()


def _take_gradient(parameter: Tensor) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient.detach()
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def _ascend_(
    gradients: list[Tensor], multiply_: Callable[[Sequence[Tensor]], None] | None, rho: float
) -> tuple[float, float]:
    """Return the factor of the ascent step's direction and its Euclidean length; the gradients become the direction.

    The direction is ``S² g`` up to a positive factor. ``multiply_`` multiplies tensors by ``S`` in place; None if ``S``
    is the identity.
    Both numbers are 0.0 if the gradient is zero or not finite.
    """
    if multiply_ is not None:
        multiply_(gradients)
    length = float(get_total_norm(gradients)) if gradients and rho > 0 else 0.0
    if not _SAFE_LENGTH[0] < length < _SAFE_LENGTH[1]:
        length = _normalise_(gradients, length)
    if length == 0:
        return 0.0, 0.0
    if multiply_ is None:
        return rho / length, rho
    for gradient in gradients:  # first to the length rho, then to the weights: the square of S could overflow
        gradient.mul_(rho / length)
    multiply_(gradients)
    return 1.0, float(get_total_norm(gradients))


_SAFE_LENGTH = (1e-15, 1e15)
"""Between these the sum of squares neither underflows nor overflows in float32, where that would matter."""


def _normalise_(gradients: list[Tensor], length: float) -> float:
    """Divide by the largest entry, into new tensors; return the length then, 0.0 if there is nothing to divide by."""
    if not gradients or math.isnan(length):
        return 0.0
    largest = float(get_total_norm(gradients, norm_type=math.inf))
    if largest == 0 or not math.isfinite(largest):
        return 0.0
    for index, gradient in enumerate(gradients):  # one by one: those before are freed, unless somebody else has them
        gradients[index] = gradient / largest
    return float(get_total_norm(gradients))


def _add_(tensors: list[Tensor], changes: list[Tensor], factor: float) -> None:
    for tensor, change in zip(tensors, changes, strict=True):
        tensor.add_(change, alpha=factor)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def optimized_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer, each once, in the order of the groups."""
    return _distinct(p for group in optimizer.param_groups for p in group["params"])


def check_rho(rho: float) -> None:
    """Raise an error unless the length of the ascent step is finite and not negative.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not (rho >= 0 and math.isfinite(rho)):
        raise ValueError(f"Expected `rho` to be >= 0 and finite, got {rho}. Use 0.0 to train without SAM.")


def linear_geometry(geometry: str | Geometry) -> LinearGeometry:
    """Return a geometry, given by itself or its name, in which SAM's step has a closed form.

    Raises:
        ValueError: If it is not linear.
    """
    resolved = resolve_geometry(geometry)
    if not isinstance(resolved, LinearGeometry):
        raise ValueError(
            f"Expected `geometry` to be linear (a chart w = w0 + S z), got {resolved!r}. Use "
            "'euclidean', 'layer', 'filter', 'element', 'path_norm' or 'attention' for SAM; other geometries can be "
            "measured in."
        )
    return resolved
