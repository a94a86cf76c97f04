"""Group runs: those that differ only in the seed are one setting.

Neither names nor hyperparameters tell alone: SGD and SAM may log the same hyperparameters into folders of their own,
and ``version_0`` to ``version_5`` may be two learning rates with three seeds each. So two runs are of one setting if
nothing but a seed or a number of repetition tells them apart in either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from lightning_flatness.compare.reading import Run, Value

_SEPARATORS = r"_\-. ,"
_REPETITION = re.compile(
    rf"(?:^|(?<=[{_SEPARATORS}]))(?:(?:(?:data|model|init|random|global|train|torch)[_\-]?)?seed"
    rf"|version|run|rep|repeat|repetition|replicate|trial|fold)[_=\-. ]?\d+(?=$|[{_SEPARATORS}])",
    re.IGNORECASE,
)
_TIMES = re.compile(
    r"\d{4}-\d\d-\d\d[_T \-]\d\d[\-:.]\d\d(?:[\-:.]\d\d)?|\d{8}[_T\-]?\d{4,6}"
    r"|[A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d_\S+"  # SummaryWriter's default folder: month, day, time and machine
)
_SEED_NAMES = re.compile(
    r"(?:.*[_\-./ ])?(?:seed|random_state)$|(?:seed_everything|run_id|run_name|log_dir|save_dir|output_dir|out_dir)$",
    re.IGNORECASE,
)


def group_runs(runs: Sequence[Run], group_by: str = "auto") -> dict[str, list[Run]]:
    """Return the runs by the name of their setting: of its path and what of the hyperparameters tells it from others.

    Args:
        runs: The runs to group.
        group_by: ``"auto"``: runs are of one setting if their paths without parts such as ``seed0``, ``version_3``,
            ``run=2``, ``trial-1``, ``fold1`` or a time are equal, and all their hyperparameters but seeds and folders.
            ``"path"`` or ``"hparams"``: one of the two. ``"run"``: each is a setting of its own. Or names of
            hyperparameters, with commas between them.

    Raises:
        ValueError: If no run has a hyperparameter that ``group_by`` names.
    """
    if group_by == "run":
        return {run.name: [run] for run in runs}
    if group_by in ("auto", "path", "hparams"):
        names = None
    else:
        names = [name.strip() for name in group_by.split(",")]
        known = sorted({name for run in runs for name in run.hyperparameters})
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"Expected `group_by` to be 'auto', 'path', 'hparams', 'run' or names of hyperparameters, got "
                f"{unknown[0]!r}. Logged are: {', '.join(known) or 'none'}."
            )
    groups: dict[tuple[str, tuple[tuple[str, Value], ...]], list[Run]] = {}
    for run in runs:
        path = setting_path(run.name) if group_by in ("auto", "path") else ""
        hyperparameters = _told_apart_by(run, names) if group_by != "path" else ()
        groups.setdefault((path, hyperparameters), []).append(run)
    return dict(zip(_setting_names(list(groups), runs), groups.values(), strict=True))


def setting_path(name: str) -> str:
    """Return a run's name (a relative path) without the parts that identify the seed or version.

    Example:
        >>> setting_path("sam/rho=0.05_seed=1/version_3"), setting_path("seed0")
        ('sam/rho=0.05', '')
    """
    parts = []
    for part in PurePosixPath(name).parts:
        left = _TIMES.sub("", _REPETITION.sub("", part))
        left = re.sub(rf"([{_SEPARATORS}])[{_SEPARATORS}]+", r"\1", left).strip("_-. ,")
        if left:
            parts.append(left)
    return "/".join(parts)


def _told_apart_by(run: Run, names: Sequence[str] | None) -> tuple[tuple[str, Value], ...]:
    chosen = run.hyperparameters if names is None else {n: run.hyperparameters.get(n, "–") for n in names}
    return tuple((k, v) for k, v in chosen.items() if names is not None or not _SEED_NAMES.match(k))


def _setting_names(keys: list[tuple[str, tuple[tuple[str, Value], ...]]], runs: Sequence[Run]) -> list[str]:
    """Name each setting by its path and by the hyperparameters that distinguish it from others of that path."""
    names = []
    for path, hyperparameters in keys:
        others = [dict(values) for other, values in keys if other == path]
        differing = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in hyperparameters
            if any(other.get(name) != value for other in others)
        ]
        parts = [path, ", ".join(differing)]
        names.append(" ".join(part for part in parts if part) or _common_folder(runs))
    taken: dict[str, int] = {}
    for i, name in enumerate(names):
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:  # one has hyperparameters and the other none
            names[i] = f"{name} #{taken[name]}"
    return names


def _common_folder(runs: Sequence[Run]) -> str:
    path = runs[0].path.resolve()
    return path.parents[len(PurePosixPath(runs[0].name).parts) - 1].name or path.name
