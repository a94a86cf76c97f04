"""Settings side by side: curves at moments, mean and standard deviation over seeds."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_flatness.compare.grouping import group_runs
from lightning_flatness.compare.moments import Reading, parse_moment, read_at, step_of_loss
from lightning_flatness.compare.reading import Run, natural, read_runs
from lightning_flatness.compare.tags import (
    TOLERANCE,
    NothingToCompareError,
    chosen_metrics,
    default_metrics,
    find_loss_tag,
    is_part_of_another,
    missing_curves,
)


@dataclass(frozen=True)
class Cell:
    """One curve of one setting at one moment: what each run of the setting reads, in the order of its runs."""

    readings: tuple[Reading, ...]

    @property
    def values(self) -> list[float]:
        """The readings of the runs that have a value."""
        return [reading.value for reading in self.readings if reading.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean over the runs; None if there is no value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def standard_deviation(self) -> float | None:
        """Standard deviation over the runs, of the sample (n - 1); None for fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def excessive_residuals(self) -> list[float]:
        """The relative residuals above :data:`TOLERANCE`."""
        relative = [reading.relative_residual for reading in self.readings]
        return [error for error in relative if error is not None and error > TOLERANCE * (1 + 1e-5)]  # float32

    @property
    def converged(self) -> bool | None:
        """Whether all relative residuals are at most :data:`TOLERANCE`; None if there are none."""
        if all(reading.relative_residual is None for reading in self.readings):
            return None
        return not self.excessive_residuals


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in the seed.

    Args:
        name: Its name in tables and pictures.
        runs: Its runs.
        cells: By moment and curve.
    """

    name: str
    runs: tuple[Run, ...]
    cells: dict[tuple[str, str], Cell]


@dataclass(frozen=True)
class Comparison:
    """Settings side by side.

    Args:
        settings: In the order of the table.
        metrics: The curves that are compared, by tag.
        moments: ``"last"``, ``"best"``, ``"loss=0.01"``.
        loss_tag: Which curve is the training loss; None if no run has one.
        problems: What went wrong, one sentence each: files that could not be read, curves that are missing, a loss that
            no run of a setting reaches.
        notes: Remarks on the numbers: runs that never reached the loss, values that have not converged.
    """

    settings: tuple[Setting, ...]
    metrics: tuple[str, ...]
    moments: tuple[str, ...]
    loss_tag: str | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def figure(self, x: str = "step") -> Figure:
        """Draw every curve, a panel each.

        Args:
            x: ``"step"``, ``"gradients"``, ``"train_loss"``, or a tag.

        Returns:
            A figure without pyplot.

        Raises:
            NothingToCompareError: If no run has what ``x`` names.
        """
        from lightning_flatness.compare.axis import check_axis
        from lightning_flatness.compare.picture import draw

        check_axis(self, x)
        return draw(self, x)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row per setting, moment and curve; an error says so where pandas is missing."""
        import pandas as pd

        from lightning_flatness.compare.report import rows

        return pd.DataFrame(rows(self))

    def _repr_html_(self) -> str:
        from lightning_flatness.compare.page import html_table

        return html_table(self)


