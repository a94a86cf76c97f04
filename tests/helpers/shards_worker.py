"""What each of several processes does in tests of weights that stay sharded; started like ddp_worker.py."""

from __future__ import annotations

import json
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.modules import Augmented, loader, trainer
from helpers.problems import cross_entropy, make_problem
from helpers.sharded_worker import (
    ShardedBusy,
    ShardedClassifier,
    TensorParallel,
    fit,
    make_batches,
    process_group,
    shard,
    train,
)
from lightning_flatness import (
    CriticalSharpness,
    DirectionalSharpness,
    FlatnessMonitor,
    InvariantSharpness,
    LossLandscape,
    OptimizerStep,
    ShardedLandscape,
    TopEigenvalues,
)
from lightning_flatness.metrics import FlatnessMetric

WAYS = {
    "relu_convnet": ("split",),
    "batchnorm_eval": ("split", "one"),
    "dropout": ("plain",),
    "tied_weights": ("split", "plain"),
    "frozen_parameters": ("split",),
}


def measured(landscape: LossLandscape) -> dict[str, list[float]]:
    """Values of some metrics, the first one twice: the second time from where it has been."""
    first = TopEigenvalues(k=2, geometry="layer", tol=1e-5)
    metrics: dict[str, FlatnessMetric] = {
        "two": first,
        "two again": first,
        "filter": TopEigenvalues(geometry="filter", tol=1e-3),
        "invariant": InvariantSharpness(tol=1e-3),
        "element": TopEigenvalues(geometry="element", tol=1e-3),
    }
    values: dict[str, list[float]] = {"loss": [float(landscape.loss())]}
    for name, metric in metrics.items():
        metric.update(landscape)
        values[name] = metric.compute().flatten().tolist()
        values[f"error of {name}"] = metric.standard_error.flatten().tolist()
    return values


def chosen(world_size: int) -> list[tuple[str, str]]:
    """The problems and ways to spread them: a few for many ranks, which take turns on few cores."""
    pairs = [(name, way) for name, ways in WAYS.items() for way in ways]
    return (
        pairs if world_size == 2 else [("relu_convnet", "split"), ("batchnorm_eval", "one"), ("tied_weights", "plain")]
    )


