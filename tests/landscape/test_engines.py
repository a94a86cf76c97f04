"""Engines: the same product by each, chosen by memory, verified, reported, and without a trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.modules import Classifier, Plain, loader, trainer
from helpers.problems import all_problems, make_problem
from memory import CountedMemory
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import FlatnessMonitor, LossLandscape, TopEigenvalues
from lightning_flatness.estimators import top_eigenvalues
from lightning_flatness.landscape.engines.autograd import Autograd

ENGINES = ("exact", "kept", "rebuilt")


def landscape_of(name: str, engine: Any, mode: Any = None, **options: Any) -> LossLandscape:
    problem = make_problem(name)
    return LossLandscape(
        problem.module, problem.batches, problem.loss_fn, mode=mode or problem.mode, engine=engine, **options
    )


def vector(landscape: LossLandscape, seed: int = 0) -> Tensor:
    return torch.randn(landscape.num_parameters, dtype=landscape.dtype, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- one product


@all_problems
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_product(name, mode, engine):
    problem = make_problem(name)
    problem.mode = mode
    landscape = landscape_of(name, engine, mode)
    with landscape.measurement():
        for seed in range(2):
            v = vector(landscape, seed)
            product = landscape.hvp(v)
            if name == "dropout" and mode == "train":  # the masks are the landscape's
                expected = landscape_of(name, "exact", mode).hvp(v)
            else:
                expected = problem.dense_hessian() @ v
            torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
    assert landscape.engine == {"exact": "kept"}.get(engine, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batchnorm", [1, 2])
def test_batchnorm_in_training_mode_with_convolutions(engine, batchnorm):
    torch.manual_seed(0)
    body = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 3))
        if batchnorm == 2
        else nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 3))
    ).double()
    batches = [(torch.randn(n, 1, 6, 6).double(), torch.randint(3, (n,))) for n in (6, 5)]

    def loss_fn(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    landscape = LossLandscape(body, batches, loss_fn, mode="train", engine=engine)
    reference = LossLandscape(body, batches, loss_fn, mode="train", engine="exact")
    v = vector(landscape)
    torch.testing.assert_close(landscape.hvp(v), reference.hvp(v), rtol=1e-10, atol=1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(dim=1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attention(engine, mode):
    torch.manual_seed(0)
    module = Attention().double()
    batches = [(torch.randint(11, (n, 5)), torch.randint(3, (n,))) for n in (3, 2)]

    def loss_fn(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    landscape = LossLandscape(module, batches, loss_fn, mode=mode, engine=engine)
    reference = LossLandscape(module, batches, loss_fn, mode=mode, engine="exact")
    v = vector(landscape)
    torch.testing.assert_close(landscape.hvp(v), reference.hvp(v), rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------- choice and report


def test_auto_keeps_what_fits_and_says_so():
    landscape = landscape_of("tanh_mlp", "auto")
    assert landscape.engine == "auto"
    landscape.hvp(vector(landscape))
    assert landscape.engine == "kept"
    sizes = {}
    for memory in (0, 3000, 2**20):
        landscape = landscape_of("tanh_mlp", "auto", graph_memory=memory)
        with landscape.measurement():
            landscape.hvp(vector(landscape))
            assert landscape.batched_loss.point.graphs.room >= 0
        sizes[memory] = landscape.engine
    assert sizes == {0: "rebuilt", 3000: "kept+rebuilt", 2**20: "kept"}


def test_the_graph_of_the_only_batch_is_kept_however_large_it_is():
    problem = landscape_of("tanh_mlp", "auto")
    batches = problem.samples.batches
    assert len(batches) > 1
    engines = {}
    for num_batches, memory in ((1, 1), (1, 0), (len(batches), 1)):
        here = LossLandscape(problem.module, batches[:num_batches], problem.loss_fn, graph_memory=memory)
        with here.measurement():
            for seed in range(2):
                here.hvp(vector(here, seed))
        engines[num_batches > 1, memory] = here.engine
    assert engines == {(False, 1): "kept", (False, 0): "rebuilt", (True, 1): "rebuilt"}


def test_engines_can_be_forced_whatever_the_memory():
    for engine, memory in (("kept", 0), ("rebuilt", 2**30)):
        landscape = landscape_of("tanh_mlp", engine, graph_memory=memory)
        with landscape.measurement():
            for _ in range(2):
                landscape.hvp(vector(landscape))
        assert landscape.engine == engine
        assert landscape.cost.gradient_evaluations == pytest.approx(5 if engine == "kept" else 6)


def test_the_choice_does_not_depend_on_time():
    """Two runs give the same bits."""
    products = []
    for _ in range(2):
        landscape = landscape_of("relu_convnet", "auto", graph_memory=20_000)
        with landscape.measurement():
            products.append(torch.stack([landscape.hvp(vector(landscape, seed)) for seed in range(4)]))
    assert torch.equal(*products)


def test_unknown_engines():
    for name in ("fast", "forward_over_reverse", "linearized"):
        names = "'auto', 'exact', 'kept', 'rebuilt', 'finite_difference'"
        message = f"Expected `engine` to be one of {names}, got '{name}'"
        with pytest.raises(ValueError, match=message):
            landscape_of("tanh_mlp", name)
        with pytest.raises(ValueError, match=message):
            FlatnessMonitor(engine=name)


def test_the_monitor_takes_an_engine(tmp_path):
    values = {}
    for engine in ("auto", "rebuilt"):
        torch.manual_seed(0)
        run = trainer(tmp_path, FlatnessMonitor(engine=engine, probe_size=16), max_epochs=1)
        run.fit(Classifier(), loader(Plain(), shuffle=False))
        values[engine] = float(run.callback_metrics["flatness/lambda_max"])
    assert values["rebuilt"] == pytest.approx(values["auto"], rel=1e-4)


def test_the_users_own_errors_are_raised_by_every_engine():
    def fail(module: nn.Module, batch: Any) -> Tensor:
        raise ArithmeticError("mine")

    problem = make_problem("tanh_mlp")
    for engine in ENGINES:
        landscape = LossLandscape(problem.module, problem.batches, fail, engine=engine)
        with pytest.raises(ArithmeticError, match="mine"):
            landscape.hvp(vector(landscape))


# ----------------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize("engine", [*ENGINES, "finite_difference"])
def test_engines_leave_no_trace(engine):
    problem = make_problem("batchnorm_train")
    module = problem.module
    module.seen = []
    module.train()
    parameters = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    buffers = {name: (b, b.clone()) for name, b in module.named_buffers()}

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        loss = problem.loss_fn(m, batch) + 0 * torch.rand(()).double()
        m.seen.append(loss)
        return loss

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    landscape = LossLandscape(module, problem.batches, loss_fn, mode="train", engine=engine)
    with landscape.measurement():
        for seed in range(2):
            landscape.hvp(vector(landscape, seed))
    assert landscape.engine == {"exact": "kept"}.get(engine, engine)
    assert module.seen == []
    assert module.training
    for name, p in module.named_parameters():
        assert p is parameters[name][0]
        assert torch.equal(p, parameters[name][1])
        assert p.grad is None
    for name, b in module.named_buffers():
        assert b is buffers[name][0]
        assert torch.equal(b, buffers[name][1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


# ----------------------------------------------------------------------------------------- gradient and memory


def test_the_gradient_is_a_by_product_of_products():
    for engine, memory in (("kept", 0), ("rebuilt", 0), ("auto", 3000)):
        landscape, plain = landscape_of("tanh_mlp", engine, graph_memory=memory), landscape_of("tanh_mlp", "exact")
        with landscape.measurement():
            landscape.hvp(vector(landscape))
            before = landscape.cost.gradient_evaluations
            torch.testing.assert_close(landscape.gradient(), plain.gradient(), rtol=1e-13, atol=1e-15)
            assert landscape.cost.gradient_evaluations == before
            landscape.hvp(vector(landscape))
            torch.testing.assert_close(landscape.gradient(), plain.gradient(), rtol=1e-13, atol=1e-15)


def test_a_product_that_fails_on_a_later_batch_leaves_a_gradient_that_is_right():
    problem = make_problem("tanh_mlp")
    calls: list[int] = []

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("once")
        return problem.loss_fn(module, batch)

    landscape = LossLandscape(problem.module, problem.batches, loss_fn)
    with landscape.measurement():
        with pytest.raises(ArithmeticError, match="once"):
            landscape.hvp(vector(landscape))
        torch.testing.assert_close(landscape.gradient(), landscape_of("tanh_mlp", "exact").gradient())


def wide(num_batches: int = 4) -> tuple[nn.Module, list[Any]]:
    """A network of which little but weights takes memory."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 5))
    return module, [(torch.randn(2, 200), torch.randint(5, (2,))) for _ in range(num_batches)]


