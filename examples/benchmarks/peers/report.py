"""Medians, errors and ratios of the timings, as tables in Markdown. Needs none of the tools."""

from __future__ import annotations

import re
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
        """Whether the error was reached: by this package in every round, by a peer in at least half of them."""
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


ALL_KINDS = ("default", "converged", "cheapest")
PEERS = ("PyHessian", "curvlinops + eigsh", "hessian-eigenthings", "power iteration")
COMPARISONS = (
    Comparison("PyHessian, default", ALL_KINDS, ("PyHessian",), ("default",), False),
    Comparison("fastest accurate peer, tuned", ALL_KINDS, PEERS, ALL_KINDS, True),
    Comparison("fastest accurate peer, untuned", ("default",), PEERS, ("default", "converged"), True),
)


@dataclass(frozen=True)
class Ratio:
    """The time of a peer over ours on one Hessian, cold; None if one of the two is not accurate or has no numbers."""

    peer: Row | None
    value: float | None

    def cell(self, *, named: bool) -> str:
        """Return a cell of a table, with or without the name of the peer."""
        if self.value is None:
            return "–"
        return f"{self.value:.1f}x ({self.peer.tool})" if named and self.peer else f"{self.value:.1f}x"


def relative_error(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest relative error of any of the eigenvalues."""
    return max(abs(v - r) / abs(r) for v, r in zip(values, reference, strict=True))


def fastest(rows: Iterable[Row], tools: Sequence[str], kinds: Sequence[str], *, accurate: bool = True) -> Row | None:
    """Return the fastest cold row of these tools and kinds, among those that reach the accuracy."""
    fitting = [r for r in rows if r.seconds and r.start == "cold" and r.tool in tools and r.kind in kinds]
    fitting = [r for r in fitting if r.reaches(TARGET_ERROR) or not accurate]
    return min(fitting, key=lambda row: row.time, default=None)


def ratio(rows: Sequence[Row], comparison: Comparison) -> Ratio:
    """Compare the rows of one Hessian."""
    own = fastest(rows, (OURS,), comparison.own_kinds)
    peer = fastest(rows, comparison.tools, comparison.kinds, accurate=comparison.has_to_be_accurate)
    return Ratio(peer, None if own is None or peer is None else peer.time / own.time)


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


def ratio_table(rows: Sequence[Row], k: int, num_batches: Sequence[int] = (1, 16)) -> str:
    """Return the time of the peers over ours, for one number of eigenvalues."""
    titles = " | ".join(c.title for c in COMPARISONS)
    lines = [f"| k = {k}, cold, error 1e-2 | batches | ours, s | {titles} |", "|---|---:|---:|---|---|---|"]
    for cell in dict.fromkeys(row.cell for row in rows if row.k == k and row.num_batches in num_batches):
        here = [row for row in rows if row.cell == cell]
        own = fastest(here, (OURS,), ALL_KINDS)
        columns = [f"{own.time:.2g}" if own else "not accurate"]
        for comparison in COMPARISONS:
            columns.append(ratio(here, comparison).cell(named=len(comparison.tools) > 1))
        lines.append(f"| {cell[0]} | {cell[2]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def read(path: Path) -> list[Row]:
    """Read the rows back from a file that :func:`write` has written: medians, and the largest error, as printed."""
    rows: list[Row] = []
    cell = ("", 0, 0)
    for line in path.read_text().splitlines():
        if heading := re.fullmatch(r"## (.*), k = (\d+), (?:(\d+) microbatches|one batch)", line):
            cell = (heading[1], int(heading[2]), int(heading[3] or 1))
        columns = [column.strip() for column in line.strip("|").split(" | ")]
        if not cell[0] or len(columns) != 9 or columns[2] not in ("cold", "warm"):
            continue
        kind, _, setting = columns[1].partition(":")
        row = Row(*cell, columns[0].strip("*"), kind, dict(re.findall(r"(\w+)=([^,]+)", setting)), columns[2])
        if columns[3] == "–":
            row.note = columns[8]
        else:
            row.seconds, row.errors = [float(columns[3])], [float(columns[6])]
        rows.append(row)
    return rows


def write(rows: Sequence[Row], machine: str, spectra: str, path: Path) -> str:
    """Write everything as Markdown and return the block that a page quotes."""
    ks = sorted({row.k for row in rows}, reverse=True)
    parts = [
        "# Top eigenvalues of the Hessian: lightning-flatness beside its peers",
        machine,
        f"True eigenvalues: {spectra}",
    ]
    parts += [ratio_table(rows, k) for k in ks]
    for cell in dict.fromkeys(row.cell for row in rows):
        batches = "one batch" if cell[2] == 1 else f"{cell[2]} microbatches"
        parts += [f"## {cell[0]}, k = {cell[1]}, {batches}", table([row for row in rows if row.cell == cell])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")
    return f"{ratio_table(rows, ks[0])}\n\n*{machine}*"


def quote(readme: Path, name: str, block: str) -> None:
    """Replace what a page quotes between the comments of this name.

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
