"""``lightning-flatness`` on the command line, also as ``python -m lightning_flatness``.

Help must come at once: what is slow to import is imported when there is something to do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_flatness import __version__

_DESCRIPTION = """\
Read the logs of runs (TensorBoard's, or metrics.csv of CSVLogger) and print, for every setting, its flatness,
training loss, and validation and test metrics: mean and standard deviation over the runs that differ in nothing but a
seed.

Early in training curvature mostly rises, late it shrinks with the training loss: after the same number of epochs, the
run that has trained least or furthest looks flatter, whatever its minimum. To compare minima rather than progress,
compare at equal training loss, with --at loss=0.01 for a loss that all runs reach."""
_EXIT_CODES = """\
exit code: 0 if all runs could be read and compared; 2 if a file is damaged or empty, a run lacks what is compared, no
run of a setting reaches the loss, or an argument is wrong. Whatever could be read is shown all the same."""

_MEASURE_DESCRIPTION = """\
Measure the flatness of checkpoints after the run, on the samples that FlatnessMonitor would have chosen in it.

What LightningCLI saved beside them (config.yaml) says how to build the module and its data; otherwise name them:
  lightning-flatness measure lightning_logs/version_0 --module my.code:Net --data my.code:Data

Values are printed, kept in the run's folder (flatness.jsonl, from which the same command goes on where it stopped), and
written there as curves of TensorBoard, which `lightning-flatness compare` reads, too. Checkpoints are only read."""
_MEASURE_EXIT_CODES = """\
exit code: 0 if all checkpoints could be measured; 2 if one could not, or an argument is wrong: the others are measured
all the same; 130 if interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Its arguments; default: those of the process.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-flatness", description="Loss-landscape flatness for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_measure(commands)
    return parser


def _add_compare(commands: Any) -> None:
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
        "(of flatness/* that at the lowest training loss: the flattest network has learnt least). loss=0.01: where the "
        "training loss first is that low, interpolated between logged points; runs that never are, are named and "
        "left out. Repeatable; default: last and best",
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
    add(
        "--x",
        default="step",
        metavar="WHAT",
        help="against what curves are drawn: step, gradients (two per step with SAM), train_loss, or a curve",
    )
    add("--html", type=Path, metavar="FILE", help="write an interactive page, one file (needs plotly)")
    add("--out", type=Path, metavar="DIR", help="write comparison.png, comparison.csv and comparison.json there")
    compare.set_defaults(run=_compare)


def _add_measure(commands: Any) -> None:
    parser = commands.add_parser(
        "measure",
        help="measure checkpoints after the run",
        description=_MEASURE_DESCRIPTION,
        epilog=_MEASURE_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # names and defaults are those of `measure_checkpoints`
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="checkpoint, or folder with *.ckpt in or below it")
    add("--module", metavar="MOD:CLASS", help="class of the module (built from the checkpoint's hyperparameters), or "
        "a function that returns one")  # fmt: skip
    add("--data", metavar="MOD:CLASS", help="DataModule, or a function that returns one or a DataLoader")
    add("--config", type=Path, metavar="FILE", help="what LightningCLI saved; default: config.yaml in the run's folder")
    add("--metrics", metavar="NAMES", help="default, all, or names with commas between them")
    add("--loss-fn", metavar="MOD:FUNCTION", help="mean loss of (module, batch); default: the module's training_step")
    add("--top-k", type=int, metavar="K", help="how many eigenvalues; default: 1")
    add(
        "--geometry", metavar="NAME", help="measure in this geometry (layer, filter, element, …) what is defined in any"
    )
    add("--probe-size", type=int, metavar="N", help="samples to measure on; default: 512")
    add("--probe-batch-size", type=int, metavar="N", help="samples per forward pass")
    add("--split", choices=("train", "val"), help="which samples; default: train")
    add("--mode", help="how to run the module; default: as FlatnessMonitor")
    add("--parameters", metavar="PATTERNS", help="measure these parameters only: 'encoder.*,head.*'")
    add("--weights", choices=("trained", "averaged", "both"), help="of weight averaging: which; default: trained")
    add("--device", help="auto, cpu, cuda, cuda:1; default: auto")
    add("--tol", type=float, help="tolerance of the default metrics; default: as FlatnessMonitor")
    add("--seed", type=int, help="of the choice of samples and of all random numbers; default: 0")
    add("--log-key-prefix", metavar="PREFIX", help="of the curves' names; default: flatness/")
    add(
        "--no-weights-only",
        dest="weights_only",
        action="store_false",
        help="read checkpoints that hold other objects, too, which runs code of theirs: for files that you trust",
    )
    add("--no-write", dest="writes", action="store_false", help="write nothing into the folders of the runs")
    add("--out", type=Path, default=None, metavar="DIR", help="write flatness.csv and flatness.json there")
    parser.set_defaults(run=_measure)


def _compare(args: argparse.Namespace) -> int:
    from lightning_flatness.compare.command import compare

    return compare(args)


def _measure(args: argparse.Namespace) -> int:
    from lightning_flatness.measuring.command import measure

    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
