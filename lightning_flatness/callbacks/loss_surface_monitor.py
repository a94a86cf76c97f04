"""Pictures of the loss surface during a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_flatness.callbacks.counted_work import MonitoredRun
from lightning_flatness.callbacks.failures import OnError
from lightning_flatness.callbacks.landscape_monitor import LandscapeMonitor
from lightning_flatness.callbacks.loggers.figures import log_figure
from lightning_flatness.geometry import Geometry, resolve_geometry
from lightning_flatness.metrics import TopEigenvalues
from lightning_flatness.metrics.presets import typical_gradients
from lightning_flatness.module.loss import LossFunction
from lightning_flatness.module.modes import Mode
from lightning_flatness.surface.measure import LossSurface, check_options, loss_surface
from lightning_flatness.surface.radius import relative_radius

_SHARES = {"random": 0.5, "eigenvectors": 0.05}
"""By how much of themselves the weights change from the middle of a picture to its side."""


@dataclass
class _Run(MonitoredRun):
    surface: LossSurface | None = None
    scale: tuple[float, float] | None = None


class LossSurfaceMonitor(LandscapeMonitor):
    r"""Draws the loss around the current weights, and logs the picture, without changing the run.

    Measures before training and at the end of every n-th training epoch, always on the same
    samples. Every logger that takes images (TensorBoard,
    Weights and Biases) gets one at the current ``global_step``:

    - ``flatness/loss_surface``: a curve or filled contours, with the current weights marked.

    Pictures of a run can be compared. All look equally far: until the weights have changed by a fixed share of
    themselves, in the geometry. All have the same colours, from 0 to twice the loss of the first picture's weights
    (where that is positive); a resumed run keeps them. With the monitor, training gives the same weights,
    buffers and random numbers, bit for bit, as without it.

    A picture costs ``num_points`` forward passes over the probe per direction, multiplied: by default those of 225 · 64
    samples, a tenth of an epoch of 50,000 samples. Its time counts in the share that :class:`FlatnessMonitor` logs.

    Args:
        every_n_epochs: Draw at the end of every n-th training epoch.
        budget: Draw less often where pictures would take more than this share of the training's gradients; see
            :class:`FlatnessMonitor`.
        directions: ``"random"`` (the same in every picture) or ``"eigenvectors"`` of the largest eigenvalues.
        geometry: The coordinates, e.g. ``"filter"`` or ``"path"``; see :func:`loss_surface`.
        num_directions: 1 for a curve, 2 for contours.
        radius: How far to go from the current weights, in units of the geometry. Default: as far as a change of all
            weights by half of themselves, for eigenvectors by a twentieth.
        num_points: Points per direction, an odd number.
        probe_size: Number of samples to measure on, over all ranks.
        probe_batch_size: Samples per forward pass; see :class:`FlatnessMonitor`.
        split: Draw the samples from the ``"train"`` or the ``"val"`` dataloader.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of a batch. Default: the module's ``training_step``.
        mode: ``"batch_statistics"``, ``"eval"`` or ``"train"``; see :class:`LossLandscape`.
        log_key_prefix: Put before the name.
        on_error: ``"warn"``: an exception in a measurement, or a loss that is not finite, becomes a warning, nothing is
            drawn, and training goes on. ``"raise"``: it ends the run.
        seed: Seed of the choice of samples, of directions and of all random numbers of a measurement.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer or module cannot be measured.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = LossSurfaceMonitor(every_n_epochs=5, geometry="filter", num_points=11)
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    run: _Run

    def __init__(
        self,
        every_n_epochs: int = 1,
        directions: Literal["random", "eigenvectors"] = "random",
        geometry: str | Geometry = "filter",
        num_directions: int = 2,
        radius: float | None = None,
        num_points: int = 15,
        probe_size: int = 64,
        probe_batch_size: int | None = None,
        split: Literal["train", "val"] = "train",
        loss_fn: LossFunction | None = None,
        mode: Mode = "batch_statistics",
        log_key_prefix: str = "flatness/",
        on_error: OnError = "warn",
        seed: int = 0,
        budget: float | None = None,
    ) -> None:
        self.radius = radius
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
            on_error=on_error,
            seed=seed,
            budget=budget,
        )
        if directions not in ("random", "eigenvectors"):
            raise ValueError(f"Expected `directions` to be 'random' or 'eigenvectors', got {directions!r}.")
        check_options(directions, num_directions, None, radius, num_points)
        self.directions = directions
        self.geometry = resolve_geometry(geometry)
        self.num_directions = num_directions
        self.num_points = num_points

    def new_run(self) -> _Run:
        """Return what is known when a run starts."""
        return _Run(self.engine)

    @property
    def surface(self) -> LossSurface | None:
        """The latest surface of the present run."""
        return self.run.surface

    @property
    def state_key(self) -> str:
        """Tells several of these in one Trainer apart."""
        return self._generate_state_key(key=self.log_key_prefix, geometry=self.geometry, directions=self.directions)

    def state_dict(self) -> dict[str, Any]:
        """Return the scale of colours: a resumed run goes on with that."""
        return {"scale": self.run.scale} | super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scale of colours."""
        super().load_state_dict(state_dict)
        self.run.scale = state_dict.get("scale")

    def expected_gradients(self) -> float:
        """Return the gradients of a picture: a third for each point, and those of eigenvectors."""
        eigenvectors = [TopEigenvalues(k=self.num_directions)] if self.directions == "eigenvectors" else []
        return float(self.num_points**self.num_directions + 1) / 3 + typical_gradients(eigenvectors)

    def measure_and_log(self, trainer: Trainer, pl_module: LightningModule, *, on_step: bool) -> None:
        """Measure the surface and log its picture."""
        landscape = self.landscape(trainer, pl_module)
        radius = self.radius or relative_radius(landscape, self.geometry, _SHARES[self.directions])

        def on_point(number: int, total: int) -> None:
            progress: Any = landscape.on_evaluation
            progress.point = f"point {number} of {total}"

        self.run.surface = surface = loss_surface(
            landscape,
            self.directions,
            self.geometry,
            num_directions=self.num_directions,
            radius=radius,
            num_points=self.num_points,
            seed=self.seed,
            on_point=on_point,
        )
        if self.run.scale is None and surface.loss > 0:
            self.run.scale = (0.0, 2 * surface.loss)
        figure = surface.figure(f"step {trainer.global_step}", self.run.scale)
        if not log_figure(trainer, f"{self.log_key_prefix}loss_surface", figure) and "loggers" not in self.run.warned:
            self.run.warned.add("loggers")
            rank_zero_warn(
                "LossSurfaceMonitor: no logger of this Trainer takes images; the latest surface is in its attribute "
                "`surface`. HINT: use the TensorBoardLogger."
            )
