"""Flatness of checkpoints: each is built anew, measured on the same samples, and kept in the folder of its run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lightning_flatness.estimators import TOLERANCE
from lightning_flatness.measuring.loaders import Split
from lightning_flatness.measuring.loading import CheckpointError, Weights, read_checkpoint
from lightning_flatness.measuring.recipes import Recipe, read_config
from lightning_flatness.measuring.records import find_checkpoints, run_folder
from lightning_flatness.measuring.results import MeasuredCheckpoint, MeasuredCheckpoints
from lightning_flatness.measuring.session import Session
from lightning_flatness.metrics.named import Metrics, chosen
from lightning_flatness.module.loss import LossFunction
from lightning_flatness.module.modes import Mode

_Kinds = Literal["trained", "averaged", "both"]
Progress = Callable[[int, int, Path, float | None], None]
"""Called with the number of the checkpoint, how many there are, its path, and the gradients so far; None at its end."""


def measure_checkpoints(
    paths: Iterable[str | os.PathLike[str]],
    *,
    module: Any = None,
    data: Any = None,
    config: str | os.PathLike[str] | None = None,
    metrics: Metrics = "default",
    loss_fn: LossFunction | str | None = None,
    top_k: int = 1,
    geometry: str | None = None,
    probe_size: int = 512,
    probe_batch_size: int | None = None,
    split: Split = "train",
    mode: Mode = "batch_statistics",
    parameters: str | None = None,
    weights: _Kinds = "trained",
    device: str = "auto",
    tol: float = TOLERANCE,
    seed: int = 0,
    weights_only: bool = True,
    writes: bool = True,
    log_key_prefix: str = "flatness/",
    on_progress: Progress | None = None,
) -> MeasuredCheckpoints:
    """Measure checkpoints after the run, as :class:`FlatnessMonitor` would have in it.

    The samples are those of the monitor for the same data, ``probe_size`` and ``seed``. What is found is kept in the
    folder of the run: in ``flatness.jsonl``, from which a later call with the same settings takes it, and as points of
    TensorBoard's curves at the checkpoint's ``global_step``. Checkpoints themselves are only read.

    Args:
        paths: Checkpoints, and folders with ``*.ckpt`` in or below them.
        module: The class of the module, or its name ``package.mod:Class``; hyperparameters are those of the checkpoint.
            Or a function that makes the module, or its name. Default: what the config says.
        data: A DataModule or DataLoader, or a class or function that makes one, or its name. Default: what the config
            says, or the loaders of the module.
        config: What LightningCLI saved. Default: ``config.yaml`` in the folder of the run.
        metrics: ``"default"``, ``"all"``, names, or metrics by name.
        loss_fn: ``loss_fn(module, batch)``, or its name; default: the module's ``training_step``.
        top_k: How many eigenvalues.
        geometry: Measure in this geometry what is defined in any.
        probe_size: Number of samples to measure on.
        probe_batch_size: Samples per forward pass; see :class:`FlatnessMonitor`.
        split: Draw the samples from the ``"train"`` or the ``"val"`` loader.
        mode: How to run the module.
        parameters: The weights to measure, by name, frozen ones too: patterns such as ``"encoder.*,head.*"``.
        weights: ``"trained"``, ``"averaged"`` (of ``WeightAveraging``, ``StochasticWeightAveraging``,
            ``AveragedModel``), or ``"both"``; averaged ones have ``flatness_averaged/`` before their names.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        tol: Tolerance of the default metrics.
        seed: Seed of the choice of samples and of all random numbers.
        weights_only: Read checkpoints without running what is in them.
        writes: Keep what is found in the folders of the runs.
        log_key_prefix: Put before the names of the curves.
        on_progress: Called during and after each checkpoint.

    Returns:
        What was found, and what went wrong.

    Raises:
        ValueError: If an argument is none of those above.
    """
    for name, value, known in [("split", split, Split), ("weights", weights, _Kinds), ("mode", mode, Mode)]:
        if value not in get_args(known):
            raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, get_args(known)))}, got {value!r}.")
    if probe_size < 1:
        raise ValueError(f"Expected `probe_size` to be >= 1, got {probe_size}.")
    if isinstance(metrics, list | tuple):
        metrics = ",".join(metrics)
    chosen(metrics, top_k=top_k, tol=tol, seed=seed, geometry=geometry)  # an unknown name is said once
    session = Session(
        recipe=Recipe(module, data, None if config is None else _needed(Path(config))),
        device=_device(device),
        split=split,
        parameters=parameters,
        weights_only=weights_only,
        tracker={
            "metrics": metrics, "loss_fn": loss_fn, "top_k": top_k, "geometry": geometry, "probe_size": probe_size,
            "probe_batch_size": probe_batch_size, "mode": mode, "tol": tol, "seed": seed,
        },
    )  # fmt: skip
    kinds: list[Weights] = ["trained", "averaged"] if weights == "both" else [weights]
    files, problems = find_checkpoints(paths)
    queue, unreadable = _in_order(files, weights_only)
    found: list[MeasuredCheckpoint] = []
    problems += unreadable
    jobs = [(path, kind) for path in queue for kind in kinds]
    try:
        for number, (path, kind) in enumerate(jobs):
            report = None if on_progress is None else _Reporter(on_progress, number + 1, len(jobs), path)
            prefix = log_key_prefix if kind == "trained" or weights == "averaged" else _averaged(log_key_prefix)
            try:
                found.append(session.measured(path, kind, report, prefix if writes else None))
            except CheckpointError as error:
                problems.append(f"{path}: {error}")
            except Exception as error:  # of the user's module or data: the others are still measured
                problems.append(f"{path}: {type(error).__name__}: {error}")
            if report is not None:
                report.end()
    except KeyboardInterrupt:
        problems.append(f"interrupted after {len(found)} of {len(jobs)}; the same command goes on from there.")
    return MeasuredCheckpoints(tuple(found), tuple(problems), tuple(session.notes))


def _averaged(prefix: str) -> str:
    return f"{prefix.rstrip('/')}_averaged/"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected `device` to be one that this machine has, got {name!r} ({reason}).") from error


def _needed(path: Path) -> Any:
    found = read_config(path)
    if found is None:
        raise CheckpointError(f"Expected {path} to have the keys `model` and `trainer` of LightningCLI.")
    return found


def _in_order(files: Sequence[Path], weights_only: bool) -> tuple[list[Path], list[str]]:
    """Return the checkpoints by run and step, one for each step, and a sentence for each that cannot be read."""
    read: list[tuple[Path, float, Path]] = []
    problems = []
    for path in files:
        try:
            content = read_checkpoint(path, weights_only=weights_only)
        except CheckpointError as error:
            problems.append(f"{path}: {error}")
            continue
        read.append((run_folder(path), float(content.get("global_step", float("inf"))), path))
    read.sort(key=lambda entry: (entry[0], entry[1], entry[2].stem == "last", entry[2]))
    seen: set[tuple[Path, float]] = set()
    unique = []
    for folder, step, path in read:
        if path.stem.startswith("last") and (folder, step) in seen:
            continue  # a second copy of the same weights
        seen.add((folder, step))
        unique.append(path)
    return unique, problems


class _Reporter:
    def __init__(self, on_progress: Progress, number: int, total: int, path: Path) -> None:
        self._call = on_progress
        self._place = (number, total, path)
        self._num_calls = 0

    def __call__(self) -> None:
        self._num_calls += 1
        self._call(*self._place, float(self._num_calls))

    def end(self) -> None:
        self._call(*self._place, None)
