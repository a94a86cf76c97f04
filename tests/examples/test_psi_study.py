"""The study of PSI-flatness: its settings, its runs, and verdicts and figures from numbers."""

from __future__ import annotations

import csv
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
RESULTS = STUDIES / "results"
NAME = "psi_flatness_and_generalization"


pytestmark = pytest.mark.usefixtures("import_path_of_studies")


# --------------------------------------------------------------------------------------------------------------- runs


def test_settings_are_those_of_the_smallest_and_the_largest_psi_sharpness():
    import psi_flatness_and_generalization as study
    from report import read_csv
    from which_measure import FULL, settings

    rows = [row for row in read_csv(study.MODELS) if not row["setting"].endswith("changed weights")]
    other = settings(FULL)
    for kind in ("mlp", "cnn"):
        sharpness = {}
        for row in rows:
            if row["kind"] == kind:
                sharpness.setdefault(row["setting"], []).append(math.log(row["path"]))
        ordered = sorted(sharpness, key=lambda name: sum(sharpness[name]))
        recipes = study.FULL.settings()[kind].recipes
        assert list(recipes) == [ordered[0], ordered[-1]]
        for name, recipe in recipes.items():
            assert (recipe.batch_size, recipe.lr) == (other[name].batch_size, other[name].lr)


def small_pair():
    import psi_flatness_and_generalization as study

    pair = replace(study.QUICK, num_train={"mlp": 300}, loss=1.5, num_probe=100, num_points=5).settings()["mlp"]
    recipes = {name: replace(recipe, lr=2 * recipe.lr) for name, recipe in pair.recipes.items()}
    return replace(pair, recipes=recipes)


@pytest.mark.slow
def test_pair_is_measured_where_its_loss_is_and_drawn_equally_far():
    from four_kinds import data_of, train
    from psi_run import train_and_measure
    from torch.nn import functional as F

    from lightning_flatness import LossLandscape, OutputLoss, PSISharpness

    pair = small_pair()
    rows = train_and_measure("mlp", 0, pair, Path("nowhere"))
    data = data_of("digits", 300)
    models = [row for row in rows if row["part"] == "pair"]
    assert [row["setting"] for row in models] == list(pair.recipes)
    for row in models:
        module = train(pair.recipes[row["setting"]], 0).module
        x, y = (part[:100] for part in data.train)
        landscape = LossLandscape(module, [(x, y)], OutputLoss(F.cross_entropy))
        metric = PSISharpness(geometry="path", tol=1e-2)
        metric.update(landscape)
        assert row["path"] == pytest.approx(float(metric.compute()), rel=1e-4)
        assert row["train_loss"] <= 1.5
        surfaces = [r for r in rows if r["part"] == "surface" and r["setting"] == row["setting"]]
        assert len(surfaces) == 2 * 2 * 25
        middle = [r["loss"] for r in surfaces if r["x"] == r["y"] == 0]
        assert middle == [pytest.approx(float(landscape.loss()), rel=1e-4)] * 4
    for geometry, kind in itertools.product(("path", "path_norm"), ("random", "eigenvectors")):
        places = [r for r in rows if (r.get("geometry"), r.get("directions")) == (geometry, kind)]
        reach = {name: max(r["x"] for r in places if r["setting"] == name) for name in pair.recipes}
        assert len(set(reach.values())) == 1
    assert all(row["part"] == "pair" for row in train_and_measure("mlp", 1, pair, Path("nowhere")))


