"""The geometry of the running optimizer against dense P^(-1/2) H P^(-1/2), and stability edges against simulation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.problems import make_problem
from torch import Tensor, nn

from lightning_flatness import LossLandscape, OptimizerGeometry, TopEigenvalues, stability_edge
from lightning_flatness.estimators import current_learning_rates, stability_band
from lightning_flatness.geometry import MissingOptimizerStateError, is_preconditioned

Make = Callable[[Any], torch.optim.Optimizer]

ADAPTIVE: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam large eps": lambda p: torch.optim.Adam(p, lr=0.01, eps=0.1, betas=(0.8, 0.9)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.3, lr_decay=0.1),
}


def trained(make: Make, steps: int = 5) -> tuple[Any, torch.optim.Optimizer]:
    problem = make_problem("tanh_mlp")
    optimizer = make(problem.module.parameters())
    for i in range(steps):
        optimizer.zero_grad()
        problem.loss_fn(problem.module, problem.batches[i % 2]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return problem, optimizer


def divisor(optimizer: torch.optim.Optimizer) -> Tensor:
    """P, written down anew from the formulas in torch's documentation."""
    twin = copy.deepcopy(optimizer)
    parts = []
    for p in (p for g in twin.param_groups for p in g["params"]):
        state, group = twin.state[p], twin.param_groups[0]
        t = float(state["step"])
        if "exp_avg_sq" in state:
            second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
            parts.append((second / (1 - group["betas"][1] ** t)).sqrt() + group["eps"])
        elif "square_avg" in state:
            variance = state["square_avg"] - (state["grad_avg"] ** 2 if group["centered"] else 0)
            parts.append(variance.sqrt() + group["eps"])
        else:
            parts.append(state["sum"].sqrt() + group["eps"])
    return torch.cat([p.flatten() for p in parts])


@pytest.mark.parametrize("name", list(ADAPTIVE))
def test_preconditioned_sharpness_equals_the_dense_one(name):
    problem, optimizer = trained(ADAPTIVE[name])
    scale = divisor(optimizer).rsqrt()
    exact = torch.linalg.eigvalsh(scale[:, None] * problem.dense_hessian() * scale).flip(0)[:3]
    for geometry, options in [("optimizer", {"optimizer": optimizer}), (OptimizerGeometry(optimizer), {})]:
        landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, **options)
        metric = TopEigenvalues(k=3, geometry=geometry, tol=1e-9)
        metric.update(landscape)
        torch.testing.assert_close(metric.compute(), exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad", "rmsprop", "adagrad"])
def test_the_preconditioner_is_what_torch_divides_by(name):
    """A step on a gradient that leaves the second moment as it is moves the weights by lr · m / P."""
    problem, optimizer = trained(ADAPTIVE[name])
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, optimizer=optimizer)
    scale = landscape.chart("optimizer").displacement(torch.ones(problem.num_parameters, dtype=torch.float64))
    group = optimizer.param_groups[0]
    group["lr"], group["weight_decay"] = 1e-9, 0.0  # small: the state after the step is compared with that before
    before, offset = [p.clone() for p in problem.parameters], 0
    moments = {}
    for p in problem.parameters:
        state = optimizer.state[p]
        p.grad = torch.zeros_like(p)
        if name in ("adam", "adamw", "amsgrad"):
            t, (beta1, beta2) = float(state["step"]), group["betas"]
            hat = state["exp_avg_sq"] / (1 - beta2**t)
            p.grad = (hat * (1 - beta2 ** (t + 1)) - beta2 * state["exp_avg_sq"]).div(1 - beta2).clamp_min(0).sqrt()
            moments[p] = (beta1 * state["exp_avg"] + (1 - beta1) * p.grad) / (1 - beta1 ** (t + 1))
            if name == "amsgrad":
                state["max_exp_avg_sq"] = state["max_exp_avg_sq"] * (1 - beta2 ** (t + 1)) / (1 - beta2**t)
        elif name == "rmsprop":
            p.grad = state["square_avg"].sqrt()
            moments[p] = group["momentum"] * state["momentum_buffer"] + p.grad / (state["square_avg"].sqrt() + 1e-8)
        else:
            p.grad = 1e-12 * torch.ones_like(p)
            moments[p] = p.grad / (1 + float(state["step"]) * group["lr_decay"])
    optimizer.step()
    for p, old in zip(problem.parameters, before, strict=True):
        moved = (old - p.detach()) / group["lr"]
        s = scale[offset : offset + p.numel()].view_as(p)
        expected = moments[p] if name == "rmsprop" else moments[p] * s**2
        tolerance = 1e-3 * float(expected.abs().max()) + (1e-5 if name == "adagrad" else 0)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=tolerance)
        offset += p.numel()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_sgd_is_euclidean(options):
    problem, optimizer = trained(lambda p: torch.optim.SGD(p, lr=0.1, **options), steps=1)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, optimizer=optimizer)
    assert landscape.chart("optimizer").scale is None


