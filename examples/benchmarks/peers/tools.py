"""The tools that are compared, each behind one function: a problem in, eigenvalues and the number of products out.

Every function does what a user of the tool would write, set-up included, and returns what a later measurement can
start from, if the tool can use that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pyhessian
import torch
from curvlinops import HessianLinearOperator
from hessian_eigenthings import HessianOperator, supervised_loss
from hessian_eigenthings import lanczos as eigenthings_lanczos
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import LossLandscape, TopEigenvalues
from peers.workloads import Batch, Problem


@dataclass(frozen=True)
class Measured:
    """What a tool found.

    Attributes:
        values: Eigenvalues, largest first.
        products: Hessian-vector products it took.
        kept: What a later measurement can start from.
        converged: Whether the tool says so.
    """

    values: list[float]
    products: int
    kept: Any = None
    converged: bool = True


Measure = Callable[..., Measured]
Settings = Callable[[int], list[dict[str, Any]]]
"""For a number of eigenvalues, the settings to try, least work first."""


@dataclass(frozen=True)
class Tool:
    """One way to measure.

    Attributes:
        name: As it stands in the tables.
        measure: ``measure(problem, k, seed, kept, **setting)``.
        cheapest: Settings to look for the least work in that reaches the accuracy asked for.
        default: The setting that the tool's documentation uses, if there is one.
        more_steps: Settings until it says that it has converged; for ``eigsh``, the tolerance that is asked for.
        kinds_warm: What is timed from what an earlier measurement found, if the tool can start from that.
        slow_kinds: What gets fewer rounds, since it would take most of the benchmark's time.
        kinds_in_microbatches: What is timed again where the samples come in many batches.
    """

    name: str
    measure: Measure
    cheapest: Settings
    default: dict[str, Any] | None = None
    more_steps: Settings | None = None
    kinds_warm: tuple[str, ...] = ()
    slow_kinds: tuple[str, ...] = ()
    kinds_in_microbatches: tuple[str, ...] = ("default", "converged", "cheapest")


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


# ------------------------------------------------------------------------------------------------------------ ours


def ours(problem: Problem, k: int, seed: int, kept: TopEigenvalues | None, *, tol: float) -> Measured:
    metric = TopEigenvalues(k=k, tol=tol, seed=seed) if kept is None else copy.deepcopy(kept)
    metric.update(LossLandscape(problem.module, problem.batches, loss_fn))
    return Measured(metric.compute().flatten().tolist(), int(metric.num_products), metric)


# ------------------------------------------------------------------------------------------------------- PyHessian


def run_pyhessian(problem: Problem, k: int, seed: int, kept: None, *, tol: float) -> Measured:
    products = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal products
            products += 1
            return function(*args)

        return call

    torch.manual_seed(seed)
    data: dict[str, Any] = {"dataloader": problem.batches}
    if len(problem.batches) == 1:  # then it keeps the graph of the gradient
        data = {"data": problem.batches[0]}
    names = pyhessian.hessian.eigenvalues.__globals__
    with warnings.catch_warnings(), patch.dict(names, hessian_vector_product=counted(names["hessian_vector_product"])):
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        problem.module.zero_grad()
        solver = pyhessian.hessian(problem.module, F.cross_entropy, cuda=False, **data)
        solver.dataloader_hv_product = counted(solver.dataloader_hv_product)
        values, _ = solver.eigenvalues(maxIter=100, tol=tol, top_n=k)
    problem.module.zero_grad()
    return Measured(sorted(values, reverse=True), products)


# ------------------------------------------------------------------------------------------------ curvlinops, SciPy


class CountingCurvlinops(HessianLinearOperator):
    products = 0

    def __matmul__(self, vectors: Any) -> Any:
        self.products += 1
        return super().__matmul__(vectors)


def run_eigsh(
    problem: Problem, k: int, seed: int, kept: np.ndarray | None, *, tol: float, ncv: int | None, check: bool
) -> Measured:
    operator = CountingCurvlinops(
        problem.module,
        nn.CrossEntropyLoss(),
        list(problem.module.parameters()),
        problem.batches,
        check_deterministic=check,
    )
    start = np.random.default_rng(seed).standard_normal(operator.shape[0]) if kept is None else kept.sum(axis=1)
    values, vectors = eigsh(
        operator.to_scipy(dtype=np.float32), k, which="LA", tol=tol, ncv=ncv, v0=start.astype(np.float32)
    )
    return Measured(sorted(values.tolist(), reverse=True), operator.products, vectors)


# ---------------------------------------------------------------------------------------------- hessian-eigenthings


class CountingEigenthings(HessianOperator):
    products = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        product: Tensor = super().matvec(v)
        return product


def run_eigenthings(problem: Problem, k: int, seed: int, kept: None, *, max_iter: int | None) -> Measured:
    operator = CountingEigenthings(problem.module, problem.batches, supervised_loss(F.cross_entropy))
    result = eigenthings_lanczos(operator, k=k, max_iter=max_iter, which="LA", seed=seed)
    values = sorted(result.eigenvalues.tolist(), reverse=True)
    return Measured(values, operator.products, converged=bool(result.converged.all()))


# --------------------------------------------------------------------------------------------------- plain autograd


def power_iteration(problem: Problem, k: int, seed: int, kept: Tensor | None, *, tol: float) -> Measured:
    """What people write by hand: power iteration with deflation, until the eigenvalue changes by less than ``tol``."""
    parameters = list(problem.module.parameters())
    generator = torch.Generator().manual_seed(seed)
    graph = None if len(problem.batches) > 1 else _flat_gradient(problem.module, problem.batches[0], parameters)
    found: list[Tensor] = []
    values: list[float] = []
    products = 0
    for i in range(k):
        size = sum(p.numel() for p in parameters)
        v = torch.randn(size, generator=generator) if kept is None else kept[i]
        value = float("inf")
        for _ in range(100):
            for u in found:
                v = v - (u @ v) * u
            v = v / v.norm()
            product = _product(problem, parameters, graph, v)
            products += 1
            previous, value = value, float(v @ product)
            v = product
            if abs(value - previous) <= tol * abs(value):
                break
        found.append(v / v.norm())
        values.append(value)
    return Measured(sorted(values, reverse=True), products, torch.stack(found))


def _flat_gradient(module: nn.Module, batch: Batch, parameters: list[nn.Parameter]) -> Tensor:
    pieces = torch.autograd.grad(loss_fn(module, batch), parameters, create_graph=True)
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _product(problem: Problem, parameters: list[nn.Parameter], graph: Tensor | None, v: Tensor) -> Tensor:
    total = torch.zeros_like(v)
    for batch in problem.batches:
        gradient = graph if graph is not None else _flat_gradient(problem.module, batch, parameters)
        pieces = torch.autograd.grad(gradient, parameters, v, retain_graph=graph is not None)
        total += torch.cat([piece.reshape(-1) for piece in pieces])
    return total / len(problem.batches)


# --------------------------------------------------------------------------------------------------------- the table


def _tolerances(*values: float) -> Settings:
    return lambda k: [{"tol": tol} for tol in values]


def _eigsh_settings(k: int) -> list[dict[str, Any]]:
    return [{"tol": tol, "ncv": k + spare, "check": False} for spare in (3, 5, 8, 12, 20) for tol in (0.3, 0.03)]


def _steps(*values: int) -> Settings:
    return lambda k: [{"max_iter": steps} for steps in values if steps >= k]


TOOLS = [
    Tool(
        "lightning-flatness",
        ours,
        _tolerances(0.3, 0.1, 0.05, 0.03, 0.01),
        default={"tol": 1e-3},
        kinds_warm=("default", "cheapest"),
    ),
    Tool(
        "hessian-eigenthings",
        run_eigenthings,
        _steps(4, 6, 8, 10, 12, 15, 18, 21, 25, 30, 40, 60, 90),
        default={"max_iter": None},
        more_steps=_steps(10, 15, 20, 25, 30, 40, 60, 90),
        kinds_in_microbatches=("converged", "cheapest"),
    ),
    Tool(
        "curvlinops + eigsh",
        run_eigsh,
        _eigsh_settings,
        default={"tol": 0, "ncv": None, "check": True},
        more_steps=lambda k: [{"tol": 1e-2, "ncv": None, "check": True}],
        slow_kinds=("default",),
        kinds_warm=("cheapest",),
        kinds_in_microbatches=("cheapest",),
    ),
    Tool(
        "PyHessian",
        run_pyhessian,
        _tolerances(3e-3, 1e-3),
        default={"tol": 1e-3},
        slow_kinds=("default", "cheapest"),
        kinds_in_microbatches=("default",),
    ),
    Tool(
        "power iteration",
        power_iteration,
        _tolerances(1e-3, 1e-4),
        kinds_warm=("cheapest",),
        slow_kinds=("default", "cheapest"),
        kinds_in_microbatches=(),
    ),
]
