"""Which curves are compared: what counts as flatness, as training loss, as validation and test."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_flatness.compare.reading import Run

FLATNESS_PREFIX = "flatness/"
_LOSS_TAGS = (
    *("train_loss_epoch", "train/loss_epoch", "train_loss", "train/loss", "loss/train", "training_loss"),
    *("train/epoch_loss", "loss_epoch", "loss", "train_loss_step", "train/loss_step", "loss_step"),
)
_EVALUATION = re.compile(r"(?:^|[/_\-. ])(?:val|valid|validation|test|eval|dev)(?:[/_\-. ]|$)", re.IGNORECASE)
_NOT_A_MEASURE = re.compile(
    r"_residual$|_standard_error$|/(?:stability_edge|gradient_evaluations|seconds|\w*share_of_\w+)$"
)


class NothingToCompareError(ValueError):
    """No run could be read, or an argument fits none of them."""


def find_loss_tag(runs: Sequence[Run], wanted: str | None = None) -> str | None:
    """Return the curve that is the training loss.

    Args:
        runs: All runs.
        wanted: What the user says it is.

    Returns:
        That, or the first of the usual names that most runs have; None if no run has one.

    Raises:
        NothingToCompareError: If no run has the wanted one.
    """
    if wanted is not None:
        if not any(wanted in run.curves for run in runs):
            raise NothingToCompareError(_unknown("loss_tag", wanted, runs))
        return wanted
    known = Counter(tag for run in runs for tag in run.curves if tag.lower() in _LOSS_TAGS)
    return min(known, key=lambda tag: (-known[tag], _LOSS_TAGS.index(tag.lower())), default=None)


def is_part_of_another(run: Run, runs: Sequence[Run], loss_tag: str | None) -> bool:
    """Whether this is a folder that SummaryWriter made in a run's, as ``add_scalars`` and ``add_hparams`` do.

    Args:
        run: Which.
        runs: All runs.
        loss_tag: The training loss.

    Returns:
        True if it lies within another run and has neither a training loss nor flatness.
    """
    is_run = loss_tag in run.curves or any(tag.startswith(FLATNESS_PREFIX) for tag in run.curves)
    return not is_run and any(other.path in run.path.parents for other in runs)


def default_metrics(runs: Sequence[Run], loss_tag: str | None) -> list[str]:
    """Return lambda_max, invariant sharpness, what else measures flatness, the training loss, validation and test.

    Args:
        runs: All runs.
        loss_tag: The training loss.

    Returns:
        Those that any of the runs has, in this order.

    Raises:
        NothingToCompareError: If there is none of them.
    """
    known = _known(runs)
    first = [FLATNESS_PREFIX + name for name in ("lambda_max", "invariant_sharpness")]
    flatness = [tag for tag in known if tag.startswith(FLATNESS_PREFIX) and not _NOT_A_MEASURE.search(tag)]
    flatness.sort(key=lambda tag: (first.index(tag) if tag in first else len(first), tag))
    evaluation = [tag for tag in known if _EVALUATION.search(tag) and not tag.endswith("_step") and tag not in flatness]
    loss = [loss_tag] if loss_tag is not None and loss_tag not in evaluation else []
    tags = [*flatness, *loss, *evaluation]
    if not tags:
        raise NothingToCompareError(
            f"Found neither {FLATNESS_PREFIX}* nor a training loss nor curves of validation or test in {len(runs)} "
            f"runs. Choose metrics among: {', '.join(known)}."
        )
    return tags


def chosen_metrics(runs: Sequence[Run], patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the curves that patterns name.

    Args:
        runs: All runs.
        patterns: Tags, tags without ``flatness/``, or patterns with ``*`` and ``?``.

    Returns:
        Tags in the order of the patterns, and one sentence for each pattern that fits none.
    """
    known = _known(runs)
    chosen: dict[str, None] = {}
    problems = []
    for pattern in patterns:
        names = {tag: (tag, tag.removeprefix(FLATNESS_PREFIX)) for tag in known}
        fitting = [tag for tag in known if pattern in names[tag]]
        fitting = fitting or [tag for tag in known if any(fnmatchcase(name, pattern) for name in names[tag])]
        if not fitting:
            problems.append(_unknown("metric", pattern, runs))
        chosen |= dict.fromkeys(fitting)
    return list(chosen), problems


def missing_curves(runs: Sequence[Run], tags: Sequence[str], *, is_default: bool) -> list[str]:
    """Say which runs lack what is compared.

    Args:
        runs: All runs.
        tags: What is compared.
        is_default: Whether nobody asked for these: then only runs without any flatness are reported.

    Returns:
        One sentence per run.
    """
    problems = []
    for run in runs:
        if is_default and not any(tag.startswith(FLATNESS_PREFIX) for tag in run.curves):
            problems.append(f"{run.name}: has no curve {FLATNESS_PREFIX}*. Was it trained with FlatnessMonitor?")
        if not is_default and (missing := [tag for tag in tags if tag not in run.curves]):
            problems.append(f"{run.name}: has no curve {', '.join(missing)}.")
    return problems


def _known(runs: Sequence[Run]) -> list[str]:
    return sorted({tag for run in runs for tag in run.curves})


def _unknown(what: str, name: str, runs: Sequence[Run]) -> str:
    return f"Expected `{what}` to be a curve of these runs, got {name!r}. They have: {', '.join(_known(runs))}."