def test_weights_that_the_optimizer_does_not_step_do_not_move():
    problem = make_problem("tanh_mlp")
    first, last = problem.module[0], problem.module[2]
    adam = torch.optim.Adam([*first.parameters(), last.weight])
    (first(problem.batches[0][0])).square().mean().backward()  # the last layer gets no gradient
    adam.step()
    z = torch.ones(problem.num_parameters, dtype=torch.float64)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, optimizer=adam)
    moved = landscape.unflatten(landscape.chart("optimizer").displacement(z))
    assert moved[0].all()
    assert not moved[2].any()
    assert not moved[3].any()
    sgd = torch.optim.SGD([last.bias], lr=0.1)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, optimizer=[adam, sgd])
    moved = landscape.unflatten(landscape.chart("optimizer").displacement(z))
    assert moved[0].all()
    assert not moved[2].any()
    assert (moved[3] == 1).all()


def test_errors_of_the_optimizer_geometry():
    problem = make_problem("tanh_mlp")
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn)
    with pytest.raises(TypeError, match=r"Expected an optimizer for the geometry 'optimizer', got none\. Pass"):
        TopEigenvalues(geometry="optimizer").update(landscape)
    landscape.optimizer = torch.optim.Adam(problem.module.parameters())
    with pytest.raises(MissingOptimizerStateError, match=r"Expected an optimizer that has stepped .* got Adam without"):
        TopEigenvalues(geometry="optimizer").update(landscape)
    with pytest.raises(TypeError, match=r"Expected one of SGD, Adam, AdamW, RMSprop and Adagrad .* got LBFGS"):
        OptimizerGeometry(torch.optim.LBFGS(problem.module.parameters()))
    with pytest.raises(TypeError, match=r"Expected a torch.optim.Optimizer, or several in a list, got Linear"):
        OptimizerGeometry(nn.Linear(1, 1))


# ---------------------------------------------------------------------------------------------- stability edges

SGDS: dict[str, Make] = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.5),
    "dampening alone": lambda p: torch.optim.SGD(p, lr=0.1, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=8.0),
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=15.0),
    "nesterov, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5.0),
}


def grows(make: Make, curvature: float, steps: int = 2000) -> bool:
    """Whether gradient descent on ``curvature · w²/2`` diverges."""
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = make([w])
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * curvature * w.square()).sum().backward()
        optimizer.step()
        if abs(float(w.detach())) > 1e6:
            return True
    return False


@pytest.mark.parametrize("name", list(SGDS))
def test_edge_of_sgd_separates_convergence_from_divergence(name):
    edge = stability_edge(SGDS[name]([torch.zeros(1, requires_grad=True)]))
    assert not grows(SGDS[name], 0.98 * edge)
    assert grows(SGDS[name], 1.02 * edge)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.Adam, {"betas": (0.9, 1 - 1e-12)}),
        (torch.optim.Adam, {"betas": (0.5, 1 - 1e-12)}),
        (torch.optim.Adam, {"betas": (0.9, 1 - 1e-12), "weight_decay": 800.0}),
        (torch.optim.AdamW, {"betas": (0.9, 1 - 1e-12), "weight_decay": 3.0}),
        (torch.optim.AdamW, {"betas": (0.0, 1 - 1e-12), "weight_decay": 5.0}),
        (torch.optim.RMSprop, {"momentum": 0.7, "alpha": 1 - 1e-12, "weight_decay": 60.0}),
        (torch.optim.RMSprop, {"momentum": 0.7, "alpha": 1 - 1e-12}),
        (torch.optim.Adagrad, {"lr_decay": 0.0}),
    ],
)
def test_edge_of_adaptive_optimizers_is_one_of_the_preconditioned_curvature(make, options):
    """With the second moment all but frozen: what Adam does is momentum with steps over P."""
    lr, second = 0.1, 25.0

    def diverges(factor: float) -> bool:
        w = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = make([w], lr=lr, **options)
        w.grad = torch.zeros_like(w)
        optimizer.step()
        state = optimizer.state[w]
        if "sum" in state:
            state["sum"] = torch.full_like(w, second * 1e12).detach()
        elif "square_avg" in state:
            state["square_avg"] = torch.full_like(w, second).detach()
        else:
            state["step"], state["exp_avg_sq"] = torch.tensor(1e15), torch.full_like(w, second).detach()
        for momentum in {"exp_avg", "momentum_buffer"} & set(state):  # of the weight decay of the first step
            state[momentum].zero_()
        landscape = LossLandscape(
            _Weight(w), [torch.zeros(1)], lambda m, _: (0.5 * m.w.square()).sum(), optimizer=optimizer
        )
        metric = TopEigenvalues(geometry="optimizer")
        metric.update(landscape)
        curvature = factor * stability_edge(optimizer) / float(metric.compute())
        w.data.fill_(1e-6)
        for _ in range(3000):
            optimizer.zero_grad()
            (0.5 * curvature * w.square()).sum().backward()
            optimizer.step()
            if abs(float(w.detach())) > 1e-3:
                return True
        return False

    assert not diverges(0.97)
    assert diverges(1.03)


