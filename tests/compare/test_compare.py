"""`lightning-flatness compare` on event files with known values: it prints and writes exactly those."""

from __future__ import annotations

import csv
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.util import tensor_util
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_flatness import FlatnessMonitor, compare_runs
from lightning_flatness.__main__ import main
from lightning_flatness.compare import Comparison, NothingToCompareError
from lightning_flatness.compare.tags import TOLERANCE
from lightning_flatness.metrics import preset_metrics

Points = dict[int, float]
LAMBDA, SHARPNESS = "flatness/lambda_max", "flatness/invariant_sharpness"
ERRORS = "flatness_errors/lambda_max"


def write(folder: Path, curves: dict[str, Points], hyperparameters: dict[str, Any] | None = None) -> Path:
    """Write a run as torch's SummaryWriter does."""
    with SummaryWriter(str(folder)) as writer:
        if hyperparameters:
            for summary in hparams(hyperparameters, {}):
                writer.file_writer.add_summary(summary)
        for tag, points in curves.items():
            for step, value in points.items():
                writer.add_scalar(tag, value, step)
    return folder


def two_settings(path: Path) -> Path:
    """SGD and SAM, two seeds each; all numbers are sums of powers of two, so that float32 holds them exactly."""
    for seed, (last, loss) in enumerate([(8.0, 0.5), (10.0, 0.25)]):
        curves = {
            LAMBDA: {0: 1.0, 10: 16.0, 20: last - 4, 30: last},
            f"{ERRORS}_residual": {0: 0.0, 10: 0.0, 20: 0.0, 30: 0.0},
            SHARPNESS: {0: 1.0, 10: 100.0, 20: 80.0, 30: 60.0 + seed},
            "flatness_cost/seconds": {0: 1.0, 30: 1.0},
            "train_loss": {9: 2.0, 19: 1.0, 29: loss},
            "val_acc": {9: 0.5, 19: 0.875, 29: 0.75},
        }
        write(path / "sgd" / f"seed{seed}", curves)
        write(path / "sam" / f"seed{seed}", {tag: {s: v / 2 for s, v in c.items()} for tag, c in curves.items()})
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def values(comparison: Comparison, setting: str, moment: str, tag: str) -> list[float]:
    (found,) = [s for s in comparison.settings if s.name == setting]
    return found.cells[moment, tag].values


# --------------------------------------------------------------------------------------------- what is printed


def test_the_table_has_exactly_the_values_that_were_written(tmp_path, capsys):
    code, out, err = run(capsys, two_settings(tmp_path))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "setting  runs  at       lambda_max  invariant_sharpness       train_loss          val_acc",
        "sam         2  last  4.500 ± 0.707         30.25 ± 0.35  0.1875 ± 0.0884  0.3750 ± 0.0000",
        "               best  4.500 ± 0.707         30.25 ± 0.35  0.1875 ± 0.0884  0.4375 ± 0.0000",
        "sgd         2  last  9.000 ± 1.414         60.50 ± 0.71  0.3750 ± 0.1768  0.7500 ± 0.0000",
        "               best  9.000 ± 1.414         60.50 ± 0.71  0.3750 ± 0.1768  0.8750 ± 0.0000",
    ]


def test_csv_and_json_have_them_in_full(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, two_settings(tmp_path / "logs"), "--out", out)[0] == 0
    with (out / "comparison.csv").open() as file:
        rows = {(r["setting"], r["at"], r["metric"]): r for r in csv.DictReader(file)}
    assert len(rows) == 2 * 2 * 4
    row = rows["sgd", "last", LAMBDA]
    assert [float(row[name]) for name in ("mean", "standard_deviation", "min", "max")] == [9.0, math.sqrt(2), 8.0, 10.0]
    assert (row["num_values"], row["num_runs"], row["converged"]) == ("2", "2", "True")
    document = json.loads((out / "comparison.json").read_text())
    assert [setting["name"] for setting in document["settings"]] == ["sam", "sgd"]
    sgd = document["settings"][1]
    assert [r["name"] for r in sgd["runs"]] == ["sgd/seed0", "sgd/seed1"]
    assert sgd["values"]["best"]["val_acc"]["runs"][0] == {"value": 0.875, "step": 19, "residual": None}
    assert sgd["values"]["best"][LAMBDA]["runs"][1] == {"value": 10.0, "step": 30, "residual": 0.0}
    assert sgd["values"]["last"][SHARPNESS]["mean"] == 60.5
    assert document["loss_tag"] == "train_loss"


