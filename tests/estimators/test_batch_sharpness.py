"""The sharpness of batches against dense Hessians in float64, in runs with small batches, and in the monitor."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from helpers.modules import Classifier, loader, loaders
from helpers.training import fit
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import BatchSharpness, FlatnessMonitor, LossLandscape, TopEigenvalues
from lightning_flatness.estimators import UndefinedMeasureError


def network() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module, torch.randn(21, 3, generator=generator).double(), torch.randint(2, (21,), generator=generator)


def dense_quotient(module: nn.Module, x: Tensor, y: Tensor, weight: Tensor | None = None) -> float:
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        weights = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return F.cross_entropy(torch.func.functional_call(module, weights | buffers, (x,)), y, weight)

    here = torch.cat([p.detach().flatten() for p in module.parameters()])
    gradient = torch.func.grad(loss)(here)
    hessian = torch.autograd.functional.hessian(loss, here)  # that of torch.func is wrong for BatchNorm
    return float(gradient @ hessian @ gradient / gradient.square().sum())


@pytest.mark.parametrize("chunk", [21, 4])  # batches of a step that go through several passes, or pass through one
@pytest.mark.parametrize("batch_size", [1, 5, 10])
def test_value_and_error_are_those_of_dense_hessians(batch_size, chunk):
    module, x, y = network()
    batches = list(zip(x.split(chunk), y.split(chunk), strict=True))
    metric = BatchSharpness(batch_size)
    metric.update(LossLandscape(module, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1])))
    parts = [slice(i, i + batch_size) for i in range(0, 21 - batch_size + 1, batch_size)]
    dense = [dense_quotient(module, x[part], y[part]) for part in parts]
    assert len(dense) == 21 // batch_size
    assert float(metric.compute()) == pytest.approx(statistics.mean(dense), rel=1e-9)
    assert float(metric.error) == pytest.approx(statistics.stdev(dense) / math.sqrt(len(dense)), rel=1e-9)
    assert 3 <= float(metric.gradient_evaluations) <= 4.5


@pytest.mark.parametrize("chunk", [21, 8, 2])  # of 2: a step takes several passes, each about as large
@pytest.mark.parametrize("kind", ["batchnorm", "weights of classes"])
def test_of_losses_that_are_no_means_over_samples(kind, chunk):
    """A batch of the run is evaluated as one, wherever the batches of the landscape end."""
    module, x, y = network()
    if kind == "batchnorm":
        module = nn.Sequential(module[0], nn.BatchNorm1d(4, momentum=None, dtype=torch.float64), *module[1:])
    weight = torch.tensor([0.2, 5.0]).double() if kind == "weights of classes" else None
    metric = BatchSharpness(5)
    batches = list(zip(x[:20].split(chunk), y[:20].split(chunk), strict=True))
    metric.update(LossLandscape(module, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1], weight)))
    if chunk > 5:
        dense = [dense_quotient(module, x[i : i + 5], y[i : i + 5], weight) for i in range(0, 20, 5)]
        assert float(metric.compute()) == pytest.approx(statistics.mean(dense), rel=1e-9)
    assert math.isfinite(metric.compute())


def test_of_all_samples_it_is_the_curvature_along_the_gradient_without_sampling_error():
    module, x, y = network()
    landscape = LossLandscape(module, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    metric, largest = BatchSharpness(21), TopEigenvalues()
    metric.update(landscape)
    largest.update(landscape)
    assert float(metric.compute()) == pytest.approx(dense_quotient(module, x, y), rel=1e-9)
    assert float(metric.error) < 1e-12
    assert float(metric.compute()) <= float(largest.compute())


def test_one_batch_of_more_than_half_of_the_samples_has_no_error():
    module, x, y = network()
    metric = BatchSharpness(15)
    metric.update(LossLandscape(module, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1])))
    assert float(metric.compute()) == pytest.approx(dense_quotient(module, x[:15], y[:15]), rel=1e-9)
    assert math.isnan(metric.error)
    assert not metric.converged


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (22, r"Expected batches of at most the 21 samples that are measured on, got a batch size of 22. Raise `probe_"),
        (
            None,
            r"Expected `batch_size`, the samples behind one optimizer step, .* Use BatchSharpness\(batch_size=...\)",
        ),
    ],
)
def test_batches_that_cannot_be_made(batch_size, message):
    module, x, y = network()
    landscape = LossLandscape(module, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(UndefinedMeasureError, match=message):
        BatchSharpness(batch_size).update(landscape)


def test_sizes_that_are_none():
    with pytest.raises(ValueError, match="Expected `batch_size` to be an integer >= 1, got 0"):
        BatchSharpness(0)


def test_in_training_with_small_batches_it_hovers_at_the_edge_while_lambda_max_stays_below():
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:200], dtype=torch.float32) / 16
    x, y = (x - x.mean(dim=0)) / (x.std(dim=0) + 0.1), F.one_hot(torch.tensor(labels[:200]), 10).float()
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)]
    module, eta, batch_size = nn.Sequential(*layers), 0.6, 4

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (module(batch[0]) - batch[1]).square().sum(dim=1).mean()

    optimizer, ratios, losses = torch.optim.SGD(module.parameters(), lr=eta), [], []
    metrics = BatchSharpness(batch_size), TopEigenvalues()
    for step in range(1, 3001):
        chosen = torch.randint(len(x), (batch_size,))
        optimizer.zero_grad()
        loss_fn(module, (x[chosen], y[chosen])).backward()
        optimizer.step()
        if step % 300 == 0:
            landscape = LossLandscape(module, [(x, y)], loss_fn)
            for metric in metrics:
                metric.update(landscape)
            ratios.append([eta / 2 * float(metric.compute()) for metric in metrics])
            losses.append(float(landscape.loss()))
    batch, largest = map(list, zip(*ratios, strict=True))
    assert losses[-1] < losses[0] / 4
    assert statistics.mean(batch[:2]) < statistics.mean(batch[-5:])  # it has risen
    assert all(0.75 < value < 1.15 for value in batch[-5:]), batch
    assert all(value < 0.65 for value in largest), largest


class Momentum(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5, weight_decay=1.0)


def test_the_monitor_passes_the_batch_size_of_the_run_and_logs_the_edges(tmp_path):
    torch.manual_seed(0)
    module = Momentum()
    monitor = FlatnessMonitor({"batch_sharpness": BatchSharpness(tol=10.0)}, probe_size=40)
    run = fit(tmp_path, monitor, module=module, accumulate_grad_batches=2, max_epochs=1)
    logged = {k: float(v) for k, v in run.callback_metrics.items()}
    assert logged["flatness/batch_sharpness_lower_edge"] == pytest.approx(2 * 0.5 / 0.1 - 1)
    assert logged["flatness/batch_sharpness_upper_edge"] == pytest.approx(2 * 1.5 / 0.1 - 1)
    metric = BatchSharpness(16)  # 8 samples, twice
    metric.update(LossLandscape(module, monitor.run.probe))
    assert logged["flatness/batch_sharpness"] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_a_batch_of_the_whole_dataset_is_as_large_as_that(tmp_path):
    monitor = FlatnessMonitor({"batch_sharpness": BatchSharpness(tol=10.0)})
    run = fit(tmp_path, monitor, data=(loader(batch_size=64),), max_epochs=1)  # of 40 samples
    assert math.isfinite(run.callback_metrics["flatness/batch_sharpness"])


@pytest.mark.filterwarnings("ignore:.* did not converge", "ignore:.*(minimum|psi)_sharpness. is left out")
def test_a_probe_smaller_than_the_batch_is_said_once(tmp_path):
    with pytest.warns(
        UserWarning, match="'flatness/batch_sharpness' is left out. Expected batches of at most the 6"
    ) as w:
        run = fit(tmp_path, FlatnessMonitor("all", probe_size=6), data=loaders(), max_epochs=2)
    assert len([c for c in w if "batch_sharpness" in str(c.message) and "left out" in str(c.message)]) == 1
    assert "flatness/lambda_max" in run.callback_metrics
    assert "flatness/batch_sharpness" not in run.callback_metrics
