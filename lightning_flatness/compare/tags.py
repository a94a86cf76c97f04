"""Choose the curves to compare: flatness, training loss, validation and test."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lightning_flatness.compare.reading import Curve, Run

FLATNESS_PREFIX = "flatness/"
TOLERANCE = 1e-2
"""The monitor's default ``tol``, written again: its own definition imports torch, which comparing does without."""

_LOSS_TAGS = (
    *("train_loss_epoch", "train/loss_epoch", "train_loss", "train/loss", "loss/train", "training_loss"),
    *("train/epoch_loss", "loss_epoch", "loss", "train_loss_step", "train/loss_step", "loss_step"),
)
_EVALUATION = re.compile(r"(?:^|[/_\-. ])(?:val|valid|validation|test|eval|dev)(?:[/_\-. ]|$)", re.IGNORECASE)
_NOT_A_MEASURE = re.compile(
    r"_errors/|_cost/|_residual$|_standard_error$|_first_order_gap$|/(?:stability_edge|\w+_(?:lower|upper)_edge|gradient_evaluations|seconds|\w*share_of_\w+)$"
)
"""Up to version 0.1, errors and costs were among the values."""


class NothingToCompareError(ValueError):
    """No run could be read, or an argument fits none of them."""


def error_of(run: Run, tag: str, kind: str) -> Curve | None:
    """Return the curve of the errors of another curve.

    Args:
        run: The run.
        tag: The curve, ``flatness/lambda_max`` say.
        kind: ``"residual"`` or ``"standard_error"``.

    Returns:
        ``flatness_errors/lambda_max_residual``, or where version 0.1 logged it; None if there is none.
    """
    parts = tag.split("/")
    if len(parts) == 1:
        parts = [FLATNESS_PREFIX.rstrip("/"), tag]
    splits = [("/".join(parts[:i]), "/".join(parts[i:])) for i in range(len(parts) - 1, 0, -1)]  # a layer has two
    names = [*(f"{group}_errors/{name}_{kind}" for group, name in splits), f"{tag}_{kind}"]
    return next((run.curves[name] for name in names if name in run.curves), None)


def find_loss_tag(runs: Sequence[Run], wanted: str | None = None) -> str | None:
    """Return the curve that is the training loss: the wanted one, or the first of the usual names that most runs have.

    Return None if no run has one.

    Raises:
        NothingToCompareError: If no run has the wanted one.
    """
    if wanted is not None:
        if not any(wanted in run.curves for run in runs):
            raise NothingToCompareError(unknown_curve("loss_tag", wanted, runs))
        return wanted
    known = Counter(tag for run in runs for tag in run.curves if tag.lower() in _LOSS_TAGS)
    return min(known, key=lambda tag: (-known[tag], _LOSS_TAGS.index(tag.lower())), default=None)


def is_part_of_another(run: Run, runs: Sequence[Run], loss_tag: str | None) -> bool:
    """Return whether SummaryWriter made this folder inside a run's folder (``add_scalars`` and ``add_hparams`` do).

    It then lies within another run and has neither a training loss nor flatness.
    """
    is_run = loss_tag in run.curves or any(tag.startswith(FLATNESS_PREFIX) for tag in run.curves)
    return not is_run and any(other.path in run.path.parents for other in runs)


def default_metrics(runs: Sequence[Run], loss_tag: str | None) -> list[str]:
    """Return lambda_max, invariant sharpness, other flatness curves, the training loss, validation and test.

    Those that any run has, in this order, without those of single layers: ``flatness/hessian_trace/encoder.0``.

    Raises:
        NothingToCompareError: If there is none of them.
    """
    known = _known(runs)
    first = [FLATNESS_PREFIX + name for name in ("lambda_max", "invariant_sharpness")]
    measures = [tag for tag in known if not _NOT_A_MEASURE.search(tag)]
    flatness = [tag for tag in measures if tag.startswith(FLATNESS_PREFIX) and tag.rpartition("/")[0] not in known]
    flatness.sort(key=lambda tag: (first.index(tag) if tag in first else len(first), tag))
    others = [tag for tag in measures if not tag.startswith(FLATNESS_PREFIX)]
    evaluation = [tag for tag in others if _EVALUATION.search(tag) and not tag.endswith("_step")]
    loss = [loss_tag] if loss_tag is not None and loss_tag not in evaluation else []
    tags = [*flatness, *loss, *evaluation]
    if not tags:
        raise NothingToCompareError(
            f"Found neither {FLATNESS_PREFIX}* nor a training loss nor curves of validation or test in {len(runs)} "
            f"runs. Choose metrics among: {', '.join(known)}."
        )
    return tags


def chosen_metrics(runs: Sequence[Run], patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the curves that match patterns, in their order, and one sentence for each pattern that fits none.

    A pattern is a tag, a tag without ``flatness/``, or has ``*`` and ``?``.
    """
    known = _known(runs)
    chosen: dict[str, None] = {}
    problems = []
    for pattern in patterns:
        names = {tag: (tag, tag.removeprefix(FLATNESS_PREFIX)) for tag in known}
        fitting = [tag for tag in known if pattern in names[tag]]
        fitting = fitting or [tag for tag in known if any(fnmatchcase(name, pattern) for name in names[tag])]
        if not fitting:
            problems.append(unknown_curve("metric", pattern, runs))
        chosen |= dict.fromkeys(fitting)
    return list(chosen), problems


def missing_curves(runs: Sequence[Run], tags: Sequence[str], *, is_default: bool) -> list[str]:
    """Return a text for each run that lacks one of the compared curves.

    If nobody asked for these (``is_default``), only runs without any flatness are reported.
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


def unknown_curve(what: str, name: str, runs: Sequence[Run]) -> str:
    """Return what to say about a curve that no run has, with the name that was meant, if one is near."""
    known = _known(runs)
    names = {short: tag for tag in known for short in (tag.removeprefix(FLATNESS_PREFIX), tag)}
    near = get_close_matches(name, names, n=1)
    hint = f" Did you mean {names[near[0]]!r}?" if near else ""
    return f"Expected `{what}` to be a curve of these runs, got {name!r}.{hint} They have: {', '.join(known)}."
