"""The landscape itself: weighting, graphs that are kept or not, finite differences, and bad input."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers.modules import Classifier
from helpers.once_differentiable import (
    OnceDifferentiable,
    SilentlyOnce,
    TwiceDifferentiable,
    once_differentiable_twin,
)
from helpers.problems import all_problems, cross_entropy, make_problem
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import LossLandscape, OutputLoss, TopEigenvalues
from lightning_flatness.landscape.engines.second_derivatives import NotTwiceDifferentiableError


def landscape_of(name: str, **options: Any) -> LossLandscape:
    problem = make_problem(name)
    return LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode, **options)


def vector(landscape: LossLandscape, seed: int = 0) -> Tensor:
    return torch.randn(landscape.num_parameters, dtype=landscape.dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [(15,), (5, 5, 5), (8, 4, 3), (1,) * 15])
def test_batches_are_weighted_by_their_samples(sizes):
    problem = make_problem("tanh_mlp")
    x, y = (torch.cat(t)[:15] for t in zip(*problem.batches, strict=True))
    whole = LossLandscape(problem.module, [(x, y)], cross_entropy)
    parts = LossLandscape(problem.module, list(zip(x.split(sizes), y.split(sizes), strict=True)), cross_entropy)
    assert parts.num_samples == 15
    v = vector(whole)
    for quantity in (lambda l: l.loss(), lambda l: l.gradient(), lambda l: l.hvp(v)):
        torch.testing.assert_close(quantity(parts), quantity(whole), rtol=1e-12, atol=1e-14)


@all_problems
@pytest.mark.parametrize("graph_memory", [0, 3000])
def test_graphs_that_do_not_fit_are_rebuilt_to_the_same_product(name, graph_memory):
    kept, rebuilt = landscape_of(name), landscape_of(name, graph_memory=graph_memory)
    with kept.measurement(), rebuilt.measurement():
        for seed in range(3):
            v = vector(kept, seed)
            torch.testing.assert_close(rebuilt.hvp(v), kept.hvp(v), rtol=1e-10, atol=1e-12)


def test_kept_graphs_save_gradients_and_are_gone_after_the_measurement():
    kept, rebuilt = landscape_of("relu_convnet"), landscape_of("relu_convnet", graph_memory=0)
    for landscape, expected in ((kept, 1 + 3 * 2), (rebuilt, 3 * 3)):
        with landscape.measurement():
            for seed in range(3):
                landscape.hvp(vector(landscape, seed))
        assert landscape.cost.gradient_evaluations == pytest.approx(expected)
        assert landscape.cost.num_products == 3
        with pytest.raises(RuntimeError, match=r"Expected a call inside a measurement. Open `with landscape"):
            _ = landscape.batched_loss


def test_pieces_of_a_gradient_are_freed_as_they_are_added():
    """Else the sum and all pieces are there at once: one more copy of the weights."""
    landscape = landscape_of("relu_convnet")
    alive: list[int] = []
    with landscape.measurement():
        shapes = [p.shape for p in landscape.parameters]
        references: list[Any] = []

        class View:
            def add_(self, piece: Tensor, alpha: float) -> None:
                alive.append(sum(reference() is not None for reference in references))

        def pieces() -> tuple[Tensor, ...]:
            made = tuple(torch.ones(shape) for shape in shapes)
            references.extend(map(weakref.ref, made))
            return made

        landscape.batched_loss.add([View() for _ in shapes], 0, pieces())
    assert alive == list(range(len(shapes), 0, -1))


def test_weights_may_change_between_measurements():
    landscape = landscape_of("tanh_mlp")
    v = vector(landscape)
    before = landscape.hvp(v)
    with torch.no_grad():
        landscape.parameters[0].mul_(2)
    problem = make_problem("tanh_mlp")
    with torch.no_grad():
        problem.parameters[0].mul_(2)
    assert not torch.allclose(landscape.hvp(v), before)
    torch.testing.assert_close(landscape.hvp(v), problem.dense_hessian() @ v, rtol=1e-10, atol=1e-12)


def test_displaced_loss_and_gradient():
    landscape, problem = landscape_of("tanh_mlp"), make_problem("tanh_mlp")
    flat = torch.cat([p.detach().reshape(-1) for p in problem.parameters])
    step = 0.1 * vector(landscape)
    with landscape.measurement():
        product = landscape.hvp(step)
        with landscape.displaced(step):
            torch.testing.assert_close(landscape.loss(), problem.mean_loss(flat + step).detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(landscape.gradient(), torch.func.grad(problem.mean_loss)(flat + step))
        torch.testing.assert_close(landscape.hvp(step), product, rtol=1e-12, atol=1e-14)


def test_dropout_in_train_mode_has_fixed_masks_and_a_symmetric_hessian():
    problem = make_problem("dropout")
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode="train")
    assert torch.equal(landscape.loss(), landscape.loss())
    assert landscape.loss() != LossLandscape(problem.module, problem.batches, problem.loss_fn).loss()
    with landscape.measurement():
        columns = [landscape.hvp(e) for e in torch.eye(landscape.num_parameters, dtype=torch.float64)]
    hessian = torch.stack(columns)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-10, atol=1e-12)


def test_modules_that_the_user_put_into_evaluation_mode_stay_so_in_train_mode():
    problem = make_problem("batchnorm_train")
    problem.module.train()
    problem.module[1].eval()
    frozen = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode="train")
    plain = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode="eval")
    assert torch.equal(frozen.loss(), plain.loss())
    assert [m.training for m in problem.module.modules()] == [True, True, False, True, True]


def test_works_under_no_grad_and_inference_mode_and_with_inference_tensors():
    expected = TopEigenvalues(k=2)
    expected.update(landscape_of("tanh_mlp"))
    with torch.inference_mode():
        problem = make_problem("tanh_mlp")
        batches = [(x.clone(), y.clone()) for x, y in problem.batches]
    module = make_problem("tanh_mlp").module
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            metric = TopEigenvalues(k=2)
            metric.update(LossLandscape(module, batches, cross_entropy))
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(metric.compute(), expected.compute())


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str = "record"


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x, y: [x, y], tuple),
        (Pair, tuple),
        (lambda x, y: OrderedDict(x=x, y=y), lambda b: (b["x"], b["y"])),
        (lambda x, y: {"meta": "text", "pair": (x, y)}, lambda b: b["pair"]),
        (Record, lambda b: (b.x, b.y)),
    ],
)
def test_batches_of_any_nesting(wrap, unwrap):
    problem = make_problem("tanh_mlp")
    wrapped = LossLandscape(
        problem.module, [wrap(*b) for b in problem.batches], lambda m, b: cross_entropy(m, unwrap(b))
    )
    assert wrapped.num_samples == 19
    assert torch.equal(wrapped.loss(), landscape_of("tanh_mlp").loss())


def test_batch_size_fn_for_batches_whose_first_axis_is_not_the_samples():
    module = nn.Linear(2, 1)
    landscape = LossLandscape(
        module, [torch.ones(7, 3, 2), torch.ones(7, 5, 2)], lambda m, x: m(x).mean(), batch_size_fn=lambda x: x.shape[1]
    )
    assert landscape.num_samples == 8


def test_a_generator_of_batches_is_read_once():
    problem = make_problem("tanh_mlp")
    landscape = LossLandscape(problem.module, (b for b in problem.batches), problem.loss_fn)
    assert torch.equal(landscape.loss(), landscape.loss())


def test_a_loss_that_is_linear_in_the_weights_has_a_zero_hessian():
    landscape = LossLandscape(nn.Linear(3, 1), [torch.randn(4, 3)], lambda m, x: m(x).mean())
    assert torch.equal(landscape.hvp(torch.ones(4)), torch.zeros(4))
    metric = TopEigenvalues(k=3)
    metric.update(landscape)
    assert torch.equal(metric.compute(), torch.zeros(3))
    assert metric.converged


def test_parameters_that_the_loss_does_not_use_have_zero_rows():
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    landscape = LossLandscape(module, [torch.randn(4, 2)], lambda m, x: m["used"](x).square().mean())
    assert not landscape.hvp(torch.ones(12))[6:].any()
    assert not landscape.gradient()[6:].any()


def test_reduced_precision_parameters_get_float32_vectors():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.bfloat16)
    x = torch.randn(16, 4)
    half = LossLandscape(module, [x.bfloat16()], lambda m, x: m(x).square().mean())
    full = LossLandscape(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), [x], lambda m, x: m(x).square().mean()
    )
    full.module.load_state_dict({k: v.float() for k, v in module.state_dict().items()})
    assert half.dtype == torch.float32
    values = []
    for landscape in (half, full):
        metric = TopEigenvalues(tol=1e-2)
        metric.update(landscape)
        values.append(metric.compute())
    torch.testing.assert_close(*values, rtol=0.1, atol=0)


def test_a_loss_that_writes_into_its_batch_does_not_change_the_probe():
    problem = make_problem("tanh_mlp")

    def loss_fn(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x, y = batch.pop("x"), batch.pop("y")
        return cross_entropy(module, (x.mul_(0.5), y))

    landscape = LossLandscape(problem.module, [{"x": x, "y": y} for x, y in problem.batches], loss_fn)
    plain = LossLandscape(problem.module, [(0.5 * x, y) for x, y in problem.batches], cross_entropy)
    for _ in range(2):
        assert torch.equal(landscape.loss(), plain.loss())
        assert torch.equal(landscape.hvp(vector(plain)), plain.hvp(vector(plain)))


def test_sparse_embeddings():
    torch.manual_seed(0)
    sparse, dense = (nn.Sequential(nn.Embedding(7, 3, sparse=s), nn.Linear(3, 2)).double() for s in (True, False))
    dense.load_state_dict(sparse.state_dict())
    tokens = torch.tensor([[1, 2, 2], [6, 0, 1]])
    one, other = (LossLandscape(m, [tokens], lambda m, b: m(b).sin().pow(2).mean()) for m in (sparse, dense))
    v = vector(one)
    torch.testing.assert_close(one.gradient(), other.gradient())
    torch.testing.assert_close(one.hvp(v), other.hvp(v))


# ------------------------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize("function", [OnceDifferentiable, SilentlyOnce])
def test_an_operator_without_second_derivative_falls_back_to_finite_differences_and_says_so_once(function):
    module, problem = once_differentiable_twin()
    module.function = function
    landscape = LossLandscape(module, problem.batches, problem.loss_fn)
    exact = landscape_of("tanh_mlp")
    with pytest.warns(UserWarning, match=r"got one without: a torch.autograd.Function.*finite differences"):
        product = landscape.hvp(vector(landscape))
    torch.testing.assert_close(product, exact.hvp(vector(exact)), rtol=1e-5, atol=1e-8)
    assert 0 < landscape.product_error < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        landscape.hvp(vector(landscape))


def test_an_operator_without_second_derivative_is_an_error_where_exact_products_are_asked_for():
    module, problem = once_differentiable_twin()
    landscape = LossLandscape(module, problem.batches, problem.loss_fn, engine="exact")
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(NotTwiceDifferentiableError, match=r"Expected operators with a second derivative, got.*Replace"):
        landscape.hvp(vector(landscape))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_a_custom_function_with_a_second_derivative_is_differentiated_exactly():
    module, problem = once_differentiable_twin()
    module.function = TwiceDifferentiable
    landscape, exact = LossLandscape(module, problem.batches, problem.loss_fn), landscape_of("tanh_mlp")
    v = vector(exact)
    torch.testing.assert_close(landscape.hvp(v), exact.hvp(v), rtol=1e-12, atol=1e-14)
    assert landscape.product_error == 0


def test_fused_attention_is_replaced_by_an_operator_with_a_second_derivative():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    landscape = LossLandscape(layer, [x], lambda m, b: m(b).pow(3).mean(), engine="exact")
    numeric = LossLandscape(layer, [x], lambda m, b: m(b).pow(3).mean(), engine="finite_difference")
    v = vector(landscape)
    torch.testing.assert_close(landscape.hvp(v), numeric.hvp(v), rtol=1e-4, atol=1e-7)


def test_the_error_of_finite_differences_is_part_of_the_reported_error():
    module, problem = once_differentiable_twin()
    metric, exact = TopEigenvalues(k=2, tol=1e-8), TopEigenvalues(k=2, tol=1e-8)
    with pytest.warns(UserWarning, match="finite differences"):
        metric.update(LossLandscape(module, problem.batches, problem.loss_fn))
    exact.update(landscape_of("tanh_mlp"))
    assert ((metric.compute() - exact.compute()).abs() <= metric.error).all()
    assert (metric.error > exact.error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["logistic_regression", "tanh_mlp", "tied_weights", "batchnorm_train", "dict_batches"])
def test_finite_differences_are_good_to_their_estimated_error(name, dtype):
    problem = make_problem(name, dtype)
    options = {"mode": problem.mode}
    exact = LossLandscape(problem.module, problem.batches, problem.loss_fn, **options)
    numeric = LossLandscape(problem.module, problem.batches, problem.loss_fn, engine="finite_difference", **options)
    v = vector(exact)
    error = (numeric.hvp(v) - exact.hvp(v)).norm() / exact.hvp(v).norm()
    assert numeric.product_error < (1e-2 if dtype == torch.float32 else 1e-5)
    assert error <= 3 * numeric.product_error + 1e-9


def test_a_zero_vector_has_a_zero_finite_difference():
    landscape = landscape_of("tanh_mlp", engine="finite_difference")
    assert not landscape.hvp(torch.zeros(landscape.num_parameters, dtype=torch.float64)).any()


# ------------------------------------------------------------------------------------------------------ bad input


def weights_are_intact(module: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda m, x: m(x).mean(0), ValueError, r"Expected the loss to be a scalar, got a tensor of shape \(2,\)"),
        (lambda m, x: m(x).mean() * torch.inf, ValueError, r"Expected a finite loss, got (-?inf|nan).*diverged"),
        (lambda m, x: m(x).mean() * torch.nan, ValueError, r"Expected a finite loss, got nan"),
        (lambda m, x: None, TypeError, r"Expected the loss function \(or training_step\) to return.*got None"),
        (lambda m, x: 1.0, TypeError, r"Expected the loss to be a scalar tensor.*got float"),
        (lambda m, x: {"los": m(x).mean()}, TypeError, r"Expected the loss to be a scalar tensor.*got dict"),
        (lambda m, x: x.mean(), RuntimeError, r"Expected a loss that depends on the trainable parameters"),
    ],
)
@pytest.mark.parametrize("call", ["loss", "gradient", "hvp"])
def test_bad_losses(loss_fn, error, message, call):
    module = nn.Linear(3, 2)
    before = [p.clone() for p in module.parameters()]
    landscape = LossLandscape(module, [torch.randn(4, 3)], loss_fn)
    if call == "loss" and error is RuntimeError:
        return  # the value exists all the same
    with pytest.raises(error, match=message):
        landscape.hvp(torch.ones(8)) if call == "hvp" else getattr(landscape, call)()
    assert weights_are_intact(module, before)
    assert module.training


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3)]])
def test_no_samples(batches):
    with pytest.raises(ValueError, match=r"Expected at least one sample in `batches`, got none. Check the loader"):
        LossLandscape(nn.Linear(3, 2), batches, lambda m, x: m(x).mean())


def test_a_batch_without_tensors():
    with pytest.raises(ValueError, match=r"Expected a batch with a tensor whose first axis.*batch_size_fn"):
        LossLandscape(nn.Linear(3, 2), [{"text": "hello"}], lambda m, x: m(x).mean())


def test_no_measured_parameters():
    module = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"Expected trainable parameters, got Linear with none. Set requires_grad"):
        LossLandscape(module, [torch.ones(1, 3)], lambda m, x: m(x).mean())


def test_lazy_parameters():
    with pytest.raises(ValueError, match=r"Expected initialised parameters, got the lazy 'weight'"):
        LossLandscape(nn.LazyLinear(2), [torch.ones(1, 3)], lambda m, x: m(x).mean())


def test_complex_parameters():
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"Expected real parameters, got 'w' of torch.complex64"):
        LossLandscape(module, [torch.ones(1, 3)], lambda m, x: m(x).mean())


def test_no_loss():
    with pytest.raises(TypeError, match=r"Expected a `loss_fn`, or a LightningModule with a `training_step`"):
        LossLandscape(nn.Linear(3, 2), [torch.ones(1, 3)])


def test_manual_optimization_without_a_loss():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"Expected a `loss_fn` for a module with manual optimization"):
        LossLandscape(module, [torch.ones(1, 3)])


def test_a_training_step_that_takes_an_iterator():
    class Iterating(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(ValueError, match=r"Expected a `training_step` that takes a batch, got.*dataloader_iter"):
        LossLandscape(Iterating(), [torch.ones(1, 3)])


@pytest.mark.parametrize("option", ["mode", "engine"])
def test_unknown_options(option):
    with pytest.raises(
        ValueError, match=rf"Expected `{option}` to be 'batch_statistics', 'eval|Expected `{option}` to be one of 'auto"
    ):
        LossLandscape(nn.Linear(3, 2), [torch.ones(1, 3)], lambda m, x: m(x).mean(), **{option: "no"})


def test_unknown_geometry():
    for geometry in ("riemann", "Layer"):
        with pytest.raises(ValueError, match=rf"Expected `geometry` to be one of \['attention', .*got '{geometry}'"):
            TopEigenvalues(geometry=geometry)
    with pytest.raises(TypeError, match=r"Expected `geometry` to be a name or a Geometry, got int"):
        TopEigenvalues(geometry=3)


def test_vectors_of_the_wrong_size():
    landscape = landscape_of("tanh_mlp")
    with pytest.raises(ValueError, match=r"Expected `v` to be a flat vector of shape \(51,\).*got shape \(3,\)"):
        landscape.hvp(torch.ones(3))


def test_metrics_want_a_landscape():
    with pytest.raises(TypeError, match=r"Expected a LossLandscape, got Linear. Pass LossLandscape\(module"):
        TopEigenvalues().update(nn.Linear(2, 2))


def test_k_larger_than_the_number_of_parameters():
    landscape = LossLandscape(nn.Linear(2, 1), [torch.ones(1, 2)], lambda m, x: m(x).square().mean())
    metric = TopEigenvalues(k=4)
    with pytest.raises(ValueError, match=r"Expected `k` to be between 1 and the number of coordinates, 3, got 4"):
        metric.update(landscape)
    with pytest.raises(ValueError, match=r"Expected `k` to be an integer >= 1, got 0"):
        TopEigenvalues(k=0)
    with pytest.raises(ValueError, match=r"Expected `which` to be 'LA', 'SA' or 'LM', got 'la'"):
        TopEigenvalues(which="la")
    with pytest.raises(ValueError, match=r"Expected `tol` to be >= 0, got -1"):
        TopEigenvalues(tol=-1)


def test_lightning_modules_outside_a_trainer_are_measured_by_their_training_step():
    torch.manual_seed(0)
    module = Classifier().double()
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(3, (10,))
    by_step = LossLandscape(module, [(x, y)])
    by_loss = LossLandscape(module, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert torch.equal(by_step.loss(), by_loss.loss())


def test_the_loss_of_a_step_that_takes_a_gradient_itself():
    module = torch.nn.Linear(3, 1)

    def loss_fn(m, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        return m(x).square().mean() + slope.square().mean()

    landscape = LossLandscape(module, [torch.randn(4, 3), torch.randn(2, 3)], loss_fn)
    value, _ = landscape.loss_and_gradient()
    torch.testing.assert_close(landscape.loss(), value)
    assert not landscape.loss().requires_grad


@pytest.mark.parametrize("geometry", ["euclidean", "element", "filter", "path_norm"])
def test_memory_format_of_the_weights_changes_nothing(geometry):
    """A network in channels-last has its weights strided, and its gradients are: same values, element by element."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    module = nn.Sequential(*layers).double()
    strided = copy.deepcopy(module).to(memory_format=torch.channels_last)
    batch = torch.randn(16, 3, 6, 6, dtype=torch.float64), torch.randint(0, 5, (16,))
    values, gradients = [], []
    for network in (module, strided):
        landscape = LossLandscape(network, [batch], OutputLoss(F.cross_entropy))
        metric = TopEigenvalues(geometry=geometry, tol=1e-6)
        metric.update(landscape)
        values.append(float(metric.compute()))
        with landscape.measurement():
            gradients.append(landscape.gradient())
    assert not strided[2].weight.is_contiguous()
    assert values[1] == pytest.approx(values[0], rel=1e-9)
    for gradient, same in zip(*gradients, strict=True):
        torch.testing.assert_close(same, gradient)
