"""The Gauss-Newton matrix: the curvature that the loss has in the outputs, carried back to the weights.

``H = Jᵀ B J + sum_k (dL/df_k) ∇²f_k``: with ``J`` the Jacobian of the outputs ``f`` in the weights and ``B`` the
Hessian of the loss in the outputs, the first term is the Gauss-Newton matrix. It is positive semi-definite where the
loss is convex in the outputs (cross-entropy, squared error, binary cross-entropy with logits), and for those losses
equals the Fisher information matrix up to a factor.

The products need the outputs: :class:`OutputLoss` separates the network from the loss. ``J v`` is the
derivative of ``u -> Jᵀ u``, which is linear, so both passes are ordinary backward passes: forward mode returns wrong
numbers for some modules (BatchNorm in training mode, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.module.batches import map_tensors, tensors_in

_ADJOINT_TOLERANCE = 1e-2


def _outputs_of_pair(module: nn.Module, batch: Any) -> Any:
    return module(_pair(batch)[0])


def _targets_of_pair(batch: Any) -> Any:
    return _pair(batch)[1]


def _pair(batch: Any) -> Any:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError(
            f"Expected a batch (inputs, targets), got {type(batch).__name__}. Pass OutputLoss(loss, outputs=lambda "
            "module, batch: ..., targets=lambda batch: ...) to say what goes into the network and into the loss."
        )
    return batch


@dataclass(frozen=True)
class OutputLoss:
    """A loss function that separates the network from the loss: ``loss(outputs(module, batch), targets(batch))``.

    To be passed as the ``loss_fn`` of a :class:`LossLandscape` or of the ``FlatnessMonitor``. It is needed for what
    looks at the outputs: ``operator="ggn"`` and ``normalize_logits=True``.

    Args:
        loss: ``loss(outputs, targets)`` returns the mean loss over the samples, a scalar tensor, e.g.
            ``torch.nn.functional.cross_entropy``. Any loss that is twice differentiable in the outputs will do.
        outputs: ``outputs(module, batch)`` returns the outputs of the network, a tensor or tensors nested in lists,
            tuples, dicts or dataclasses. Default: ``module(inputs)`` for batches ``(inputs, targets)``.
        targets: ``targets(batch)`` returns what the loss takes beside the outputs. Default: the second part of
            batches ``(inputs, targets)``.

    Example:
        The Gauss-Newton matrix of a linear model under squared error is its Hessian.

        >>> import torch
        >>> from lightning_flatness import LossLandscape, OutputLoss
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
        >>> landscape = LossLandscape(module, batches, OutputLoss(torch.nn.functional.mse_loss))
        >>> landscape.ggnvp(torch.tensor([1.0]))
        tensor([10.])
    """

    loss: Callable[[Any, Any], Tensor]
    outputs: Callable[[nn.Module, Any], Any] = _outputs_of_pair
    targets: Callable[[Any], Any] = _targets_of_pair

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return self.loss(self.outputs(module, batch), self.targets(batch))


class Linearization:
    """The outputs of one batch with their graph, and the gradient of the loss in the outputs with its own.

    Raises:
        ValueError: If no output depends on the parameters.
    """

    def __init__(self, output_loss: OutputLoss, module: nn.Module, batch: Any, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        outputs = output_loss.outputs(module, batch)
        leaves = map_tensors(_leaf, outputs)
        self.is_used = [f.requires_grad for f in tensors_in(outputs)]
        pairs = [(f, leaf) for f, leaf in zip(tensors_in(outputs), tensors_in(leaves), strict=True) if f.requires_grad]
        if not pairs:
            raise ValueError(
                f"Expected outputs that depend on the weights, got {type(outputs).__name__} without such a tensor. "
                "Return the outputs of the network from `OutputLoss.outputs`, not detached ones."
            )
        self.outputs, self.leaves = (list(group) for group in zip(*pairs, strict=True))
        self.loss = output_loss.loss(leaves, output_loss.targets(batch))
        self._slopes: Sequence[Tensor | None] | None = None
        self._dual: list[Tensor] = []
        self._pulled: Sequence[Tensor | None] | None = None

    def product(self, v: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor | None]:
        """Return ``Jᵀ B J v``, a piece per parameter; the graphs stay if they are to be used again."""
        return self._transposed(self._curved(self.jvp(v), keep), keep)

    def product_from(self, jv: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor | None]:
        """Return ``Jᵀ B u`` for a given ``u = J v``."""
        return self._transposed(self._curved(jv, keep), keep)

    def jvp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return ``J v``: the derivative of ``u -> <Jᵀ u, v>``."""
        pulled_back = self.pulled_back()
        active = [(g, d.to(g.dtype)) for g, d in zip(pulled_back, v, strict=True) if g is not None and g.requires_grad]
        if not active:
            return [torch.zeros_like(f) for f in self.outputs]
        pulled, directions = zip(*active, strict=True)
        jv = torch.autograd.grad(pulled, self._dual, directions, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(f) if d is None else d for d, f in zip(jv, self.outputs, strict=True)]

    def is_adjoint(self) -> bool:
        """Return whether ``<u, J v> = <Jᵀ u, v>`` for random u and v, as it is unless a backward pass is no function.

        The derivative of the ``backward`` of a ``torch.autograd.Function`` can be missing without an error.
        """
        generator = torch.Generator(device="cpu").manual_seed(0)
        u, v = ([_randn_like(t, generator) for t in group] for group in (self.outputs, self.parameters))
        transposed = torch.autograd.grad(self.outputs, self.parameters, u, retain_graph=True, allow_unused=True)
        left = sum(float((a * b).sum()) for a, b in zip(u, self.jvp(v), strict=True))
        terms = [float((a * b).sum()) for a, b in zip(transposed, v, strict=True) if a is not None]
        return abs(left - sum(terms)) <= _ADJOINT_TOLERANCE * sum(abs(term) for term in terms)

    def pulled_back(self) -> Sequence[Tensor | None]:
        """Return ``Jᵀ u`` with its graph in ``u``; made once."""
        if self._pulled is None:
            self._dual = [torch.zeros_like(f, requires_grad=True) for f in self.outputs]
            self._pulled = torch.autograd.grad(
                self.outputs, self.parameters, self._dual, create_graph=True, allow_unused=True
            )
        return self._pulled

    def _curved(self, u: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """Return ``B u``."""
        if self._slopes is None:
            self._slopes = torch.autograd.grad(self.loss, self.leaves, create_graph=True, allow_unused=True)
        active = [(s, d) for s, d in zip(self._slopes, u, strict=True) if s is not None and s.requires_grad]
        if not active:  # the loss is linear in the outputs
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        slopes, directions = zip(*active, strict=True)
        curved = torch.autograd.grad(slopes, self.leaves, directions, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(f) if d is None else d for d, f in zip(curved, self.leaves, strict=True)]

    def _transposed(self, u: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
        """Return ``Jᵀ u``."""
        return torch.autograd.grad(self.outputs, self.parameters, u, retain_graph=keep, allow_unused=True)


def _randn_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.device, tensor.dtype)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def output_loss_of(landscape: Any, purpose: str) -> OutputLoss:
    """Return the loss function of a landscape if it separates the outputs from the loss.

    Raises:
        TypeError: If it does not; the error names the ``purpose``.
    """
    if isinstance(landscape.loss_fn, OutputLoss):
        return landscape.loss_fn
    got = "a training_step" if hasattr(landscape.module, "training_step") else type(landscape.loss_fn).__name__
    raise TypeError(
        f"Expected an OutputLoss as `loss_fn` for {purpose}, which has to know the outputs of the network, got {got}. "
        "Pass loss_fn=OutputLoss(torch.nn.functional.cross_entropy), with outputs=lambda module, batch: ... and "
        "targets=lambda batch: ... where batches are not (inputs, targets)."
    )


def normalized_logits(output_loss: OutputLoss) -> OutputLoss:
    """Return the loss on ``f / sqrt(mean_k (f_k - mean f)²)``: logits over their standard deviation over the classes.

    The classes are on the second axis, or on the last of a vector. Scaling the last layer then changes nothing, as it
    changes no prediction (arXiv 2302.07011).
    """

    def normalized(module: nn.Module, batch: Any) -> Any:
        return map_tensors(_normalized_logits, output_loss.outputs(module, batch))

    return OutputLoss(output_loss.loss, normalized, output_loss.targets)


def _normalized_logits(logits: Tensor) -> Tensor:
    axis = min(1, logits.dim() - 1)
    if logits.dim() == 0 or logits.shape[axis] < 2:
        raise ValueError(
            f"Expected logits of two or more classes to normalise, got outputs of shape {tuple(logits.shape)}. "
            "Leave `normalize_logits` False."
        )
    variance = logits.var(dim=axis, correction=0, keepdim=True)
    return logits * variance.clamp_min(torch.finfo(logits.dtype).tiny).rsqrt()