def values(out: Path) -> dict[str, Any]:
    """FSDP2 with a share on each rank; replicated and sharded with all batches on the last rank; under DDP."""
    found: dict[str, Any] = {}
    with process_group() as (rank, size):
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        for name, way in chosen(size):
            problem = make_problem(name)
            if way == "split":
                shard(problem.module)
            elif way == "one":
                shard(problem.module, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
            batches = problem.batches[rank::size] if way != "one" else problem.batches if rank == size - 1 else []
            landscape = ShardedLandscape(problem.module, batches, problem.loss_fn, mode=problem.mode, num_total=1000)
            found[f"{name}/{way}"] = measured(landscape)
    return found


def along_update(make: Any, share: slice, shard_: Any = None) -> dict[str, list[float]]:
    """Train one step on a batch that all ranks have, and measure along its update."""
    problem = make_problem("relu_convnet")
    if shard_ is not None:
        shard_(problem.module)
    optimizer = torch.optim.AdamW(problem.module.parameters(), lr=0.01)
    problem.loss_fn(problem.module, problem.batches[0]).backward()
    with OptimizerStep(optimizer) as update:
        optimizer.step()
    optimizer.zero_grad()
    options = {"mode": problem.mode, "num_total": 1000, "update": update}
    landscape = make(problem.module, problem.batches[share], problem.loss_fn, **options)
    with landscape.measurement(on_shards=True):
        found = {"entries": [float(len(landscape.batched_loss.change_of(update)))]}
    for metric in (CriticalSharpness(), DirectionalSharpness()):
        metric.update(landscape)
        numbers = torch.cat([metric.value.flatten(), metric.error.flatten(), metric.standard_error.flatten()])
        found[type(metric).__name__] = numbers.tolist()
    return found


def updates(out: Path) -> dict[str, Any]:
    with process_group() as (rank, size):
        return along_update(ShardedLandscape, slice(rank, None, size), shard)


def whole(vectors: Any, part: Tensor) -> list[float]:
    """Return all entries of a vector, given those of this rank."""
    found = torch.zeros(vectors.size, dtype=part.dtype)
    pieces = part.split([stop - start for start, stop in vectors.slices])
    for (start, stop), piece in zip(vectors.slices, pieces, strict=True):
        found[start:stop] = piece.detach()
    entries: list[float] = vectors.total(found).tolist()
    return entries


def products(out: Path) -> dict[str, Any]:
    """Gradients and products of all engines, put together from the ranks' entries."""
    found: dict[str, Any] = {}
    with process_group() as (rank, size):
        for engine in ("kept", "rebuilt", "finite_difference"):
            problem = make_problem("tanh_mlp")
            shard(problem.module)
            landscape = ShardedLandscape(problem.module, problem.batches[rank::size], problem.loss_fn, engine=engine)
            with landscape.measurement(on_shards=True):
                vectors = landscape.vectors_in(landscape.chart("euclidean"))
                v = vectors.gaussian(torch.Generator().manual_seed(1))
                found[engine] = [whole(vectors, part) for part in (landscape.gradient(), landscape.hvp(v))]
                assert landscape.engine == engine
        module = TensorParallel().parallelized(init_device_mesh("cpu", (size,)))
        metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
        metric.update(ShardedLandscape(module, make_batches()[rank::size], cross_entropy))
        found["tensor_parallel"] = metric.compute().tolist()
    return found


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside the block and are alive, and the most of them at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class Deep(nn.Module):
    """Layers of equal size, so that one of them is a small part of the whole."""

    def __init__(self, width: int = 96, depth: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def memory(out: Path) -> dict[str, Any]:
    """The most bytes alive in a measurement, in units of the weights: of the basis and of everything."""
    found: dict[str, Any] = {}
    with process_group() as (rank, _):
        for kind in (LossLandscape, ShardedLandscape):
            module = Deep()
            shard(module.layers)
            num_bytes = sum(p.numel() for p in module.parameters()) * 4
            x = torch.randn(4, 96, generator=torch.Generator().manual_seed(rank))
            landscape = kind(module, [(x, torch.randint(3, (4,)))], cross_entropy)
            metric = TopEigenvalues(tol=1e-7, max_basis=12, max_products=16)
            with LiveBytes() as live:
                metric.update(landscape)
            found[kind.__name__] = live.most / num_bytes
            assert int(metric.num_products) >= 12
    return found


def no_trace(out: Path) -> dict[str, Any]:
    """Train with and without measurements on shards."""
    with process_group():
        return {"with": train(ShardedLandscape)[0], "without": train(None)[0]}


def monitor(out: Path) -> dict[str, Any]:
    """Fit with the monitor, sharded and gathered, and without."""

    def watch(sharded: bool) -> FlatnessMonitor:
        return FlatnessMonitor(top_k=2, probe_size=17, probe_batch_size=4, tol=1e-5, sharded=sharded)

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    return {
        "with": fit(out, ShardedBusy, watch(True), strategy=strategy()),
        "without": fit(out, ShardedBusy, strategy=strategy()),
        "sharded": fit(out, ShardedClassifier, watch(True), strategy=strategy()),
        "gathered": fit(out, ShardedClassifier, watch(False), strategy=strategy()),
    }


def survive(out: Path) -> dict[str, Any]:
    """A measurement that fails on one rank is a warning on both."""
    seed_everything(0, verbose=False)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        loss = module.training_step(batch, 0)
        if dist.get_rank() == 1:
            raise ArithmeticError("rank one fails")
        return loss

    run = trainer(
        out,
        FlatnessMonitor(probe_size=17, probe_batch_size=4, sharded=True, loss_fn=loss_fn),
        logger=CSVLogger(out),
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        devices=2,
        max_epochs=1,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(ShardedClassifier(), loader(Augmented(), batch_size=4))
    return {"said": [str(w.message) for w in caught if "FlatnessMonitor" in str(w.message)], "step": run.global_step}


if __name__ == "__main__":
    command, out, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    commands = {f.__name__: f for f in (values, updates, products, memory, no_trace, monitor, survive)}
    result = commands[command](Path(out), *map(int, numbers))
    (Path(out) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
