"""Weights and vectors that stay sharded: the values of one process on two and four, in a part of the memory each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.problems import cross_entropy, make_problem
from helpers.ranks import run_ranks
from helpers.registry import METRICS, make_landscape
from helpers.sharded_worker import TensorParallel, make_batches
from helpers.shards_worker import along_update, chosen, measured
from torch import Tensor, nn

from lightning_flatness import (
    FlatnessMonitor,
    InvariantSharpness,
    LossLandscape,
    PathGeometry,
    ShardedLandscape,
    TopEigenvalues,
)
from lightning_flatness.callbacks.sharded import kind_of_landscape
from lightning_flatness.metrics.measurement import measure_metrics


def run_shards(command: str, out: Any, world_size: int = 2) -> list[Any]:
    return run_ranks(command, out, world_size=world_size, script="shards_worker.py")


def whole(name: str) -> LossLandscape:
    problem = make_problem(name)
    return LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode, num_total=1000)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_find_the_values_of_one_process(tmp_path, world_size):
    first, *others = run_shards("values", tmp_path, world_size)
    assert all(rank == first for rank in others)
    for name, way in chosen(world_size):
        expected, found = measured(whole(name)), first[f"{name}/{way}"]
        assert found.keys() == expected.keys()
        for key, numbers in expected.items():
            assert found[key] == pytest.approx(numbers, rel=1e-6, nan_ok=True), (name, way, key)


@pytest.mark.slow
def test_measures_along_an_update_take_the_entries_of_a_rank(tmp_path):
    first, second = run_shards("updates", tmp_path)
    whole = along_update(LossLandscape, slice(None))
    (entries,) = whole.pop("entries")
    sizes = [rank.pop("entries")[0] for rank in (first, second)]
    assert sum(sizes) == entries
    assert max(sizes) < 0.6 * entries
    assert first == second
    for name, numbers in whole.items():
        assert first[name] == pytest.approx(numbers, rel=1e-6, abs=1e-12), name


@pytest.mark.slow
def test_gradients_and_products_of_all_engines(tmp_path):
    first, second = run_shards("products", tmp_path)
    assert first == second
    metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
    metric.update(LossLandscape(TensorParallel(), make_batches(), cross_entropy))
    assert first.pop("tensor_parallel") == pytest.approx(metric.compute().tolist(), rel=1e-8)
    problem = make_problem("tanh_mlp")
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn)
    v = torch.randn(landscape.num_parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient, product = landscape.gradient().tolist(), landscape.hvp(v).tolist()
    for engine, (found_gradient, found_product) in first.items():
        rel = 1e-4 if engine == "finite_difference" else 1e-10
        assert found_gradient == pytest.approx(gradient, rel=1e-10, abs=1e-14)
        assert found_product == pytest.approx(product, rel=rel, abs=rel * max(map(abs, product))), engine


@pytest.mark.slow
def test_memory_of_a_rank_falls_with_the_ranks(tmp_path):
    most = {size: run_shards("memory", tmp_path / str(size), size) for size in (1, 2, 4)}
    for size, ranks in most.items():
        for rank in ranks:
            # Twelve vectors of the basis, the weights, a few vectors beside them; of a layer's eighth some copies.
            assert rank["LossLandscape"] > 16
            assert rank["ShardedLandscape"] < 20 / size + 1.5, (size, rank)
    print("\nmost bytes on a rank, in units of the weights, with a basis of twelve vectors")
    for size, ranks in most.items():
        print(f"{size} ranks: gathered {ranks[0]['LossLandscape']:.1f}, sharded {ranks[0]['ShardedLandscape']:.1f}")


@pytest.mark.slow
def test_no_trace_in_training(tmp_path):
    for rank in run_shards("no_trace", tmp_path):
        assert rank["with"] == rank["without"]
        assert rank["with"]["calls"].count("accumulated") == 6


@pytest.mark.slow
def test_monitor_logs_the_same_sharded_and_gathered_and_leaves_no_trace(tmp_path):
    fits = run_shards("monitor", tmp_path)
    for fit in fits:
        sharded, gathered = fit["sharded"]["logged"], fit["gathered"]["logged"]
        assert sharded.keys() == gathered.keys()
        for key in ("lambda_max", "lambda_2", "invariant_sharpness"):
            assert sharded[f"flatness/{key}"] == pytest.approx(gathered[f"flatness/{key}"], rel=1e-5)
        logged = {k: v for k, v in fit["with"]["logged"].items() if not k.startswith("flatness")}
        assert fit["with"] | {"logged": logged} == fit["without"]
    first, second = ({k: v for k, v in fit["with"]["logged"].items() if k.startswith("flatness")} for fit in fits)
    assert first == second


@pytest.mark.slow
def test_a_failure_on_one_rank_stops_no_run(tmp_path):
    (first, second) = run_shards("survive", tmp_path)
    assert first["step"] == second["step"] == 6
    assert ["Measuring failed on another rank; see its error." in text for text in first["said"]] == [True]
    assert ["ArithmeticError: rank one fails" in text for text in second["said"]] == [True]


@pytest.mark.parametrize("name", ["relu_convnet", "tied_weights", "batchnorm_train"])
def test_in_one_process(name):
    problem = make_problem(name)
    landscape = ShardedLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)
    expected = whole(name)
    v = torch.randn(landscape.num_parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert landscape.gradient().tolist() == pytest.approx(expected.gradient().tolist(), rel=1e-12, abs=1e-15)
    assert landscape.hvp(v).tolist() == pytest.approx(expected.hvp(v).tolist(), rel=1e-10, abs=1e-14)
    with landscape.displaced(v, 0.1), expected.displaced(v, 0.1):
        assert float(landscape.loss()) == pytest.approx(float(expected.loss()), rel=1e-12)
    assert all(type(p) is nn.Parameter for p in problem.module.parameters())


def test_a_graph_keeps_no_gathered_weights():
    module = nn.Sequential(*(nn.Linear(50, 50) for _ in range(4)))
    batches = [torch.randn(2, 50, generator=torch.Generator().manual_seed(0))]
    sizes = {}
    for kind in (LossLandscape, ShardedLandscape):
        landscape = kind(module, batches, lambda m, x: m(x).square().mean())
        with landscape.measurement(on_shards=True):
            landscape.hvp(torch.ones(landscape.num_parameters))
            store = landscape.batched_loss.point.graphs
            sizes[kind] = store.budget - store.room
    assert landscape.engine == "kept"
    # A graph leaves the weights themselves out of its count; those gathered for the graph would be three layers more.
    assert sizes[ShardedLandscape] <= sizes[LossLandscape] + 4 * 50 * 50


@pytest.mark.parametrize("name", [name for name, make in METRICS.items() if not make().takes_shards])
def test_a_measure_of_whole_vectors_refuses(name):
    landscape = make_landscape()
    sharded = ShardedLandscape(landscape.module, landscape.samples.batches, landscape.loss_fn)
    with pytest.raises(
        ValueError, match=r"Expected a measure that takes sharded vectors, got one .* Use LossLandscape"
    ):
        METRICS[name]().update(sharded)
    with pytest.raises(ValueError, match="Expected a measure that takes sharded vectors"):
        measure_metrics({"lambda_max": TopEigenvalues(), name: METRICS[name]()}, sharded)


def test_a_geometry_of_whole_weights_is_refused():
    problem = make_problem("tanh_mlp")
    landscape = ShardedLandscape(problem.module, problem.batches, problem.loss_fn)
    with pytest.raises(ValueError, match=r"looks at one tensor at a time, got PathGeometry\(\). Use LossLandscape"):
        landscape.chart(PathGeometry())


def test_a_loss_that_writes_to_weights_is_refused():
    module = nn.Linear(2, 1)

    def clamping(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            module.weight.clamp_(-1, 1)
        return module(x).mean()

    landscape = ShardedLandscape(module, [torch.ones(2, 2)], clamping)
    before = module.weight.tolist()
    with pytest.raises(RuntimeError, match=r"only reads weights which stay sharded, got one that writes .*clamp_"):
        landscape.loss()
    assert module.weight.tolist() == before


def test_a_measurement_of_the_same_module_inside_another_is_refused():
    problem = make_problem("tanh_mlp")
    landscape = ShardedLandscape(problem.module, problem.batches, problem.loss_fn)
    other = ShardedLandscape(problem.module, problem.batches, problem.loss_fn)
    with (
        landscape.measurement(on_shards=True),
        pytest.raises(RuntimeError, match="Expected a module that is not being measured"),
    ):
        other.loss()


def test_what_the_loss_looks_at_beside_the_entries_of_weights():
    """Shapes, types, tied and frozen weights, a penalty over all parameters, a copy, transposes."""

    def loss_fn(module: Any, batch: Any) -> Tensor:
        assert module.weight.shape == (3, 4)
        assert module.weight.dtype == batch[0].dtype
        assert module.weight.device == batch[0].device
        assert isinstance(module.weight, nn.Parameter)
        assert module.weight.requires_grad
        assert len(module.weight) == 3
        penalty = sum(p.square().sum() for p in module.parameters() if p.requires_grad)
        centred = (module.weight.T - module.weight.mean(dim=1)).T
        return cross_entropy(module, batch) + 0.1 * penalty + 0.01 * (centred @ module.weight.mT).sum()

    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    module.bias.requires_grad_(False)
    batches = [(torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))]
    whole, sharded = (kind(module, batches, loss_fn) for kind in (LossLandscape, ShardedLandscape))
    v = torch.randn(12, dtype=torch.float64)
    assert sharded.hvp(v).tolist() == pytest.approx(whole.hvp(v).tolist(), rel=1e-10)


def test_the_monitor_gathers_if_a_metric_needs_it(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_flatness.callbacks.sharded.rank_zero_info", said.append)
    two = {"lambda_max": TopEigenvalues(), "invariant": InvariantSharpness()}
    assert kind_of_landscape(two, True) is ShardedLandscape
    assert kind_of_landscape(two, False) is LossLandscape
    assert not said
    assert kind_of_landscape(two | {"ggn": TopEigenvalues(operator="ggn")}, True) is LossLandscape
    assert said[0].startswith("FlatnessMonitor: 'ggn' cannot be measured with sharded weights")
    assert FlatnessMonitor(sharded=True).sharded
