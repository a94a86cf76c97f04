"""The study of lambda_max: its protocol is the paper's, and its verdicts follow from numbers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("import_path_of_studies")


def small(**changes):
    from to_accuracy import AccuracyRecipe

    recipe = AccuracyRecipe(lr=0.1, batch_size=50, accuracy=80.0, max_epochs=30, num_train=500, num_test=200)
    return replace(recipe, **{"num_probe": 250, "data": "digits"} | changes)


# ------------------------------------------------------------------------------------------------------- the protocol


def test_probe_is_evenly_spaced_and_inputs_are_standardised():
    from digits import DigitsDataModule
    from to_accuracy import data_of

    data = data_of(small(), Path("nowhere"), "cpu")
    assert float(data.train[0].mean()) == pytest.approx(0, abs=1e-6)
    assert float(data.train[0].std()) == pytest.approx(1)
    raw, labels = DigitsDataModule().train_set.tensors
    raw = raw[:500]
    assert torch.allclose(data.train[0], (raw - raw.mean()) / raw.std(), atol=1e-6)
    x, y = data.probe(250)
    assert torch.equal(x, data.train[0][::2])
    assert torch.equal(y, labels[:500][::2])
    assert len(data.probe(7)[0]) == 7


def test_networks_are_those_of_the_protocol():
    from to_accuracy import AccuracyRecipe, network_of
    from torch import nn

    mlp = network_of(AccuracyRecipe(0.1, 50, dropout=0.5), 28)
    assert [type(layer).__name__ for layer in mlp] == ["Flatten", *["Linear", "ReLU", "Dropout"] * 2, "Linear"]
    assert [tuple(p.shape) for p in mlp.parameters() if p.ndim == 2] == [(256, 784), (256, 256), (10, 256)]
    for batch_norm, num in ((False, 0), (True, 4)):
        vgg = network_of(AccuracyRecipe(0.1, 50, network="vgg", batch_norm=batch_norm), 28)
        assert sum(isinstance(layer, nn.BatchNorm2d) for layer in vgg) == num
        assert vgg(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_batches_are_a_new_permutation_in_every_epoch():
    from to_accuracy import ShuffledBatches

    x = torch.arange(10.0)
    batches = ShuffledBatches((x, x.long()), 4)
    epochs = [list(batches), list(batches)]
    assert len(batches) == 3
    for epoch in epochs:
        assert [len(images) for images, _ in epoch] == [4, 4, 2]
        assert sorted(torch.cat([images for images, _ in epoch]).tolist()) == x.tolist()
        assert all(torch.equal(images.long(), labels) for images, labels in epoch)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def plain_loop(recipe, data):
    """Train by hand until an epoch ends at the accuracy: the reference."""
    from to_accuracy import network_of

    torch.manual_seed(3)
    net = network_of(recipe, data.pixels)
    (x, y), epoch = data.train, 0
    while True:
        epoch += 1
        for chosen in torch.randperm(len(x)).split(recipe.batch_size):
            loss = F.cross_entropy(net(x[chosen]), y[chosen])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, gradient in zip(net.parameters(), gradients, strict=True):
                    p -= recipe.lr * gradient
        accuracy = 100 * float((net.eval()(x).argmax(dim=1) == y).double().mean())
        net.train()
        if accuracy >= recipe.accuracy:
            return net, epoch, accuracy


def largest_eigenvalue(net, x, y):
    """Return that of the dense Hessian, from its columns by two backward passes each, in float64."""
    net = copy.deepcopy(net).double()
    weights = list(net.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(net(x.double()), y), weights, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    vector = torch.randn(len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(200):  # power iteration
        product = torch.autograd.grad(flat @ (vector / vector.norm()), weights, retain_graph=True)
        vector = torch.cat([part.flatten() for part in product])
    return float(vector.norm())


@pytest.mark.slow
def test_run_is_plain_sgd_until_the_accuracy(tmp_path, monkeypatch):
    import to_accuracy
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = small(accuracy=94.0)  # looked at after every epoch near it
    data = to_accuracy.data_of(recipe, Path("nowhere"), "cpu")
    monkeypatch.setattr(to_accuracy.UntilAccuracy, "points_per_epoch", 1e9)
    folder = tmp_path / "a setting" / "seed3"
    [row] = to_accuracy.train_and_measure("a setting", 3, recipe, folder, Path("nowhere"))
    net, epoch, accuracy = plain_loop(recipe, data)
    assert (row["setting"], row["seed"], row["point"], row["reached"]) == ("a setting", 3, "accuracy=94", True)
    assert (row["epoch"], row["step"]) == (epoch, 10 * epoch)
    assert row["train_accuracy"] == pytest.approx(accuracy)
    x, y = data.test
    assert row["test_accuracy"] == pytest.approx(100 * float((net(x).argmax(dim=1) == y).double().mean()))
    assert row["lambda_max"] == pytest.approx(largest_eigenvalue(net, *data.probe(250)), rel=1e-3)
    assert 0 < row["lambda_max_standard_error"] < row["lambda_max"]
    logged = EventAccumulator(str(folder)).Reload().Scalars("flatness/lambda_max")
    assert [(event.step, event.value) for event in logged] == [(row["step"], pytest.approx(row["lambda_max"]))]


@pytest.mark.slow
def test_run_that_does_not_get_there_has_no_lambda_max(tmp_path):
    from to_accuracy import train_and_measure

    recipe = small(lr=1e-6, max_epochs=2)
    [row] = train_and_measure("s", 0, recipe, tmp_path / "s" / "seed0", Path("nowhere"))
    assert (row["reached"], row["epoch"]) == (False, 2)
    assert "lambda_max" not in row
    [row] = train_and_measure("s", 0, small(lr=1e6), tmp_path / "s" / "seed0", Path("nowhere"))
    assert not row["reached"]
    assert row["train_loss"] is None


@pytest.mark.slow
def test_between_iterates_is_a_step_of_sgd():
    """Of a network without BatchNorm: its loss at the end of the way is known from a step by torch's SGD."""
    from to_accuracy import ShuffledBatches, data_of, lambda_max_between, network_of

    recipe = small(num_between=3, lr=0.5, num_probe=500)
    data = data_of(recipe, Path("nowhere"), "cpu")
    torch.manual_seed(0)
    net = network_of(recipe, data.pixels)
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    found = lambda_max_between(net, recipe, data)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    torch.manual_seed(5)
    x, y = next(iter(ShuffledBatches(data.train, recipe.batch_size)))
    stepped, expected = copy.deepcopy(net), []
    for _ in range(2):  # two halves of a step along one gradient
        optimizer = torch.optim.SGD(stepped.parameters(), lr=recipe.lr / 2)
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        for p, gradient in zip(stepped.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        expected.append(largest_eigenvalue(stepped, *data.probe(500)))
    assert found == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- the verdicts


def rows_of(study, grid, curvature, accuracy):
    """Return rows of three seeds with these values, a little different for each seed."""
    return [
        {"setting": name, "seed": seed, "point": f"accuracy={grid.base.accuracy:g}", "reached": True}
        | {"lambda_max": curvature[name] * (1 + 1e-3 * seed), "test_accuracy": accuracy[name] * (1 + 1e-4 * seed)}
        | {"lambda_max_eval": curvature[name] * 20.0, "lambda_max_standard_error": 0.1}
        for name in grid.settings()
        for seed in range(3)
    ]


@pytest.fixture
def as_in_the_paper():
    """Return the study, a grid, and curvatures and accuracies by setting of which all claims hold."""
    import max_eigenvalue_and_generalization as study
    from max_eigenvalue_grid import QUICK as grid

    smallest, largest = grid.batch_sizes[0], grid.batch_sizes[-1]
    places = [*[(lr, size) for lr in grid.lrs for size in grid.batch_sizes], *grid.diagonal]
    curvature = {study.plain(lr, size): 1 / lr for lr, size in places}
    accuracy = dict.fromkeys(curvature, 80.0)
    accuracy[study.plain(grid.lrs[-1], smallest)] += 2
    accuracy[study.plain(grid.lrs[-1], largest)] += 1
    for rho in grid.rhos:
        for size in grid.batch_sizes:
            reference = study.plain(grid.sam_lr, size)  # the grid of SAM has the same sizes here
            curvature[study.sam(rho, size)] = curvature[reference] / 2
            accuracy[study.sam(rho, size)] = accuracy[reference] + (2 if size == smallest else 1)
    for p in grid.dropouts:
        curvature[study.dropout(p)] = 1 - p
        accuracy[study.dropout(p)] = 80 + 10 * (p if p <= grid.moderate_dropout else -p)
    for i, place in enumerate(grid.norm_places):
        curvature[study.convolutional(*place)] = 1.0
        curvature[study.batch_norm(*place)] = 0.5 if i else 2.0
        accuracy[study.convolutional(*place)], accuracy[study.batch_norm(*place)] = 80.0, 82.0
    return study, grid, curvature, accuracy


def verdicts_of(lines):
    return [line[-1].strip("*") for line in lines]


def test_findings_hold_where_the_numbers_are_the_papers(as_in_the_paper):
    study, grid, curvature, accuracy = as_in_the_paper
    findings = study.Findings(rows_of(study, grid, curvature, accuracy), grid)
    tables = list(findings.verdicts().values())
    for table in tables[:4]:
        assert set(verdicts_of(table)) == {"holds here"}
    assert [len(table) for table in tables[:4]] == [6, 3, 6, 4]
    normalized = verdicts_of(tables[4])
    assert normalized[:2] == ["larger", "smaller"]
    assert normalized[2:4] == ["larger", "larger"]  # in evaluation mode
    assert normalized[4:] == ["holds here"] * 3


def test_findings_fail_where_the_numbers_are_turned_around(as_in_the_paper):
    study, grid, curvature, accuracy = as_in_the_paper
    turned = {name: 1 / value for name, value in curvature.items()}, {k: 160 - v for k, v in accuracy.items()}
    tables = list(study.Findings(rows_of(study, grid, *turned), grid).verdicts().values())
    for table in (tables[0], tables[2], tables[3]):
        assert set(verdicts_of(table)) == {"does not"}
    same = study.Findings(rows_of(study, grid, dict.fromkeys(curvature, 1.0), accuracy), grid)
    assert verdicts_of(map(study.written, same.scaled_together())) == ["does not", "holds here", "does not"]
    normalized = verdicts_of(map(study.written, same.batch_normalization()))
    assert normalized[:2] == ["the same"] * 2
    assert normalized[4] == "holds here"  # lambda_max is not smaller


def test_less_than_half_a_point_is_no_help(as_in_the_paper):
    study, grid, curvature, accuracy = as_in_the_paper
    hardly = {name: 80 + 0.05 * (value - 80) for name, value in accuracy.items()}
    findings = study.Findings(rows_of(study, grid, curvature, hardly), grid)
    for table in findings.verdicts().values():
        verdicts = {line[0]: line[-1].strip("*") for line in table if "accuracy" in line[0] or "less" in line[0]}
        about_help = {verdict for claim, verdict in verdicts.items() if "help" in claim or "costs" in claim}
        assert about_help <= {"does not"}


def test_nothing_is_decided_without_runs(as_in_the_paper):
    study, grid, curvature, accuracy = as_in_the_paper
    rows = [row | {"reached": False} for row in rows_of(study, grid, curvature, accuracy)]
    for table in study.Findings(rows, grid).verdicts().values():
        assert set(verdicts_of(table)) == {"undecided"}


def test_batch_norm_is_judged_by_the_largest_up_to_the_next_iterate(as_in_the_paper):
    study, grid, curvature, accuracy = as_in_the_paper
    rows = rows_of(study, grid, curvature, accuracy)
    place = grid.norm_places[-1]
    for row in rows:
        if row["setting"] == study.batch_norm(*place):
            row["lambda_max_between"] = 4.0 + 1e-3 * row["seed"]
    findings = study.Findings(rows, grid)
    assert set(findings.lambda_max(study.batch_norm(*place)).values()) == {4.0, 4.001, 4.002}
    assert verdicts_of(findings.verdicts()["5. BatchNorm"])[: len(grid.norm_places)] == ["larger", "larger"]


def test_figures_and_text_are_made_of_all_settings(as_in_the_paper, tmp_path):
    study, grid, curvature, accuracy = as_in_the_paper
    rows = rows_of(study, grid, curvature, accuracy)
    findings = study.Findings(rows, grid)
    drawn = {name for _, _, lines in findings.curves().values() for settings in lines.values() for name in settings}
    assert drawn == set(grid.settings())
    findings.draw(tmp_path, "title")
    assert len(list(tmp_path.glob("*.png"))) == 5
    for row in rows:  # every second seed says the opposite
        row["test_accuracy"] *= 1 + 0.02 * (-1) ** (row["seed"] + ("SAM" in row["setting"]))
    text = study.text_of(study.Findings(rows, grid), "title")
    assert "more seed" in text
    assert "Every run reached its points" in text


# ----------------------------------------------------------------------------------- how many seeds would decide


@pytest.mark.parametrize("unit", ["", "x"])
def test_seeds_to_decide_are_those_of_the_t_interval(unit):
    from scipy import stats
    from verdicts import difference, judge, ratio, seeds_to_decide

    values = [1.0, 4.0, -2.0]
    found = (
        ratio({i: math.exp(v) for i, v in enumerate(values)}, dict.fromkeys(range(3), 1.0))
        if unit == "x"
        else difference(dict(enumerate(values)), dict.fromkeys(range(3), 0.0))
    )
    assert judge(found, "above") == "undecided"
    expected = next(n for n in range(3, 1000) if stats.t.ppf(0.975, n - 1) * 3.0 / math.sqrt(n) < 1.0)
    assert seeds_to_decide(found, "above") == expected
    assert seeds_to_decide(found, "above", most=expected - 1) is None


def test_seeds_to_decide_of_what_is_decided_or_unknown():
    from verdicts import Effect, difference, seeds_to_decide

    assert seeds_to_decide(difference({0: 1.0, 1: 1.1}, {0: 0.0, 1: 0.0}), "above") == 2
    assert seeds_to_decide(Effect(1.0, -math.inf, math.inf, 1), "above") is None
    on_the_edge = difference({0: 0.4, 1: 0.6}, {0: 0.0, 1: 0.0})
    assert seeds_to_decide(on_the_edge, "within", 0.5) is None


def test_outlook_is_about_what_is_undecided():
    from report import outlook
    from verdicts import Claim, Effect, difference

    claim, zeros = Claim("it helps", "above"), {0: 0.0, 1: 0.0, 2: 0.0}
    decided, open_ = difference({0: 1.0, 1: 1.1, 2: 0.9}, zeros), difference({0: 1.0, 1: 4.0, 2: -2.0}, zeros)
    nothing, alone = Effect(0.0, -1.0, 1.0, 5), difference({0: 1.0}, zeros)
    assert outlook([(claim, "there", decided)]) == ""
    text = outlook(
        [(claim, "there", decided), (claim, "here", open_), (claim, "nowhere", nothing), (claim, "once", alone)]
    )
    assert [line for line in text.splitlines() if line.startswith("-")] == [
        "- it helps, here: 35 more seeds would decide.",
        "- it helps, nowhere: no number up to 1,000 seeds would decide.",
        "- it helps, once: fewer than two pairs, so that this is not known.",
    ]
