"""Run by test_sam_ddp.py in each of two processes: fits in all scenarios, and saves what comes out."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler

from helpers.sam_reference import make_data, make_loader, make_trainer
from lightning_flatness import SharpnessAwareMinimization

NUM_SAMPLES = 40
BATCH_SIZE = 4  # of each rank; together they see the batches of 8 of one process
NUM_EPOCHS = 2


class Small(LightningModule):
    """Without batch statistics, so that two halves of a batch are the batch."""

    def __init__(
        self,
        vanishing: bool = False,
        uneven: bool = False,
        normalized: bool = False,
        lr: float = 0.1,
        used_in: Literal["clean", "perturbed", "neither"] | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            norm = nn.BatchNorm1d(8) if normalized else nn.LayerNorm(8)
            self.net = nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh(), nn.Linear(8, 3)).double()
            self.sometimes = nn.Parameter(torch.full((3,), float(used_in == "neither"), dtype=torch.float64))
            # Falls through zero in the perturbation, or rises through it, and has no gradient there.
            self.gate = nn.Parameter(torch.tensor(0.01 if used_in == "clean" else -0.01, dtype=torch.float64))
        self.sometimes.requires_grad_(uneven or used_in is not None)
        self.gate.requires_grad_(used_in in ("clean", "perturbed"))
        self.vanishing, self.uneven, self.lr, self.used_in = vanishing, uneven, lr, used_in
        self.num_calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.num_calls += 1
        logits = self.net(batch[0])
        has_turn = not self.uneven or self.global_rank == batch_idx % 2
        if has_turn and (self.uneven if self.used_in is None else self.gate > 0):
            logits = logits + self.sometimes
        loss = F.cross_entropy(logits, batch[1])
        if self.used_in is not None:
            loss = loss - (self.gate if self.used_in == "clean" else -self.gate).relu()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return 0 * loss if self.vanishing and batch_idx % 2 == self.global_rank else loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=self.lr == 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decay = 0.1 if self.used_in == "neither" else 0.0
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=decay)


class CountReductions(Callback):
    """Counts the gradient all-reduces of DDP (there is one bucket) and those through the strategy.

    On the class: the second pass of SAM leaves no trace in a callback.
    """

    num_reduced = 0
    num_averaged = 0

    def __init__(self) -> None:
        CountReductions.num_reduced = CountReductions.num_averaged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        wrapped, strategy = trainer.strategy.model, trainer.strategy
        wrapped.register_comm_hook(None, self.hook)
        reduce = strategy.reduce

        def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            CountReductions.num_averaged += isinstance(tensor, torch.Tensor) and tensor.numel() > 10
            return reduce(tensor, *args, **kwargs)

        strategy.reduce = counted

    def hook(self, state, bucket):  # DDP refuses annotations that are strings
        CountReductions.num_reduced += 1
        world = torch.distributed.get_world_size()
        future = torch.distributed.all_reduce(bucket.buffer() / world, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer": {"sam": {"geometry": "layer"}},
    "accumulate": {"accumulate": 2},
    "accumulate_views": {"accumulate": 2, "ddp": {"gradient_as_bucket_view": True}},
    "accumulate_views_in_place": {"accumulate": 2, "ddp": {"gradient_as_bucket_view": True}, "module": {"lr": 0.0999}},
    "in_place": {"accumulate": 2, "module": {"lr": 0.0999}},
    "static": {"ddp": {"static_graph": True}},
    "local": {"sam": {"sync_perturbation": False}},
    "local_accumulate": {"accumulate": 2, "sam": {"sync_perturbation": False}},
    "vanishing": {"accumulate": 2, "module": {"vanishing": True}},
    "vanishing_local": {"sam": {"sync_perturbation": False}, "module": {"vanishing": True}},
    "uneven": {"accumulate": 2, "module": {"uneven": True}, "ddp": {"find_unused_parameters": True}},
    "uneven_local": {
        "accumulate": 2,
        "module": {"uneven": True},
        "ddp": {"find_unused_parameters": True},
        "sam": {"sync_perturbation": False},
    },
    **{
        f"only_{used_in}{ending}": {
            "accumulate": accumulate,
            "module": {"used_in": used_in},
            "ddp": {"find_unused_parameters": True, "gradient_as_bucket_view": ending == "_views"},
        }
        for used_in in ("clean", "perturbed")
        for ending, accumulate in {"": 1, "_accumulate": 2, "_views": 2}.items()
    },
    **{
        f"uneven_clean_{accumulate}{ending}": {
            "accumulate": accumulate,
            "module": {"used_in": "clean", "uneven": True},
            "ddp": {"find_unused_parameters": True, "gradient_as_bucket_view": ending == "_views"},
            "sam": {"sync_perturbation": ending != "_local"},
        }
        for ending in ("", "_local", "_views")
        for accumulate in (1, 2)
    },
    **{
        f"unused_{accumulate}{ending}": {
            "accumulate": accumulate,
            "module": {"used_in": "neither"},
            "ddp": {"find_unused_parameters": True},
            "sam": {"sync_perturbation": not ending},
        }
        for ending in ("", "_local")
        for accumulate in (1, 2)
    },
    "still_without": {"accumulate": 2, "module": {"normalized": True, "lr": 0.0}, "sam": None},
    "still": {"accumulate": 2, "module": {"normalized": True, "lr": 0.0}},
    "still_local": {"accumulate": 2, "module": {"normalized": True, "lr": 0.0}, "sam": {"sync_perturbation": False}},
    "momentum": {"sam": {"ascent": "momentum"}},
    "momentum_accumulate": {"accumulate": 2, "sam": {"ascent": "momentum"}},
    "previous": {"sam": {"ascent": "previous"}},
    "previous_accumulate": {"accumulate": 2, "sam": {"ascent": "previous"}, "ddp": {"gradient_as_bucket_view": True}},
    "zero": {"sam": {"rho": 0.0}},
    "without": {"sam": None},
}


def run(
    module: dict[str, Any] | None = None,
    sam: dict[str, Any] | None = {},
    accumulate: int = 1,
    ddp: dict[str, Any] | None = None,
    devices: int = 2,
) -> dict[str, Any]:
    """Fit in one scenario; return what is to be compared."""
    count = CountReductions()
    callbacks: list[Callback] = [] if sam is None else [SharpnessAwareMinimization(**({"rho": 0.1} | sam))]
    if devices > 1 and not ddp:
        callbacks.append(count)
    trainer = make_trainer(
        *callbacks,
        max_epochs=NUM_EPOCHS,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,  # the Trainer's own would shuffle
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo", **(ddp or {})) if devices > 1 else "auto",
    )
    small = Small(**(module or {}))
    batch_size = 2 * BATCH_SIZE
    sampler: Any = None
    if devices > 1:
        rank, batch_size = int(os.environ["RANK"]), BATCH_SIZE
        sampler = DistributedSampler(make_data(torch.float64, NUM_SAMPLES), devices, rank, shuffle=False)
    trainer.fit(small, make_loader(torch.float64, batch_size, NUM_SAMPLES, sampler=sampler))
    return {
        "weights": {name: t.clone() for name, t in small.state_dict().items()},
        "logged": {name: float(t) for name, t in trainer.callback_metrics.items()},
        "num_calls": small.num_calls,
        "global_step": trainer.global_step,
        "num_reduced": count.num_reduced,
        "num_averaged": count.num_averaged,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {name: run(**options) for name, options in SCENARIOS.items()}
    torch.save(results, f"{sys.argv[1]}/rank{torch.distributed.get_rank()}.pt")
