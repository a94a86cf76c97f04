"""What each of two processes does in tests of ranks; started by torchrun-like environment variables."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from helpers.modules import Augmented, Busy, Classifier, loader, trainer
from helpers.problems import PROBLEMS, make_problem
from helpers.registry import METRICS, make_landscape
from lightning_flatness import FlatnessMonitor, LossLandscape, TopEigenvalues, loss_surface
from lightning_flatness.callbacks import landscape_monitor
from lightning_flatness.callbacks.transfer import transferred


class Fragile(Classifier):
    """Fails on one rank alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and not self.training:
            raise ArithmeticError("rank one fails")
        return F.cross_entropy(self(batch[0]), batch[1])


def monitor(out: Path, num_devices: int, probe_size: int) -> None:
    """Fit with the monitor and write what rank zero logged."""
    torch.manual_seed(0)
    run = trainer(
        out,
        FlatnessMonitor(top_k=3, probe_size=probe_size, probe_batch_size=4, tol=1e-5),
        logger=CSVLogger(out, name="logs"),
        strategy="ddp" if num_devices > 1 else "auto",
        devices=num_devices,
        max_epochs=2,
    )
    run.fit(Classifier(), loader(Augmented(), batch_size=8 // num_devices))
    values = {
        k: float(v)
        for k, v in run.callback_metrics.items()
        if k.startswith("flatness") and k not in ("flatness_cost/seconds", "flatness_cost/share_of_epoch_time")
    }
    if probe_size > 1:
        values |= bounded(out, num_devices)
    (out / f"rank{run.global_rank}.json").write_text(json.dumps(values))


class Miscounting(pl.Callback):
    """Makes the second rank believe that nothing was trained; the first one decides for both."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, FlatnessMonitor) and trainer.global_rank == 1:
                callback.run.work.trained = 0.0


def bounded(out: Path, num_devices: int) -> dict[str, Any]:
    """Fit with a budget, and return what was counted and measured."""
    callback = FlatnessMonitor(budget=1.0, every_n_steps=1, probe_size=4)
    strategy = "ddp" if num_devices > 1 else "auto"
    run = trainer(out, Miscounting(), callback, strategy=strategy, devices=num_devices, max_epochs=10)
    run.fit(Classifier(), loader(Augmented(), batch_size=8 // num_devices))
    trained = run.strategy.broadcast(callback.run.work.trained)
    return {"trained": trained, "steps": [step for step, _ in callback.run.history]}


def fail(out: Path) -> None:
    """Both ranks must raise: the failing one its own error, the other one that says where to look."""
    run = trainer(out, FlatnessMonitor(on_error="raise"), strategy="ddp", devices=2)
    try:
        run.fit(Fragile(), loader(Augmented()))
    except (ArithmeticError, RuntimeError) as error:
        (out / f"rank{run.global_rank}.json").write_text(json.dumps(f"{type(error).__name__}: {error}"))


class LameMetric(TopEigenvalues):
    """Fails on one rank alone, between two sums."""

    def estimate(self, landscape: LossLandscape) -> Any:
        landscape.gradient()
        if dist.get_rank() == 1:
            raise MemoryError("rank one has no memory")
        return super().estimate(landscape)


class Unlucky(FlatnessMonitor):
    """Cannot draw its samples on one rank alone."""

    def _draw_probe(self, trainer: Any, pl_module: Any) -> None:
        def failing(*_: Any) -> Any:
            raise OSError("rank one cannot read")

        with patch.object(landscape_monitor, "transferred", failing if dist.get_rank() else transferred):
            super()._draw_probe(trainer, pl_module)


def survive(out: Path) -> None:
    """What fails on one rank alone, in a sum, between sums, or before, stops neither rank and changes no weight."""
    weights, said = [], []
    cases: list[tuple[list[Any], type[Classifier]]] = [
        ([], Classifier),
        ([FlatnessMonitor()], Fragile),
        ([FlatnessMonitor({"lame": LameMetric(), "fine": TopEigenvalues()})], Classifier),
        ([Unlucky()], Classifier),
    ]
    for callbacks, module_class in cases:
        torch.manual_seed(0)
        module = module_class()
        run = trainer(out, *callbacks, strategy="ddp", devices=2, max_epochs=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module, loader())
        weights.append([p.flatten().tolist() for p in module.parameters()])
        said.append([str(w.message) for w in caught if "failed at step" in str(w.message)])
        assert not any("flatness" in key for key in run.callback_metrics)
    (out / f"rank{run.global_rank}.json").write_text(json.dumps([weights, said]))


def hyperparameters(out: Path) -> None:
    """The columns are what is logged, which is reduced over the ranks when it is first read: by all of them."""
    logger = TensorBoardLogger(out, name="", version="run", default_hp_metric=False)
    run = trainer(out, FlatnessMonitor(), strategy="ddp", devices=2, max_epochs=2, logger=logger)
    run.fit(Busy(), loader(Augmented()), loader(Augmented(), shuffle=False))
    (out / f"rank{run.global_rank}.json").write_text(json.dumps(sorted(run.callback_metrics)))


def landscape(out: Path) -> None:
    """Plain process group, no Trainer: ragged shares, one of them empty."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    values = {}
    for name in PROBLEMS:
        if name == "batchnorm_train":
            continue
        problem = make_problem(name)
        for share, batches in {"split": problem.batches[rank::size], "one": problem.batches if rank else []}.items():
            metric = TopEigenvalues(k=2, geometry="layer", tol=1e-9)
            metric.update(LossLandscape(problem.module, batches, problem.loss_fn, mode=problem.mode))
            values[f"{name}/{share}"] = metric.compute().tolist()
    (out / f"rank{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def once(out: Path) -> None:
    """One rank has no batch and cannot see that an operator has no second derivative; both must fall back."""
    from helpers.once_differentiable import once_differentiable_twin

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    module, problem = once_differentiable_twin()
    landscape = LossLandscape(module, problem.batches if rank else [], problem.loss_fn)
    metric = TopEigenvalues(tol=1e-5)
    metric.update(landscape)
    (out / f"rank{rank}.json").write_text(json.dumps([landscape.engine, metric.compute().tolist()]))
    dist.destroy_process_group()


def metrics(out: Path) -> None:
    """All metrics, each sample on the rank that the probe puts it on."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    values = {}
    for name, make in METRICS.items():
        metric = make()
        metric.update(make_landscape(rank, size))
        numbers = metric.compute(), metric.error, metric.standard_error
        values[name] = tuple(number.flatten().tolist() for number in numbers)
    (out / f"rank{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def reductions(out: Path) -> None:
    """Count the all-reduces of each evaluation, on three batches."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    landscape = make_landscape(rank, size)
    v = torch.ones(landscape.num_parameters, dtype=landscape.dtype)
    counts: dict[str, list[int]] = {}

    def count(name: str, evaluate: Any) -> None:
        calls.clear()
        evaluate()
        counts[name] = list(calls)

    with landscape.measurement():
        count("first product", lambda: landscape.hvp(v))
        count("next product", lambda: landscape.hvp(v))
        count("gradient", landscape.gradient)
        count("gradient again", landscape.gradient)
        count("loss", landscape.loss)
        count("loss and gradient", landscape.loss_and_gradient)
        count("gauss-newton", lambda: landscape.ggnvp(v))
    (out / f"rank{rank}.json").write_text(json.dumps([landscape.num_parameters, counts]))
    dist.destroy_process_group()


def surface(out: Path) -> None:
    """Draw surfaces, each sample on the rank that the probe puts it on."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    drawn = [
        loss_surface(make_landscape(rank, size), directions, geometry=geometry, radius=radius, num_points=5)
        for directions, geometry, radius in SURFACES
    ]
    result = [[s.losses.tolist(), s.x.tolist(), s.directions.tolist()] for s in drawn]
    (out / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


SURFACES = [("random", "filter", None), ("eigenvectors", "layer", None), ("random", "element", 0.5)]


if __name__ == "__main__":
    command, out, *numbers = sys.argv[1:]
    commands = {
        "monitor": monitor,
        "fail": fail,
        "landscape": landscape,
        "once": once,
        "metrics": metrics,
        "reductions": reductions,
        "surface": surface,
        "survive": survive,
        "hyperparameters": hyperparameters,
    }
    commands[command](Path(out), *map(int, numbers))
