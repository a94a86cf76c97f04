"""Two gloo processes give the values of one, whatever the shares; a failure on one rank stops both."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from helpers.ddp_worker import SURFACES
from helpers.problems import PROBLEMS, make_problem
from helpers.ranks import run_ranks
from helpers.registry import make_landscape
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_flatness import LossLandscape, TopEigenvalues, loss_surface
from lightning_flatness.compare import read_runs

pytestmark = pytest.mark.slow


def logged(out: Path) -> list[dict[str, str]]:
    """The rows of the log that hold flatness."""
    rows = csv.DictReader((out / "logs" / "version_0" / "metrics.csv").read_text().splitlines())
    return [row for row in rows if row["flatness/lambda_max"]]


@pytest.mark.parametrize("probe_size", [17, 1])
def test_ddp_logs_the_values_of_one_process_once(tmp_path, probe_size):
    (single,) = run_ranks("monitor", tmp_path / "one", 1, probe_size, world_size=1)
    first, second = run_ranks("monitor", tmp_path / "two", 2, probe_size)
    assert first == second
    assert first.keys() == single.keys()
    if probe_size > 1:  # a budget counts the samples of both ranks, and both measure at the same steps
        assert first["trained"] == single["trained"] == 10 * 48
        assert len(first["steps"]) > 2
        assert (first["steps"][0], first["steps"][-1]) == (0, 60)
    rows = logged(tmp_path / "two")
    assert [int(row["step"]) for row in rows] == [0, 6, 12]
    before, alone = rows[0], logged(tmp_path / "one")[0]
    for key in ("lambda_max", "lambda_2", "lambda_3", "invariant_sharpness"):
        assert float(before[f"flatness/{key}"]) == pytest.approx(float(alone[f"flatness/{key}"]), rel=1e-5)


def test_hyperparameters_are_written_by_the_first_rank_and_no_rank_waits(tmp_path):
    first, second = run_ranks("hyperparameters", tmp_path)
    assert first == second
    (run,), problems = read_runs([tmp_path / "run"])
    assert not problems
    assert len(list((tmp_path / "run").glob("*tfevents*"))) == 1
    assert run.hyperparameters["batch_size"] == 16  # 8 on each of two ranks
    content = EventAccumulator(str(tmp_path / "run")).Reload().PluginTagToContent("hparams")
    columns = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG]).metric_infos
    assert {"flatness/lambda_max", "val_loss", "accuracy_epoch"} <= {column.name.tag for column in columns}


def test_landscape_in_a_process_group(tmp_path):
    first, second = run_ranks("landscape", tmp_path)
    assert first == second
    for name in PROBLEMS:
        if name == "batchnorm_train":  # batch statistics are of a rank's batches
            continue
        problem = make_problem(name)
        metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
        metric.update(LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode))
        assert first[f"{name}/one"] == pytest.approx(metric.compute().tolist(), rel=1e-8), name
        assert first[f"{name}/split"] == pytest.approx(metric.compute().tolist(), rel=1e-8), name


def test_a_failure_on_one_rank_stops_both(tmp_path):
    first, second = run_ranks("fail", tmp_path)
    assert second == "ArithmeticError: rank one fails"
    assert first.startswith("RuntimeError: Evaluating the loss failed on another rank")


def test_a_failure_on_one_rank_stops_no_run(tmp_path):
    (first, said_first), (second, said_second) = run_ranks("survive", tmp_path)
    assert first == second
    assert all(weights == first[0] for weights in first)
    assert said_first[0] == said_second[0] == []
    for case, (own, others) in enumerate(
        [
            ("ArithmeticError: rank one fails", "Evaluating the loss failed on another rank; see its error."),
            ("MemoryError: rank one has no memory", "Measuring failed on another rank; see its error."),
            ("OSError: rank one cannot read", "Measuring failed on another rank; see its error."),
        ],
        start=1,
    ):
        assert [own in text for text in said_second[case]] == [True], said_second[case]
        assert [others in text for text in said_first[case]] == [True], said_first[case]


def test_ranks_fall_back_to_finite_differences_together(tmp_path):
    first, second = run_ranks("once", tmp_path)
    assert first == second
    assert first[0] == "finite_difference"


def test_one_all_reduce_per_evaluation(tmp_path):
    first, second = run_ranks("reductions", tmp_path)
    assert first == second
    num_parameters, counts = first
    for name, sizes in counts.items():
        assert len(sizes) == (name != "gradient again"), name
        assert sum(sizes) <= num_parameters + 4, name


def test_surfaces_of_two_ranks_are_those_of_one_process(tmp_path):
    first, second = run_ranks("surface", tmp_path)
    assert first == second
    for (directions, geometry, radius), (losses, x, rows) in zip(SURFACES, first, strict=True):
        surface = loss_surface(make_landscape(), directions, geometry=geometry, radius=radius, num_points=5)
        assert x == surface.x.tolist()
        torch.testing.assert_close(torch.tensor(losses).double(), surface.losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.tensor(rows).double(), surface.directions.double(), rtol=1e-5, atol=1e-5)
