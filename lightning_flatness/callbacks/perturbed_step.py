"""One microbatch of SAM's callback with one gradient: forward and backward run at weights moved before."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_flatness.geometry import Geometry
from lightning_flatness.module.sharding import reshard
from lightning_flatness.sam import Ascent, Displacement, known_direction


class PerturbedStep:
    """Stands in front of the strategy's ``training_step`` for one microbatch, and moves the weights there.

    Only the Trainer calls that one, so hooks before the step, and whoever else evaluates the module, see the weights of
    training.

    Args:
        trainer: The Trainer.
        module: Its module.
        ascent: ``"momentum"`` or ``"previous"``.
        rho: Length of the step.
        geometry: Of the step.
        is_sharded: Whether the weights are spread over ranks.

    Attributes:
        has_run: Whether the Trainer has called ``training_step``.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        ascent: Ascent,
        rho: float,
        geometry: Geometry,
        *,
        is_sharded: bool,
    ) -> None:
        self.has_run = False
        self._optimizer, self._strategy = trainer.optimizers[0], trainer.strategy
        self._module, self._ascent = module, ascent
        self._is_sharded = is_sharded
        self._displacement = Displacement(rho, geometry, module)
        self._versions: list[tuple[Tensor, int]] = []

    @property
    def norm(self) -> float:
        """The Euclidean length of the perturbation."""
        return self._displacement.norm

    def install(self) -> None:
        """Take the place of the strategy's ``training_step``."""
        original = self._strategy.training_step

        def perturbing(*args: Any, **kwargs: Any) -> Any:
            self._uninstall()
            parameters, directions, sign = known_direction(self._optimizer, self._ascent)
            self._displacement.move(parameters, directions, sign=sign, shared=True)
            self._reshard()
            self._versions = [(p, p._version) for p in parameters] if self.norm > 0 else []
            self.has_run = True
            return original(*args, **kwargs)

        self._strategy.__dict__["training_step"] = perturbing

    def end(self) -> None:
        """Put the weights back, wherever the step has got to; once more does no harm."""
        self._uninstall()
        has_written = any(p._version != version for p, version in self._versions)
        self._displacement.put_back()
        self._versions = []
        if self.has_run:
            self._reshard()
        if has_written:
            rank_zero_warn(
                f"`training_step` wrote to weights that SharpnessAwareMinimization(ascent={self._ascent!r}) had moved: "
                "what it wrote is undone after the backward pass. Change weights in `on_train_batch_start` or "
                "`on_train_batch_end` instead, or use ascent='gradient'.",
            )

    def _reshard(self) -> None:
        if self._is_sharded:  # FSDP2 may hold weights gathered before, e.g. in validation
            reshard(self._module)

    def _uninstall(self) -> None:
        self._strategy.__dict__.pop("training_step", None)