@pytest.mark.slow
def test_both_sides_of_the_bound_are_of_the_network_that_was_trained():
    from balance_bound import NoisyChain, largest_error
    from four_kinds import data_of
    from psi_run import NUM_DRAWS, SmallRecipe, pooled, train_and_measure, train_small

    recipe = SmallRecipe(4, 50, 0.1, "digits", 1000, 3)
    [row] = train_and_measure("4 units", 5, recipe, Path("nowhere"))
    data = data_of("digits", 1000)
    x, y = pooled(data.test)
    torch.testing.assert_close(x[:, :, 2, 3], data.test[0][:, :, 4:6, 6:8].mean(dim=(2, 3)))
    module = train_small(recipe, 5, pooled(data.train))
    assert row["test_error"] == pytest.approx(100 * float((module(x).argmax(dim=1) != y).double().mean()), abs=0.3)
    noisy = NoisyChain(module, NUM_DRAWS)
    right = largest_error(row["noisy_train_error"] / 100, noisy.complexity.budget(row["noise"], 1000))
    assert row["bound"] == pytest.approx(100 * right, rel=1e-9)
    assert row["noisy_test_error"] == pytest.approx(100 * noisy.error((x, y), row["noise"])[0])
    assert row["noisy_train_error"] < row["bound_if_balanced"] < row["bound"]
    assert row["holds"]


@pytest.mark.slow
def test_study_resumes_and_gives_the_same_numbers(tmp_path, monkeypatch):
    """In one process: what SIGKILL does to runs is tested with the machinery, which all studies share."""
    import psi_flatness_and_generalization as study

    tiny = replace(study.QUICK, num_train={"mlp": 300}, loss=1.5, num_probe=100, num_points=5, widths=(4,), epochs=2)
    monkeypatch.setattr(study, "QUICK", tiny)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["study", "--quick", "--workers", "1", "--out", str(out)])
    study.main()
    files = sorted((out / "runs").glob("*.json"))
    assert len(files) == 2 * 3
    tables = [out / f"{NAME}.csv", out / f"{NAME}_surfaces.csv"]
    whole = [path.read_text() for path in tables]
    kept = {path: path.stat().st_mtime_ns for path in files[::2]}
    for path in files[1::2]:
        path.unlink()
    study.main()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [path.read_text() for path in tables] == whole
    assert "6 runs at commit" in (out / f"{NAME}.md").read_text()
    assert all((out / f"{NAME}{end}.png").stat().st_size > 10_000 for end in ("", "_surfaces"))


# ------------------------------------------------------------------------------------------------- verdicts, pictures


def made_up(sharper, accuracy, bound):
    """Return rows of three seeds: by how much the second setting is sharper, its accuracy, and a bound."""
    rows = []
    for seed in range(3):
        for name, factor, percent in (("mlp: a", 1.0, 80.0), ("mlp: b", sharper, accuracy)):
            row = {"part": "pair", "setting": name, "seed": seed, "point": "loss=1", "reached": True, "bound": 99.9}
            row |= dict.fromkeys(("path", "path_norm", "lambda_max", "balance"), factor * (1 + 0.01 * seed))
            rows.append(row | {"balance_deciles": factor, "test_accuracy": percent + seed, "test_loss": 10 / percent})
        row = {"part": "bound", "setting": "s", "seed": seed, "point": "epochs=1", "reached": True, "applies": True}
        row |= {"noisy_test_error": 20.0 + seed, "bound": bound + 0.9 * seed, "bound_if_balanced": 25.0, "noise": 0.1}
        rows.append(row | {"test_error": 12.0, "num_paths": 90, "log_balance": 9.0, "nats": 300.0, "num_train": 1000})
    return [*rows, rows[-1] | {"seed": 3, "applies": False, "bound": None, "noisy_test_error": None}]


@pytest.mark.parametrize(
    ("sharper", "accuracy", "bound", "verdict", "violated"),
    [(3.0, 70.0, 40.0, "holds here", "0 of 3"), (0.5, 90.0, 15.0, "does not", "3 of 3")],
)
def test_verdicts_follow_from_the_numbers(sharper, accuracy, bound, verdict, violated):
    import psi_report as report

    rows = made_up(sharper, accuracy, bound)
    lines = [report.verdict_line(*claim) for claim in report.pair_claims(rows) + report.bound_claims(rows)]
    assert len(lines) == 7 + 1
    assert {line[-1] for line in lines} == {f"**{verdict}**"}
    assert {line[1] for line in lines[:7]} == {"MLP: b against a"}
    assert report.bound_cells(rows)[0][1] == violated
    assert [line[-1] for line in report.each_network(rows)] == ["holds" if bound > 21 else "violated"] * 3
    text = report.tables(rows, report_models())
    assert "is at least 99.9 %, whatever their errors" in text
    assert "does not apply to 1 of 4 networks" in text
    assert "more models would decide." in text.split("**The order**")[1]


