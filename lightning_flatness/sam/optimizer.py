"""SAM around any optimizer, for plain loops, Fabric and manual optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_flatness.geometry import Geometry, LinearGeometry
from lightning_flatness.module.replay import ReplayedPass
from lightning_flatness.module.sharding import reshard
from lightning_flatness.module.undo import undone
from lightning_flatness.sam.ascent import Ascent, PreviousGradient, check_ascent, known_direction, why_no_ascent
from lightning_flatness.sam.perturbation import (
    Displacement,
    check_rho,
    linear_geometry,
    optimized_parameters,
    perturbed,
)


class SAM(Optimizer):
    r"""Sharpness-aware minimisation around an optimizer, for plain loops, Fabric and manual optimization.

    One step takes the gradient ``g`` at the weights ``w``, moves to ``w + rho S² g / ‖S g‖``, takes the gradient
    there, moves back and lets the wrapped optimizer descend with it. ``S`` is the diagonal of a geometry's chart
    ``w = w0 + S z``: ones for SAM (arXiv 2010.01412), ``|w|`` for ASAM (``geometry="element"``, arXiv 2102.11600).

    ``param_groups``, ``state``, ``defaults``, ``state_dict``, ``load_state_dict``, ``zero_grad`` and
    ``add_param_group`` are those of the wrapped optimizer: schedulers work, and checkpoints can be loaded with and
    without SAM.

    Costs two gradients per step and one extra copy of the weights (two at the peak in geometry ``"element"``).

    Two other values of ``ascent`` take one gradient per step, at weights that are moved before it is known:

    - ``"momentum"`` (MSAM, arXiv 2401.12033, algorithm 1): ``w - rho S² v / ‖S v‖`` with the momentum ``v`` of the
      optimizer, its ``momentum_buffer`` (``v <- mu v + g``) or ``exp_avg``. The minus is the paper's: the gradient is
      taken ahead, in the direction of the coming step, as Nesterov's.
    - ``"previous"``: ``w + rho S² g' / ‖S g'‖`` with the gradient ``g'`` of the step before, which is kept in the state
      of the optimizer (one more copy of the weights, also in checkpoints).

    The first step is then the wrapped optimizer's alone. BatchNorm statistics, metrics and the loss that the closure
    returns are those at the moved weights. With a loss scaler or accumulated gradients write
    ``with optimizer.perturbed(): ...`` around forward and backward, and call ``step()`` without a closure.

    With the Lightning Trainer and automatic optimization use the callback ``SharpnessAwareMinimization`` instead.
    ``GradScaler.step`` takes no closure: in a loop with a loss scaler and ``ascent="gradient"`` write the two passes
    yourself, the second one inside :func:`perturbed`.

    Args:
        optimizer: The optimizer instance to wrap.
        rho: Length of the ascent step in the coordinates of the geometry, >= 0; 0.0 is the wrapped optimizer alone.
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, or a linear ``Geometry``.
        module: The module that is trained. With it, the second pass leaves no trace in it (BatchNorm statistics,
            torchmetrics and plain attributes have seen the first pass only), and geometry ``"filter"`` knows
            transposed convolutions. Without it, both passes update what the closure updates. The random numbers
            are in either case the same in both passes. FSDP2 with one gradient per step needs it.
        ascent: ``"gradient"``, ``"momentum"`` or ``"previous"``.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer instance.
        ValueError: If ``rho``, the geometry or ``ascent`` is out of range, the optimizer calls closures itself, or it
            keeps no momentum and ``ascent`` is ``"momentum"``.

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
        ascent: Ascent = "gradient",
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
        check_ascent(ascent)
        if (reason := why_no_ascent(optimizer, ascent)) is not None:
            raise ValueError(reason)
        # What Optimizer.__init__ prepares, except for groups and state: those are the wrapped optimizer's.
        self.__setstate__(
            {
                "base_optimizer": optimizer,
                "rho": rho,
                "geometry": linear_geometry(geometry),
                "module": module.module if isinstance(module, DistributedDataParallel) else module,
                "ascent": ascent,
            }
        )

    base_optimizer: Optimizer
    rho: float
    geometry: LinearGeometry
    module: nn.Module | None
    ascent: Ascent = "gradient"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        With a closure, gradients from before the call are dropped, whether or not it zeroes.

        Args:
            closure: Computes the loss, calls backward and returns the loss. It is called twice, or once if ``ascent``
                is not ``"gradient"``; then it may be None, and the gradients are those made inside :meth:`perturbed`.

        Returns:
            What the closure returned in the first pass: the loss at the weights before the step, or at the perturbed
            ones if there is one pass only.

        Raises:
            ValueError: If there is no closure and ``ascent`` is ``"gradient"``.
            RuntimeError: If the closure leaves no gradient; the weights are then as before.
        """
        if self.ascent != "gradient":
            return self._step_with_one_gradient(closure)
        if closure is None:
            raise ValueError(
                "Expected a `closure` that computes the loss and calls backward, got None: SAM needs the gradient "
                "twice. Call optimizer.step(closure)."
            )
        parameters = optimized_parameters(self)
        module = self.module if self.module is not None else nn.Module()
        first_pass = ReplayedPass(module, _device_of(parameters), [self.base_optimizer])
        loss = self._evaluate(closure, parameters, "at the weights")
        if self.rho > 0:
            with perturbed(parameters, self.rho, self.geometry, self.module), first_pass.again():
                self._evaluate(closure, parameters, "at the perturbed weights")
        self.base_optimizer.step()
        return loss

    @contextmanager
    def perturbed(self) -> Iterator[float]:
        """Move the weights inside the block, where forward and backward run, and put them back bit for bit.

        For loops without a closure, around each microbatch. What the block writes to weights that have moved is undone.

        Yields:
            The Euclidean length of the change of the weights; 0.0 before the first step.

        Raises:
            ValueError: If ``ascent`` is ``"gradient"``.

        Example:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> optimizer = SAM(torch.optim.SGD([w], lr=0.0, momentum=0.9), rho=0.5, ascent="momentum")
            >>> for _ in range(2):
            ...     with optimizer.perturbed():
            ...         print(w.data)
            ...         w.square().sum().backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            tensor([3., 4.])
            tensor([2.7000, 3.6000])
        """
        if self.ascent == "gradient":
            raise ValueError(
                "Expected `ascent` to be 'momentum' or 'previous', got 'gradient', whose perturbation needs a gradient "
                "first. Call optimizer.step(closure)."
            )
        module = self.module if self.module is not None else nn.Module()
        displacement = Displacement(self.rho, self.geometry, module)

        def put_back() -> None:
            displacement.put_back()
            reshard(module)

        with undone(put_back):
            if self.rho > 0:
                parameters, directions, sign = known_direction(self.base_optimizer, self.ascent)
                displacement.move(parameters, directions, sign=sign, shared=True)
                reshard(module)  # FSDP2 may hold weights gathered before, e.g. in validation
            yield displacement.norm

    def _step_with_one_gradient(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with self.perturbed():
                loss = self._evaluate(closure, optimized_parameters(self), "at the perturbed weights")
        gradient = PreviousGradient(self.base_optimizer)
        if self.ascent == "previous" and self.rho > 0:
            gradient.take()
        self.base_optimizer.step()
        gradient.keep()
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
        return {name: self.__dict__[name] for name in ("base_optimizer", "rho", "geometry", "module", "ascent")}

    def __repr__(self) -> str:
        ascent = "" if self.ascent == "gradient" else f", ascent={self.ascent!r}"
        return f"SAM({self.base_optimizer!r}, rho={self.rho}, geometry={self.geometry!r}{ascent})"


def _device_of(parameters: Sequence[Tensor]) -> torch.device | None:
    return parameters[0].device if parameters else None


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