def wide_landscape(engine: Any, num_batches: int = 4, **options: Any) -> LossLandscape:
    module, batches = wide(num_batches)
    return LossLandscape(module, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), engine=engine, **options)


def test_kept_graphs_hold_no_gradients_and_their_bytes_are_those_counted():
    landscape = wide_landscape("kept", num_batches=16)
    weights = sum(p.nbytes for p in landscape.parameters)
    v = vector(landscape)
    with CountedMemory() as memory, landscape.measurement():
        landscape.hvp(v)
        counted = sum(landscape.batched_loss.point.graphs.get((Autograd, i)).num_bytes for i in range(16))
        held = memory.current - landscape.batched_loss.point.gradient_sum.untyped_storage().nbytes()
        held -= weights  # of the twin
    assert held < 0.5 * weights  # sixteen gradients would be sixteen times the weights
    assert counted == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("engine", ["kept", "rebuilt"])
def test_a_product_takes_three_times_the_weights_beside_its_vector_and_graph(engine):
    landscape = wide_landscape(engine)
    weights = sum(p.nbytes for p in landscape.parameters)
    v = vector(landscape)
    with landscape.measurement():
        for _ in range(3):
            with CountedMemory() as memory:
                landscape.hvp(v)
            assert memory.peak < 4.1 * weights


