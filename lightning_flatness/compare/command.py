"""The command ``lightning-flatness compare``: table to stdout, problems to stderr, files to a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_flatness.compare.axis import check_axis
from lightning_flatness.compare.comparison import Comparison, compare_runs
from lightning_flatness.compare.report import table, to_csv, to_json

_FAILURE = 2


def compare(args: argparse.Namespace) -> int:
    """Compare the runs that the command names; return the exit code, 2 if anything could not be read or compared."""
    try:
        comparison = compare_runs(
            args.runs,
            metrics=args.metric,
            at=args.at or ("last", "best"),
            group_by=args.group_by,
            loss_tag=args.loss_tag,
            sort=args.sort,
        )
        check_axis(comparison, args.x)
    except ValueError as error:
        _say(str(error))
        return _FAILURE
    print(table(comparison))
    if comparison.notes:
        print("\n" + "\n".join(comparison.notes))
    for problem in comparison.problems:
        _say(problem)
    if args.out is not None:
        try:
            write(comparison, args.out, args.x)
        except OSError as error:
            _say(f"Expected `--out` to be a folder that can be written to, got {args.out} ({error}).")
            return _FAILURE
        print(f"\nWrote comparison.png, comparison.csv and comparison.json to {args.out}")
    if args.html is not None:
        from lightning_flatness.compare.page import write_page

        try:
            write_page(comparison, args.html, args.x)
        except (OSError, ModuleNotFoundError) as error:
            _say(f"Expected to write {args.html}: {error}")
            return _FAILURE
    return _FAILURE if comparison.problems else 0


def write(comparison: Comparison, folder: Path, x: str = "step") -> None:
    """Write ``comparison.png``, ``comparison.csv`` and ``comparison.json`` to a folder, made if need be."""
    from lightning_flatness.compare.picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("comparison.csv").write_text(to_csv(comparison), encoding="utf-8")
    folder.joinpath("comparison.json").write_text(to_json(comparison), encoding="utf-8")
    draw(comparison, x).savefig(folder / "comparison.png", dpi=130)


def _say(message: str) -> None:
    for line in message.splitlines():
        print(f"lightning-flatness compare: {line}", file=sys.stderr)
