"""Critical and directional sharpness against closed forms, dense Hessians in float64 and scans of the ray."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import CriticalSharpness, DirectionalSharpness, FlatnessTracker, LossLandscape, OptimizerStep
from lightning_flatness.estimators.line_search import first_crossing
from lightning_flatness.landscape import MissingUpdateError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "two groups": lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.05}, {"params": p[1:], "lr": 0.2}]),
}


def network() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module, torch.randn(40, 3, generator=generator).double(), torch.randint(2, (40,), generator=generator)


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> OptimizerStep:
    optimizer.zero_grad()
    loss.backward()
    with OptimizerStep(optimizer) as update:
        optimizer.step()
    return update


def least_squares(lr: float) -> tuple[nn.Module, Tensor, OptimizerStep]:
    """A quadratic loss whose Hessian is ``2 mean x xᵀ``, after a step of gradient descent."""
    torch.manual_seed(0)
    module, x = nn.Linear(3, 1, bias=False).double(), torch.randn(32, 3).double()
    return module, x, stepped(module, torch.optim.SGD(module.parameters(), lr=lr), module(x).square().mean())


def square(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().mean()


@pytest.mark.parametrize("lr", [1e-3, 0.3, 1.0, 30.0])  # far below, about and above the critical one
def test_of_a_quadratic_loss_both_are_the_closed_form(lr):
    module, x, update = least_squares(lr)
    change, hessian = update.change(list(module.parameters())), 2 * x.T @ x / len(x)
    u, before = change / lr, flat(module) + change
    gradient = hessian @ before
    expected = float(u @ hessian @ u / (u @ gradient))
    landscape = LossLandscape(module, x.split(5), square, update=update)
    critical, directional = CriticalSharpness(), DirectionalSharpness()
    critical.update(landscape)
    directional.update(landscape)
    assert float(critical.compute()) == pytest.approx(expected, rel=1e-6)
    assert expected / 40 < float(critical.error) < expected / 30
    assert directional.compute().tolist() == pytest.approx([expected, float(u @ hessian @ u / (u @ u))], rel=1e-9)
    assert critical.references("c", [])["c_edge"] == pytest.approx(2 / lr)
    assert critical.converged
    assert directional.converged


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_of_any_optimizer_against_a_scan_of_the_ray_and_the_dense_hessian(name):
    module, x, y = network()
    optimizer = OPTIMIZERS[name](list(module.parameters()))
    for _ in range(3):
        before = flat(module)
        update = stepped(module, optimizer, cross_entropy(module, (x, y)))
    after, eta = flat(module), max(group["lr"] for group in optimizer.param_groups)
    shapes = {n: p.shape for n, p in module.named_parameters()}

    def loss(w: Tensor) -> Tensor:
        pieces = w.split([s.numel() for s in shapes.values()])
        weights = {n: piece.view(s) for (n, s), piece in zip(shapes.items(), pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module, weights, (x,)), y)

    u, here = (before - after) / eta, loss(before)
    scan = next(s for s in torch.arange(0.01, 1e3, 0.01).tolist() if loss(before - s * eta * u) > here)
    batches = list(zip(x.split(7), y.split(7), strict=True))
    landscape = LossLandscape(module, batches, cross_entropy, update=update)
    metric = CriticalSharpness()
    metric.update(landscape)
    value, error = float(metric.compute()), float(metric.error)
    assert abs(value - 2 / (scan * eta)) <= error
    assert value == pytest.approx(2 / (scan * eta), rel=0.01)
    hessian, gradient = torch.autograd.functional.hessian(loss, before), torch.func.grad(loss)(before)
    directional = DirectionalSharpness()
    directional.update(landscape)
    dense = [float(u @ hessian @ u / (u @ gradient)), float(u @ hessian @ u / (u @ u))]
    assert directional.compute().tolist() == pytest.approx(dense, rel=1e-8)


def test_a_warm_start_takes_at_most_eight_forward_passes_in_a_run():
    module, x, y = network()
    optimizer, metric = torch.optim.Adam(module.parameters(), lr=0.01), CriticalSharpness()
    passes = []
    for _ in range(30):
        update = stepped(module, optimizer, cross_entropy(module, (x, y)))
        metric.update(LossLandscape(module, [(x, y)], cross_entropy, update=update))
        passes.append(round(3 * float(metric.gradient_evaluations)))
    assert max(passes[5:]) <= 8
    assert sum(passes[5:]) / 25 < 7.5


def test_standard_errors_are_those_of_other_samples():
    """Deviations of many probes from the whole set, in units of their standard errors, have variance one."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4000, 3, generator=generator).double(), torch.randint(2, (4000,), generator=generator)
    module = network()[0]
    update = stepped(module, torch.optim.Adam(module.parameters(), lr=0.05), cross_entropy(module, (x, y)))

    def measured(metric, chosen):
        metric.update(LossLandscape(module, [(x[chosen], y[chosen])], cross_entropy, update=update, num_total=4000))
        return metric.value.flatten()[0], metric.standard_error.flatten()[0], metric.error.flatten()[0]

    for metric in (CriticalSharpness(tol=1e-3), DirectionalSharpness()):
        truth, none, _ = measured(metric, slice(None))
        assert float(none) == 0
        z = []
        for _ in range(60):
            value, se, _ = measured(metric, torch.randperm(4000, generator=generator)[:256])
            z.append(float((value - truth) / se))
        assert 0.7 < float(torch.tensor(z).square().mean().sqrt()) < 1.3


