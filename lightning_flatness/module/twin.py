"""The twin of a module: a deep copy that a measurement evaluates, so that there is nothing to put back in the run.

The twin has parameters, buffers, Python state, optimizers and a Trainer of its own. Every forward pass starts from the
same state: what the last one left in the twin is copied anew from the module of the run, which stands still meanwhile.
So the loss stays one function of the weights, and neither a side effect nor an interruption reaches training.

The price is one more copy of the weights. Frozen tensors above a size are shared with the run and watched.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.module import copying_builtin, copying_lightning  # noqa: F401
from lightning_flatness.module.copying import MAX_COPIED_BYTES, Copier, is_plain
from lightning_flatness.module.copying_torch import fill_module
from lightning_flatness.module.kernels import LossFunctions, twice_differentiable
from lightning_flatness.module.leaks import Outside
from lightning_flatness.module.loss import graph_nodes
from lightning_flatness.module.modes import Mode, set_training, training_flags
from lightning_flatness.module.rebinding import rebound
from lightning_flatness.module.rng import preserved_rng, seed_all
from lightning_flatness.module.sharding import set_form, sharded_form

_MAX_COPIED_FROZEN_BYTES = 2**20
"""Where the frozen tensors take more memory than the trained ones, those above this size are shared."""

_named: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""Attributes that a warning has named already."""


@contextmanager
def twin_of(
    module: nn.Module, parameters: Sequence[Tensor], mode: Mode, seed: int, kind: type[Twin] | None = None
) -> Iterator[Twin]:
    """Copy a module for a measurement, and set what it shares with the run: generators, kernels, precision.

    Args:
        module: The module of the run.
        parameters: Those of its parameters that are measured.
        mode: Which layers act as in training; see :mod:`lightning_flatness.module.modes`.
        seed: Seed of the random numbers of every forward pass.
        kind: The class of the twin.

    Yields:
        The twin.
    """
    device = parameters[0].device
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(device))
        has_autocast = torch.is_autocast_enabled(device.type)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(twice_differentiable(module, device))
        is_first = module not in _named
        twin = (kind or Twin)(module, parameters, mode, seed, mixes_precisions=has_autocast)
        outside = Outside(original for original, _ in twin.modules) if is_first else None
        yield twin
        if outside is not None and (changed := outside.changed()):
            warnings.warn(
                f"{', '.join(map(repr, changed))} changed while the loss of {type(module).__name__} was measured. The "
                "copy of the module shares class attributes and global variables with the run, so this reaches "
                "training. HINT: keep such state on the module, or pass loss_fn=lambda module, batch: ... that leaves "
                "it alone.",
                stacklevel=2,
            )


