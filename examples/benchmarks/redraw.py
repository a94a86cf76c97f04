"""Draw the pictures of the committed benchmarks again, from their committed tables.

    python examples/benchmarks/redraw.py

needs none of the peers, and measures nothing.
"""

from __future__ import annotations

from pathlib import Path

from benchmark_scale import SERIES, Case, Outcome
from benchmark_scale import draw as draw_scale
from peers.picture import draw as draw_peers
from peers.report import read

RESULTS = Path(__file__).parent / "results"


def outcomes(path: Path) -> dict[Case, Outcome]:
    """Read what the table of ``benchmark_scale.py`` holds; the bytes of a plain product are not in it."""
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")][1:]
    cases = dict.fromkeys(case for series in SERIES.values() for case in series)
    found = {}
    for case, row in zip(cases, rows, strict=True):
        num_parameters, products, seconds = round(1e6 * float(row[0].rstrip("M"))), int(row[3]), float(row[4])
        found[case] = Outcome(
            num_parameters, seconds, products, gradient_evaluations=float("nan"),
            plain_seconds=seconds / products / float(row[6]) / case.num_samples, plain_bytes=0, peak_bytes=0,
            resident_bytes=round(1e9 * float(row[7])), value=float("nan"), error=float("nan"),
        )  # fmt: skip
    return found


def main() -> None:
    draw_peers(read(RESULTS / "benchmark_peers.md"), RESULTS / "benchmark_peers.png")
    draw_scale(outcomes(RESULTS / "benchmark_scale.md"), RESULTS / "benchmark_scale.png")


if __name__ == "__main__":
    main()
