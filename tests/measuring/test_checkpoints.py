"""`measure_checkpoints` and `lightning-flatness measure`, as a user meets them: after the run, from another process."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import user_program
from helpers.modules import Classifier, loader
from helpers.processes import run_python
from helpers.training import fit
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_flatness import FlatnessMonitor, compare_runs, measure, measure_checkpoints
from lightning_flatness.__main__ import main
from lightning_flatness.measuring import CheckpointError, checkpoints

PROGRAM = Path(user_program.__file__)
CONFIG = """
seed_everything: 3
trainer:
  max_epochs: 3
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
  default_root_dir: .
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: ., name: run, version: v}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_top_k: -1, save_last: true}
    - class_path: lightning_flatness.FlatnessMonitor
      init_args: {every_n_epochs: 3}
model: {widths: [7, 5], lr: 0.05}
data: {batch_size: 8}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LightningCLI, monitored before training and after the last epoch only."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copy(PROGRAM, folder / "main.py")
    (folder / "run.yaml").write_text(CONFIG)
    done = run_python("main.py", "fit", "-c", "run.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def user(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shutil.copytree(finished, tmp_path / "user")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("main", None)
    return folder


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.ckpt"))}


NAMED = {"module": "main:Net", "data": "main:Data"}


def test_a_run_of_lightningcli_is_measured_from_another_process(user):
    before, direct = hashes(user), points(user / "run" / "v", "direct")
    command = ("-m", "lightning_flatness", "measure", "run", "--module", "main:Net", "--data", "main:Data")
    done = run_python(*command, "--out", "out", cwd=user)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["checkpoint", "step", "epoch", "lambda"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        [f"epoch={e}-step={5 * (e + 1)}.ckpt", str(5 * (e + 1)), str(e)] for e in range(3)
    ]
    assert "±" in lines[1]
    assert [f"[{i}/3]" in done.stderr for i in (1, 2, 3)] == [True] * 3
    assert hashes(user) == before
    assert points(user / "run" / "v", "direct") == direct  # `training_step` has logged nothing

    # One curve in TensorBoard and compare: the monitor's points at 0 and 15, and between them those of checkpoints.
    curve = points(user / "run" / "v", "flatness/lambda_max")
    assert [step for step, _ in curve] == [0, 5, 10, 15]
    (setting,) = compare_runs([user / "run"]).settings
    assert setting.runs[0].curves["flatness/lambda_max"].steps.tolist() == [0, 5, 10, 15]
    assert "5 points at step 15 were there already" not in done.stdout  # as many as the monitor has
    assert "at step 15 were there already" in done.stdout

    # The number after the run equals the last point of the monitor within both residuals.
    rows = list(csv.DictReader((user / "out" / "flatness.csv").read_text().splitlines()))
    document = json.loads((user / "out" / "flatness.json").read_text())
    assert [row["step"] for row in rows] == ["5", "10", "15"]
    assert document["checkpoints"][2]["lambda_max"] == float(rows[2]["lambda_max"])
    for name in ("lambda_max", "invariant_sharpness"):
        value, residual = float(rows[2][name]), float(rows[2][f"{name}_residual"])
        assert value == pytest.approx(dict(points(user / "run" / "v", f"flatness/{name}"))[15], abs=2 * residual + 1e-6)
    assert float(rows[2]["stability_edge"]) == pytest.approx((2 + 2 * 0.9) / 0.05)


def test_a_second_call_measures_nothing_anew_and_doubles_no_point(user, monkeypatch):
    first = measure_checkpoints(["run"], **NAMED)
    assert first.problems == ()
    monkeypatch.setattr("lightning_flatness.measuring.session.build", None)
    second = measure_checkpoints(["run"], **NAMED)
    assert [c.report.values for c in second] == [c.report.values for c in first]
    assert [step for step, _ in points(user / "run" / "v", "flatness/lambda_max")] == [0, 5, 10, 15]
    assert len(list((user / "run" / "v").glob("*tfevents*"))) == 2  # the run's, and one of all its checkpoints
    with pytest.raises(AssertionError):  # other settings are measured
        assert measure_checkpoints(["run"], **NAMED, probe_size=8).problems == ()


def test_interrupted_it_keeps_what_it_has_and_goes_on_from_there(user, monkeypatch, capsys):
    calls = []
    build = checkpoints.Session.measured

    def interrupts(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return build(*args, **kwargs)

    monkeypatch.setattr(checkpoints.Session, "measured", interrupts)
    assert main(["measure", "run", "--module", "main:Net", "--data", "main:Data"]) == 130
    output = capsys.readouterr()
    assert "interrupted after 2 of 3" in output.err
    assert len(output.out.splitlines()) == 3
    records = (user / "run" / "v" / "flatness.jsonl").read_text().splitlines()
    assert len(records) == 2
    (user / "run" / "v" / "flatness.jsonl").write_text("\n".join([*records, records[0][:40]]))  # killed while writing
    monkeypatch.setattr(checkpoints.Session, "measured", build)
    assert [c.step for c in measure_checkpoints(["run"], **NAMED)] == [5, 10, 15]


def test_config_names_classes_in_subclass_mode_and_says_what_is_missing_otherwise(user):
    folder = user / "run" / "v"
    assert "Pass --module package.mod:Class" in measure_checkpoints([folder]).problems[0]
    assert "Pass --data package.mod:Class" in measure_checkpoints([folder], module="main:Net").problems[0]
    config = (folder / "config.yaml").read_text().split("model:")[0]
    config += (
        "model: {class_path: main.Net, init_args: {widths: [7, 5], lr: 0.05}}\n"
        "data: {class_path: main.Data, init_args: {batch_size: 8}}\n"
    )
    (folder / "config.yaml").write_text(config)
    measured = measure_checkpoints([folder / "checkpoints"], writes=False)
    assert measured.problems == ()
    assert len(measured) == 3
    assert not (folder / "flatness.jsonl").exists()


def test_every_broken_checkpoint_is_named_and_the_others_are_measured(user, capsys):
    folder = user / "run" / "v" / "checkpoints"
    whole = folder / "epoch=2-step=15.ckpt"
    (folder / "truncated.ckpt").write_bytes(whole.read_bytes()[:-500])
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save({"weights": 1}, folder / "other.ckpt")
    content = torch.load(whole, weights_only=True)
    content["state_dict"] = {f"backbone.{name}": value for name, value in content["state_dict"].items()}
    torch.save(content, folder / "of_another_class.ckpt")
    code = main(["measure", "run", "missing", "--module", "main:Net", "--data", "main:Data", "--no-write"])
    output = capsys.readouterr()
    assert code == 2
    assert len(output.out.splitlines()) == 4
    for name, words in [
        ("truncated.ckpt", "cut off or none"),
        ("empty.ckpt", "cut off or none"),
        ("other.ckpt", "got the keys weights"),
        ("of_another_class.ckpt", "Expected the weights of Net, got a checkpoint that lacks 6 (net.0.0.bias,"),
        ("missing", "no such file"),
    ]:
        assert any(f"{name}: " in line and words in line for line in output.err.splitlines()), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--module", "main:OtherNet", "--data", "main:Data"], "Expected the weights of OtherNet, got others"),
        (["--module", "main:Nothing"], "Expected 'main:Nothing' to name something"),
        (["--module", "main:Net", "--data", "nowhere.code:Data"], "Expected 'nowhere.code:Data' to name something"),
        (["--module", "main:Net", "--data", "main:Data", "--metrics", "lamda_max"], "Did you mean 'lambda_max'"),
        (
            ["--module", "main:Net", "--data", "main:Data", "--parameters", "head.*"],
            "matches none. Names near it: ",
        ),
        (["--module", "main:Net", "--data", "main:Data", "--weights", "averaged"], "Expected averaged weights"),
        (["--module", "main:Net", "--data", "main:Data", "--split", "val"], "`val_dataloader`"),
        (["--config", "missing.yaml"], "Expected missing.yaml to be YAML"),
        (["--mode", "evl"], "Expected `mode` to be one of 'batch_statistics', 'eval', 'train', got 'evl'"),
        (["--probe-size", "0"], "Expected `probe_size` to be >= 1, got 0"),
        (["--device", "warp:9"], "Expected `device` to be one that this machine has, got 'warp:9'"),
    ],
)
def test_what_does_not_fit_is_said_with_exit_code_2(user, capsys, arguments, words):
    assert main(["measure", "run/v/checkpoints/last.ckpt", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_a_config_hyperparameters_come_from_the_checkpoint(user):
    checkpoint = user / "mine" / "model.ckpt"
    checkpoint.parent.mkdir()
    shutil.copy(user / "run" / "v" / "checkpoints" / "last.ckpt", checkpoint)
    measured = measure_checkpoints([checkpoint], module="main:Net", data="main:Data", tol=1e-5)
    assert measured.problems == ()
    assert measured[0].report.num_samples == 40
    assert "Pass --module" in measure_checkpoints([checkpoint]).problems[0]
    assert "Pass --data" in measure_checkpoints([checkpoint], module=user_program.Net).problems[0]


def test_hyperparameters_that_need_code_are_refused_with_a_hint(user):
    folder = user / "run" / "v" / "checkpoints"
    content = torch.load(folder / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["activation"] = nn.Tanh()
    torch.save(content, folder / "last.ckpt")
    options = {"module": "main:Net", "data": "main:Data", "writes": False}
    (problem,) = measure_checkpoints([folder / "last.ckpt"], **options).problems
    assert "torch.nn.modules.activation.Tanh" in problem
    assert "--no-weights-only" in problem
    assert measure_checkpoints([folder / "last.ckpt"], **options, weights_only=False).problems == ()


def checkpoint_of(path: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> Path:
    saves = ModelCheckpoint(path, filename="model", save_top_k=-1)
    fit(path, *callbacks, saves, module=module, max_epochs=2, enable_checkpointing=True, **options)
    (found,) = path.glob("model*.ckpt") if not (path / "model-v1.ckpt").exists() else [path / "model-v1.ckpt"]
    return found


def measured_value(path: Path, **options: Any) -> float:
    measured = measure_checkpoints([path], module=Classifier, data=loader, tol=1e-6, writes=False, **options)
    assert measured.problems == ()
    return measured[0].report.values["lambda_max"]


def test_names_that_compile_and_ddp_put_before_weights(tmp_path):
    module = Classifier()
    expected = measure(module, loader(), tol=1e-6).values["lambda_max"]
    state = module.state_dict()
    wrapped = {
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "inner": {name.replace("net.", "net._orig_mod."): value for name, value in state.items()},
        "ddp": {f"module.{name}": value for name, value in state.items()},
        "both": {f"module._orig_mod.{name}": value for name, value in state.items()},
    }
    for name, weights in wrapped.items():
        torch.save({"state_dict": weights, "global_step": 1}, tmp_path / f"{name}.ckpt")
        assert measured_value(tmp_path / f"{name}.ckpt") == pytest.approx(expected, rel=1e-4), name
    torch.save(state, tmp_path / "plain.ckpt")
    assert measured_value(tmp_path / "plain.ckpt") == pytest.approx(expected, rel=1e-4)
    compiled = torch.compile(Classifier())
    compiled.load_state_dict({f"_orig_mod.{name}": value for name, value in state.items()})
    torch.save({"state_dict": compiled.state_dict()}, tmp_path / "real.ckpt")
    assert measured_value(tmp_path / "real.ckpt") == pytest.approx(expected, rel=1e-4)


def test_averaged_model_of_torch(tmp_path):
    module = Classifier()
    average = AveragedModel(module)
    average.update_parameters(module)
    torch.save({"state_dict": average.state_dict(), "global_step": 4}, tmp_path / "ema.ckpt")
    expected = measure(module, loader(), tol=1e-6).values["lambda_max"]
    assert measured_value(tmp_path / "ema.ckpt", weights="averaged") == pytest.approx(expected, rel=1e-4)
    (problem,) = measure_checkpoints([tmp_path / "ema.ckpt"], module=Classifier, data=loader).problems
    assert "Pass --weights averaged" in problem


def test_weights_of_lightnings_averaging_callbacks(tmp_path):
    ema = pytest.importorskip(
        "lightning.pytorch.callbacks.weight_averaging", reason="lightning 2.6 brings WeightAveraging"
    ).EMAWeightAveraging(decay=0.5)
    callback = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    for name, averaging in [("ema", ema), ("swa", callback)]:
        torch.manual_seed(0)
        path = checkpoint_of(tmp_path / name, Classifier(), averaging)
        both = measure_checkpoints([path], module=Classifier, data=loader, tol=1e-6, weights="both")
        assert both.problems == ()
        assert ["stability_edge" in c.report.values for c in both] == [True, False]  # nothing trains an average
        values = {c.weights: c.report.values["lambda_max"] for c in both}
        content = torch.load(path, weights_only=True)
        trained = content.get("current_model_state", content["state_dict"])
        module = Classifier()
        module.load_state_dict(trained)
        assert values["trained"] == pytest.approx(measure(module, loader(), tol=1e-6).values["lambda_max"], rel=1e-4)
        assert abs(values["averaged"] / values["trained"] - 1) > 1e-4
        step = both[0].step
        folder = tmp_path / name
        curve = points(folder, "flatness/lambda_max")
        averaged = points(folder, "flatness_averaged/lambda_max")
        assert curve == [(step, pytest.approx(values["trained"]))]
        assert averaged == [(step, pytest.approx(values["averaged"]))]


def test_double_precision_and_bfloat16(tmp_path):
    module = Classifier().double()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "double.ckpt")
    measured = measure_checkpoints([tmp_path / "double.ckpt"], module=Classifier, data=loader, tol=1e-10, writes=False)
    assert measured.problems == ()
    batches = [(x.double(), y) for x, y in loader(shuffle=False)]
    expected = measure(module, batches, tol=1e-10).values["lambda_max"]
    assert measured[0].report.values["lambda_max"] == pytest.approx(expected, rel=1e-9)
    half = checkpoint_of(tmp_path / "half", Classifier(), precision="bf16-true")
    module = Classifier()
    module.load_state_dict(torch.load(half, weights_only=True)["state_dict"])
    assert measured_value(half) == pytest.approx(measure(module, loader(), tol=1e-6).values["lambda_max"], rel=0.02)


def test_only_some_parameters(tmp_path):
    module = Classifier()
    torch.save(module.state_dict(), tmp_path / "model.ckpt")
    value = measured_value(tmp_path / "model.ckpt", parameters="net.2.*")
    module.net[0].requires_grad_(False)
    assert value == pytest.approx(measure(module, loader(), tol=1e-6).values["lambda_max"], rel=1e-4)


def test_results_show_themselves(tmp_path):
    for step in (1, 2):
        torch.save({"state_dict": Classifier().state_dict(), "global_step": step}, tmp_path / f"{step}.ckpt")
    measured = measure_checkpoints([tmp_path], module=Classifier, data=loader, writes=False)
    assert len(str(measured).splitlines()) == 3
    assert measured._repr_html_().count("<tr>") == 3
    measured.figure().savefig(tmp_path / "curve.png")
    pytest.importorskip("pandas", reason="`to_pandas` needs pandas")
    assert measured.to_pandas()["lambda_max"].tolist() == [c.report.values["lambda_max"] for c in measured]


def test_defaults_are_the_monitors():
    monitor, own = (inspect.signature(f).parameters for f in (FlatnessMonitor, measure_checkpoints))
    for name in ("top_k", "probe_size", "probe_batch_size", "split", "mode", "tol", "seed", "log_key_prefix"):
        assert own[name].default == monitor[name].default, name


def test_a_config_that_is_none_is_an_error(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1")
    with pytest.raises(CheckpointError, match="keys `model` and `trainer`"):
        measure_checkpoints([tmp_path], config=tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["split", "weights"])
def test_what_python_cannot_know_from_types(tmp_path, name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be one of 'tra.*, got 'ema'"):
        measure_checkpoints([tmp_path], **{name: "ema"})


def test_two_checkpoints_of_a_step_are_rows_and_the_first_is_the_point(tmp_path):
    for name in "ab":
        torch.save({"state_dict": Classifier().state_dict(), "global_step": 7}, tmp_path / f"{name}.ckpt")
    measured = measure_checkpoints([tmp_path], module=Classifier, data=loader)
    first, second = (c.report.values["lambda_max"] for c in measured)
    assert first != second
    assert points(tmp_path, "flatness/lambda_max") == [(7, pytest.approx(first))]
    assert "points at step 7 were there already" in measured.notes[0]


def test_help_comes_at_once():
    code = "import sys; from lightning_flatness.__main__ import main\ntry:\n    main(['measure', '--help'])\n"
    code += "except SystemExit:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