def report_models():
    from report import read_csv

    return read_csv(RESULTS / "which_measure.csv")


def test_order_is_that_of_the_chains_of_the_study_of_measures():
    import psi_report as report

    chosen = report.chains(report_models())
    assert len(chosen) == 32
    assert {model["kind"] for model in chosen} == {"mlp", "cnn"}
    effects = {(claim.text, where): effect for claim, where, effect in report.order_claims(report_models())}
    assert len(effects) == 2 * len(report.ORDERED)
    agreeing = 0  # Kendall's tau within kinds by plain loops
    for a, b in itertools.combinations([m for m in chosen if m["kind"] == "mlp"], 2):
        agreeing += np.sign(a["path"] - b["path"]) * np.sign(a["loss_gap"] - b["loss_gap"])
    for a, b in itertools.combinations([m for m in chosen if m["kind"] == "cnn"], 2):
        agreeing += np.sign(a["path"] - b["path"]) * np.sign(a["loss_gap"] - b["loss_gap"])
    effect = effects[report.ORDERS.text, "PSI sharpness, path; test - train loss"]
    assert effect.estimate == pytest.approx(agreeing / (2 * 16 * 15 / 2))
    assert len(report.advantage_claims(report_models())) == 2 * 2 * 2


def test_pictures_say_what_they_show(tmp_path, monkeypatch):
    import psi_report as report

    made = []
    monkeypatch.setattr(report, "save", lambda figure, path: made.append(figure))
    rows = made_up(3.0, 70.0, 40.0)
    report.draw_models(rows, report_models(), tmp_path / "a.png", "title")
    assert "dots are seeds" in made[0].get_suptitle()
    assert "95 % interval" in made[0].get_suptitle()
    surfaces = [
        {"setting": name, "geometry": g, "directions": d, "x": x, "y": y, "loss": None if x > 0 < y else 1.0 + x * x}
        for name in ("mlp: a", "mlp: b")
        for g in report.GEOMETRIES
        for d in report.DIRECTIONS
        for x, y in itertools.product((-1.0, 0.0, 1.0), repeat=2)
    ]
    report.draw_surfaces(rows, surfaces, tmp_path / "b.png", "title")
    panels = made[1].axes[:8]
    assert "Grey: a path of the skeleton has reached 0" in made[1].get_suptitle()
    assert "test accuracy 70.0 %\nPSI sharpness 3" in panels[1].get_title()
    assert [panels[i].get_xlabel() for i in (0, 7)] == [
        "random directions of basis paths", "top eigenvectors of path norm"
    ]  # fmt: skip


def test_committed_bound_follows_from_the_committed_numbers():
    import psi_report as report
    from balance_bound import DELTA, largest_error
    from report import read_csv

    rows = read_csv(RESULTS / f"{NAME}.csv")
    networks = [row for row in rows if row["part"] == "bound" and row["applies"]]
    assert len(networks) == 4 * len({row["seed"] for row in networks}) >= 12
    for row in networks:
        budget = (row["nats"] + math.log(2 * math.sqrt(row["num_train"]) / DELTA)) / row["num_train"]
        assert row["bound"] == pytest.approx(100 * largest_error(row["noisy_train_error"] / 100, budget), rel=1e-9)
        assert row["holds"] == (row["noisy_test_error"] <= row["bound"])
    table = (RESULTS / f"{NAME}.md").read_text()
    for line in (*report.bound_cells(rows), *report.each_network(rows)):
        assert f"| {' | '.join(line)} |" in table
    readme = (STUDIES / "README.md").read_text()
    assert all(f"| {' | '.join(line)} |" in readme for line in report.bound_cells(rows))
    with (RESULTS / f"{NAME}_surfaces.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * 2 * 2 * 17**2