def test_the_picture_shows_curves_in_two_colours(tmp_path, capsys):
    run(capsys, two_settings(tmp_path / "logs"), "--out", tmp_path)
    pixels = (255 * image.imread(tmp_path / "comparison.png")[..., :3]).round().astype(int)
    assert pixels.shape[0] > 500
    for color in ([31, 119, 180], [255, 127, 14]):  # C0 and C1 of matplotlib
        assert (pixels == color).all(-1).sum() > 500


def test_python_function_returns_the_same(tmp_path):
    comparison = compare_runs([two_settings(tmp_path)], metrics=["lambda_max", "val_*"], at=["last"])
    assert comparison.metrics == (LAMBDA, "val_acc")
    assert values(comparison, "sgd", "last", LAMBDA) == [8.0, 10.0]
    assert values(comparison, "sam", "last", "val_acc") == [0.375, 0.375]


def test_sorted_by_a_curve_that_is_not_shown(tmp_path, capsys):
    _, out, _ = run(capsys, two_settings(tmp_path), "--sort", "val_acc", "--metric", "lambda_max", "--at", "last")
    assert [line.split()[0] for line in out.splitlines()] == ["setting", "sam", "sgd"]
    assert "val_acc" not in out
    write(tmp_path / "adam" / "seed0", {LAMBDA: {1: 3.0}, "val_acc": {1: 0.5}})
    _, out, _ = run(capsys, tmp_path, "--sort", "val_acc", "--metric", "lambda_max", "--at", "last")
    assert [line.split()[0] for line in out.splitlines()] == ["setting", "sam", "adam", "sgd"]


# ------------------------------------------------------------------------------------------- at equal train loss


def test_equal_loss_is_interpolated_in_the_logarithm_between_logged_points(tmp_path):
    curves = {"train_loss": {10: 1.0, 20: 0.25}, LAMBDA: {0: 0.0, 10: 4.0, 20: 16.0}, "val_r2": {10: -1.0, 20: 2.0}}
    write(tmp_path / "a", curves)
    comparison = compare_runs([tmp_path], at=["loss=0.5", "loss=0.25", "loss=3"])
    assert values(comparison, "a", "loss=0.5", LAMBDA) == pytest.approx([8.0])  # half way from 1 to 1/4
    assert values(comparison, "a", "loss=0.5", "train_loss") == pytest.approx([0.5])
    assert values(comparison, "a", "loss=0.5", "val_r2") == pytest.approx([0.5])  # no logarithm of what is negative
    assert values(comparison, "a", "loss=0.25", LAMBDA) == [16.0]
    assert values(comparison, "a", "loss=3", LAMBDA) == [4.0]  # the first point is below already


@pytest.mark.parametrize("loss", [0.1, 0.01, 0.3, 1e-7])
def test_a_loss_that_float32_rounds_up_is_reached_all_the_same(tmp_path, loss):
    write(tmp_path / "a", {"train_loss": {1: 2 * loss, 2: loss}, LAMBDA: {1: 1.0, 2: 2.0}})
    comparison = compare_runs([tmp_path], at=[f"loss={loss}"])
    assert values(comparison, "a", f"loss={loss}", LAMBDA) == pytest.approx([2.0], rel=1e-5)


