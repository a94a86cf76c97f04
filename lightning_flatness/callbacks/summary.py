"""What a run is told of its measurements: what went wrong, once; at its end first and last values, and advice."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_flatness.callbacks.budget import percent
from lightning_flatness.metrics.layered import of_whole_networks
from lightning_flatness.metrics.measurement import Measurement

BUDGET = 0.1
"""Share above which a summary says how to spend less, where the user has set none."""

_WORTH_SAVING = 5.0  # seconds in all
_NUM_UNSTABLE = 3
_LARGEST_RELATIVE_ERROR = 0.5


def say_once(measured: Measurement, prefix: str, step: int, said: set[str]) -> None:
    """Warn of what has not converged or is left out, and say which values are no numbers, each name once.

    Args:
        measured: A measurement.
        prefix: Of the names in the logs.
        step: The ``global_step``.
        said: The names so far; new ones are added.
    """
    if measured.diverged is not None and "diverged" not in said:
        said.add("diverged")
        rank_zero_warn(f"FlatnessMonitor: NaN is logged from step {step} on. {measured.diverged}")
    for name in [name for name in measured.remarks if name not in said]:
        said.add(name)
        # That a quantity does not exist at some step is no fault of the measurement.
        say = rank_zero_info if math.isnan(measured.values.get(name, 0.0)) else rank_zero_warn
        say(f"FlatnessMonitor: '{prefix}{name}' {measured.remarks[name]}")


def summarize(
    history: Sequence[tuple[int, Measurement]],
    weights: str,
    num_samples: int,
    mode: str,
    share: float = 0.0,
    budget: float | None = None,
) -> str:
    """Return a short text about a run.

    Args:
        history: Steps and what was measured there, in order.
        weights: Which weights were measured.
        num_samples: The size of the probe.
        mode: How the module was run.
        share: What measuring took, of the training's gradients.
        budget: What it was allowed to take.

    Returns:
        A line of what was measured, a line per value of the whole network, and a line per piece of advice.

    Example:
        >>> first = Measurement({"lambda_max": 1.0}, {"lambda_max": {"residual": 0.1}})
        >>> costs = {"share_of_epoch_time": 0.3, "seconds": 9}
        >>> last = Measurement({"lambda_max": 8.0}, {"lambda_max": {"residual": 0.2}}, costs)
        >>> print(summarize([(0, first), (50, last)], "trained", 512, "batch_statistics", 0.21))
        2 measurements of the trained weights on 512 samples, mode 'batch_statistics':
          lambda_max: 1 ± 0.1 at step 0, 8 ± 0.2 at step 50
          Measuring took 30 % of the time of an epoch, 21 % of the training's gradients. budget=0.1 bounds the latter.
    """
    if not history:
        return "Nothing was measured."
    plural = "" if len(history) == 1 else "s"
    lines = [f"{len(history)} measurement{plural} of the {weights} weights on {num_samples} samples, mode {mode!r}:"]
    for name in of_whole_networks(dict.fromkeys(name for _, measured in history for name in measured.values)):
        points = [(step, measured) for step, measured in history if name in measured.values]
        ends = [points[0], points[-1]] if len(points) > 1 else points
        lines.append(f"  {name}: " + ", ".join(f"{_with_error(measured, name)} at step {s}" for s, measured in ends))
    return "\n".join([*lines, *(f"  {line}" for line in advice(history, num_samples, mode, share, budget))])


def _with_error(measured: Measurement, name: str) -> str:
    error = max(measured.errors.get(name, {}).values(), default=None)
    return f"{measured.values[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def advice(
    history: Sequence[tuple[int, Measurement]],
    num_samples: int,
    mode: str,
    share: float = 0.0,
    budget: float | None = None,
) -> list[str]:
    """Return what to change, a sentence each with the number behind it.

    Args:
        history: Steps and what was measured there, in order.
        num_samples: The size of the probe.
        mode: How the module was run; only in ``"batch_statistics"`` the edge of stability is training's.
        share: What measuring took, of the training's gradients.
        budget: What it was allowed to take.
    """
    last = history[-1][1]
    found = []
    edges = [m.values["edge_of_stability"] for _, m in history if "edge_of_stability" in m.values][-_NUM_UNSTABLE:]
    if mode == "batch_statistics" and len(edges) == _NUM_UNSTABLE and min(edges) > 1:
        numbers = ", ".join(f"{edge:.3g}" for edge in edges)
        found.append(
            f"edge_of_stability was above 1 in the last {_NUM_UNSTABLE} measurements ({numbers}): full-batch steps of "
            f"this size would diverge along the sharpest direction. A learning rate {max(edges):.2g} times smaller is "
            "below the edge."
        )
    for name in of_whole_networks(last.values):
        value = last.values[name]
        error = last.errors.get(name, {}).get("standard_error", 0.0)
        if value and error > _LARGEST_RELATIVE_ERROR * abs(value):
            ratio = error / abs(value)
            times = math.ceil((ratio / _LARGEST_RELATIVE_ERROR) ** 2 + 0.5)
            # Much larger than the numerical error, it is the samples'; else the measure's own random vectors make it.
            kinds = last.errors[name]
            is_of_samples = "residual" in kinds or kinds.get("numerical_error", error) < error / 2
            more = f"probe_size={times * num_samples}" if is_of_samples else f"{times} times its random vectors"
            found.append(
                f"{name} has a standard error of {100 * ratio:.0f} % of its value. About {more} would bring it below "
                f"{100 * _LARGEST_RELATIVE_ERROR:.0f} %."
            )
    found += [f"{name} {remark}" for name, remark in last.remarks.items()]
    if (line := _advice_on_cost(history, num_samples, share, budget)) is not None:
        found.append(line)
    return found


def _advice_on_cost(
    history: Sequence[tuple[int, Measurement]], num_samples: int, share: float, budget: float | None
) -> str | None:
    if budget is not None:
        if share <= budget:
            return None
        size = math.floor(num_samples * budget / share)
        hint = f" probe_size={size} would come to {percent(budget)}." if size else ""
        return (
            f"Measuring took {percent(share)} of the training's gradients, above budget={budget:g}: it always measures "
            f"before training and after the last epoch.{hint}"
        )
    times = [m.costs["share_of_epoch_time"] for _, m in history if "share_of_epoch_time" in m.costs]
    seconds = sum(m.costs.get("seconds", 0.0) for _, m in history)
    if seconds <= _WORTH_SAVING or not times or (time := sum(times) / len(times)) <= BUDGET:
        return None
    return (
        f"Measuring took {percent(time)} of the time of an epoch, {percent(share)} of the training's gradients. "
        f"budget={BUDGET:g} bounds the latter."
    )
