"""The LightningCLI example as a user runs it; then what TensorBoard serves of it, and what a browser shows."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from helpers.screenshots import BROWSER, browse, needs_browser, screenshot
from helpers.tensorboard_server import Server, tensorboard
from matplotlib import image

import lightning_flatness
from lightning_flatness.compare import read_runs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cli"
CURVES = ("flatness/lambda_max", "flatness/invariant_sharpness", "train_loss", "test_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with SGD and with SAM for an epoch, by the page's commands; return where `logs` is."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("sgd", "sam"):
        python(folder, EXAMPLE / "main.py", "fit", "-c", EXAMPLE / f"{name}.yaml", "-c", EXAMPLE / "flatness.yaml",
               "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false")  # fmt: skip
    return folder


def python(folder: Path, *arguments: Any) -> str:
    path = os.pathsep.join([str(Path(lightning_flatness.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with tensorboard(folder / "logs", folder / "tensorboard.log") as server:
        server.wait_for(lambda: len(server.get("data/plugin/scalars/tags")) == 2)
        yield server


def test_both_settings_are_compared_by_one_command(folder):
    table = python(folder, "-m", "lightning_flatness", "compare", "logs", "--at", "last", "--out", "out")
    assert [line.split()[:3] for line in table.splitlines()[:3]] == [
        ["setting", "runs", "at"],
        ["sam", "1", "last"],
        ["sgd", "1", "last"],
    ]
    document = json.loads((folder / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert set(CURVES) <= set(document["metrics"])
    sam, sgd = (setting["runs"][0]["hyperparameters"] for setting in document["settings"])
    assert (sam["sam_rho"], sgd["sam_rho"]) == (0.1, 0.0)
    assert sgd["lr"] == sam["lr"] == 0.02
    assert sgd["batch_size"] == 32


def test_the_commands_of_the_page_are_those_of_the_example():
    page = (EXAMPLE / "README.md").read_text()
    docstring = (EXAMPLE / "main.py").read_text()
    commands = re.findall(r"^    (\S*python main.py .*|\S*lightning-flatness .*)$", docstring, re.M)
    assert len(commands) == 3
    for command in commands:
        assert command in page


def test_scalars_are_served_with_their_values(folder, server):
    runs, _ = read_runs([folder / "logs"])
    assert len(runs) == 2
    for run in runs:
        for tag in CURVES:
            points = server.get("data/plugin/scalars/scalars", run=run.name, tag=tag)
            assert [step for _, step, _ in points] == run.curves[tag].steps.tolist()
            assert [value for _, _, value in points] == pytest.approx(run.curves[tag].values.tolist())
    assert len(runs[0].curves["flatness/lambda_max"]) == 2


def test_custom_scalars_are_served_with_the_layout(server):
    layout = server.wait_for(lambda: server.get("data/plugin/custom_scalars/layout"))
    charts = {c["title"]: c["multiline"]["tag"] for category in layout["category"] for c in category["chart"]}
    assert charts["edge of stability: lambda_max"] == ["flatness/lambda_max$", "flatness/stability_edge$"]
    assert charts["lambda_max … lambda_5"][1:] == [f"flatness/lambda_{i}$" for i in range(2, 6)]
    query = urlencode({"run": "sgd/version_0", "tag": "flatness/stability_edge$"})
    served = json.loads(server.read(f"data/plugin/custom_scalars/scalars?{query}"))
    assert served["regex_valid"]
    (points,) = served["tag_to_events"].values()
    assert points[-1][2] == pytest.approx(2 * 1.9 / 0.02)  # (2 + 2 momentum) / lr


def test_images_are_served_as_pictures(server):
    tags = server.wait_for(lambda: server.get("data/plugin/images/tags"))
    assert "flatness/loss_surface" in tags["sam/version_0"]
    images = server.get("data/plugin/images/images", run="sam/version_0", tag="flatness/loss_surface", sample=0)
    assert images[0]["step"] == 0
    data = server.read(f"data/plugin/images/individualImage?{images[0]['query']}")
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) > 300


def test_hparams_are_served_with_flatness_as_outcome(folder, server):
    experiment = server.post("data/plugin/hparams/experiment", experimentName="", includeMetrics=True)
    columns = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert columns[:3] == ["flatness/lambda_max", "flatness/invariant_sharpness", "flatness/edge_of_stability"]
    assert {"test_accuracy", "train_loss"} <= set(columns)
    assert "hp_metric" not in columns
    assert {"lr", "batch_size", "sam_rho"} <= {info["name"] for info in experiment["hparamInfos"]}
    for order, first in {"ORDER_ASC": min, "ORDER_DESC": max}.items():
        groups = session_groups(server, order)
        assert len(groups) == 2
        values = [next(m["value"] for m in g["metricValues"] if m["name"]["tag"] == CURVES[0]) for g in groups]
        assert values[0] == first(values)
    runs, _ = read_runs([folder / "logs"])
    expected = {run.name: run for run in runs}
    for group in groups:
        (session,) = group["sessions"]
        run = expected[session["name"]]
        assert group["hparams"] == run.hyperparameters
        for value in group["metricValues"]:
            assert value["value"] == pytest.approx(run.curves[value["name"]["tag"]].values[-1])


def session_groups(server: Server, order: str) -> Any:
    """Ask for the rows of the HParams tab, sorted by lambda_max."""
    column = {"metric": {"tag": CURVES[0]}, "order": order}
    statuses = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    query = {"allowedStatuses": statuses, "colParams": [column], "startIndex": 0, "sliceSize": 100}
    return server.post("data/plugin/hparams/session_groups", experimentName="", **query)["sessionGroups"]


PAGES = {
    "custom_scalars": [(255, 112, 67), (0, 119, 187)],  # the curves of either run
    "hparams": [(63, 81, 181)],  # check marks at hyperparameters and metrics
}


@needs_browser
@pytest.mark.parametrize("page", list(PAGES))
def test_a_browser_shows_what_is_served(server, tmp_path, page):
    picture = screenshot(BROWSER, f"{server.url}/#{page}", tmp_path / "page.png")
    pixels = (255 * image.imread(picture)[..., :3]).round().astype(int)
    bar = (245, 124, 0)
    for color in (bar, *PAGES[page]):
        shown = (abs(pixels - color) <= 8).all(-1).sum()
        assert shown > (50_000 if color == bar else 300), f"{color}: {shown} pixels"


@needs_browser
def test_a_browser_lists_the_runs_and_the_curves(server):
    text = browse(BROWSER, f"{server.url}/#timeseries", "--dump-dom")
    for name in ("sgd/version_0", "sam/version_0", "flatness", "test_accuracy"):
        assert name in text
