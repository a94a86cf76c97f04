"""Studies: verdicts follow from numbers, and a study that was killed ends as if it had not been."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.study_processes import finish, kill_in_the_middle, study_processes
from scipy import stats

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "examples" / "studies"
RESULTS = STUDIES / "results"


pytestmark = pytest.mark.usefixtures("import_path_of_studies")


# --------------------------------------------------------------------------------------------------- judging an effect


def effect(low, high, unit=""):
    from verdicts import Effect

    return Effect((low + high) / 2, low, high, 5, unit)


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.1, 0.9, "holds here", "does not"),
        (-0.9, -0.1, "does not", "holds here"),
        (-0.1, 0.9, "undecided", "undecided"),
        (-math.inf, math.inf, "undecided", "undecided"),
        (math.nan, math.nan, "undecided", "undecided"),
    ],
)
def test_side_of_an_interval(low, high, above, below):
    from verdicts import judge

    assert judge(effect(low, high), "above") == above
    assert judge(effect(low, high), "below") == below


@pytest.mark.parametrize(
    ("low", "high", "within", "apart"),
    [
        (-0.3, 0.4, "holds here", "does not"),  # nothing there, or too little to matter
        (0.1, 0.4, "holds here", "does not"),
        (0.2, 0.9, "undecided", "holds here"),  # something there, but maybe too little
        (0.6, 0.9, "does not", "holds here"),
        (-0.9, -0.6, "does not", "holds here"),
        (-0.9, 0.2, "undecided", "undecided"),
    ],
)
def test_equivalence_and_difference(low, high, within, apart):
    from verdicts import judge

    assert judge(effect(low, high), "within", 0.5) == within
    assert judge(effect(low, high), "apart", 0.5) == apart
    as_ratio = effect(math.exp(low), math.exp(high), "x")
    assert judge(as_ratio, "within", math.exp(0.5)) == within
    assert judge(as_ratio, "apart", math.exp(0.5)) == apart


def test_what_is_certainly_too_little_does_not_hold():
    from verdicts import judge

    too_little, maybe, enough = effect(0.1, 0.4), effect(0.1, 0.9), effect(0.6, 0.9)
    assert [judge(e, "above", 0.5) for e in (too_little, maybe, enough)] == ["does not", "holds here", "holds here"]
    assert [judge(e, "below", 0.5) for e in (too_little, maybe, enough)] == ["does not"] * 3
    assert judge(effect(-0.2, 0.4), "above", 0.5) == judge(effect(-0.4, 0.2), "below", 0.5) == "does not"
    assert judge(effect(-0.2, 0.6), "above", 0.5) == judge(effect(-0.6, 0.2), "below", 0.5) == "undecided"
    assert judge(effect(-0.9, -0.1), "below", 0.5) == "holds here"


def test_equivalence_needs_a_margin():
    from verdicts import judge

    with pytest.raises(ValueError, match=r"Expected a margin for a claim of 'within', got nan. Choose one"):
        judge(effect(-0.1, 0.1), "within")


def test_models_that_would_decide_a_rank_correlation():
    from verdicts import Effect, models_to_decide

    assert models_to_decide(Effect(0.2, -0.2, 0.5, 32), "above") == 4 * 32 + 1
    assert models_to_decide(Effect(-0.2, -0.3, 0.2, 32), "above") == 4 * 32 + 1  # then it would be "does not"
    assert models_to_decide(Effect(0.2, 0.1, 0.5, 32), "above") == 32
    assert models_to_decide(Effect(0.02, -0.5, 0.5, 32), "above") is None
    assert models_to_decide(Effect(0.0, -0.5, 0.5, 32), "above") is None
    assert models_to_decide(Effect(math.nan, -math.inf, math.inf, 1), "above") is None


def test_verdicts_on_several_parts():
    from verdicts import all_of, not_all_of

    holds, fails, unknown = "holds here", "does not", "undecided"
    assert all_of([holds, holds]) == not_all_of([holds, fails]) == holds
    assert all_of([holds, fails, unknown]) == not_all_of([holds, holds]) == fails
    assert all_of([holds, unknown]) == not_all_of([holds, unknown]) == unknown
    assert all_of([]) == not_all_of([]) == unknown


# ------------------------------------------------------------------------------------------------- effects from numbers


def test_difference_is_paired_and_has_the_t_interval():
    from verdicts import difference

    a, b = {0: 5.0, 1: 7.0, 2: 6.5, 9: 100.0}, {0: 4.0, 1: 5.5, 2: 5.0, 8: -100.0}
    found = difference(a, b, " %")
    low, high = stats.ttest_rel([5.0, 7.0, 6.5], [4.0, 5.5, 5.0]).confidence_interval(0.95)
    assert (found.estimate, found.low, found.high) == pytest.approx((4 / 3, low, high))
    assert (found.num, found.unit) == (3, " %")


def test_ratio_is_geometric():
    from verdicts import ratio

    found = ratio({0: 8.0, 1: 2.0}, {0: 1.0, 1: 1.0})
    assert found.estimate == pytest.approx(4.0)
    assert found.low * found.high == pytest.approx(16.0)
    assert found.unit == "x"


@pytest.mark.parametrize("seeds", [[], [0]])
def test_fewer_than_two_pairs_decide_nothing(seeds):
    from report import interval
    from verdicts import difference, judge, ratio

    for found in (difference(dict.fromkeys(seeds, 2.0), {0: 1.0}), ratio(dict.fromkeys(seeds, 2.0), {0: 1.0})):
        assert judge(found, "above") == "undecided"
        assert found.num == len(seeds)
        assert interval(found) == "none"


def test_interval_covers_as_often_as_it_says():
    from verdicts import mean_effect

    draw = random.Random(0)
    samples = [[draw.gauss(1.0, 2.0) for _ in range(5)] for _ in range(2000)]
    covered = sum(e.low < 1.0 < e.high for e in map(mean_effect, samples))
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


# ------------------------------------------------------------------------------------------- the studies' own judgement


def rows_of(settings, points, columns):
    """Return rows of three seeds, in which settings have these values, a little different for each seed."""
    return [
        {"setting": name, "seed": seed, "point": point, "reached": True, "step": 1, "train_loss": 0.01}
        | {column: columns(name, column) * (1 + 0.001 * seed) for column in ("lambda_max", "test_accuracy")}
        | {name_: columns(name, name_) * (1 + 0.001 * seed) for name_ in ("invariant_sharpness", "path_norm_sharpness")}
        for name in settings
        for point in points
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    ("sharpness", "accuracy", "verdicts"),
    [
        (3.0, 90.0, {"holds here"}),
        (0.3, 99.0, {"does not"}),
        (None, None, {"undecided"}),
    ],
)
def test_batch_sizes_are_judged_by_their_numbers(sharpness, accuracy, verdicts):
    import large_batch_vs_small_batch as study

    size = study.QUICK
    points = {p for name in size.networks for c in size.comparisons(name) for p in (c.large_point, c.small_point)}

    def number(name, column):
        large = accuracy if column == "test_accuracy" else sharpness
        return large if "large batch" in name and large else 95.0 if column == "test_accuracy" else 1.0

    rows = rows_of(size.settings(), points, number)
    if sharpness is None:  # every other seed says the opposite
        for row in rows:
            for column in (*study.CURVATURES, "test_accuracy"):
                row[column] *= 1 + 0.1 * (-1) ** (row["seed"] + ("large batch" in row["setting"]))
    lines = study.verdict_lines(rows, size)
    assert len(lines) == 4 * 2 * 4 + 3 * 2
    assert {line[-1].strip("*") for line in lines} == verdicts


# ---------------------------------------------------------------------------------------------- the committed results


def verdicts_from_rows(name, rows):
    if name == "large_batch_vs_small_batch":
        import large_batch_vs_small_batch as study

        return study.verdict_lines(rows, study.FULL)
    if name == "max_eigenvalue_and_generalization":
        import max_eigenvalue_and_generalization as study

        return [line for lines in study.Findings(rows, study.FULL).verdicts().values() for line in lines]
    from psi_report import verdict_lines
    from report import read_csv

    return verdict_lines(rows, read_csv(RESULTS / "which_measure.csv"))


@pytest.mark.parametrize(
    "name", ["large_batch_vs_small_batch", "max_eigenvalue_and_generalization", "psi_flatness_and_generalization"]
)
def test_committed_verdicts_follow_from_the_committed_numbers(name):
    from report import read_csv

    table = (RESULTS / f"{name}.md").read_text()
    lines = verdicts_from_rows(name, read_csv(RESULTS / f"{name}.csv"))
    printed = [line for line in table.splitlines() if line.endswith("** |")]
    assert printed == [f"| {' | '.join(line)} |" for line in lines if line[-1].startswith("**")]
    readme = (STUDIES / "README.md").read_text()
    assert [line for line in readme.splitlines() if line in printed], f"The page quotes nothing of {name}.md"


def test_readme_has_no_verdict_of_its_own():
    tables = "".join(path.read_text() for path in RESULTS.glob("*.md")).splitlines()
    verdicts = [line for line in (STUDIES / "README.md").read_text().splitlines() if line.endswith("** |")]
    assert verdicts
    assert not [line for line in verdicts if line not in tables]


# ----------------------------------------------------------------------------------------------------------- one run


@pytest.mark.slow
def test_run_is_measured_at_its_points_on_all_training_samples(tmp_path, monkeypatch):
    import training
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from training import Recipe, RecipeModule, data_of, train_and_measure

    from lightning_flatness import LossLandscape, TopEigenvalues

    folder = tmp_path / "a setting" / "seed3"
    recipe = Recipe(
        ("step=5", "loss=2", "loss=1e-9"), ("lambda_max",), 80, 100, 1e-3, "adam", network="lenet", data="digits"
    )
    rows = {row["point"]: row for row in train_and_measure("a setting", 3, recipe, folder)}
    assert {(row["setting"], row["seed"]) for row in rows.values()} == {("a setting", 3)}
    assert rows["loss=1e-9"] == {"setting": "a setting", "seed": 3, "point": "loss=1e-9", "reached": False}
    assert rows["step=5"]["step"] == 5
    assert rows["step=5"]["epoch"] == 5 / 14
    assert 1.8 < rows["loss=2"]["train_loss"] <= 2.0 < rows["step=5"]["train_loss"]

    events = EventAccumulator(str(folder)).Reload()
    logged = {e.step: e.value for e in events.Scalars("flatness/lambda_max")}
    assert logged == {row["step"]: pytest.approx(row["lambda_max"]) for row in rows.values() if row["reached"]}

    modules = []
    monkeypatch.setattr(training, "RecipeModule", lambda *args: modules.append(RecipeModule(*args)) or modules[-1])
    [again] = train_and_measure("a setting", 3, replace(recipe, points=("step=5",)), folder)
    assert again == rows["step=5"]
    data = data_of(recipe)
    metric = TopEigenvalues(tol=1e-5)
    landscape = LossLandscape(modules[0], [data.train_set.tensors])
    metric.update(landscape)
    assert again["lambda_max"] == pytest.approx(float(metric.compute()), rel=1e-3)
    assert again["train_loss"] == pytest.approx(float(landscape.loss()), rel=1e-5)
    x, y = data.test_set.tensors
    num_right = sum(modules[0].net(x).argmax(dim=1) == y).item()
    assert again["test_accuracy"] == pytest.approx(100 * num_right / len(y))


def test_batch_in_parts_takes_the_same_steps(tmp_path):
    """At the same losses after the same steps, of the same samples: each batch falls into halves."""
    from training import Recipe, train_and_measure

    points = "step=3", "step=8", "loss=1.2"
    recipe = Recipe(points, ("lambda_max",), 80, 700, 2e-3, "adam", network="lenet", data="digits")
    whole = train_and_measure("whole", 0, recipe, tmp_path / "whole" / "seed0")
    halves = train_and_measure("halves", 0, replace(recipe, parts=2), tmp_path / "halves" / "seed0")
    assert [row["point"] for row in whole] == list(points)
    for row, same in zip(whole, halves, strict=True):
        assert same["setting"] == "halves"
        for column in ("step", "epoch", "train_loss", "test_loss", "lambda_max"):
            assert same[column] == pytest.approx(row[column], rel=1e-3), column


def test_network_has_a_name():
    from training import Recipe, network_of

    with pytest.raises(ValueError, match="Expected the network to be 'fully_connected' or 'lenet', got 'vgg'"):
        network_of(Recipe((), (), 1, 32, 0.1, network="vgg"), 8)


# ------------------------------------------------------------------------------------------------- killed, and resumed


@pytest.fixture
def start():
    with study_processes("small_study.py") as start:
        yield lambda out, workers: start("--out", out, "--workers", workers)


@pytest.mark.slow
def test_killed_study_gives_the_same_table(tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, workers=1))

    kill_in_the_middle(start(killed, workers=2), killed / "runs", at_least=2)
    done = {path.name: path.stat().st_mtime_ns for path in (killed / "runs").glob("*.json")}
    assert 2 <= len(done) < 6
    (killed / "runs" / "half.123.tmp").write_text('{"run": ')  # what a kill between writing and renaming leaves
    assert f"{len(done)} of 6 runs are done already" in finish(start(killed, workers=1))
    assert {name: (killed / "runs" / name).stat().st_mtime_ns for name in done} == done

    name = "large_batch_vs_small_batch"
    assert (killed / f"{name}.csv").read_bytes() == (whole / f"{name}.csv").read_bytes()
    *table, provenance = (killed / f"{name}.md").read_text().splitlines()
    assert table == (whole / f"{name}.md").read_text().splitlines()[:-1]
    assert len([line for line in table if line.endswith("** |")]) == 19
    assert provenance.startswith("6 runs at commit ")
    logs = list((killed / "logs").glob("*/seed*"))
    assert len(logs) == 6
    for folder in logs:  # one event file each: what the killed one had logged is gone
        assert len(list(folder.glob("events*"))) == 1, folder


@pytest.mark.slow
def test_run_of_another_recipe_is_done_again(tmp_path):
    from study import Run, finish
    from training import Recipe

    recipe = Recipe((), (), 1, 32, 0.1)
    seen = []

    def train(setting, seed, recipe, folder):
        seen.append((setting, seed, recipe.lr))
        return [{"setting": setting, "seed": seed, "lr": recipe.lr}]

    runs = [Run("a", 0, recipe), Run("a", 1, recipe)]
    finish(runs, tmp_path, 1, train)
    rows = finish([runs[0], Run("a", 1, replace(recipe, lr=0.2)), Run("b", 0, recipe)], tmp_path, 1, train)
    assert seen == [("a", 0, 0.1), ("a", 1, 0.1), ("a", 1, 0.2), ("b", 0, 0.1)]
    assert [row["lr"] for row in rows] == [0.1, 0.2, 0.1]
