"""``lightning-flatness`` on the command line, also as ``python -m lightning_flatness``.

Help must come at once: what is slow to import is imported when there is something to do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_flatness import __version__

_DESCRIPTION = """\
Read the TensorBoard logs of runs and print, for every setting, its flatness, training loss, and validation and test
metrics: mean and standard deviation over the runs that differ in nothing but a seed.

Curvature shrinks with the training loss: after the same number of epochs, the run that has trained further looks
flatter, whatever its minimum. To compare minima rather than progress, compare at equal training loss, with
--at loss=0.01 for a loss that all runs reach."""
_EXIT_CODES = """\
exit code: 0 if all runs could be read and compared; 2 if a file is damaged or empty, a run lacks what is compared, or
an argument is wrong. Whatever could be read is shown all the same."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Its arguments; default: those of the process.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(arguments)
    return _compare(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-flatness", description="Loss-landscape flatness for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="compare runs from their TensorBoard logs",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = compare.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, folder above runs, or event file")
    add(
        "--at",
        action="append",
        metavar="WHEN",
        help="last: the last point of each curve. best: its best one, highest for accuracies and the like, else lowest "
        "(of flatness/* not the one before training). loss=0.01: where the training loss first is that low, "
        "interpolated between logged points; runs that never are, are named and left out. Repeatable; default: last "
        "and best",
    )
    add(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a curve, by tag or pattern: 'lambda_max', 'flatness/*', 'val_*'. Repeatable; default: flatness/* without "
        "errors and costs, the training loss, and all of validation and test",
    )
    add("--loss-tag", metavar="TAG", help="which curve is the training loss; default: train_loss, train/loss, loss, …")
    add(
        "--group-by",
        default="auto",
        metavar="WHAT",
        help="what makes runs one setting. auto: paths without parts like seed0, version_3, run=2, and hyperparameters "
        "but seeds, are equal. path, hparams: one of the two. run: each is its own. lr,batch_size: these "
        "hyperparameters are equal. Default: auto",
    )
    add("--sort", metavar="NAME", help="the curve to order settings by, smallest first; default: by name")
    add("--out", type=Path, metavar="DIR", help="write comparison.png, comparison.csv and comparison.json there")
    return parser


def _compare(args: argparse.Namespace) -> int:
    from lightning_flatness.compare.command import compare

    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