def test_runs_that_never_reach_the_loss_are_named_and_left_out(tmp_path, capsys):
    code, out, err = run(capsys, two_settings(tmp_path), "--at", "loss=0.3", "--metric", "lambda_max")
    assert (code, err) == (0, "")
    assert "sgd/seed0: never reaches loss=0.3 (lowest train_loss 0.5); left out there." in out
    comparison = compare_runs([tmp_path], at=["loss=0.3"])
    assert len(values(comparison, "sgd", "loss=0.3", LAMBDA)) == 1
    assert len(values(comparison, "sam", "loss=0.3", LAMBDA)) == 2
    assert " (1)" in next(line for line in out.splitlines() if line.startswith("sgd "))


def test_a_loss_that_no_run_reaches_is_a_failure(tmp_path, capsys):
    code, out, err = run(capsys, two_settings(tmp_path), "--at", "loss=0.001")
    assert code == 2
    assert "sam/seed1: never reaches loss=0.001" in err
    assert out.splitlines()[1].startswith("sam")


def test_a_curve_that_does_not_go_as_far_has_no_value_there(tmp_path):
    write(tmp_path / "a", {"loss": {0: 1.0, 100: 0.1}, LAMBDA: {0: 1.0, 20: 5.0}, "test_acc": {100: 0.5}})
    comparison = compare_runs([tmp_path], at=["loss=0.2"])
    assert comparison.loss_tag == "loss"
    assert values(comparison, "a", "loss=0.2", LAMBDA) == values(comparison, "a", "loss=0.2", "test_acc") == []
    assert any("not logged there" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"train_loss", "train_loss_step", "train_loss_epoch", "val_loss"}, "train_loss_epoch"),
        ({"train/loss", "val/loss"}, "train/loss"),
        ({"Loss/train", "Loss/test"}, "Loss/train"),
        ({"loss", "val_loss"}, "loss"),
        ({"val_loss"}, None),
    ],
)
def test_training_loss_is_found_under_its_usual_names(tmp_path, tags, expected):
    write(tmp_path / "a", {tag: {1: 1.0} for tag in tags | {LAMBDA}})
    assert compare_runs([tmp_path]).loss_tag == expected


def test_loss_tag_of_choice(tmp_path):
    write(tmp_path / "a", {LAMBDA: {1: 1.0, 2: 2.0}, "train_loss": {1: 1.0}, "risk": {1: 1.0, 2: 0.5}})
    assert values(compare_runs([tmp_path], at=["loss=0.5"], loss_tag="risk"), "a", "loss=0.5", LAMBDA) == [2.0]
    with pytest.raises(NothingToCompareError, match="Expected `loss_tag` to be a curve of these runs, got 'nope'"):
        compare_runs([tmp_path], loss_tag="nope")


# ------------------------------------------------------------------------------------------------- best, errors


def test_best_is_highest_for_accuracies_lowest_else_and_for_flatness_that_at_the_lowest_training_loss(tmp_path):
    curves = {LAMBDA: {0: 0.5, 1: 3.0, 2: 2.0, 3: 4.0}, "val/acc": {0: 0.1, 1: 0.9, 2: 0.3}, "val/loss": {0: 1.0, 1: 2}}
    write(tmp_path / "a", curves)
    comparison = compare_runs([tmp_path], at=["best"])
    assert values(comparison, "a", "best", LAMBDA) == [4.0]  # without a training loss the last one
    write(tmp_path / "a", {"train_loss": {0: 3.0, 1: math.nan, 2: 0.1, 3: 0.2}})
    assert values(compare_runs([tmp_path], at=["best"]), "a", "best", LAMBDA) == [2.0]
    assert values(comparison, "a", "best", "val/acc") == [float(np.float32(0.9))]
    assert values(comparison, "a", "best", "val/loss") == [1.0]


