"""Chooses the settings of each tool to time: its default, enough steps to converge, and the least that is accurate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from peers.report import ALL_KINDS, OURS, TARGET_ERROR, Row, relative_error
from peers.tools import TOOLS, Measured, Settings, Tool
from peers.workloads import Problem

HELP = "given the math attention kernel by hand"
NOT_ENOUGH = "nothing tried is enough"
NUM_TRIALS = 3


@dataclass
class Candidate:
    """A tool in one setting, ready to be timed, with what an earlier measurement left for a warm start."""

    tool: Tool
    row: Row
    kept: Any = None

    def run(self, problem: Problem, seed: int) -> Measured:
        with sdpa_kernel(SDPBackend.MATH) if self.row.note == HELP else nullcontext():
            return self.tool.measure(problem, self.row.k, seed, self.kept, **self.row.options)

    def with_(self, kept: Any = None, **changes: Any) -> Candidate:
        """Return the same with another row of no numbers yet."""
        lists: dict[str, Any] = {name: [] for name in ("seconds", "gradient_seconds", "products", "errors")}
        kept = self.kept if kept is None else kept
        return Candidate(self.tool, replace(self.row, **lists, peak_bytes=None, **changes), kept)

    @property
    def is_runnable(self) -> bool:
        return self.row.note in ("", HELP)


def calibrated(
    before: Problem,
    now: Problem,
    values: list[float],
    title: str,
    *,
    quick: bool = False,
    earlier: Sequence[Row] = (),
) -> list[Candidate]:
    """Try the settings of all tools on one Hessian, untimed.

    Args:
        before: The network as it was a few steps earlier, for warm starts.
        now: What is to be measured.
        values: Its largest eigenvalues.
        title: Of the workload.
        quick: Do not try: take the middle one of the settings, to see that everything runs.
        earlier: What an earlier run has found for the same Hessian: the settings of peers are taken from there.

    Returns:
        What to time, and rows with a note for what cannot be.
    """
    k, num_batches, found = len(values), len(now.batches), []
    for tool in TOOLS:
        first = Candidate(tool, Row(title, k, num_batches, tool.name, "cheapest", tool.cheapest(k)[0]))
        reason = _why_not(first, now)
        if reason:
            found.append(first.with_(kind="default", options={}, note=f"fails: {reason}"))
        if reason and first.row.note != HELP:
            continue
        chosen = {(row.kind, row.start): row for row in earlier if row.tool == tool.name != OURS}
        cold = _candidates(first, ALL_KINDS, now, values, quick, chosen)
        found += cold
        if tool.kinds_warm:
            kept = first.with_(options=cold[0].row.options).run(before, 0).kept  # its note may say "not enough" by now
            found += _candidates(first.with_(kept=kept, start="warm"), tool.kinds_warm, now, values, quick, chosen)
    return found


def _why_not(candidate: Candidate, problem: Problem) -> str:
    """Return why the tool fails, if it does; note in the row that the math attention kernel helps, if it does."""
    try:
        candidate.run(problem, 0)
        return ""
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    try:
        candidate.row.note = HELP
        candidate.run(problem, 0)
    except RuntimeError:
        candidate.row.note = ""
    return reason


def _candidates(
    like: Candidate,
    kinds: Sequence[str],
    problem: Problem,
    values: list[float],
    quick: bool,
    chosen: dict[tuple[str, str], Row],
) -> list[Candidate]:
    def first(kind: str, settings: Settings, is_enough: Callable[[Measured], bool]) -> Candidate:
        """Return the first setting whose result is enough, from several random starts."""
        if (kind, like.row.start) in chosen:
            row = chosen[kind, like.row.start]
            return like.with_(kind=kind, options=row.options, note=row.note)
        tried = settings(like.row.k)
        if quick:
            return like.with_(kind=kind, options=tried[len(tried) // 2])
        for options in tried:
            candidate = like.with_(kind=kind, options=options)
            if all(is_enough(candidate.run(problem, seed)) for seed in range(NUM_TRIALS)):
                return candidate
        candidate.row.note = NOT_ENOUGH
        return candidate

    tool, found = like.tool, []
    if "default" in kinds and tool.default is not None:
        found.append(like.with_(kind="default", options=tool.default))
    if "converged" in kinds and tool.more_steps is not None:
        found.append(first("converged", tool.more_steps, lambda result: result.converged))
    accurate = TARGET_ERROR / 2
    found.append(first("cheapest", tool.cheapest, lambda result: relative_error(result.values, values) <= accurate))
    return found


def for_microbatches(candidates: list[Candidate], num_batches: int) -> list[Candidate]:
    """Return what is timed where the same samples come in many batches: the settings found for one, cold."""
    chosen = [c for c in candidates if c.row.start == "cold" and c.row.kind in c.tool.kinds_in_microbatches]
    return [c.with_(num_batches=num_batches) for c in chosen]
