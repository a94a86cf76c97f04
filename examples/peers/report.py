"""What the timings say: medians, errors, ratios, verdicts, as tables in Markdown and as a picture. No tool is needed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OURS = "lightning-flatness"
TARGET_ERROR = 1e-2
TARGETS = {"PyHessian": 10.0, "fastest peer": 2.5}


@dataclass
class Row:
    """One tool in one setting on one Hessian.

    Attributes:
        workload: Title of the network, with its number of parameters.
        k: Number of eigenvalues.
        num_batches: Batches that the samples come in.
        tool: Its name.
        kind: ``"default"`` or ``"cheapest"``: the least work among those tried that reaches the accuracy.
        setting: What it was called with.
        start: ``"cold"`` or ``"warm"``.
        seconds: Of each round.
        gradient_seconds: One gradient over the same batches in each of the same rounds.
        products: Hessian-vector products of each round.
        errors: Largest relative error of the k eigenvalues in each round.
        peak_bytes: Memory the measurement took at its peak; None where the system does not tell.
        note: Help that the tool was given, or why there are no numbers.
    """

    workload: str
    k: int
    num_batches: int
    tool: str
    kind: str
    setting: str
    start: str = "cold"
    seconds: list[float] = field(default_factory=list)
    gradient_seconds: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    note: str = ""

    @property
    def time(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def gradient_equivalents(self) -> float:
        """Median over the rounds of the time in gradients over the same batches."""
        return statistics.median(s / g for s, g in zip(self.seconds, self.gradient_seconds, strict=True))

    @property
    def cell(self) -> tuple[str, int, int]:
        """The Hessian that was measured."""
        return self.workload, self.k, self.num_batches

    def reaches(self, error: float) -> bool:
        """Whether the error was reached: by us in every round, by a peer in half of them (the benefit of the doubt)."""
        if not self.errors:
            return False
        return (max(self.errors) if self.tool == OURS else statistics.median(self.errors)) <= error


@dataclass(frozen=True)
class Verdict:
    """How many times faster than a peer we are on one Hessian, cold, and whether that is what was wanted."""

    cell: tuple[str, int, int]
    against: str
    peer: str
    ratio: float | None
    target: float

    @property
    def word(self) -> str:
        """``"reached"``, ``"not reached"``, or why there is nothing to compare."""
        if self.ratio is None:
            return "nothing to compare with"
        return "reached" if self.ratio >= self.target else "not reached"


def relative_error(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest relative error of any of the eigenvalues."""
    return max(abs(v - r) / abs(r) for v, r in zip(values, reference, strict=True))


def fastest(rows: Iterable[Row]) -> Row | None:
    """Return the fastest row that reaches the accuracy, if any does."""
    return min((row for row in rows if row.reaches(TARGET_ERROR)), key=lambda row: row.time, default=None)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Compare us at the accuracy asked for with PyHessian as it comes, and with the fastest peer that is as accurate."""
    found = []
    for cell in dict.fromkeys(row.cell for row in rows):
        cold = [row for row in rows if row.cell == cell and row.start == "cold" and row.seconds]
        own = fastest(row for row in cold if row.tool == OURS)
        pyhessian = next((row for row in cold if row.tool == "PyHessian" and row.kind == "default"), None)
        peer = fastest(row for row in cold if row.tool != OURS)
        for against, other in (("PyHessian", pyhessian), ("fastest peer", peer)):
            ratio = None if own is None or other is None else other.time / own.time
            name = "" if other is None else f"{other.tool}, {other.setting}"
            found.append(Verdict(cell, against, name, ratio, TARGETS[against]))
    return found


# ----------------------------------------------------------------------------------------------------------- tables


def table(rows: Sequence[Row]) -> str:
    """Return every row of one Hessian, slowest last; those without numbers at the end."""
    lines = [
        "| tool | setting | start | seconds | products | gradients | worst error | peak MB | rounds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    order = sorted(rows, key=lambda row: (row.start == "warm", row.time if row.seconds else float("inf")))
    for row in order:
        name = f"**{row.tool}**" if row.tool == OURS else row.tool
        head = f"| {name} | {row.kind}: {row.setting} | {row.start} |"
        if not row.seconds:
            lines.append(f"{head} – | – | – | – | – | {row.note} |")
            continue
        peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        products = f"{statistics.median(row.products):.0f}"
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"{head} {row.time:.3g} | {products} | {row.gradient_equivalents:.0f} "
            f"| {max(row.errors):.0e} | {peak} | {len(row.seconds)}{note} |"
        )
    return "\n".join(lines)


def verdict_table(rows: Sequence[Row], k: int) -> str:
    """Return how many times faster than the peers we are, with the verdicts, for one number of eigenvalues."""
    lines = [
        f"| network, k = {k}, cold | batches | ours, s | PyHessian, default | | fastest peer at 1e-2 | | which |",
        "|---|---:|---:|---:|---|---:|---|---|",
    ]
    by_cell = {(verdict.cell, verdict.against): verdict for verdict in verdicts(rows)}
    for cell in dict.fromkeys(row.cell for row in rows if row.k == k):
        own = fastest(row for row in rows if row.cell == cell and row.tool == OURS and row.start == "cold")
        columns = [f"{own.time:.3g}" if own else "accuracy not reached"]
        for against in TARGETS:
            verdict = by_cell[cell, against]
            columns += ["–" if verdict.ratio is None else f"{verdict.ratio:.1f}x", verdict.word]
        columns.append(by_cell[cell, "fastest peer"].peer)
        lines.append(f"| {cell[0]} | {cell[2]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def summary_table(rows: Sequence[Row], k: int = 5, num_batches: int = 1) -> str:
    """Return a line per tool and a column per network: the seconds of the fastest setting that is accurate enough."""
    rows = [row for row in rows if row.k == k and row.num_batches == num_batches and row.start == "cold"]
    workloads = list(dict.fromkeys(row.workload for row in rows))
    lines = [f"| seconds, k = {k}, cold | {' | '.join(workloads)} |", f"|---|{'---:|' * len(workloads)}"]
    for tool, kind in dict.fromkeys((row.tool, row.kind) for row in rows):
        cells = []
        for workload in workloads:
            row = next((r for r in rows if (r.tool, r.kind, r.workload) == (tool, kind, workload)), None)
            if row is None or not row.seconds:
                cells.append("–" if row is None else f"– ({row.note})")
            else:
                cells.append(f"{row.time:.2g} (error {max(row.errors):.0e})")
        lines.append(f"| {tool}, {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], machine: str, path: Path) -> str:
    """Write everything as Markdown and return the block that the README quotes."""
    ks = sorted({row.k for row in rows}, reverse=True)
    quoted = "\n\n".join([verdict_table(rows, ks[0]), machine])
    parts = ["# Top eigenvalues of the Hessian: lightning-flatness and its peers", machine]
    parts += [verdict_table(rows, k) for k in ks]
    for cell in dict.fromkeys(row.cell for row in rows):
        batches = "one batch" if cell[2] == 1 else f"{cell[2]} microbatches"
        parts += [f"## {cell[0]}, k = {cell[1]}, {batches}", table([row for row in rows if row.cell == cell])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")
    return quoted