def test_graphs_stay_within_their_memory():
    whole = wide_landscape("kept", num_batches=8)
    with whole.measurement():
        whole.hvp(vector(whole))
        size = whole.batched_loss.point.graphs.get((Autograd, 0)).num_bytes
    landscape = wide_landscape("auto", num_batches=8, graph_memory=int(3.5 * size))
    with landscape.measurement():
        for _ in range(3):
            landscape.hvp(vector(landscape))
        kept = [i for i in range(8) if landscape.batched_loss.point.graphs.get((Autograd, i)) is not None]
        assert landscape.batched_loss.point.graphs.room >= 0
    assert kept == [0, 1, 2]
    assert landscape.engine == "kept+rebuilt"


@pytest.mark.parametrize("engine", ["auto", "rebuilt", "finite_difference"])
def test_no_growth_over_fifty_measurements(engine):
    landscape = landscape_of("relu_convnet", engine)
    v = vector(landscape)
    with CountedMemory() as memory:
        held = []
        for _ in range(50):
            with landscape.measurement():
                landscape.hvp(v)
                landscape.gradient()
            held.append(memory.current)
    assert held[-1] == held[1]


@pytest.mark.parametrize("geometry", ["euclidean", "layer"])
def test_eigenvalues_leave_nothing_but_their_vectors(geometry):
    landscape = wide_landscape("auto")
    weights = sum(p.nbytes for p in landscape.parameters)
    with CountedMemory() as memory:
        held = []
        for _ in range(5):
            result = top_eigenvalues(landscape, geometry, tol=1e-2, max_basis=6)
            held.append(memory.current)
            del result
    assert held[-1] == held[0] < 4.1 * weights


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("geometry", ["euclidean", "layer", "element"])
def test_a_measurement_takes_its_basis_and_seven_times_the_weights(k, geometry):
    landscape = wide_landscape("rebuilt", num_batches=2)
    weights = sum(p.nbytes for p in landscape.parameters)
    metric = TopEigenvalues(k=k, geometry=geometry, max_basis=k + 8, tol=1e-6, max_products=40)
    for _ in ("cold", "warm"):
        with CountedMemory() as memory:
            metric.update(landscape)
        assert metric.num_products > k + 8  # so it has restarted
        assert memory.peak <= (k + 8 + 6 + 1) * weights  # the last one is the twin