def test_a_loss_that_no_run_of_a_setting_reaches_is_a_problem(tmp_path, capsys):
    curves = {"train_loss": {0: 1.0, 1: 0.5}, LAMBDA: {0: 1.0, 1: 2.0}}
    for seed in range(2):
        write(tmp_path / "fast" / f"seed{seed}", curves | {"train_loss": {0: 1.0, 1: 0.1}})
        write(tmp_path / "slow" / f"seed{seed}", curves)
    code, out, err = run(capsys, tmp_path, "--at", "loss=0.2")
    assert code == 2
    assert "slow/seed0: never reaches loss=0.2 (lowest train_loss 0.5); left out there." in err
    assert "fast" in out
    write(tmp_path / "slow" / "seed2", curves | {"train_loss": {0: 1.0, 1: 0.1}})
    code, out, err = run(capsys, tmp_path, "--at", "loss=0.2")
    assert (code, err) == (0, "")
    assert "slow/seed0: never reaches loss=0.2" in out


@pytest.mark.parametrize("errors", ["flatness_errors/lambda_max", LAMBDA])  # up to version 0.1 beside the values
def test_values_that_have_not_converged_are_marked(tmp_path, capsys, errors):
    for seed, residual in enumerate([0.06, 2.0]):
        write(tmp_path / f"seed{seed}", {LAMBDA: {1: 8.0}, f"{errors}_residual": {1: residual}})
    code, out, _ = run(capsys, tmp_path, "--at", "last", "--out", tmp_path / "out")
    assert code == 0
    assert "8.000 ± 0.000*" in out
    assert "lambda_max at last has not converged in 1 of 2 runs: residual up to 25.0% of it." in out
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert document["settings"][0]["values"]["last"][LAMBDA]["converged"] is False


def test_values_that_are_not_finite_are_left_out_and_null(tmp_path, capsys):
    write(tmp_path / "sgd" / "seed0", {LAMBDA: {1: 8.0, 2: math.nan}, "train_loss": {1: 1.0, 2: math.inf}})
    write(tmp_path / "sgd" / "seed1", {LAMBDA: {1: 8.0, 2: 4.0}, "train_loss": {1: 1.0, 2: 0.5}})
    code, out, _ = run(capsys, tmp_path, "--out", tmp_path)
    assert code == 0
    assert "sgd: flatness/lambda_max at last is not finite, or not logged there, in 1 of 2 runs; left out." in out
    assert "4.000 (1)" in out
    text = (tmp_path / "comparison.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    last = json.loads(text)["settings"][0]["values"]["last"][LAMBDA]
    assert (last["mean"], last["standard_deviation"], last["runs"][0]["value"]) == (4.0, None, None)


# ------------------------------------------------------------------------------------------- seeds of one setting


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sgd/seed0", "sgd/seed1", "sam/seed0"], {"sgd": 2, "sam": 1}),
        (["sgd_seed=1", "sgd_seed=2", "sgd-big_seed=1"], {"sgd": 2, "sgd-big": 1}),
        (["lr0.1_data_seed3_x", "lr0.1_data-seed4_x"], {"lr0.1_x": 2}),
        (["logs/version_0", "logs/version_1"], {"logs": 2}),
        (["lr=0.1/version_0", "lr=0.1/version_1", "lr=0.2/version_0"], {"lr=0.1": 2, "lr=0.2": 1}),
        (["batch/32", "batch/64"], {"32": 1, "64": 1}),  # not every number is a seed
        (["resnet18_run3", "resnet50_run3", "resnet18_run4"], {"resnet18": 2, "resnet50": 1}),
        (["Nov22_10-03-11_host", "Nov22_10-05-12_host"], {"logs": 2}),
        (["sam/2026-11-22_10-03-11", "sam/20261122-100500"], {"sam": 2}),
        (["trial-1/fold0", "trial-1/fold1"], {"trial-1": 2}),
    ],
)
def test_seeds_are_found_in_paths(tmp_path, names, expected):
    for name in names:
        write(tmp_path / "logs" / name, {LAMBDA: {1: 1.0}})
    comparison = compare_runs([tmp_path / "logs"])
    assert {setting.name: len(setting.runs) for setting in comparison.settings} == expected


