"""The study of measures: networks, changes that leave their function, rank correlations, table, and resuming."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.study_processes import finish, kill_in_the_middle, study_processes
from scipy import stats

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "examples" / "studies"
RESULTS = STUDIES / "results"
KINDS = ("mlp", "cnn", "resnet", "transformer")


pytestmark = pytest.mark.usefixtures("import_path_of_studies")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 1, 14, 14, generator=generator), torch.randint(0, 10, (40,), generator=generator)


@pytest.fixture
def samples(images):
    """Return 40 samples for a kind of network."""

    def of_kind(kind):
        from four_kinds import data_of

        return data_of("sources", 40).train if kind == "transformer" else images

    return of_kind


def network(kind, seed=0):
    from four_kinds import network

    torch.manual_seed(seed)
    return network(kind)


# ------------------------------------------------------------------------------------------------- networks, training


@pytest.mark.parametrize(
    ("kind", "change"),
    [*((kind, change) for kind in KINDS for change in ("layers", "units", "order")), ("resnet", "filters"),
     ("transformer", "heads")],
)  # fmt: skip
def test_changes_leave_the_function_and_move_the_weights(kind, change, samples):
    from rescaling import CHANGES, changed

    module = network(kind).train()
    assert kind in CHANGES[change][1]
    before = [p.detach().clone() for p in module.parameters()]
    other = changed(module, change)
    with torch.no_grad():
        outputs, after = (net(samples(kind)[0]) for net in (module, other))
    assert float((outputs - after).abs().max()) < 1e-3 * float(outputs.abs().max())
    moved = [float((p - q.detach()).abs().max()) for p, q in zip(before, other.parameters(), strict=True)]
    assert max(moved) > 0.05
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))


def test_networks_and_data_have_names():
    from four_kinds import data_of, network

    with pytest.raises(
        ValueError, match="Expected `kind` to be one of 'mlp', 'cnn', 'resnet', 'transformer', got 'lstm'"
    ):
        network("lstm")
    with pytest.raises(ValueError, match="Expected the data to be 'fashion', 'digits' or 'sources', got 'imagenet'"):
        data_of("imagenet", 100)


def test_text_is_that_of_the_standard_library_and_what_follows():
    import sysconfig

    from four_kinds import CONTEXT, NUM_TEST, data_of

    data = data_of("sources", 500)
    first = Path(sysconfig.get_path("stdlib"), "__future__.py").read_text()
    pieces = ["".join(map(chr, piece)) for piece in data.train[0].tolist()]
    known = [i for i, piece in enumerate(pieces) if piece in first]
    assert len(known) >= 5
    for i in known:
        place = first.index(pieces[i]) + CONTEXT
        assert first[place] == chr(data.train[1][i]), repr(pieces[i])
    assert (len(data.train[0]), len(data.test[0])) == (500, NUM_TEST)
    known_to_test = {tuple(piece) for piece in data.test[0].tolist()}
    assert len({tuple(piece) for piece in data.train[0].tolist()} & known_to_test) <= 5  # such as rows of dashes


def test_images_are_mirrored_and_shifted_by_one_pixel():
    from four_kinds import augmented

    torch.manual_seed(0)
    x = torch.zeros(8, 1, 14, 14)
    x[:, 0, 5, 3] = 1.0
    seen = {tuple(place) for _ in range(60) for place in augmented(x).nonzero()[:, 2:].tolist()}
    assert seen == {(5 + row, column + shift) for row in (-1, 0, 1) for column in (3, 10) for shift in (-1, 0, 1)}


def test_batch_norm_has_the_statistics_of_all_training_images(images):
    from four_kinds import loss_and_accuracy

    module, (x, y) = network("resnet"), images
    module.train()(3 * x + 1)  # what training has left
    loss, accuracy = loss_and_accuracy(module, (x, y), x)
    with torch.no_grad():
        inputs = module[0](x)
        torch.testing.assert_close(module[1].running_mean, inputs.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(module[1].running_var, inputs.var(dim=(0, 2, 3)))
        logits = module.eval()(x)
    assert module[1].momentum == 0.1
    picked = logits.log_softmax(dim=1)[torch.arange(len(y)), y]
    assert loss == pytest.approx(-float(picked.mean()), rel=1e-5)
    assert accuracy == pytest.approx(100 * float((logits.argmax(dim=1) == y).float().mean()))


def recipe_of(kind="mlp", **changes):
    import which_measure as study

    base = replace(study.QUICK, points=("loss=1.5",), measures=("lambda_max", "path"), num_train=300)
    return replace(study.settings(base)[f"{kind}: batch 32, low lr"], **changes)


def test_training_stops_at_its_loss_and_depends_on_the_seed_alone():
    from four_kinds import data_of, loss_and_accuracy, train

    recipe = recipe_of(lr=0.05)
    data = data_of("digits", 300)
    first, again, other = train(recipe, 3), train(recipe, 3), train(recipe, 4)
    loss, _ = loss_and_accuracy(first.module, data.train, data.train[0])
    assert first.reached
    assert 1.0 < loss <= 1.5
    weights = [torch.cat([p.flatten() for p in t.module.parameters()]) for t in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with_sam = train(replace(recipe, rho=0.5), 3)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in with_sam.module.parameters()]))


def test_run_that_does_not_reach_its_loss_says_so_and_has_no_numbers(tmp_path):
    import which_measure as study
    from which_measure_report import models_of

    rows = study.train_and_measure("mlp: a", 0, recipe_of(points=("loss=1e-9",), max_steps=11), tmp_path)
    [row] = rows
    assert (row["reached"], row["step"]) == (False, 11)
    assert "lambda_max" not in row
    assert models_of(rows) == []


def test_run_is_measured_again_after_each_change(tmp_path):
    import which_measure as study

    points = ("loss=1.5", "layers", "order")
    rows = study.train_and_measure("mlp: changed weights", 0, recipe_of(lr=0.05, points=points), tmp_path)
    assert [row["change"] for row in rows] == ["none", "layers", "order"]
    plain, layers, order = (row["lambda_max"] for row in rows)
    assert order == pytest.approx(plain, rel=1e-3)
    assert abs(layers / plain - 1) > 0.1
    assert {round(row["path"] / rows[0]["path"], 3) for row in rows} == {1.0}


def test_settings_are_sixteen_models_and_more_of_four_kinds():
    import which_measure as study

    found = study.settings(study.FULL)
    per_kind = {kind: [recipe for name, recipe in found.items() if name.startswith(f"{kind}:")] for kind in KINDS}
    assert all(2 * len(recipes) >= 15 for recipes in per_kind.values())
    for kind, recipes in per_kind.items():
        assert len(set(recipes)) == len(recipes)
        assert len({r.batch_size for r in recipes}) >= 3
        assert len({r.lr for r in recipes}) >= 3
        assert {bool(r.rho) for r in recipes} == {bool(r.weight_decay) for r in recipes} == {True, False}
        assert {r.augmentation for r in recipes} == ({False} if kind in study.NOT_AUGMENTED else {True, False})


# ---------------------------------------------------------------------------------------------------------- measuring


def test_measures_are_those_of_the_metrics_with_their_errors_and_cost(images):
    from measures import measure_all

    from lightning_flatness import LossLandscape, NoiseCurvatureRatio, OutputLoss, TopEigenvalues

    module = network("mlp")
    row = measure_all(module, "mlp", images, 100, names=("noise", "trace", "ratio", "lambda_min", "attention"))
    landscape = LossLandscape(module, [images], OutputLoss(torch.nn.functional.cross_entropy), num_total=100)
    ratio, lowest = NoiseCurvatureRatio(num_products=12), TopEigenvalues(which="SA", tol=1e-4)
    ratio.update(landscape)
    lowest.update(landscape)
    for column, value in (("ratio", ratio.value), ("ratio_error", ratio.error),
                          ("ratio_standard_error", ratio.standard_error)):  # fmt: skip
        assert row[column] == pytest.approx(float(value), rel=1e-4)
    assert row["lambda_min"] == pytest.approx(-float(lowest.value), rel=0.1)
    assert row["lambda_min_gradients"] > 5
    assert row["ratio_gradients"] == pytest.approx(row["noise_gradients"] + row["trace_gradients"])
    assert not [name for name in row if name.startswith("attention")]
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()))
    assert row["weight_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "defined"),
    [
        ("mlp", {"path_norm", "path", "minimum", "fisher", "balance"}),
        ("cnn", {"path_norm", "path", "minimum", "fisher", "balance"}),
        ("resnet", {"path_norm"}),
        ("transformer", {"fisher", "attention"}),
    ],
)
def test_what_is_not_defined_is_left_out(kind, defined, samples):
    from measures import measure_all

    asked = ("path_norm", "path", "minimum", "fisher", "balance", "attention")
    row = measure_all(network(kind), kind, samples(kind), 100, names=asked)
    assert {name for name in asked if name in row} == defined


def test_every_metric_of_the_package_is_there():
    from measures import MEASURES

    import lightning_flatness.metrics as metrics

    taken = {type(measure.make()).__name__ for measure in MEASURES.values()}
    public = {
        name
        for name in metrics.__all__
        if isinstance(getattr(metrics, name), type) and issubclass(getattr(metrics, name), metrics.FlatnessMetric)
    }
    assert public - taken - {"FlatnessMetric"} <= {"SpectralDensity", "CriticalSharpness", "DirectionalSharpness"}


# ------------------------------------------------------------------------------------------------- rank correlations


def slow_taus(x, y, clusters, groups):
    from rank_correlation import NUM_RESAMPLES

    names = list(dict.fromkeys(clusters))
    members = [[i for i, c in enumerate(clusters) if c == name] for name in names]
    draws = np.random.default_rng(0).integers(len(names), size=(NUM_RESAMPLES, len(names)))
    for draw in [range(len(names)), *draws]:
        chosen = [i for c in draw for i in members[c]]
        agree = in_x = in_y = 0.0
        for i in chosen:
            for j in chosen:
                if groups[i] == groups[j]:
                    a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
                    agree, in_x, in_y = agree + a * b, in_x + a * a, in_y + b * b
        yield agree / math.sqrt(in_x * in_y) if in_x * in_y else 0.0


@pytest.mark.parametrize("num_groups", [1, 3])
def test_taus_are_those_of_plain_loops(num_groups):
    from itertools import islice

    from rank_correlation import taus

    draw = np.random.default_rng(1)
    x, y = draw.integers(0, 6, size=(2, 14)).astype(float)
    clusters = [f"s{i // 2}" for i in range(14)]
    groups = [f"g{i % num_groups}" for i in range(14)]
    found = taus(x, y, clusters, groups if num_groups > 1 else None)
    expected = list(islice(slow_taus(x, y, clusters, groups), 40))
    np.testing.assert_allclose(found[:40], expected, atol=1e-12)


def test_interval_is_that_of_resampled_settings():
    from rank_correlation import NUM_RESAMPLES, effect, taus

    draw = np.random.default_rng(2)
    x, y = draw.normal(size=(2, 20))
    clusters = [f"s{i // 2}" for i in range(20)]
    found = effect(taus(x, y, clusters), 20, 10)
    assert found.estimate == pytest.approx(stats.kendalltau(x, y).statistic)
    settings = np.random.default_rng(0).integers(10, size=(NUM_RESAMPLES, 10))
    chosen = np.stack([2 * settings, 2 * settings + 1], axis=2).reshape(NUM_RESAMPLES, 20)
    expected = np.quantile([stats.kendalltau(x[c], y[c]).statistic for c in chosen], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert effect(taus(x[:2], y[:2], ["a", "a"]), 2, 1).low == -math.inf
    assert math.isnan(effect(np.array([0.0]), 1, 1).estimate)


def test_seeds_of_a_setting_are_not_independent():
    from rank_correlation import effect, taus

    settings = np.repeat(np.arange(5.0), 8)  # eight equal seeds in each of five settings
    y = settings[[16, 0, 24, 8, 32]].repeat(8)

    def width(clusters):
        found = effect(taus(settings, y, clusters), 40, len(set(clusters)))
        return found.high - found.low

    assert width([f"s{s}" for s in settings]) > 2 * width([str(i) for i in range(40)])


def made_up(order_within, order_of_kinds=1.0, noise=0.1):
    """Return models whose gap follows lambda_max within kinds and across kinds in these directions."""
    draw = random.Random(0)
    return [
        {"setting": f"{kind}: {i}", "seed": seed, "kind": kind, "change": "none", "reached": True, "train_loss": 0.2,
         "train_accuracy": 95.0, "lambda_max": 10.0 ** (i / 8 + 2 * k), "weight_norm": draw.random(),
         "lambda_max_error": 0.0, "lambda_max_standard_error": 0.1 * 10.0 ** (i / 8 + 2 * k),
         "lambda_max_gradients": 12.0, "lambda_max_seconds": 0.6, "gradient_seconds": 0.05,
         "test_loss": 1 + order_within * i / 8 + order_of_kinds * 3 * k + draw.gauss(0, noise), "test_accuracy": 80.0}
        for k, kind in enumerate(KINDS) for i in range(8) for seed in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(("order", "verdict"), [(1.0, "holds here"), (-1.0, "does not"), (0.0, "undecided")])
def test_verdict_is_on_models_of_the_same_kind(order, verdict):
    from which_measure_report import correlation, models_of, table_lines

    models = models_of(made_up(order))
    line = table_lines(models, models)[0]
    assert line[0] == "lambda_max"
    assert line[-1] == f"**{verdict}**"
    assert correlation(models, "lambda_max", "loss_gap", within=False).low > 0.4  # kinds alone order the models
    of_kinds = [float(cell) for cell in line[3:7]]
    assert [np.sign(tau) for tau in of_kinds] == [order] * 4 or not order


def test_columns_beside_the_correlations():
    from which_measure_report import measured, median, models_of, spread, survives

    rows = made_up(1.0)
    for row in rows:
        row["lambda_max"] *= 10.0 ** (0.1 * (-1) ** row["seed"])
    models = models_of(rows)
    seeds, settings = spread(models, "lambda_max")
    assert seeds == pytest.approx(0.1 * math.sqrt(2))
    assert settings == pytest.approx(np.std(np.arange(8) / 8, ddof=1))
    assert median(models, "lambda_max", "gradients") == 12
    assert median(models, "lambda_max", "seconds") == pytest.approx(12)
    assert math.isnan(median(models, "weight_norm", "gradients"))
    assert median(models_of(made_up(1.0)), "lambda_max", "standard_error") == pytest.approx(0.1)
    assert measured(models, "path") == []

    plain = {"setting": "mlp: changed weights", "kind": "mlp", "change": "none", "trace": 10.0, "trace_error": 0.5}
    vit = plain | {"setting": "transformer: changed weights", "kind": "transformer"}
    others = [plain | {"change": "layers", "trace": 10.05}, plain | {"change": "units", "trace": 30.0},
              plain | {"change": "order", "trace": 11.0}, vit | {"change": "layers", "trace": 9.99}]  # fmt: skip
    assert survives([plain, vit, *others], "trace") == ["layers", "order?"]
    exact = [row | {"balance": 5 + 0.01 * i} for i, row in enumerate((plain, plain | {"change": "units"}))]
    assert survives(exact, "balance") == ["units"]
    assert survives([plain, vit, *others, vit | {"change": "layers", "trace": 90.0}], "trace") == ["order?"]


def test_basis_paths_are_compared_on_networks_that_have_both():
    from which_measure_report import models_of, path_lines, recommended_geometry

    models = models_of(made_up(1.0))
    for model in models:
        if model["kind"] in ("mlp", "cnn"):
            model |= {"path": model["test_loss"], "path_norm": -model["test_loss"]}
    line = path_lines(models)[0]
    assert line[2:] == ["+2.00", "+2.00 … +2.00", "32", "**holds here**"]
    assert recommended_geometry(models) == "path"
    assert path_lines([])[0][-1] == "**undecided**"
    assert recommended_geometry([]) == "path_norm"


# ---------------------------------------------------------------------------------------------- the committed results


def test_committed_table_follows_from_the_committed_numbers():
    from report import read_csv
    from which_measure_report import models_of, path_lines, path_table, recommended_geometry, table, table_lines

    from lightning_flatness import PSISharpness
    from lightning_flatness.metrics import preset_metrics

    rows = read_csv(RESULTS / "which_measure.csv")
    models = models_of(rows)
    assert len(models) >= 60
    assert {model["kind"] for model in models} == set(KINDS)
    text = (RESULTS / "which_measure.md").read_text()
    found = table(table_lines(models, rows))
    assert found in text
    assert path_table(path_lines(models)) in text
    taken = recommended_geometry(models)
    assert f"the one to take: {taken}." in text
    assert PSISharpness().geometry.name == preset_metrics("all")["psi_sharpness"].geometry.name == taken
    printed = [line for line in text.splitlines() if line.endswith("** |")]
    page = (STUDIES / "README.md").read_text().splitlines()
    assert [line for line in printed if line not in page] == []


# ------------------------------------------------------------------------------------------------- killed, and resumed


@pytest.fixture
def start():
    with study_processes("small_which_measure.py") as start:
        yield lambda out: start("--seeds", 1, "--out", out, "--workers", 1)


@pytest.mark.slow
def test_killed_study_gives_the_same_numbers(tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))

    kill_in_the_middle(start(killed), killed / "runs", at_least=3)
    done = {path.name: path.stat().st_mtime_ns for path in killed.glob("runs/*.json")}
    assert 3 <= len(done) < 12
    assert f"{len(done)} of 12 runs are done already" in finish(start(killed))
    assert {name: (killed / "runs" / name).stat().st_mtime_ns for name in done} == done

    from report import read_csv

    tables = [read_csv(folder / "which_measure.csv") for folder in (whole, killed)]
    for table in tables:  # the time that it took differs, and nothing else
        for row in table:
            for name in [name for name in row if name.endswith("seconds")]:
                del row[name]
    assert json.dumps(tables[0]) == json.dumps(tables[1])
    assert {(row["setting"], row["seed"]) for row in tables[0]} == {
        *((f"{kind}: {name}", 0) for kind in KINDS for name in ("batch 32, low lr", "batch 256, high lr")),
        *((f"{kind}: changed weights", 0) for kind in KINDS),
    }
    assert {row["change"] for row in tables[0]} > {"none", "layers", "units", "order"}
    text = (killed / "which_measure.md").read_text()
    assert "Verdicts: " in text
    assert (killed / "which_measure.png").stat().st_size > 10_000
