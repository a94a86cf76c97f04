"""Pictures of the loss surface during a training run."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_flatness.callbacks.landscape_monitor import LandscapeMonitor
from lightning_flatness.callbacks.pictures import log_figure
from lightning_flatness.geometry import Geometry, resolve_geometry
from lightning_flatness.isolation import Mode
from lightning_flatness.loss import LossFunction
from lightning_flatness.surface import LossSurface, check_options, loss_surface


class LossSurfaceMonitor(LandscapeMonitor):
    r"""Draws the loss around the current weights, and logs the picture, without changing the run.

    Measures before training and at the end of every n-th training epoch, on the same samples as
    :class:`FlatnessMonitor` with the same ``probe_size`` and ``seed``. Every logger that takes images (TensorBoard,
    Weights and Biases) gets one at the current ``global_step``:

    - ``flatness/loss_surface``: a curve or filled contours, with the current weights marked.

    The first picture chooses how far to look, unless ``radius`` says so, and the next ones look as far: so that
    flattening is seen. With the monitor, training gives the same weights, buffers and random numbers, bit for bit, as
    without it. A picture costs ``num_points`` forward passes over the probe per direction, multiplied.

    Args:
        every_n_epochs: Draw at the end of every n-th training epoch.
        directions: ``"random"`` (the same in every picture) or ``"eigenvectors"`` of the largest eigenvalues.
        geometry: The coordinates, e.g. ``"filter"`` or ``"path"``; see :func:`loss_surface`.
        num_directions: 1 for a curve, 2 for contours.
        radius: How far to go from the current weights, in units of the geometry. Default: see :func:`loss_surface`.
        num_points: Points per direction, an odd number.
        probe_size: Number of samples to measure on, over all ranks.
        probe_batch_size: Samples per forward pass. Default: the loader's batch size, 128 at most.
        split: Draw the samples from the ``"train"`` or the ``"val"`` dataloader.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of a batch. Default: the module's ``training_step``.
        mode: Measure the module in ``"eval"`` or in ``"train"`` mode.
        log_key_prefix: Put before the name.
        seed: Seed of the choice of samples, of directions and of all random numbers of a measurement.

    Attributes:
        surface: The latest :class:`LossSurface`, or None.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer or module cannot be measured.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = LossSurfaceMonitor(every_n_epochs=5, geometry="filter", num_points=11)
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        directions: Literal["random", "eigenvectors"] = "random",
        geometry: str | Geometry = "filter",
        num_directions: int = 2,
        radius: float | None = None,
        num_points: int = 15,
        probe_size: int = 512,
        probe_batch_size: int | None = None,
        split: Literal["train", "val"] = "train",
        loss_fn: LossFunction | None = None,
        mode: Mode = "eval",
        log_key_prefix: str = "flatness/",
        seed: int = 0,
    ) -> None:
        super().__init__(
            every_n_epochs=every_n_epochs,
            every_n_steps=None,
            probe_size=probe_size,
            probe_batch_size=probe_batch_size,
            split=split,
            loss_fn=loss_fn,
            mode=mode,
            log_key_prefix=log_key_prefix,
            engine="auto",
            seed=seed,
        )
        if directions not in ("random", "eigenvectors"):
            raise ValueError(f"Expected `directions` to be 'random' or 'eigenvectors', got {directions!r}.")
        check_options(directions, num_directions, None, radius, num_points)
        self.directions = directions
        self.geometry = resolve_geometry(geometry)
        self.num_directions = num_directions
        self.radius = radius
        self.num_points = num_points
        self.surface: LossSurface | None = None
        self._reach: float | None = radius

    @property
    def state_key(self) -> str:
        """Tells several of these in one Trainer apart."""
        return self._generate_state_key(key=self.log_key_prefix, geometry=self.geometry, directions=self.directions)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the pictures look: a resumed run goes on with that."""
        return {"reach": self._reach}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore how far the pictures look."""
        self._reach = state_dict["reach"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this module can be measured under this Trainer."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.surface, self._reach = None, self.radius

    def measure_and_log(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        """Measure the surface and log its picture."""
        self.surface = loss_surface(
            self.landscape(trainer, pl_module),
            self.directions,
            self.geometry,
            num_directions=self.num_directions,
            radius=self._reach,
            num_points=self.num_points,
            seed=self.seed,
        )
        self._reach = float(self.surface.x[-1])
        figure = self.surface.figure(f"step {trainer.global_step}")
        if not log_figure(trainer, f"{self.log_key_prefix}loss_surface", figure) and "loggers" not in self._warned:
            self._warned.add("loggers")
            rank_zero_warn(
                "LossSurfaceMonitor: no logger of this Trainer takes images; the latest surface is in its attribute "
                "`surface`. HINT: use the TensorBoardLogger."
            )