def test_hyperparameters_split_versions_and_seeds_do_not(tmp_path):
    for version, (lr, seed) in enumerate([(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]):
        hyperparameters = {"lr": lr, "seed": seed, "data/seed": seed, "model_seed": seed, "width": 8}
        write(tmp_path / "logs" / f"version_{version}", {LAMBDA: {1: 1.0}}, hyperparameters)
    comparison = compare_runs([tmp_path / "logs"])
    assert {s.name: [r.name for r in s.runs] for s in comparison.settings} == {
        "lr=0.1": ["version_0", "version_1"],
        "lr=0.2": ["version_2", "version_3"],
    }
    assert [len(s.runs) for s in compare_runs([tmp_path], group_by="seed").settings] == [2, 2]
    assert [len(s.runs) for s in compare_runs([tmp_path], group_by="path").settings] == [4]
    assert [len(s.runs) for s in compare_runs([tmp_path], group_by="run").settings] == [1] * 4


def test_folders_split_what_has_the_same_hyperparameters(tmp_path):
    for name in ("sgd/seed0", "sgd/seed1", "sam/seed0", "sam/seed1"):
        write(tmp_path / name, {LAMBDA: {1: 1.0}}, {"lr": 0.1})
    assert [len(s.runs) for s in compare_runs([tmp_path]).settings] == [2, 2]
    assert [len(s.runs) for s in compare_runs([tmp_path], group_by="hparams").settings] == [4]
    assert [s.name for s in compare_runs([tmp_path], group_by="lr").settings] == [tmp_path.name]


def test_unknown_hyperparameter_to_group_by(tmp_path, capsys):
    write(tmp_path / "a", {LAMBDA: {1: 1.0}}, {"lr": 0.1})
    with pytest.raises(ValueError, match=r"Expected `group_by` to be 'auto', .* got 'depth'. Logged are: lr."):
        compare_runs([tmp_path], group_by="lr,depth")
    assert run(capsys, tmp_path, "--group-by", "depth")[0] == 2


# --------------------------------------------------------------------------------------------------- other writers


def test_scalars_written_as_tensors_count_and_other_tensors_do_not(tmp_path):
    with SummaryWriter(str(tmp_path / "tf2")) as writer:
        for step, value in enumerate([4.0, 2.0]):
            metadata = scalar_metadata.create_summary_metadata("", "") if step == 0 else None  # only the first has it
            tensor = tensor_util.make_tensor_proto(np.float32(value))
            writer.file_writer.add_summary(
                Summary(value=[Summary.Value(tag=LAMBDA, metadata=metadata, tensor=tensor)]), step
            )
        writer.add_text("flatness/note", "not a number", 1)
        writer.add_histogram("flatness/weights", np.arange(10.0), 1)
    comparison = compare_runs([tmp_path], at=["last", "best"])
    assert comparison.metrics == (LAMBDA,)
    assert values(comparison, "tf2", "last", LAMBDA) == [2.0]


def test_folders_that_summary_writer_makes_inside_a_run_are_no_runs(tmp_path):
    write(tmp_path / "a", {LAMBDA: {1: 1.0}})
    with SummaryWriter(str(tmp_path / "a")) as writer:
        writer.add_scalars("both", {"x": 1.0, "y": 2.0}, 1)
        writer.add_hparams({"lr": 0.1}, {"hparam/accuracy": 1.0})
    comparison = compare_runs([tmp_path])
    assert (len(comparison.settings), comparison.problems) == (1, ())


def test_a_resumed_run_in_two_files_is_one_curve_and_the_later_value_counts(tmp_path):
    write(tmp_path / "a", {LAMBDA: {0: 1.0, 10: 2.0, 20: 3.0}})
    with SummaryWriter(str(tmp_path / "a"), filename_suffix=".resumed") as writer:
        for step, value in {10: 2.5, 20: 3.5, 30: 4.5}.items():
            writer.add_scalar(LAMBDA, value, step)
    (setting,) = compare_runs([tmp_path]).settings
    curve = setting.runs[0].curves[LAMBDA]
    assert dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) == {0: 1.0, 10: 2.5, 20: 3.5, 30: 4.5}


