"""What each of two processes does in tests of sharded weights; started like ddp_worker.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers.modules import Augmented, Busy, Classifier, loader, trainer
from helpers.problems import PROBLEMS, cross_entropy, make_problem
from helpers.registry import METRICS, make_landscape
from lightning_flatness import (
    SAM,
    FlatnessMonitor,
    LossLandscape,
    SharpnessAwareMinimization,
    TopEigenvalues,
    loss_surface,
)
from lightning_flatness.estimators import relative_flatness


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        yield rank, size
    finally:
        dist.destroy_process_group()


def shard(module: nn.Module, **options: Any) -> None:
    """Every layer on its own, then what is left; tied layers cannot be told apart."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if len(names) == len(list(module.parameters())):
        for child in module.children():
            if list(child.parameters()):
                fully_shard(child, **options)
    fully_shard(module, **options)


def landscape(out: Path) -> dict[str, Any]:
    """Ragged shares, one of them empty, of weights in float64 and in mixed precision; products and eigenvalues."""
    values: dict[str, Any] = {}
    with process_group() as (rank, size):
        replicating = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        ways: dict[str, dict[str, Any]] = {
            "split": {},
            "one": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16), "mesh": replicating},
        }
        for name in PROBLEMS:
            for share, options in ways.items():
                problem = make_problem(name)
                batches = problem.batches[rank::size] if share == "split" else problem.batches if rank else []
                shard(problem.module, **options)
                land = LossLandscape(problem.module, batches, problem.loss_fn, mode=problem.mode)
                v = torch.randn(land.num_parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
                metric.update(land)
                with land.displaced(0.1 * v):
                    displaced = float(land.loss())
                values[f"{name}/{share}"] = {
                    "loss": float(land.loss()),
                    "displaced": displaced,
                    "gradient": land.gradient().tolist(),
                    "product": land.hvp(v).tolist(),
                    "eigenvalues": metric.compute().tolist(),
                    "scale": land.chart("filter").pull_back(v).tolist(),
                }
                assert all(isinstance(p, DTensor) for p in problem.module.parameters())
    return values


def metrics(out: Path) -> dict[str, Any]:
    """All metrics, each sample on the rank that the probe puts it on."""
    values = {}
    with process_group() as (rank, size):
        for name, make in METRICS.items():
            metric = make()
            metric.update(make_landscape(rank, size, shard))
            values[name] = metric.compute().flatten().tolist(), metric.error.flatten().tolist()
        land, other = (make_landscape(rank, size, shard) for _ in range(2))
        for p in other.module.parameters():
            p.data.mul_(1.5)
        line = loss_surface(land, "between", other=other.module, num_points=5)
        values["surface"] = line.losses.tolist(), [0.0] * 5
        values["relative_flatness"] = [relative_flatness(land).value.item()], [0.0]
    return values


class TensorParallel(nn.Module):
    """Three ways to lay out the heads of a layer: two of them count on the shape of a slice."""

    def __init__(self, heads: int | None = None, size: int = -1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 3)
            self.double()
        self.heads, self.size = heads, size

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.heads is not None:
            hidden = hidden.view(len(x), self.heads, self.size).softmax(-1).flatten(1)
        return self.second(hidden)

    def parallelized(self, mesh: Any) -> TensorParallel:
        parallelize_module(self, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
        return self


def make_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(13, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(4), torch.randint(3, (13,), generator=generator).split(4), strict=True))


def others(out: Path) -> dict[str, Any]:
    """Tensor parallelism, and all that is refused."""
    values: dict[str, Any] = {}
    with process_group() as (rank, _):
        mesh = init_device_mesh("cpu", (2,))
        module = TensorParallel().parallelized(mesh)
        land = LossLandscape(module, make_batches()[rank::2], cross_entropy)
        metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
        metric.update(land)
        values["tensor_parallel"] = {
            "gradient": land.gradient().tolist(),
            "eigenvalues": metric.compute().tolist(),
            "output": module(make_batches()[0][0]).detach().flatten().tolist(),
        }
        both = TensorParallel().parallelized(
            init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))["tensor"]
        )
        fully_shard(both, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))["data"])
        refused: dict[str, nn.Module] = {
            "local_sizes": TensorParallel(2, -1).parallelized(mesh),
            "local_shapes": TensorParallel(2, 2).parallelized(mesh),
            "both": both,
            "fsdp1": FullyShardedDataParallel(TensorParallel(), device_id=torch.device("cpu")),
            "stages": nn.Linear(4, 3 + rank).double(),
        }
        for name, refused_module in refused.items():
            try:
                LossLandscape(refused_module, make_batches() if rank else [], cross_entropy)
            except ValueError as error:
                values[name] = str(error)
    return values


