"""compare on CSVLogger's files, against training loss and gradients, in notebooks, and as an interactive page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.modules import loaders
from helpers.screenshots import BROWSER, browse, needs_browser
from helpers.training import fit
from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_flatness import FlatnessMonitor, compare_runs
from lightning_flatness.__main__ import main
from lightning_flatness.compare import NothingToCompareError
from lightning_flatness.compare.axis import points

LAMBDA = "flatness/lambda_max"


def write(folder: Path, curves: dict[str, dict[int, float]]) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in curves.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two settings; every number is a power of two or a sum of few, which float32 holds exactly."""
    for name, factor in [("sgd", 1.0), ("sam", 0.5)]:
        curves = {
            LAMBDA: {0: 1.0, 10: 16.0 * factor, 20: 8.0 * factor},
            "flatness_errors/lambda_max_standard_error": {0: 0.25, 10: 2.0, 20: 1.0},
            "train_loss": {9: 1.0, 19: 0.25},
        }
        write(tmp_path / "logs" / name, curves | ({"sam/loss_rise": {9: 0.5}} if name == "sam" else {}))
    return tmp_path / "logs"


def test_metrics_csv_is_read_as_event_files_are(tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    logger.log_hyperparams({"lr": 0.1})
    run = fit(tmp_path, FlatnessMonitor(), data=loaders(), logger=logger, max_epochs=2)
    comparison = compare_runs([tmp_path], at=["last"])
    assert comparison.problems == ()
    (setting,) = comparison.settings
    curve = setting.runs[0].curves[LAMBDA]
    assert curve.steps.tolist() == [0, 5, 10]
    assert setting.cells["last", LAMBDA].mean == pytest.approx(float(run.callback_metrics[LAMBDA]), rel=1e-6)
    assert setting.cells["last", LAMBDA].converged
    assert setting.runs[0].hyperparameters["lr"] == 0.1
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open("a") as stream:
        stream.write("1,2")  # cut off
    assert compare_runs([tmp_path]).problems == ()


def test_a_csv_of_something_else_is_a_problem(tmp_path, logs):
    (logs / "other").mkdir()
    (logs / "other" / "metrics.csv").write_text("a,b\n1,2\n")
    (problem,) = compare_runs([logs]).problems
    assert "metrics.csv: cannot be read (has no column `step`)" in problem


def test_against_training_loss_and_gradients(logs, tmp_path):
    comparison = compare_runs([logs])
    sam, sgd = (setting.runs[0] for setting in comparison.settings)
    across, up, error = points(comparison, sgd, LAMBDA, "train_loss")
    # Between the points at 9 and 19 in the logarithm; the last one holds for step 20; before training there is none.
    np.testing.assert_allclose(across, [np.exp(0.1 * np.log(0.25)), 0.25])
    assert up.tolist() == [16.0, 8.0]
    assert error.tolist() == [2.0, 1.0]
    (bars, *_) = comparison.figure("train_loss").axes[0].collections
    assert [np.ptp(bar.vertices[:, 1]) for bar in bars.get_paths()] == [4.0, 2.0]
    assert points(comparison, sgd, LAMBDA, "gradients")[0].tolist() == [0.0, 10.0, 20.0]
    assert points(comparison, sam, LAMBDA, "gradients")[0].tolist() == [0.0, 20.0, 40.0]
    for x in ("step", "gradients", "train_loss", LAMBDA):
        (ax, *_) = comparison.figure(x).axes
        assert ax.get_xlabel() == x
        assert len(ax.lines) == 2
    assert comparison.figure("train_loss").axes[0].xaxis_inverted()
    with pytest.raises(NothingToCompareError, match=r"Expected `x` to be a curve .* Did you mean 'train_loss'\?"):
        comparison.figure("train_los")
    assert main(["compare", str(logs), "--x", "gradients", "--out", str(tmp_path / "out")]) == 0
    assert main(["compare", str(logs), "--x", "nonsense"]) == 2


@pytest.mark.parametrize(
    ("hyperparameters", "curve", "per_step"),
    [
        ({"sam_rho": 0.1}, None, 2),
        ({"sam_rho": 0.1, "sam_ascent": "momentum"}, None, 1),  # SAM in manual optimization
        ({"sam_rho": 0.1}, "sam/perturbation_norm", 1),
        ({"sam_rho": 0.0}, None, 1),
    ],
)
def test_gradients_per_step_of_sam(tmp_path, hyperparameters, curve, per_step):
    logger = CSVLogger(tmp_path, name="csv")
    logger.log_hyperparams(hyperparameters)
    for step in (5, 10):
        logger.log_metrics({LAMBDA: 1.0} | ({curve: 0.1} if curve else {}), step)
    logger.save()
    comparison = compare_runs([tmp_path])
    run = comparison.settings[0].runs[0]
    assert points(comparison, run, LAMBDA, "gradients")[0].tolist() == [5.0 * per_step, 10.0 * per_step]


def heights_of_bands(comparison):
    return [np.ptp(band.get_paths()[0].vertices[:, 1]) for band in comparison.figure().axes[0].collections]


def test_bands_hold_the_standard_errors(logs):
    assert heights_of_bands(compare_runs([logs])) == [10.0 - 0.75, 18.0 - 0.75]
    for name, value in [("seed0", 4.0), ("seed1", 1.0)]:
        errors = {} if name == "seed1" else {"flatness_errors/lambda_max_standard_error": {0: 1.0}}
        write(logs.parent / "seeds" / "sgd" / name, {LAMBDA: {0: value, 5: value}} | errors)
    assert heights_of_bands(compare_runs([logs.parent / "seeds"])) == [5.0 - 1.0]  # the upper end has an error
    no_errors = {LAMBDA: {0: 1.0, 5: 2.0}}
    write(logs.parent / "plain" / "sgd", no_errors)
    assert heights_of_bands(compare_runs([logs.parent / "plain"])) == []


def test_did_you_mean(logs, capsys):
    assert main(["compare", str(logs), "--metric", "lamda_max"]) == 2
    assert "Did you mean 'flatness/lambda_max'?" in capsys.readouterr().err


def test_in_a_notebook(logs, tmp_path):
    comparison = compare_runs([logs], at=["last"])
    html = comparison._repr_html_()
    assert html.count("<tr>") == 3
    assert "<td>sam</td>" in html
    comparison.figure().savefig(tmp_path / "figure.png")
    pytest.importorskip("pandas", reason="`to_pandas` needs pandas")
    frame = comparison.to_pandas().set_index(["setting", "metric"])
    assert frame.loc[("sgd", LAMBDA), "mean"] == 8.0


def test_a_page_says_what_it_needs(logs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert main(["compare", str(logs), "--html", str(tmp_path / "page.html")]) == 2
    assert "pip install lightning-flatness[html]" in capsys.readouterr().err


USE = """<script>
const say = {}, wait = () => new Promise(done => setTimeout(done, 300));
const column = n => [...document.querySelectorAll("tbody tr")].map(row => row.cells[n].textContent);
const click = item => ["mousedown", "mouseup", "click"].forEach(
  kind => item.dispatchEvent(new MouseEvent(kind, {bubbles: true, view: window, clientX: 0, clientY: 0})));
(async () => {
  await wait();
  const curves = document.getElementById("curves");
  say.before = column(0); document.querySelectorAll("th")[3].click(); say.sorted = column(3);
  document.querySelectorAll("th")[3].click(); say.reversed = column(3);
  Plotly.Fx.hover(curves, [{curveNumber: 0, pointNumber: 1}]); await wait();
  say.hover = [...curves.querySelectorAll(".hoverlayer text")].map(item => item.textContent).join(" ");
  say.shown = curves.querySelectorAll(".scatterlayer .trace").length;
  click(curves.querySelector(".legendtoggle")); await wait(); await wait(); await wait();
  say.off = curves.querySelectorAll(".scatterlayer .trace").length;
  document.body.innerHTML = "<pre>RESULT" + JSON.stringify(say) + "END</pre>";
})().catch(error => document.body.innerHTML = "<pre>RESULT" + JSON.stringify(String(error)) + "END</pre>");
</script>"""


@needs_browser
def test_in_a_browser_curves_are_hovered_settings_switched_off_and_the_table_sorted(logs, tmp_path):
    pytest.importorskip("plotly", reason="`--html` needs plotly")
    page = tmp_path / "page.html"
    assert main(["compare", str(logs), "--at", "last", "--html", str(page)]) == 0
    text = page.read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="', text)  # one file, no network
    page.write_text(text.replace("</body>", f"{USE}</body>"))
    dom = browse(BROWSER, page.as_uri(), "--dump-dom", seconds=20)
    found = re.search(r"RESULT(.*)END", dom)
    assert found, dom[-2000:]
    said = json.loads(found[1])
    assert said["before"] == ["sam", "sgd"]
    assert said["sorted"] == ["4.000", "8.000"]
    assert said["reversed"] == ["8.000", "4.000"]
    assert "8" in said["hover"]
    assert "sam" in said["hover"]
    assert said["shown"] == 4
    assert said["off"] == 2  # one click on the legend hides the setting in both panels