class _Weight(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.detach().clone())
        self._share(w)

    def _share(self, w: Tensor) -> None:
        self._parameters["w"] = w  # type: ignore[assignment]


def test_formulas_of_the_edges():
    p = [torch.zeros(1, requires_grad=True)]
    assert stability_edge(torch.optim.SGD(p, lr=0.1)) == pytest.approx(20)
    assert stability_edge(torch.optim.SGD(p, lr=0.1, momentum=0.9)) == pytest.approx(38)
    assert stability_edge(torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)) == pytest.approx(3.8 / 0.28)
    for adam, decay in ((torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.0)):
        assert stability_edge(adam(p, lr=0.01, betas=(0.9, 0.99), weight_decay=decay)) == pytest.approx(3800)
        assert is_preconditioned(adam(p))
    assert stability_edge(torch.optim.RMSprop(p, lr=0.1)) == pytest.approx(20)
    assert stability_edge(torch.optim.SGD(p, lr=0.0)) == math.inf
    assert math.isnan(stability_edge(torch.optim.LBFGS(p)))
    assert math.isnan(stability_edge([]))
    assert not is_preconditioned(torch.optim.SGD(p))
    assert stability_edge(torch.optim.SGD(p, lr=torch.tensor(0.1))) == pytest.approx(20)


def test_weight_decay_lowers_the_edge():
    p = [torch.zeros(1, requires_grad=True)]
    assert stability_edge(torch.optim.SGD(p, lr=0.1, weight_decay=3.0)) == pytest.approx(17)
    assert stability_edge(torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=3.0)) == pytest.approx(35)
    adamw = torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.99), weight_decay=2.0)
    assert stability_edge(adamw) == pytest.approx(3800 - 38)  # gamma (1 + beta1) / (1 - beta1)
    assert stability_edge(torch.optim.AdamW(p, lr=0.1, betas=(0.0, 0.99), weight_decay=2.0)) == pytest.approx(20 - 2)
    adam = torch.optim.Adam(p, lr=0.01, weight_decay=2.0)
    assert stability_edge(adam) == pytest.approx(3800)  # nothing is divided yet
    p[0].grad = torch.full((1,), 4.0)
    adam.step()
    assert stability_edge(adam) == pytest.approx(3800 - 2.0 / 4.0, rel=1e-6)


def test_the_edge_of_the_step_just_taken_and_not_of_the_schedule():
    p = [torch.zeros(1, requires_grad=True)]
    sgd = torch.optim.SGD(p, lr=torch.tensor(0.1))
    taken = current_learning_rates(sgd)
    sgd.param_groups[0]["lr"].fill_(0.0)
    assert stability_edge(sgd) == math.inf
    assert stability_edge([sgd], taken) == pytest.approx(20)
    sgd.add_param_group({"params": [torch.zeros(1)], "lr": 0.4})
    assert stability_edge(sgd, taken) == pytest.approx(5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_band_of_momentum(beta):
    sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=beta, weight_decay=1.0)
    low, high = stability_band(sgd)
    assert low == pytest.approx(2 * (1 - beta) / 0.1 - 1)
    assert high == pytest.approx(2 * (1 + beta) / 0.1 - 1)
    assert all(map(math.isnan, stability_band(torch.optim.Adam([torch.zeros(1)]))))


def test_an_optimizer_without_a_learning_rate_has_no_edge():
    """As Adafactor of transformers, which makes its own: `lr=None`."""

    class Relative(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": None})

    assert math.isnan(stability_edge(Relative([torch.zeros(1)])))


def test_of_several_groups_and_optimizers_the_smallest_edge_counts():
    p, q = (torch.zeros(1, requires_grad=True) for _ in range(2))
    groups = torch.optim.SGD([{"params": [p], "lr": 0.5}, {"params": [q], "lr": 0.1, "momentum": 0.9}])
    assert stability_edge(groups) == pytest.approx(4)
    assert stability_edge([torch.optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.4)]) == pytest.approx(5)


def test_edge_of_adagrad_follows_its_decay():
    w = torch.ones(1, requires_grad=True)
    adagrad = torch.optim.Adagrad([w], lr=0.1, lr_decay=1.0)
    for _ in range(4):
        w.grad = torch.ones(1)
        adagrad.step()
    assert stability_edge(adagrad) == pytest.approx(2 / 0.1 * 4)
