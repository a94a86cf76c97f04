"""The study of SAM's price: gradients are counted as they are taken, and its verdicts follow from numbers."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

STEPS = 5
"""Of an epoch of the small runs."""


pytestmark = pytest.mark.usefixtures("import_path_of_studies")


def small(**changes):
    from price_run import PriceRecipe

    recipe = PriceRecipe(lr=0.02, batch_size=40, momentum=0.9, num_train=200, num_test=100, num_probe=125)
    return replace(recipe, **{"max_epochs": 8, "epochs": 2, "gradients": 4, "data": "digits"} | changes)


def run(recipe, folder, seed=3):
    from price_run import train_and_measure

    rows = train_and_measure("a setting", seed, recipe, folder / "a setting" / f"seed{seed}", Path("nowhere"))
    return {row["point"]: row for row in rows}


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "spent", "steps"),
    [  # by hand: gradients after 2 epochs of 5 steps, and the step at which 4 x 5 gradients are spent
        ({}, 10, 20),
        ({"rho": 0.05}, 20, 10),
        ({"rho": 0.05, "interval": 5}, 12, 16),  # second passes in steps 0, 5, 10 and 15: 16 + 4 are 20 after 16
        ({"rho": 0.05, "start_epoch": 1}, 15, 13),
        ({"rho": 0.5, "geometry": "element"}, 20, 10),
        ({"rho": 0.05, "ascent": "momentum"}, 10, 20),
        ({"rho": 0.05, "ascent": "previous"}, 10, 20),
    ],
)
def test_gradients_are_those_that_were_taken(options, spent, steps, tmp_path, monkeypatch):
    from to_accuracy import SgdModule

    num_calls, counted = 0, []
    whole_step = SgdModule.training_step

    def training_step(self, batch, batch_idx):
        nonlocal num_calls
        num_calls += 1
        return whole_step(self, batch, batch_idx)

    monkeypatch.setattr(SgdModule, "training_step", training_step)
    import price_run

    measure = price_run.PriceMonitor.measure

    def measure_and_count(self, point, *args):
        counted.extend([(point, num_calls)] * (point in self.pending))
        measure(self, point, *args)

    monkeypatch.setattr(price_run.PriceMonitor, "measure", measure_and_count)
    rows = run(small(**options), tmp_path)
    assert {point: row["gradients"] * STEPS for point, row in rows.items()} == pytest.approx(dict(counted))
    assert rows["epochs"]["gradients"] * STEPS == pytest.approx(spent)
    assert (rows["epochs"]["step"], rows["gradients"]["step"]) == (2 * STEPS, steps)
    assert rows["gradients"]["gradients"] * STEPS in (20, 21)
    assert all(row["lambda_max"] > 0 and row["invariant_sharpness"] > 0 and row["seconds"] > 0 for row in rows.values())


@pytest.mark.slow
def test_run_is_momentum_sgd_and_measuring_changes_nothing(tmp_path):
    """The reference is a loop by hand, which measures nothing in between."""
    from price_run import train_and_measure
    from to_accuracy import data_of, network_of

    recipe = small()
    data = data_of(recipe, Path("nowhere"), "cpu")
    torch.manual_seed(3)
    net = network_of(recipe, data.pixels)
    (x, y), velocity = data.train, [torch.zeros_like(p) for p in net.parameters()]
    losses = []
    for _ in range(4):
        for chosen in torch.randperm(len(x)).split(recipe.batch_size):
            gradients = torch.autograd.grad(F.cross_entropy(net(x[chosen]), y[chosen]), list(net.parameters()))
            with torch.no_grad():
                for p, v, gradient in zip(net.parameters(), velocity, gradients, strict=True):
                    v.mul_(recipe.momentum).add_(gradient)
                    p -= recipe.lr * v
        losses.append(float(F.cross_entropy(net(x), y).detach()))
    level = 1.001 * losses[2]
    rows = train_and_measure("s", 3, replace(recipe, loss=level), tmp_path / "s" / "seed3", Path("nowhere"))
    by_point = {row["point"]: row for row in rows}
    assert by_point["epochs"]["train_loss"] == pytest.approx(losses[1], rel=1e-4)
    assert by_point["gradients"]["train_loss"] == pytest.approx(losses[3], rel=1e-4)
    first = next(i for i, loss in enumerate(losses) if loss <= level)
    assert by_point["loss"]["epoch"] == first + 1
    assert by_point["loss"]["train_loss"] == pytest.approx(losses[first], rel=1e-4)


@pytest.mark.slow
def test_level_of_the_loss_before_sam_has_begun_is_no_point(tmp_path):
    rows = run(small(rho=0.05, start_epoch=1, loss=100.0), tmp_path)
    assert not rows["loss"]["reached"]
    assert rows["epochs"]["reached"]
    late = run(small(loss=1e-9), tmp_path)
    assert (late["loss"]["reached"], late["epochs"]["reached"]) == (False, True)


@pytest.mark.slow
def test_diverged_run_has_no_numbers_and_ends(tmp_path):
    rows = run(small(lr=1e6, loss=0.1), tmp_path)
    assert set(rows) == {"epochs", "gradients", "loss"}
    assert not any(row["reached"] for row in rows.values())


# --------------------------------------------------------------------------------------------------------- the study


def rows_of(study, size, curvature, accuracy):
    """Return rows of three seeds with these factors and differences to SGD, by method."""
    columns = {"train_loss": 0.1, "epoch": 6, "seconds": 2.0, "gradients": 6.0}
    return [
        {"setting": name, "seed": seed, "point": point, "reached": True, **columns}
        | {column: 10.0 * curvature.get(method, 1.0) * (1 + 1e-3 * seed) for column in ("lambda_max",)}
        | {"invariant_sharpness": 5.0 / curvature.get(method, 1.0), "test_accuracy": 80 + accuracy.get(method, 0.0)}
        for name, recipe in size.settings().items()
        for method in [name.split(", batch")[0]]
        for point in ("epochs", "gradients", "loss")
        if getattr(recipe, point)
        for seed in range(3)
    ]


def test_every_method_is_compared_at_every_point():
    import sam_at_what_price as study

    for size in (study.FULL, study.QUICK):
        settings = size.settings()
        assert len(settings) == 2 * (9 + 3)
        for name, recipe in settings.items():
            assert (recipe.rho == 0) == name.startswith("SGD")
            total = recipe.epochs or recipe.gradients
            if name.startswith("SAM, last") and not recipe.epochs:  # an epoch with SAM takes two gradients
                total = recipe.start_epoch + (recipe.gradients - recipe.start_epoch) / 2
            if name.startswith("SAM, last"):
                share = float(name.split()[2]) / 100
                assert 1 - recipe.start_epoch / total == pytest.approx(share, abs=0.5 / total + 0.01)
            assert recipe.max_epochs >= total
    judged = study.judged(rows_of(study, study.FULL, {}, {}), study.FULL)
    assert len(judged) == 3 * 2 * 3 * 8


def test_verdicts_follow_from_the_numbers_of_a_file(tmp_path):
    import sam_at_what_price as study
    from report import write_csv

    rows = rows_of(study, study.QUICK, {"SAM": 0.5, "ASAM": 0.9}, {"SAM": 1.0, "ASAM": -0.2})
    write_csv(rows, tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as file:
        read = [
            {k: v if k in ("setting", "point") else v == "True" if k == "reached" else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
    lines = study.verdict_lines(read, study.QUICK)
    assert lines == study.verdict_lines(rows, study.QUICK)
    for line in lines:
        method = line[1].split(", batch")[0]
        assert line[-1].strip("*") == ("holds here" if method == "SAM" else "does not"), line
    effects = {line[2] for line in lines if line[1].startswith("SAM, batch")}
    assert effects == {"x 0.5", "x 2", "+1.00 %"}
    answers = list(study.answer(rows, study.QUICK))
    assert len(answers) == 6
    assert answers[0] == "- batch 32, equal epochs: SAM x 0.50 (6.0 epochs of gradients)."


def test_points_that_were_not_reached_are_left_out():
    import sam_at_what_price as study

    rows = rows_of(study, study.QUICK, {}, {})
    for row in rows:
        if row["setting"].startswith("SAM, last 10 %") and row["point"] == "loss":
            row["reached"] = False
    where = {line[1] for line in study.verdict_lines(rows, study.QUICK)}
    assert "SAM, last 10 %, batch 32: equal epochs" in where
    assert "SAM, last 10 %, batch 32: equal train loss" not in where
    assert ["batch 32: equal train loss", "SAM, last 10 %", *["–"] * 7] in study.mean_lines(rows, study.QUICK)


def test_picture_says_what_its_bands_are(tmp_path, monkeypatch):
    import sam_at_what_price as study

    made = []
    monkeypatch.setattr(study, "save", lambda figure, path: made.append(figure))
    rows = [row for row in rows_of(study, study.QUICK, {"SAM": 0.5}, {}) if "ASAM" not in row["setting"]]
    study.draw(rows, study.QUICK, tmp_path / "a.png", "title")
    assert "one standard deviation over seeds" in made[0].get_suptitle()
    assert len(made[0].axes) == 2 * len(study.PANELS)
    assert study.range_of([1.0, 3.0], log=False) == pytest.approx((2 - 2**0.5, 2, 2 + 2**0.5))
    assert study.range_of([2.0, 8.0], log=True)[1] == pytest.approx(4)


@pytest.mark.slow
def test_killed_study_resumes_and_gives_the_same_numbers(tmp_path, monkeypatch):
    """In one process: what SIGKILL does to runs is tested with the machinery, which all studies share."""
    import sam_at_what_price as study

    tiny = replace(study.QUICK, base=small(epochs=0, gradients=0), lr={40: 0.02}, loss={40: 2.0}, epochs=1)
    monkeypatch.setattr(study, "QUICK", tiny)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["study", "--quick", "--seeds", "2", "--workers", "1", "--out", str(out)])
    study.main()
    whole, files = (out / "sam_at_what_price.csv").read_text(), sorted((out / "runs").glob("*.json"))
    assert len(files) == 24
    assert (out / "sam_at_what_price.png").stat().st_size > 10_000
    table = (out / "sam_at_what_price.md").read_text()
    assert "24 runs at commit" in table
    assert "would decide" in table
    kept = {path: path.stat().st_mtime_ns for path in files[::2]}
    for path in files[1::2]:
        path.unlink()
    study.main()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert without_seconds(out / "sam_at_what_price.csv") == without_seconds(whole)


def without_seconds(table):
    text = table if isinstance(table, str) else table.read_text()
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(text.splitlines())]
