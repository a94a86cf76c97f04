"""One call of ``measure_checkpoints``: what its checkpoints share, and how one of them is measured."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lightning_flatness import __version__
from lightning_flatness.callbacks.probe import draw_probe
from lightning_flatness.callbacks.transfer import transferred
from lightning_flatness.measuring.building import Built, build
from lightning_flatness.measuring.curves import Curves
from lightning_flatness.measuring.loaders import Split, loader_of
from lightning_flatness.measuring.loading import CheckpointError, Weights, read_checkpoint
from lightning_flatness.measuring.recipes import Recipe, imported, read_config
from lightning_flatness.measuring.records import identity, record, recorded, run_folder
from lightning_flatness.measuring.report import FlatnessReport
from lightning_flatness.measuring.results import MeasuredCheckpoint
from lightning_flatness.measuring.tracker import FlatnessTracker
from lightning_flatness.metrics.measurement import Measurement
from lightning_flatness.module.loss import measured_parameters
from lightning_flatness.module.modes import uses_batch_statistics
from lightning_flatness.module.rng import device_of, preserved_rng


@dataclass
class Session:
    """Settings of a call, and the samples of each run: shared by its checkpoints."""

    recipe: Recipe
    device: torch.device
    split: Split
    parameters: str | None
    weights_only: bool
    tracker: dict[str, Any]
    probes: dict[Path, list[Any]] = field(default_factory=dict)
    curves: dict[Path, Curves] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def measured(self, path: Path, weights: Weights, on_evaluation: Any, prefix: str | None) -> MeasuredCheckpoint:
        """Measure a checkpoint, or take what an earlier call has found."""
        folder = run_folder(path)
        content = read_checkpoint(path, weights_only=self.weights_only)
        step, epoch = content.get("global_step"), content.get("epoch")
        recipe = self._recipe(folder)
        key = self._key(path, folder, weights, recipe)
        earlier = recorded(folder, key) if key is not None else None
        if earlier is None:
            report = self._report(folder, content, recipe, weights, on_evaluation, step)
        else:
            report = FlatnessReport(
                Measurement(**earlier["measurement"]), earlier["num_samples"], earlier["mode"], step
            )
        if prefix is not None:
            try:
                if earlier is None and key is not None:
                    record(folder, key, _to_json(report))
                if folder not in self.curves:
                    self.curves[folder] = Curves(folder)
                known = 0 if step is None else self.curves[folder].add(report.logged(prefix), step)
                if known and earlier is None:
                    self._note(
                        folder,
                        f"{known} points at step {step} were there already and stay as they are. --log-key-prefix "
                        "makes curves of their own.",
                    )
            except OSError as error:
                self._note(folder, f"cannot be written to ({error}); the table is all there is.")
        return MeasuredCheckpoint(path, step, epoch, weights, report)

    def _note(self, folder: Path, text: str) -> None:
        self.notes[f"{folder}: {text}"] = None

    def _recipe(self, folder: Path) -> Recipe:
        config = folder / "config.yaml"
        if self.recipe.config is not None or not config.exists():
            return self.recipe
        return replace(self.recipe, config=read_config(config))

    def _key(self, path: Path, folder: Path, weights: Weights, recipe: Recipe) -> dict[str, Any] | None:
        """Return what the numbers depend on; None if that cannot be told from another call."""
        settings = {name: value for name, value in self.tracker.items() if value is not None}
        settings |= {"module": recipe.module, "data": recipe.data, "split": self.split, "parameters": self.parameters}
        if not all(isinstance(value, str | int | float | type(None)) for value in settings.values()):
            return None
        config = hashlib.sha256(json.dumps(recipe.config, sort_keys=True, default=str).encode()).hexdigest()
        name = os.path.relpath(path.resolve(), folder)
        settings |= {"checkpoint": name, "weights": weights, "config": config, "version": __version__}
        return settings | identity(path)

    def _report(
        self, folder: Path, content: dict[str, Any], recipe: Recipe, weights: Weights, on_evaluation: Any, step: Any
    ) -> FlatnessReport:
        with preserved_rng():
            built = build(recipe, content, weights, self.device)
            content.clear()  # and with it the pages of the file
            if built.note is not None:
                self._note(folder, built.note)
            with built.trainer.precision_plugin.train_step_context():
                if folder not in self.probes:
                    self.probes[folder] = self._probe(built)
                _check_parameters(built, self.parameters)
                settings = self.tracker | {"loss_fn": imported(self.tracker["loss_fn"])}
                tracker = FlatnessTracker(
                    built.module,
                    [],
                    optimizer=built.optimizers,
                    parameters=self.parameters,
                    on_evaluation=on_evaluation,
                    **settings,
                )
                tracker.probe = self.probes[folder]  # drawn once, the same for all checkpoints of a run
                return tracker.measure(step)

    def _probe(self, built: Built) -> list[Any]:
        loader, max_batches = loader_of(built, self.split)
        seed = self.tracker["seed"]
        batches = draw_probe(
            loader,
            self.tracker["probe_size"],
            batch_size=self.tracker["probe_batch_size"],
            uses_batch_statistics=uses_batch_statistics(built.module, self.tracker["mode"]),
            max_batches=max_batches,
            seed=seed,
            device=device_of(built.module),
        )
        return transferred(built.trainer, built.module, batches, seed)


def _check_parameters(built: Built, parameters: str | None) -> None:
    try:
        measured_parameters(built.module, parameters)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _to_json(report: FlatnessReport) -> dict[str, Any]:
    measurement = asdict(replace(report.measurement, figures={}))
    return {"measurement": measurement, "num_samples": report.num_samples, "mode": report.mode, "step": report.step}