def test_runs_given_one_by_one_by_file_and_twice(tmp_path):
    two_settings(tmp_path)
    (file,) = (tmp_path / "sam" / "seed0").iterdir()
    folders = [tmp_path / "sgd", tmp_path / "sgd" / "seed0", file]
    comparison = compare_runs(folders, at=["last"])
    assert sorted(len(s.runs) for s in comparison.settings) == [1, 2]


# ------------------------------------------------------------------------------------------------------- bad input


def damaged(path: Path, keep: float) -> Path:
    """Cut the event file of a run."""
    (file,) = path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    return file


def test_a_truncated_file_is_reported_and_read_as_far_as_it_goes(tmp_path, capsys):
    write(tmp_path / "whole", {LAMBDA: {step: 1.0 + step for step in range(100)}})
    write(tmp_path / "cut", {LAMBDA: {step: 1.0 + step for step in range(100)}})
    file = damaged(tmp_path / "cut", 0.5)
    code, out, err = run(capsys, tmp_path, "--at", "last")
    assert code == 2
    assert f"{file}: is cut off or damaged after" in err
    assert "A run that is still being written looks like this, too." in err
    assert [line.split()[0] for line in out.splitlines()] == ["setting", "cut", "whole"]
    last = compare_runs([tmp_path], at=["last"])
    assert 30 < values(last, "cut", "last", LAMBDA)[0] < 70
    assert values(last, "whole", "last", LAMBDA) == [100.0]


def test_damage_in_the_middle_is_reported(tmp_path, capsys):
    write(tmp_path / "a", {LAMBDA: dict.fromkeys(range(100), 1.0)})
    (file,) = (tmp_path / "a").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    code, out, err = run(capsys, tmp_path)
    assert code == 2
    assert "cut off or damaged" in err
    assert out.splitlines()[1].startswith("a ")


def test_empty_files_and_files_without_scalars_are_reported(tmp_path, capsys):
    write(tmp_path / "good", {LAMBDA: {1: 1.0}})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "events.out.tfevents.1.host").touch()
    with SummaryWriter(str(tmp_path / "bare")):
        pass
    code, out, err = run(capsys, tmp_path)
    assert code == 2
    assert "events.out.tfevents.1.host: is empty." in err
    assert f"{tmp_path / 'bare'}: no scalars in its event files." in err
    assert out.splitlines()[1].startswith("good ")


def test_something_else_that_calls_itself_an_event_file(tmp_path, capsys):
    write(tmp_path / "good", {LAMBDA: {1: 1.0}})
    (tmp_path / "events.out.tfevents.text").write_text("this is no event file, whatever its name says\n" * 10)
    code, out, err = run(capsys, tmp_path)
    assert code == 2
    assert "events.out.tfevents.text: is cut off or damaged after 0 of" in err
    assert "good" in out


@pytest.mark.parametrize(("make", "message"), [(True, "no TensorBoard event files"), (False, "no such file or folder")])
def test_no_runs(tmp_path, capsys, make, message):
    folder = tmp_path / "logs"
    if make:
        folder.mkdir()
    code, out, err = run(capsys, folder)
    assert (code, out) == (2, "")
    assert f"{folder}: {message}" in err
    assert f"Found no run to compare in {folder}." in err


def test_missing_runs_do_not_hide_the_others(tmp_path, capsys):
    code, out, err = run(capsys, write(tmp_path / "a", {LAMBDA: {1: 1.0}}), tmp_path / "b")
    assert code == 2
    assert "b: no such file or folder" in err
    assert out.splitlines()[1].startswith("a ")