class Twin:
    """A copy of a module; made by :func:`twin_of`.

    Args:
        module: The module of the run.
        parameters: Those of its parameters that are measured.
        mode: See :func:`twin_of`.
        seed: Seed of the random numbers of every forward pass.
        mixes_precisions: Whether training casts the inputs of operators, so that weights may have different dtypes.

    Attributes:
        module: The copy.
        parameters: Its parameters in the order of the given ones.
        modules: The modules of the run, each with its copy.
        has_hidden_weights: Whether it holds parameters that are not registered, such as those of a teacher in a list.
        moves_parameters: Whether a forward pass was seen to write to them. Graphs of two passes then exclude each
            other.
    """

    def __init__(
        self, module: nn.Module, parameters: Sequence[Tensor], mode: Mode, seed: int, *, mixes_precisions: bool = False
    ) -> None:
        self._seed = seed
        self._device = parameters[0].device
        self._originals = list(parameters)
        self._mixes_precisions = mixes_precisions
        self._shared = _too_large_to_copy(module, {id(p) for p in parameters})
        # Gathered weights are made for this measurement. They and the slices that they remember are not copied.
        gathered = [p for p in module.parameters() if sharded_form(p) is not p]
        self._kept = [*self._shared.values(), *gathered, *map(sharded_form, gathered)]
        copier = Copier({id(tensor): tensor for tensor in self._kept})
        self.module: nn.Module = copier.copy(module)
        self.parameters: list[Tensor] = [copier.memo[id(p)] for p in parameters]
        for copied, original in zip(self.parameters, parameters, strict=True):
            set_form(copied, original)
        self.modules = copier.modules
        self._mode: Mode = mode
        layers = list(self.module.modules())
        self._flags = list(zip(layers, training_flags(layers, mode), strict=True))
        self._weights = copier.copies_of(nn.Parameter)  # frozen ones and those of modules in plain lists, too
        self._requires_grad = {id(c): o.requires_grad for o, c in self._weights}
        registered = set(map(id, self.module.parameters()))
        self.has_hidden_weights = any(id(c) not in registered for _, c in self._weights)
        self._shared |= copier.large
        self._kept += copier.large.values()
        self._watched = [(name, tensor, _state_of(tensor)) for name, tensor in self._shared.items()]
        self._home: Sequence[Tensor] | None = self._originals
        self._num_passes = 0
        self._is_checked = False
        self._versions: list[int] | None = None
        self.moves_parameters = False
        self._finish_modules()
        _name_once(module, copier.shared)

    def differentiate_measured(self) -> None:
        """Let autograd follow those parameters of the copy that are measured, and no others."""
        measured = set(map(id, self.parameters))
        for p in self.module.parameters():
            self._requires_grad[id(p)] = id(p) in measured
            p.requires_grad_(id(p) in measured)

    @contextmanager
    def forward_pass(self, index: int) -> Iterator[None]:
        """Guard one forward pass.

        Args:
            index: Number of the batch: the same batch sees the same random numbers in every pass.

        Raises:
            RuntimeError: If the pass wrote to a tensor that is shared with the run.
        """
        if self._num_passes > 0:
            self._start_again()
        seed_all(self._seed + index, self._device)
        try:
            with LossFunctions(self._mixes_precisions):
                yield
        finally:
            for _, copied in self._weights:
                if copied.requires_grad != self._requires_grad[id(copied)]:  # a head that warms up
                    copied.requires_grad_(not copied.requires_grad)  # autograd looks at it later
        self._num_passes += 1
        self._notice_moves()

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the parameters have other values inside the block, one tensor for each, in storage of their own."""
        here, home = [p.data for p in self.parameters], self._home
        try:
            for p, value in zip(self.parameters, values, strict=True):
                p.data = value
            self._home = [value.clone() for value in values] if self.moves_parameters else None
            yield
        finally:
            for p, value in zip(self.parameters, here, strict=True):
                p.data = value
            self._home = home

    def weights(self) -> list[Tensor]:
        """Return the values of the parameters, where no forward pass has moved them."""
        has_moved = self.moves_parameters and self._home is not None
        return [p.data for p in (self._home if has_moved else self.parameters)]  # type: ignore[union-attr]

    def check(self, loss: Tensor) -> None:
        """Check, once, that a loss was computed with the twin and not with weights of the run.

        Raises:
            RuntimeError: If it depends on weights of the run.
        """
        if self._is_checked or not loss.requires_grad:
            return
        self._is_checked = True
        used = {
            id(variable) for node in graph_nodes([loss]) if (variable := getattr(node, "variable", None)) is not None
        }
        own = {id(p) for p in self.parameters}
        if any(id(p) in used and id(p) not in own for p in self._originals):
            raise RuntimeError(
                "Expected a loss of the module that the loss function is given, got one that also uses weights of the "
                "module in training, which it reaches by a global name or a class attribute. Use the given module, or "
                "`self`, or pass loss_fn=lambda module, batch: ... that does."
            )

    def rebound(self, function: Any) -> Any:
        """Return a loss function that uses the twin where the given one uses the module of the run."""
        return rebound(function, self._copies())

    def _copies(self) -> dict[int, Any]:
        """Return what stands for what in all forward passes, by the identity of the original."""
        kept = [(tensor, tensor) for tensor in self._kept]
        return {id(old): new for old, new in (*self.modules, *self._weights, *kept)}

    def _start_again(self) -> None:
        """Copy anew what the last pass may have changed; modules and parameters keep their identity."""
        if self.moves_parameters and self._home is not None:
            for p, value in zip(self.parameters, self._home, strict=True):
                p.data.copy_(value)  # not seen by the version counters of graphs, for which the next pass moves it back
        storages = {o.untyped_storage().data_ptr(): c.untyped_storage() for o, c in self._weights if is_plain(o)}
        copier = Copier(self._copies(), storages)
        for module, copied in self.modules:
            fill_module(copier, module, copied)
        for _, copied in self._weights:
            copied.grad = None
        self._finish_modules()

    def _finish_modules(self) -> None:
        for layer, flag in self._flags:
            set_training(layer, flag, self._mode)
        for module, copied in self.modules:
            copying_lightning.mute(module, copied)

    def _notice_moves(self) -> None:
        """See which parameters the first pass has written to, and that none has written to shared tensors."""
        for name, tensor, state in self._watched:
            if _state_of(tensor) != state:
                raise RuntimeError(
                    f"Expected a loss that only reads {name!r}, which takes {tensor.nbytes / 2**20:.0f} MB and is "
                    "therefore shared with the run, got one that writes to it. Pass loss_fn=lambda module, batch: ... "
                    "that returns the mean loss of a batch and leaves it alone."
                )
        if self._home is not self._originals:
            return
        versions = [p._version for p in self.parameters]
        if self._versions is None:
            own = {id(p) for p in self.parameters}
            self._weights = [(o, c) for o, c in self._weights if id(c) in own or _equal(c, o)]
            self.moves_parameters = not all(map(_equal, self.parameters, self._originals))
        else:
            self.moves_parameters |= versions != self._versions
        self._versions = versions


def _too_large_to_copy(module: nn.Module, measured: set[int]) -> dict[str, Tensor]:
    """Return frozen parameters that are not copied: large ones where most of the weights are frozen."""
    parameters = dict(module.named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad and id(p) not in measured}
    trained_bytes = sum(p.nbytes for name, p in parameters.items() if name not in frozen)
    if sum(p.nbytes for p in frozen.values()) <= max(trained_bytes, MAX_COPIED_BYTES):
        return {}
    return {name: p for name, p in frozen.items() if p.nbytes > _MAX_COPIED_FROZEN_BYTES}


def _state_of(tensor: Tensor) -> tuple[int, list[float]]:
    """Return the version counter of a tensor, and some entries: writing to ``.data`` does not count."""
    sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].double() if is_plain(tensor) else None
    return 0 if tensor.is_inference() else tensor._version, [] if sample is None else sample.nan_to_num().tolist()


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one.detach(), other.detach()))


def _name_once(module: nn.Module, shared: dict[str, str]) -> None:
    """Warn of what cannot be copied, once for each module and place."""
    named = _named.setdefault(module, set())
    new = {place: kind for place, kind in shared.items() if place not in named}
    named.update(new)
    if new:
        places = ", ".join(f"{place!r} ({kind})" for place, kind in sorted(new.items()))
        warnings.warn(
            f"{type(module).__name__} holds what cannot be copied: {places}. A measurement uses it, too, so what the "
            "loss changes in it reaches training. HINT: pass loss_fn=lambda module, batch: ... that leaves it alone.",
            stacklevel=2,
        )
