"""Weights sharded over two gloo processes (FSDP2): the values of one process, and no trace in the training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.modules import Augmented, Classifier, loader, trainer
from helpers.problems import PROBLEMS, cross_entropy, make_problem
from helpers.ranks import run_ranks
from helpers.registry import METRICS, make_landscape
from helpers.sharded_worker import TensorParallel, make_batches
from lightning.pytorch import seed_everything

from lightning_flatness import FlatnessMonitor, LossLandscape, TopEigenvalues, loss_surface
from lightning_flatness.estimators import relative_flatness

pytestmark = pytest.mark.slow


def run_sharded(command: str, out: Path, *numbers: int, world_size: int = 2) -> list[Any]:
    return run_ranks(command, out, *numbers, world_size=world_size, script="sharded_worker.py")


@pytest.fixture(scope="module")
def landscapes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_sharded("landscape", tmp_path_factory.mktemp("landscape"))


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_a_sharded_module_has_the_landscape_of_the_whole_one(landscapes, name):
    problem = make_problem(name)
    landscape = LossLandscape(problem.module, problem.batches, problem.loss_fn, mode=problem.mode)
    metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
    metric.update(landscape)
    v = torch.randn(landscape.num_parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with landscape.displaced(0.1 * v):
        displaced = float(landscape.loss())
    for share in ("split", "one"):
        first, second = (values[f"{name}/{share}"] for values in landscapes)
        assert first == second
        assert first["loss"] == pytest.approx(float(landscape.loss()), rel=1e-12)
        assert first["displaced"] == pytest.approx(displaced, rel=1e-12)
        assert first["gradient"] == pytest.approx(landscape.gradient().tolist(), rel=1e-10, abs=1e-12)
        assert first["product"] == pytest.approx(landscape.hvp(v).tolist(), rel=1e-10, abs=1e-12)
        assert first["scale"] == pytest.approx(landscape.chart("filter").pull_back(v).tolist(), rel=1e-12)
        assert first["eigenvalues"] == pytest.approx(metric.compute().tolist(), rel=1e-8), name


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> list[dict[str, Any]]:
    return run_sharded("others", tmp_path_factory.mktemp("others"))


def test_a_tensor_parallel_module_has_the_landscape_of_the_whole_one(modules):
    module, batches = TensorParallel(), make_batches()
    landscape = LossLandscape(module, batches, cross_entropy)
    metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
    metric.update(landscape)
    first, second = (rank["tensor_parallel"] for rank in modules)
    assert first == second
    assert first["gradient"] == pytest.approx(landscape.gradient().tolist(), rel=1e-10, abs=1e-12)
    assert first["eigenvalues"] == pytest.approx(metric.compute().tolist(), rel=1e-8)
    assert first["output"] == pytest.approx(module(batches[0][0]).flatten().tolist(), rel=1e-12)  # as before


REFUSED = {
    "local_sizes": "same with whole weights as with slices of them, got the loss",
    "local_shapes": "same with whole weights as with slices of them, got RuntimeError: shape",
    "both": r"torch.distributed.fsdp.fully_shard \(FSDP2\) .* got one with both FSDP2 and tensor parallelism",
    "fsdp1": r"got one wrapped in FullyShardedDataParallel \(FSDP1\).* measure a checkpoint of the full weights",
    "stages": r"got one with other weights on every rank \(a stage of a pipeline, say\)",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_gathered_is_refused_on_all_ranks(modules, name):
    for rank in modules:
        assert re.search(REFUSED[name], rank[name]), rank[name]


def test_deepspeed_is_refused():
    module = torch.nn.Linear(2, 1)
    module.weight.ds_id = 0  # what ZeRO stage 3 sets
    with pytest.raises(ValueError, match=r"got one partitioned by DeepSpeed \(ZeRO stage 3\). Train it with"):
        LossLandscape(module, [torch.ones(1, 2)], lambda m, x: m(x).mean())


def test_all_metrics_of_a_sharded_module(tmp_path):
    first, second = run_sharded("metrics", tmp_path)
    assert first == second
    for name, make in METRICS.items():
        metric = make()
        metric.update(make_landscape())
        value, error = first[name]
        assert value == pytest.approx(metric.compute().flatten().tolist(), rel=1e-6, nan_ok=True), name
        assert error == pytest.approx(metric.error.flatten().tolist(), rel=1e-3, abs=1e-9, nan_ok=True), name
    landscape, other = make_landscape(), make_landscape()
    for p in other.module.parameters():
        p.data.mul_(1.5)
    line = loss_surface(landscape, "between", other=other.module, num_points=5)
    assert first["surface"][0] == pytest.approx(line.losses.tolist(), rel=1e-10)
    assert first["relative_flatness"][0] == pytest.approx([relative_flatness(landscape).value.item()], rel=1e-8)


def test_sam_takes_the_same_steps_on_sharded_weights(tmp_path):
    for rank in run_sharded("sam", tmp_path):
        for geometry, (alone, sharded) in rank.items():
            for one, two in zip(alone, sharded, strict=True):
                assert two == pytest.approx(one, rel=1e-10, abs=1e-12), geometry


def test_no_trace_in_sharded_training(tmp_path):
    for rank in run_sharded("no_trace", tmp_path):
        assert rank["with"] == rank["without"]
        assert rank["with"]["calls"].count("accumulated") == 6


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> list[dict[str, Any]]:
    return run_sharded("monitor", tmp_path_factory.mktemp("monitor"))


def test_monitor_leaves_no_trace_under_model_parallel_strategy(fits):
    measured = [{k: v for k, v in fit["with"]["logged"].items() if k.startswith("flatness")} for fit in fits]
    assert measured[0] == measured[1]
    assert {"flatness/lambda_2", "flatness/invariant_sharpness", "flatness/preconditioned_sharpness"} <= measured[
        0
    ].keys()
    for fit in fits:
        logged = {k: v for k, v in fit["with"]["logged"].items() if k not in measured[0]}
        assert fit["with"] | {"logged": logged} == fit["without"]


def test_monitor_measures_the_same_under_model_parallel_strategy_as_under_ddp(fits):
    for fit in fits:
        sharded, whole = fit["sharded"]["logged"], fit["whole"]["logged"]
        assert sharded.keys() == whole.keys()
        for key in ("lambda_max", "lambda_2", "invariant_sharpness"):
            assert sharded[f"flatness/{key}"] == pytest.approx(whole[f"flatness/{key}"], rel=1e-4)


def test_monitor_measures_a_tensor_parallel_module(fits, tmp_path):
    seed_everything(0, verbose=False)
    run = trainer(tmp_path, FlatnessMonitor(top_k=2, probe_size=17, tol=1e-5), max_epochs=1)
    run.fit(Classifier(lr=1e-12), loader(Augmented(), batch_size=4))
    for fit in fits:
        for key in ("lambda_max", "lambda_2", "invariant_sharpness"):
            alone = float(run.callback_metrics[f"flatness/{key}"])
            assert fit["tensor_parallel"]["logged"][f"flatness/{key}"] == pytest.approx(alone, rel=1e-4)


def test_sam_callback_on_sharded_weights(tmp_path):
    for rank in run_sharded("trained_with_sam", tmp_path):
        for name in ("plain", "element", "momentum", "previous"):
            sharded, whole = rank[name]
            assert sharded["logged"] == pytest.approx(whole["logged"], rel=1e-4)
            assert sharded["logged"].get("sam/loss_rise", 1.0) > 1e-3
            assert sharded["logged"]["sam/perturbation_norm"] > 0.01
            for key, values in whole["weights"].items():
                torch.testing.assert_close(
                    torch.tensor(sharded["weights"][key]), torch.tensor(values), rtol=1e-4, atol=1e-5
                )
        without, zero = rank["zero"]
        assert without == zero
        assert re.search(r"whole gradients for `sync_perturbation=False`.*HINT: Use", rank["local"])
        assert re.search(r"sharded by FSDP2 alone, got a module with tensor parallelism.*HINT: Use", rank["tensor"])