def test_runs_without_flatness_are_shown_and_reported(tmp_path, capsys):
    write(tmp_path / "watched", {LAMBDA: {1: 1.0}, "train_loss": {1: 1.0}})
    write(tmp_path / "alone", {"train_loss": {1: 2.0}})
    code, out, err = run(capsys, tmp_path)
    assert code == 2
    assert "alone: has no curve flatness/*. Was it trained with FlatnessMonitor?" in err
    assert "–" in next(line for line in out.splitlines() if line.startswith("alone"))


def test_missing_and_unknown_curves(tmp_path, capsys):
    write(tmp_path / "a", {LAMBDA: {1: 1.0}, SHARPNESS: {1: 1.0}})
    write(tmp_path / "b", {LAMBDA: {1: 2.0}})
    code, out, err = run(capsys, tmp_path, "--metric", "lambda_max", "--metric", "invariant_sharpness")
    assert code == 2
    assert "b: has no curve flatness/invariant_sharpness." in err
    assert "2.000" in out
    code, out, err = run(capsys, tmp_path, "--metric", "lambda_max", "--metric", "sharpest", "--sort", "nothing")
    assert code == 2
    assert "got 'sharpest'. They have: flatness/invariant_sharpness, flatness/lambda_max." in err
    assert "got 'nothing'" in err
    assert "2.000" in out
    code, out, err = run(capsys, tmp_path, "--metric", "sharpest")
    assert (code, out) == (2, "")


def test_runs_with_nothing_of_interest(tmp_path, capsys):
    write(tmp_path / "a", {"reward": {1: 1.0}})
    code, _, err = run(capsys, tmp_path)
    assert code == 2
    assert "Found neither flatness/* nor a training loss" in err
    assert "Choose metrics among: reward." in err
    assert "reward" in run(capsys, tmp_path, "--metric", "reward")[1]


@pytest.mark.parametrize("moment", ["loss=", "loss=low", "loss=nan", "first", "train_loss=0.1", ""])
def test_bad_moment(tmp_path, capsys, moment):
    code, out, err = run(capsys, write(tmp_path / "a", {LAMBDA: {1: 1.0}}), "--at", moment)
    assert (code, out) == (2, "")
    assert f"Expected `at` to be 'last', 'best' or a training loss such as 'loss=0.01', got {moment!r}." in err


def test_a_run_without_training_loss_at_equal_loss(tmp_path, capsys):
    write(tmp_path / "a", {LAMBDA: {1: 1.0}})
    code, _, err = run(capsys, tmp_path, "--at", "loss=0.1")
    assert code == 2
    assert "a: has no training loss, so that it is left out at loss=0.1." in err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    write(tmp_path / "a", {LAMBDA: {1: 1.0}})
    (tmp_path / "out").touch()
    code, out, err = run(capsys, tmp_path / "a", "--out", tmp_path / "out")
    assert code == 2
    assert "Expected `--out` to be a folder that can be written to" in err
    assert "1.000" in out


# ----------------------------------------------------------------------------------------------------- the command


def test_help_imports_neither_torch_nor_lightning_and_warns_of_equal_epochs():
    command = [sys.executable, "-X", "importtime", "-m", "lightning_flatness", "compare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "late it shrinks with the training loss" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & {"torch", "lightning", "numpy", "matplotlib", "tensorboard"}


def test_comparing_imports_neither_torch_nor_lightning(tmp_path):
    write(tmp_path / "a", {LAMBDA: {1: 1.0}})
    code = (
        "import sys; from lightning_flatness.__main__ import main; "
        "code = main(sys.argv[1:]); print(sorted({'torch', 'lightning'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "compare", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    with pytest.raises(SystemExit, match="2"):
        main(["compare"])
    assert "RUN" in capsys.readouterr().err


def test_what_counts_as_not_converged_is_what_the_monitor_does_not_reach():
    assert FlatnessMonitor().tol == inspect.signature(preset_metrics).parameters["tol"].default == TOLERANCE
