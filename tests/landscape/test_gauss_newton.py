"""The Gauss-Newton matrix against J^T B J, and what it asks of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.problems import Problem, make_problem
from hessian_eigenthings import GGNOperator
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import (
    FlatnessMonitor,
    HessianTrace,
    LossLandscape,
    OutputLoss,
    SpectralDensity,
    TopEigenvalues,
    WorstCaseSharpness,
)
from lightning_flatness.landscape.engines.second_derivatives import NotTwiceDifferentiableError


def _dict_loss() -> OutputLoss:
    return OutputLoss(F.cross_entropy, lambda m, b: m(b["inputs"]), lambda b: b["meta"]["labels"])


LOSSES: dict[str, Callable[[], OutputLoss]] = {
    "linear_regression": lambda: OutputLoss(F.mse_loss),
    "logistic_regression": lambda: OutputLoss(F.cross_entropy),
    "tanh_mlp": lambda: OutputLoss(F.cross_entropy),
    "relu_convnet": lambda: OutputLoss(F.cross_entropy),
    "batchnorm_eval": lambda: OutputLoss(F.cross_entropy),
    "batchnorm_train": lambda: OutputLoss(F.cross_entropy),
    "tied_weights": lambda: OutputLoss(F.mse_loss, lambda m, x: m(x), lambda x: x),
    "frozen_parameters": lambda: OutputLoss(F.cross_entropy),
    "dict_batches": _dict_loss,
    "zero_bias": lambda: OutputLoss(F.cross_entropy),
}


def dense_ggn(problem: Problem, output_loss: OutputLoss) -> Tensor:
    """Sum over batches of J^T B J, row by row of J: reverse mode only, which is right for BatchNorm too."""
    problem.module.train(problem.mode == "train")
    buffers = [b.clone() for b in problem.module.buffers()]
    total = torch.zeros(problem.num_parameters, problem.num_parameters, dtype=torch.float64)
    num_samples = 0
    for batch in problem.batches:
        outputs = output_loss.outputs(problem.module, batch)
        rows = [torch.autograd.grad(f, problem.parameters, retain_graph=True) for f in outputs.flatten()]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        leaf = outputs.detach()
        targets = output_loss.targets(batch)
        curvature = torch.autograd.functional.hessian(lambda f, t=targets: output_loss.loss(f, t), leaf)
        n = len(outputs)
        total += n * jacobian.T @ curvature.view(leaf.numel(), leaf.numel()) @ jacobian
        num_samples += n
    for buffer, value in zip(problem.module.buffers(), buffers, strict=True):
        buffer.copy_(value)
    problem.module.eval()
    return total / num_samples


def multilabel() -> tuple[Problem, OutputLoss]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(n, 4).double(), torch.randint(2, (n, 3)).double()) for n in (6, 3)]
    loss = OutputLoss(F.binary_cross_entropy_with_logits)
    return Problem(module, batches, loss), loss


@pytest.mark.parametrize("name", [*LOSSES, "multilabel"])
def test_product_equals_the_dense_matrix(name):
    problem, loss = multilabel() if name == "multilabel" else (make_problem(name), LOSSES[name]())
    dense = dense_ggn(problem, loss)
    landscape = LossLandscape(problem.module, problem.batches, loss, mode=problem.mode)
    v = torch.randn(problem.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(landscape.ggnvp(v), dense @ v, rtol=1e-10, atol=1e-12)
    with (
        landscape.measurement()
    ):  # the second product reuses the graph of the first, and does not disturb the Hessian's
        landscape.ggnvp(v)
        torch.testing.assert_close(landscape.ggnvp(v), dense @ v, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(landscape.hvp(v), problem.dense_hessian() @ v, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12


@pytest.mark.parametrize("geometry", ["euclidean", "layer", "element"])
def test_metrics_measure_the_dense_matrix_in_geometries(geometry):
    problem, loss = make_problem("tanh_mlp"), OutputLoss(F.cross_entropy)
    scale = problem.scale(geometry)
    dense = scale[:, None] * dense_ggn(problem, loss) * scale
    eigenvalues = torch.linalg.eigvalsh(dense)
    landscape = LossLandscape(problem.module, problem.batches, loss)
    top = TopEigenvalues(k=3, geometry=geometry, operator="ggn", tol=1e-9)
    trace = HessianTrace(geometry, operator="ggn", num_products=60)
    density = SpectralDensity(geometry, operator="ggn")
    for metric in (top, trace, density):
        metric.update(landscape)
    torch.testing.assert_close(top.compute(), eigenvalues.flip(0)[:3], rtol=1e-8, atol=0)
    torch.testing.assert_close(trace.compute(), eigenvalues.sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(density.moments[1], eigenvalues.square().mean(), rtol=1e-10, atol=0)
    assert density.negative_share == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func.jvp, in torch itself
def test_product_agrees_with_hessian_eigenthings():
    problem = make_problem("tanh_mlp")
    theirs = GGNOperator(
        problem.module, problem.batches[:1], lambda m, b: m(b[0]), lambda f, b: F.cross_entropy(f, b[1])
    )
    landscape = LossLandscape(problem.module, problem.batches[:1], OutputLoss(F.cross_entropy))
    v = torch.randn(problem.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(landscape.ggnvp(v), theirs.matvec(v), rtol=1e-10, atol=1e-12)


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    problem = make_problem("logistic_regression")
    landscape = LossLandscape(problem.module, problem.batches, OutputLoss(F.cross_entropy))
    v = torch.randn(problem.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(landscape.ggnvp(v), landscape.hvp(v), rtol=1e-10, atol=1e-14)


def test_nested_outputs_and_a_loss_that_uses_some_of_them():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            h = torch.tanh(self.body(x))
            return {"a": self.a(h), "rest": [self.b(h), h, x]}

    torch.manual_seed(0)
    module = TwoHeads().double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 1).double()
    nested = OutputLoss(lambda f, t: f["a"].square().mean() * 3 + F.mse_loss(f["rest"][0], t))
    flat = OutputLoss(
        lambda f, t: f[:, :2].square().mean() * 3 + F.mse_loss(f[:, 2:], t),
        lambda m, b: torch.cat([m(b[0])["a"], m(b[0])["rest"][0]], dim=1),
    )
    v = torch.randn(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    products = [LossLandscape(module, [(x, y)], loss).ggnvp(v) for loss in (nested, flat)]
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-12)


def test_a_loss_linear_in_the_outputs_has_no_gauss_newton_curvature():
    problem = make_problem("tanh_mlp")
    landscape = LossLandscape(problem.module, problem.batches, OutputLoss(lambda f, _: f.mean()))
    assert not landscape.ggnvp(torch.ones(problem.num_parameters, dtype=torch.float64)).any()


@pytest.mark.parametrize("graph_memory", [0, 2**30])
def test_cost_is_two_gradients_where_graphs_are_kept_and_four_with_their_making(graph_memory):
    problem = make_problem("tanh_mlp")
    landscape = LossLandscape(problem.module, problem.batches, OutputLoss(F.cross_entropy), graph_memory=graph_memory)
    v = torch.ones(problem.num_parameters, dtype=torch.float64)
    with landscape.measurement():
        first = landscape.ggnvp(v)
        assert landscape.cost.gradient_evaluations == pytest.approx(3)
        torch.testing.assert_close(landscape.ggnvp(v), first)
    assert landscape.cost.gradient_evaluations == pytest.approx(5 if graph_memory else 6)
    assert landscape.cost.num_products == 2


def test_finite_differences_agree():
    problem = make_problem("tanh_mlp")
    v = torch.randn(problem.num_parameters, dtype=torch.float64)
    exact, numeric = (
        LossLandscape(problem.module, problem.batches, OutputLoss(F.cross_entropy), engine=d)
        for d in ("exact", "finite_difference")
    )
    product = exact.ggnvp(v)
    assert torch.linalg.vector_norm(numeric.ggnvp(v) - product) < 1e-7 * torch.linalg.vector_norm(product)
    assert numeric.product_error > 0
    assert not numeric.ggnvp(torch.zeros_like(v)).any()


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():  # no error, and no derivative either
            return (g * x.cos()).detach()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.last = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_OnceDifferentiable.apply(self.linear(x)))


def test_a_custom_function_without_a_derivative_of_its_backward_falls_back_to_finite_differences():
    torch.manual_seed(0)
    module = Custom().double()
    batches = [(torch.randn(5, 3).double(), torch.randn(5, 1).double())]
    v = torch.randn(11, dtype=torch.float64)

    class Plain(Custom):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sin(self.linear(x)))

    plain = Plain().double()
    plain.load_state_dict(module.state_dict())
    expected = LossLandscape(plain, batches, OutputLoss(F.mse_loss)).ggnvp(v)
    with pytest.warns(UserWarning, match="central finite differences"):
        product = LossLandscape(module, batches, OutputLoss(F.mse_loss)).ggnvp(v)
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(NotTwiceDifferentiableError, match="Expected operators with a second derivative"):
        LossLandscape(module, batches, OutputLoss(F.mse_loss), engine="exact").ggnvp(v)


def test_without_outputs_the_error_says_what_to_provide():
    problem = make_problem("tanh_mlp")
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn)
    for metric in (TopEigenvalues(operator="ggn"), HessianTrace(operator="ggn"), SpectralDensity(operator="ggn")):
        with pytest.raises(TypeError, match=r"Expected an OutputLoss as `loss_fn` for the Gauss-Newton.* got function"):
            metric.update(landscape)
    with pytest.raises(TypeError, match=r"Expected an OutputLoss as `loss_fn` for normalize_logits=True"):
        WorstCaseSharpness(normalize_logits=True).update(landscape)
    with pytest.raises(ValueError, match=r"Expected a batch \(inputs, targets\), got Tensor. Pass OutputLoss"):
        LossLandscape(problem.module, [torch.zeros(2, 4)], OutputLoss(F.mse_loss)).loss()
    detached = OutputLoss(F.cross_entropy, lambda m, b: m(b[0]).detach())
    with pytest.raises(ValueError, match=r"Expected outputs that depend on the weights, got Tensor"):
        LossLandscape(problem.module, problem.batches, detached).ggnvp(torch.ones(problem.num_parameters).double())


def test_the_monitor_takes_an_output_loss(tmp_path):
    from helpers.modules import Classifier, loader, trainer

    monitor = FlatnessMonitor({"ggn": TopEigenvalues(operator="ggn")}, loss_fn=OutputLoss(F.cross_entropy))
    run = trainer(tmp_path, monitor)
    run.fit(Classifier(), loader(), loader(shuffle=False))
    assert float(run.callback_metrics["flatness/ggn"]) > 0


def test_no_trace_of_a_product_in_training_mode():
    problem = make_problem("batchnorm_train")
    before = {n: b.clone() for n, b in problem.module.named_buffers()}
    problem.module.train()
    landscape = LossLandscape(problem.module, problem.batches, OutputLoss(F.cross_entropy), mode="train")
    landscape.ggnvp(torch.ones(problem.num_parameters, dtype=torch.float64))
    assert all(torch.equal(b, before[n]) for n, b in problem.module.named_buffers())
    assert all(p.grad is None for p in problem.module.parameters())