@pytest.mark.parametrize("metric", [CriticalSharpness(), DirectionalSharpness()], ids=["critical", "directional"])
def test_an_update_that_climbs_has_none_and_says_so(metric):
    module, x, y = network()
    update = stepped(module, torch.optim.SGD(module.parameters(), lr=0.1, maximize=True), cross_entropy(module, (x, y)))
    metric.update(LossLandscape(module, [(x, y)], cross_entropy, update=update))
    assert math.isnan(metric.compute().flatten()[0])
    assert "Along the last update the loss of these samples does not fall" in metric.remark


def test_a_loss_that_never_rises_gives_half_of_a_bound_and_does_not_converge():
    module = nn.Linear(2, 1, bias=False).double()
    x = torch.ones(4, 2).double()
    update = stepped(module, torch.optim.SGD(module.parameters(), lr=0.5), module(x).mean())
    metric = CriticalSharpness()
    metric.update(LossLandscape(module, [x], lambda m, x: m(x).mean(), update=update))
    assert not metric.converged
    assert 0 < float(metric.compute()) == float(metric.error) < 1e-5


@pytest.mark.parametrize("make", [CriticalSharpness, DirectionalSharpness])
def test_before_the_first_step(make):
    module, x, y = network()
    match = f"Expected an optimizer step before {make.__name__}.* got none.*OptimizerStep"
    with pytest.raises(MissingUpdateError, match=match):
        make().update(LossLandscape(module, [(x, y)], cross_entropy))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with OptimizerStep(optimizer) as update:
        optimizer.step()  # without a gradient
    with pytest.raises(MissingUpdateError, match="got one that changed no weight"):
        make().update(LossLandscape(module, [(x, y)], cross_entropy, update=update))
    tracker = FlatnessTracker(module, [(x, y)], {"sharpness": make()}, loss_fn=cross_entropy)
    assert tracker.measure().values == {}
    update = stepped(module, optimizer, cross_entropy(module, (x, y)))
    assert set(tracker.measure(1, update).values) >= {"sharpness", "sharpness_edge"}


def test_bad_arguments():
    with pytest.raises(ValueError, match="Expected `max_passes` to be an integer >= 4, got 3"):
        CriticalSharpness(max_passes=3)
    with pytest.raises(ValueError, match="Expected `tol` to be >= 0, got -1"):
        CriticalSharpness(tol=-1)


@pytest.mark.parametrize("root", [1e-3, 0.1, 0.9, 1.0, 3.0, 50.0, 1e3])
@pytest.mark.parametrize("power", [2, 4, 12])
@pytest.mark.parametrize("guess", [None, 0.7, 0.97, 1.02, 1.5])
def test_brackets_of_powers(root, power, guess):
    start = None if guess is None else guess * root
    crossing = first_crossing(
        lambda s: (s / root) ** power - s / root if s / root < 1e9 else math.inf, 1 / 16, 40, start
    )
    assert crossing.low <= root <= crossing.high
    assert crossing.width <= 1 / 16
    assert crossing.at == pytest.approx(root, rel=1 / 16)
    assert len(crossing.rises) <= (20 if guess is None else 12)
    if power == 2 and guess in (0.97, 1.02):
        assert len(crossing.rises) <= 4


@pytest.mark.parametrize(
    "rise", [lambda s: s, lambda s: 3 * s + s * s, lambda s: math.expm1(min(s, 99)), lambda s: s - s * s / 9]
)
@pytest.mark.parametrize("start", [None, 1e-3, 7.0])
def test_a_function_that_climbs_is_told_by_a_few_values(rise, start):
    crossing = first_crossing(rise, 1 / 16, 40, start)
    assert crossing.climbs or math.isinf(crossing.high)
    assert len(crossing.rises) <= 8


@pytest.mark.parametrize("bend", [0.8, 4.0])
@pytest.mark.parametrize("start", [20.0, 58.0, 500.0])
def test_a_function_that_falls_only_far_nearer_than_it_did_before_is_not_told_to_climb(bend, start):
    crossing = first_crossing(lambda s: s * (0.3 * s / (s + bend) - 0.1), 1 / 16, 31, start)
    assert crossing.low <= bend / 2 <= crossing.high
    assert crossing.width <= 1 / 16
    assert len(crossing.rises) <= 12


def test_a_jump_is_bracketed_by_bisection():
    crossing = first_crossing(lambda s: -1e-9 if s < 3 else math.nan, 1 / 16, 40)
    assert crossing.low < 3 <= crossing.high
    assert crossing.width <= 1 / 16
