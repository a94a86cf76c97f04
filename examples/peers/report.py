"""What the timings say: medians, errors, ratios and verdicts, as tables in Markdown. No tool is needed here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "lightning-flatness"
TARGET_ERROR = 1e-2


@dataclass
class Row:
    """One tool in one setting on one Hessian.

    Attributes:
        workload: Title of the network, with its number of parameters.
        k: Number of eigenvalues.
        num_batches: Batches that the samples come in.
        tool: Its name.
        kind: ``"default"``; ``"converged"``: enough steps for the tool to say so itself; ``"cheapest"``: the least
            work, among the settings tried, that reaches the accuracy, which takes knowing the truth.
        options: What it was called with.
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
    options: dict[str, Any]
    start: str = "cold"
    seconds: list[float] = field(default_factory=list)
    gradient_seconds: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    note: str = ""

    @property
    def setting(self) -> str:
        """The options in words."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items() if name != "check")

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
class Comparison:
    """What is compared with what: the fastest of our rows of some kinds with the fastest of some of the peers'."""

    title: str
    own_kinds: tuple[str, ...]
    tools: tuple[str, ...]
    kinds: tuple[str, ...]
    has_to_be_accurate: bool
    target: float


ALL_KINDS = ("default", "converged", "cheapest")
PEERS = ("PyHessian", "curvlinops + eigsh", "hessian-eigenthings", "power iteration")
COMPARISONS = (
    Comparison("PyHessian, default", ALL_KINDS, ("PyHessian",), ("default",), False, 10.0),
    Comparison("fastest accurate peer, tuned", ALL_KINDS, PEERS, ALL_KINDS, True, 2.5),
    Comparison("fastest accurate peer, untuned", ("default",), PEERS, ("default", "converged"), True, 2.5),
)


@dataclass(frozen=True)
class Verdict:
    """How many times faster than a peer we are on one Hessian, cold, and whether that is what was wanted."""

    comparison: Comparison
    peer: Row | None
    ratio: float | None

    @property
    def word(self) -> str:
        """``"reached"``, ``"not reached"``, or that there is nothing to compare."""
        if self.ratio is None:
            return "nothing to compare"
        return "reached" if self.ratio >= self.comparison.target else "not reached"


def relative_error(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest relative error of any of the eigenvalues."""
    return max(abs(v - r) / abs(r) for v, r in zip(values, reference, strict=True))


def fastest(rows: Iterable[Row], tools: Sequence[str], kinds: Sequence[str], *, accurate: bool = True) -> Row | None:
    """Return the fastest cold row of these tools and kinds, among those that reach the accuracy."""
    fitting = [r for r in rows if r.seconds and r.start == "cold" and r.tool in tools and r.kind in kinds]
    fitting = [r for r in fitting if r.reaches(TARGET_ERROR) or not accurate]
    return min(fitting, key=lambda row: row.time, default=None)


def verdict(rows: Sequence[Row], comparison: Comparison) -> Verdict:
    """Compare the rows of one Hessian; where a peer has no numbers, or we are not accurate, there is no ratio."""
    own = fastest(rows, (OURS,), comparison.own_kinds)
    peer = fastest(rows, comparison.tools, comparison.kinds, accurate=comparison.has_to_be_accurate)
    return Verdict(comparison, peer, None if own is None or peer is None else peer.time / own.time)


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


def verdict_table(rows: Sequence[Row], k: int, num_batches: Sequence[int] = (1, 16)) -> str:
    """Return how many times faster than the peers we are, with verdicts, for one number of eigenvalues."""
    titles = " | ".join(f"{c.title} (target {c.target:g}x)" for c in COMPARISONS)
    lines = [f"| k = {k}, cold, error 1e-2 | batches | ours, s | {titles} |", "|---|---:|---:|---|---|---|"]
    for cell in dict.fromkeys(row.cell for row in rows if row.k == k and row.num_batches in num_batches):
        here = [row for row in rows if row.cell == cell]
        own = fastest(here, (OURS,), ALL_KINDS)
        columns = [f"{own.time:.2g}" if own else "not accurate"]
        for comparison in COMPARISONS:
            found = verdict(here, comparison)
            peer = "" if found.peer is None or len(comparison.tools) == 1 else f" ({found.peer.tool})"
            columns.append(found.word if found.ratio is None else f"**{found.ratio:.1f}x**{peer}: {found.word}")
        lines.append(f"| {cell[0]} | {cell[2]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], machine: str, spectra: str, path: Path) -> str:
    """Write everything as Markdown and return the block that the README quotes."""
    ks = sorted({row.k for row in rows}, reverse=True)
    parts = [
        "# Top eigenvalues of the Hessian: lightning-flatness beside its peers",
        machine,
        f"True eigenvalues: {spectra}",
    ]
    parts += [verdict_table(rows, k) for k in ks]
    for cell in dict.fromkeys(row.cell for row in rows):
        batches = "one batch" if cell[2] == 1 else f"{cell[2]} microbatches"
        parts += [f"## {cell[0]}, k = {cell[1]}, {batches}", table([row for row in rows if row.cell == cell])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")
    return f"{verdict_table(rows, ks[0])}\n\n*{machine}*"


def quote(readme: Path, name: str, block: str) -> None:
    """Replace what a README quotes between the comments of this name.

    Raises:
        ValueError: If the comments are not there.
    """
    before, found, rest = readme.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not found or not end:
        raise ValueError(
            f"Expected <!-- {name} --> and <!-- /{name} --> in {readme}, got at most one of them. Add both."
        )
    readme.write_text(f"{before}{found}{block.strip()}\n{end}{after}")