def sam(out: Path) -> dict[str, Any]:
    """Steps of SAM on whole weights with all samples, and on sharded ones with this rank's half."""
    values: dict[str, Any] = {}
    with process_group() as (rank, _):
        for geometry in ("euclidean", "layer", "filter", "element"):
            for part in (slice(None), slice(rank, None, 2)):
                module, (x, y) = TensorParallel(), make_batches()[0]
                if part != slice(None):
                    shard(module)
                optimizer = SAM(torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9), 0.3, geometry, module)

                def closure(module: Any = module, x: Tensor = x[part], y: Tensor = y[part]) -> Tensor:
                    module.zero_grad()
                    loss = cross_entropy(module, (x, y))
                    loss.backward()
                    return loss

                for _ in range(3):
                    optimizer.step(closure)
                reached = [whole(p).detach().flatten().tolist() for p in module.parameters()]
                values.setdefault(geometry, []).append(reached)
    return values


class Recurrent(nn.Module):
    """A module that keeps a list of its weights beside them, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


def train(kind: type[LossLandscape] | None) -> tuple[dict[str, Any], list[Any]]:
    """Accumulate gradients, evaluate (which leaves weights gathered) and measure in between; return all tensors."""
    torch.manual_seed(0)
    module = Recurrent().double()
    shard(module)
    calls: list[str] = []
    module.head.register_forward_hook(lambda m, x, y: calls.append("forward"))
    module.head.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(12, 5, 4, generator=generator, dtype=torch.float64)
    losses: list[Any] = []
    for step in range(6):
        module(x[2 * step : 2 * step + 2]).square().mean().backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        module.eval()
        with torch.no_grad():
            losses.append(float(module(x).square().mean()))
        module.train()
        if kind is not None:
            before = list(calls), [(p, p._version, p.grad, p.grad._version) for p in _sharded(module)]
            land = kind(module, [x], lambda m, b: m(b).square().mean(), optimizer=optimizer, mode="train")
            for geometry in ("euclidean", "layer", *(["optimizer"] if step else [])):
                TopEigenvalues(geometry=geometry).update(land)
            assert calls == before[0]
            for p, (same, version, gradient, gradient_version) in zip(_sharded(module), before[1], strict=True):
                assert p is same
                assert p.grad is gradient
                assert (p._version, gradient._version) == (version, gradient_version)
    state = {name: whole(t).tolist() for name, t in module.state_dict().items()}
    states = [{k: whole(t).tolist() for k, t in optimizer.state[p].items()} for p in _sharded(module)]
    return {"weights": state, "optimizer": states, "losses": losses, "calls": calls}, losses


def _sharded(module: nn.Module) -> list[Any]:
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
    return list(module.parameters())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def no_trace(out: Path) -> dict[str, Any]:
    """Train with and without measurements."""
    with process_group():
        return {"with": train(LossLandscape)[0], "without": train(None)[0]}


class ShardedBusy(Busy):
    """Everything that can leave a trace, sharded."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[4], self.net[6]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class ShardedClassifier(Classifier):
    """A function of the weights alone."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class TensorParallelClassifier(Classifier):
    """Slices of both layers on each rank; hardly trained, for its ranks are to see the same batches."""

    def __init__(self) -> None:
        super().__init__(lr=1e-12)

    def configure_model(self) -> None:
        layers = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], layers)


class WithMomentum(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class ShardedWithMomentum(WithMomentum, ShardedClassifier):
    pass


def fit(out: Path, module_class: Any, *callbacks: Any, strategy: Any, **options: Any) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    module = module_class()
    run = trainer(
        out,
        *callbacks,
        logger=CSVLogger(out, name=module_class.__name__ + ("Watched" if callbacks else "")),
        strategy=strategy,
        devices=2,
        max_epochs=2,
        **options,
    )
    run.fit(module, loader(Augmented(), batch_size=4), loader(Augmented(), batch_size=4, shuffle=False))
    logged = {k: float(v) for k, v in run.callback_metrics.items() if not k.endswith(("seconds", "time"))}
    weights = {name: whole(t).tolist() for name, t in module.state_dict().items()}
    state = [{k: whole(t).tolist() for k, t in s.items()} for s in run.optimizers[0].state.values()]
    return {"logged": logged, "weights": weights, "optimizer": state, "history": getattr(module, "history", [])}


def monitor(out: Path) -> dict[str, Any]:
    """Fit with the monitor and without, with weights sharded and whole."""

    def watch() -> FlatnessMonitor:
        return FlatnessMonitor(top_k=2, probe_size=17, probe_batch_size=4, tol=1e-5, every_n_steps=2)

    def sharding() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    return {
        "with": fit(out, ShardedBusy, watch(), strategy=sharding()),
        "without": fit(out, ShardedBusy, strategy=sharding()),
        "sharded": fit(out, ShardedClassifier, watch(), strategy=sharding()),
        "whole": fit(out, Classifier, watch(), strategy="ddp"),
        "tensor_parallel": fit(out, TensorParallelClassifier, watch(), strategy=ModelParallelStrategy(1, 2)),
    }


def trained_with_sam(out: Path) -> dict[str, Any]:
    """Fit with the callback on sharded weights and under DDP, and see what it refuses."""

    def both(*callbacks: Any, classes: Any = (ShardedClassifier, Classifier), **options: Any) -> list[Any]:
        sharding = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return [
            fit(out, classes[0], *callbacks, strategy=sharding, **options),
            fit(out, classes[1], *callbacks, strategy="ddp", **options),
        ]

    results: dict[str, Any] = {
        "plain": both(SharpnessAwareMinimization(0.3)),
        "element": both(SharpnessAwareMinimization(0.5, "element"), accumulate_grad_batches=2, gradient_clip_val=0.2),
        "momentum": both(
            SharpnessAwareMinimization(0.3, ascent="momentum"),
            classes=(ShardedWithMomentum, WithMomentum),
            accumulate_grad_batches=2,
        ),
        "previous": both(SharpnessAwareMinimization(0.3, "layer", ascent="previous")),
        "zero": [
            fit(
                out,
                ShardedBusy,
                *callbacks,
                strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            )
            for callbacks in ([], [SharpnessAwareMinimization(0.0)])
        ],
    }
    for name, module_class, sizes in (
        ("local", ShardedClassifier, (2, 1)),
        ("tensor", TensorParallelClassifier, (1, 2)),
    ):
        try:
            fit(
                out,
                module_class,
                SharpnessAwareMinimization(sync_perturbation=name != "local"),
                strategy=ModelParallelStrategy(*sizes),
            )
        except MisconfigurationException as error:
            results[name] = str(error)
    return results


if __name__ == "__main__":
    command, out, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    commands = {
        "landscape": landscape,
        "metrics": metrics,
        "no_trace": no_trace,
        "others": others,
        "sam": sam,
        "trained_with_sam": trained_with_sam,
        "monitor": monitor,
    }
    result = commands[command](Path(out), *map(int, numbers))
    (Path(out) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