def compare_runs(
    paths: Iterable[str | os.PathLike[str]],
    *,
    metrics: Sequence[str] = (),
    at: Sequence[str] = ("last", "best"),
    group_by: str = "auto",
    loss_tag: str | None = None,
    sort: str | None = None,
) -> Comparison:
    """Read runs from TensorBoard's event files and compare their settings over seeds.

    Early in training curvature mostly rises, late it shrinks with the training loss. So after equal epochs the run that
    has trained least or furthest looks flatter, whatever its minimum: compare ``at=["loss=0.01"]``, a loss that all
    runs reach.

    Args:
        paths: Folders of runs, folders above them, or event files; of this package or not.
        metrics: Which curves, by tag or pattern: ``"flatness/*"``, ``"lambda_max"`` for ``"flatness/lambda_max"``.
            Default: ``flatness/*`` without errors and costs, the training loss, and all curves of validation and test.
        at: Moments: ``"last"``: the last point. ``"best"``: the best point of each curve, that is the highest of
            accuracies and the like, else the lowest; of ``flatness/*`` the one at the lowest training loss (the
            lowest would be that of the network that has learnt least), the last one without a loss. ``"loss=0.01"``:
            where the training loss first is that low, interpolated between logged points, in the logarithm of what is
            positive. Runs that never are count in no number of that moment; a curve that does not go as far has none.
        group_by: ``"auto"``, ``"path"``, ``"hparams"``, ``"run"``, or names of hyperparameters with commas between
            them; see :func:`lightning_flatness.compare.grouping.group_runs`.
        loss_tag: Which curve is the training loss. Default: the first of ``train_loss_epoch``, ``train_loss``,
            ``train/loss``, ``loss/train``, ``loss`` and others that most runs have.
        sort: A curve by whose mean, at the first moment, to order the settings, smallest first. Default: by name.

    Returns:
        The comparison; what could not be read is among its ``problems``.

    Raises:
        NothingToCompareError: If no run can be read, or none has what is to be compared.
        ValueError: If ``at`` or ``group_by`` is not one of the above.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> folder = tempfile.mkdtemp()
        >>> for seed, value in enumerate([1.0, 3.0]):
        ...     with SummaryWriter(f"{folder}/sgd/seed{seed}") as writer:
        ...         writer.add_scalar("flatness/lambda_max", value, 10)
        >>> (sgd,) = compare_runs([folder]).settings
        >>> cell = sgd.cells["last", "flatness/lambda_max"]
        >>> sgd.name, cell.mean, round(cell.standard_deviation, 3)
        ('sgd', 2.0, 1.414)
    """
    paths = list(paths)
    losses = {moment: parse_moment(moment) for moment in at}
    if not losses:
        raise ValueError("Expected `at` to name a moment, got none. Leave it out for 'last' and 'best'.")
    runs, problems = read_runs(paths)
    if not runs:
        listed = ", ".join(str(path) for path in paths) or "nowhere"
        raise NothingToCompareError("\n".join([*problems, f"Found no run to compare in {listed}."]))
    loss_tag = find_loss_tag(runs, loss_tag)
    runs = [run for run in runs if not is_part_of_another(run, runs, loss_tag)]
    tags, unknown = chosen_metrics(runs, metrics) if metrics else (default_metrics(runs, loss_tag), [])
    by, unsortable = chosen_metrics(runs, [] if sort is None else [sort])
    problems += [*unknown, *unsortable]
    if not tags:
        raise NothingToCompareError("\n".join(problems))
    problems += missing_curves(runs, tags, is_default=not metrics)
    notes: list[str] = []
    settings = [Setting(name, tuple(members), {}) for name, members in group_runs(runs, group_by).items()]
    for moment, loss in losses.items():
        steps: dict[Path, float | None] = {}
        if loss is not None:
            steps, unreached = _steps_of_loss(runs, loss_tag, loss)
        for setting in settings:
            if loss is not None:
                is_reached = any(steps[run.path] is not None for run in setting.runs)
                (notes if is_reached else problems).extend(
                    unreached[run.path] for run in setting.runs if run.path in unreached
                )
            setting.cells.update(_cells(setting, dict.fromkeys([*tags, *by]), moment, steps, loss_tag))
    order = {setting.name: _order(setting, at[0], by) for setting in settings}
    settings.sort(key=lambda setting: order[setting.name])
    notes += _remarks(settings, tags)
    return Comparison(tuple(settings), tuple(tags), tuple(losses), loss_tag, tuple(problems), tuple(notes))


def _steps_of_loss(
    runs: Sequence[Run], loss_tag: str | None, loss: float
) -> tuple[dict[Path, float | None], dict[Path, str]]:
    """Return the step at which each run reaches a training loss, and a text for each run that does not."""
    steps: dict[Path, float | None] = {}
    unreached = {}
    for run in runs:
        curve = run.curves.get(loss_tag or "")
        steps[run.path] = None if curve is None else step_of_loss(curve, loss)
        if curve is None:
            unreached[run.path] = f"{run.name}: has no training loss, so that it is left out at loss={loss:g}."
        elif steps[run.path] is None:
            lowest = np.nanmin(curve.values, initial=math.inf)
            unreached[run.path] = (
                f"{run.name}: never reaches loss={loss:g} (lowest {loss_tag} {lowest:.4g}); left out there."
            )
    return steps, unreached


def _cells(
    setting: Setting, tags: Iterable[str], moment: str, steps: dict[Path, float | None], loss_tag: str | None
) -> dict[tuple[str, str], Cell]:
    cells = {}
    for tag in tags:
        readings = []
        for run in setting.runs:
            is_reached = not steps or steps[run.path] is not None
            readings.append(read_at(run, tag, moment, steps.get(run.path), loss_tag) if is_reached else Reading())
        cells[moment, tag] = Cell(tuple(readings))
    return cells


def _order(setting: Setting, moment: str, by: Sequence[str]) -> tuple[float, list[tuple[int, str]]]:
    mean = setting.cells[moment, by[0]].mean if by else 0.0
    return (math.inf if mean is None else mean), natural(setting.name)


def _remarks(settings: Sequence[Setting], tags: Sequence[str]) -> list[str]:
    """Return a text for each value that has not converged, is not a number or is not logged at a moment."""
    remarks = []
    for setting in settings:
        for (moment, tag), cell in setting.cells.items():
            what, number = f"{setting.name}: {tag} at {moment}", len(cell.readings)
            if tag not in tags:
                continue
            if errors := cell.excessive_residuals:
                worst = f"residual up to {max(errors):.1%} of it"
                remarks.append(f"* {what} has not converged in {len(errors)} of {number} runs: {worst}.")
            if lost := sum(reading.value is None and reading.step is not None for reading in cell.readings):
                remarks.append(f"{what} is not finite, or not logged there, in {lost} of {number} runs; left out.")
    return remarks
