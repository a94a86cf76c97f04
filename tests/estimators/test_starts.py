"""Where the search for the sharpest directions starts: what it saves, and that it changes no value."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import InvariantSharpness, LossLandscape, TopEigenvalues
from lightning_flatness.estimators import lanczos, top_eigenvalues
from lightning_flatness.metrics import preset_metrics


def landscape(seed: int = 0, weights: Tensor | None = None, **options: Any) -> LossLandscape:
    """A small network in float64, half-way trained where its weights are given."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    if weights is None:
        weights = torch.randn(sum(p.numel() for p in module.parameters()), generator=generator).double() / 3
    nn.utils.vector_to_parameters(weights, module.parameters())
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)).double()
    y = (3 * x[:, 0] + x[:, 1]).long().remainder(4)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return LossLandscape(module, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), **options)


def test_the_gradient_leaves_its_graphs_to_the_products():
    kept, rebuilt = landscape(), landscape(engine="rebuilt")
    for each, cost in ((kept, 1 + 2), (rebuilt, 1 + 3)):
        with each.measurement():
            gradient = each.gradient(keep_graphs=True)
            each.hvp(gradient)
        assert each.cost.gradient_evaluations == pytest.approx(cost)
        torch.testing.assert_close(gradient, each.gradient(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shared", [False, True])
def test_what_one_geometry_has_found_helps_the_next_only_where_asked(shared):
    alone, together = landscape(), landscape()
    metric = InvariantSharpness(tol=1e-3)
    metric.update(alone)
    after = InvariantSharpness(tol=1e-3, shared_start=shared)
    with together.measurement():
        TopEigenvalues(tol=1e-3).update(together)
        after.update(together)
        assert together.batched_loss.point.sharp_covectors is not None
    with together.measurement():
        assert together.batched_loss.point.sharp_covectors is None
    if shared:
        assert int(after.num_products) <= int(metric.num_products) - 2
        torch.testing.assert_close(after.compute(), metric.compute(), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(after.compute(), metric.compute(), rtol=1e-10, atol=0)


def test_blocks_of_norm_zero_neither_give_nor_take_a_direction():
    for order in (("layer", "euclidean"), ("euclidean", "layer")):
        here = landscape()
        with torch.no_grad():
            here.module[0].bias.zero_()
            here.module[2].bias.zero_()
        with here.measurement():
            metrics = [TopEigenvalues(geometry=g, which="LM", tol=1e-6, shared_start=True) for g in order]
            for metric in metrics:
                metric.update(here)
        for metric, geometry in zip(metrics, order, strict=True):
            lone = TopEigenvalues(geometry=geometry, which="LM", tol=1e-6)
            lone.update(here)
            torch.testing.assert_close(metric.compute(), lone.compute(), rtol=1e-8, atol=0)


def test_a_warm_start_with_the_gradient_finds_the_same_value():
    weights = nn.utils.parameters_to_vector(landscape().module.parameters()).detach()
    metric = TopEigenvalues(tol=1e-6)
    for step in range(4):
        here = landscape(weights=weights)
        metric.update(here)
        cold = TopEigenvalues(tol=1e-6)
        cold.update(here)
        torch.testing.assert_close(metric.compute(), cold.compute(), rtol=1e-8, atol=0)
        weights = weights - 0.5 * here.gradient() * (step + 1)


def test_the_default_metrics_take_at_most_a_fifth_of_an_epoch_of_50_000_samples(monkeypatch):
    """Counted at the ends of epochs of the digits example, from the second on; their standard errors come on top."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    sys.modules.pop("digits", None)
    from digits import ConvNet, DigitsDataModule

    torch.manual_seed(0)
    module, data = ConvNet(), DigitsDataModule().train_set.tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    probe = [(x, y) for x, y in zip(data[0][:512].split(128), data[1][:512].split(128), strict=True)]
    metrics = preset_metrics()
    shares = []
    for epoch in range(7):
        here = LossLandscape(module, probe, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        with here.measurement():
            for metric in metrics.values():
                metric.update(here)
        shares.append(here.cost.gradient_evaluations * here.num_samples / 50_000)
        for batch in torch.randperm(1400, generator=torch.Generator().manual_seed(epoch)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(module(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
    assert all(metric.converged for metric in metrics.values())
    standard_errors = 2 * 1.5 * here.num_samples / 50_000  # of two eigenvalues, 1.5 gradients each at most
    assert statistics.median(shares[1:]) <= 0.2 + standard_errors, shares


def test_a_cold_run_starts_from_the_gradient_and_finds_what_a_random_start_finds(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    sys.modules.pop("digits", None)
    from digits import ConvNet, DigitsDataModule

    torch.manual_seed(0)
    module, (x, y) = ConvNet(), DigitsDataModule().train_set.tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.arange(1400).split(32):
        optimizer.zero_grad()
        F.cross_entropy(module(x[batch]), y[batch]).backward()
        optimizer.step()
    saved = []
    with LossLandscape(module, [(x[:512], y[:512])], lambda m, b: F.cross_entropy(m(b[0]), b[1])).measurement() as here:
        for seed in range(5):
            options = {"k": 1, "tol": 1e-3, "seed": seed}
            found = top_eigenvalues(here, **options)
            random = lanczos(here.hvp, here.num_parameters, **options)
            saved.append(random.num_products - found.num_products)
            torch.testing.assert_close(found.eigenvalues, random.eigenvalues, rtol=1e-4, atol=0)
    assert statistics.median(saved) >= 1, saved


def test_the_gradient_may_have_no_part_in_the_sharpest_direction():
    """Two quadratics side by side, of which the sharper one is at its minimum."""
    module = nn.ParameterDict({"flat": nn.Parameter(torch.ones(300)), "sharp": nn.Parameter(torch.zeros(300))})
    curvature = torch.linspace(0.1, 1, 300).double()

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return (curvature * (module["flat"] ** 2 + 3 * module["sharp"] ** 2)).sum() / 2

    here = LossLandscape(module.double(), [torch.zeros(1)], loss)
    for k in (1, 3):
        result = top_eigenvalues(here, k=k, tol=1e-4)
        torch.testing.assert_close(result.eigenvalues, 3 * curvature.flip(0)[:k], rtol=1e-4, atol=0)
