"""SAM and ASAM written down a second time, in plain PyTorch, as an oracle; and a module that makes it hard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from helpers import training
from helpers.modules import trainer
from helpers.training import Recorder, everything, state_of
from lightning_flatness import FlatnessMonitor

SGD = "sgd"
ADAMW = "adamw"
GEOMETRIES = ("euclidean", "element", "layer", "filter")


def make_optimizer(name: str, parameters: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    if name == SGD:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(parameters, lr=lr / 10)


def make_network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    # No bias in front of BatchNorm: its gradient is zero up to rounding, and Adam blows up what is left of it.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3)
        ).to(dtype)


def make_data(dtype: torch.dtype = torch.float32, num_samples: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(3, (num_samples,), generator=generator))


def make_loader(dtype: torch.dtype = torch.float32, batch_size: int = 8, num_samples: int = 40, **kwargs: Any) -> Any:
    # A generator of its own: else the loader draws from the one of the dropout masks.
    generator = torch.Generator().manual_seed(2)
    return DataLoader(make_data(dtype, num_samples), batch_size, generator=generator, **kwargs)


class Net(LightningModule):
    """BatchNorm, dropout, torchmetrics, logging per step and epoch, a list and a count of its own, a scheduler."""

    def __init__(self, optimizer: str = SGD, dtype: torch.dtype = torch.float32, schedule: bool = False) -> None:
        super().__init__()
        self.net = make_network(dtype)
        self.accuracy = MulticlassAccuracy(3)
        self.optimizer_name = optimizer
        self.schedule = schedule
        self.calls = 0
        self.seen: list[Tensor] = []

    def on_train_start(self) -> None:
        torch.manual_seed(3)  # of the dropout masks, as in the plain loop

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        return F.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        loss = self.loss(batch)
        self.seen.append(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.optimizer_name, self.parameters())
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return trainer(None, *callbacks, **options)


def fit(module: LightningModule, *callbacks: Callback, loader: Any = None, **options: Any) -> Any:
    """Train with the data that `Net` is made for."""
    data = (make_loader() if loader is None else loader,)
    return training.fit(None, *callbacks, module=module, data=data, **({"logger": False} | options))


class Resumable(Net):
    """Its masks do not depend on when the run was started."""

    def on_train_start(self) -> None:
        pass

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


class Stateful:
    """A loader that goes on where it was."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.start = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches[self.start :]:
            self.start += 1
            yield batch
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["start"]


def watched_in_both_orders(make_sam: Callable[[], Callback]) -> list[tuple[Trainer, FlatnessMonitor, dict[str, Any]]]:
    """Train with SAM and a monitor, in either order of the callbacks; return how each run ended, but for times.

    The weights are those of SAM alone, bit for bit.
    """
    alone = Net(schedule=True)
    fit(alone, make_sam(), accumulate_grad_batches=2)
    runs = []
    for order in (1, -1):
        torch.manual_seed(0)
        module, logger = Net(schedule=True), Recorder()
        monitor = FlatnessMonitor(every_n_steps=2, probe_size=24)
        callbacks = [make_sam(), monitor][::order]
        trainer = fit(module, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
        times = ("flatness_cost/seconds", "flatness_cost/share_of_epoch_time")
        records = [(s, {k: v for k, v in m.items() if k not in times}) for s, m in logger.records]
        end = everything(module, trainer) | {"records": [r for r in records if r[1]]}
        for key in times:
            end["metrics"].pop(key)
        assert any("flatness/lambda_max" in m for _, m in end["records"])
        assert_same_bits(state_of(alone), end["weights"])
        runs.append((trainer, monitor, end))
    return runs


def plain_gradient(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def plain_scales(parameters: Sequence[Tensor], geometry: str) -> list[Tensor]:
    """The diagonal of S, from the table in the papers."""
    if geometry == "euclidean":
        return [torch.ones_like(p) for p in parameters]
    if geometry == "element":
        return [p.detach().abs() for p in parameters]
    if geometry == "layer":
        return [p.detach().square().sum().sqrt() for p in parameters]
    return [
        p.detach().abs()
        if p.dim() < 2
        else torch.stack([torch.full_like(row, float(row.norm())) for row in p.detach()])
        for p in parameters
    ]


def plain_perturbation(gradients: Sequence[Tensor], scales: Sequence[Tensor], rho: float) -> list[Tensor]:
    norm = torch.cat([(s * g).flatten() for s, g in zip(scales, gradients, strict=True)]).norm()
    return [rho * s * s * g / norm for s, g in zip(scales, gradients, strict=True)]


def plain_sam_gradient(
    model: nn.Module, loss: Callable[[], Tensor], rho: float, geometry: str
) -> tuple[list[Tensor], float, float]:
    """One microbatch: the gradient at the perturbed weights, the rise of the loss, the length of the perturbation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rng = torch.get_rng_state()
    first_loss = torch.zeros(())

    def first() -> Tensor:
        nonlocal first_loss
        first_loss = loss()
        return first_loss

    perturbation = plain_perturbation(plain_gradient(first, parameters), plain_scales(parameters, geometry), rho)
    rng_after, buffers_after = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    weights = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, e in zip(parameters, perturbation, strict=True):
            p.add_(e)
    torch.set_rng_state(rng)
    second_loss = torch.zeros(())

    def second() -> Tensor:
        nonlocal second_loss
        second_loss = loss()
        return second_loss

    gradients = plain_gradient(second, parameters)
    with torch.no_grad():
        for p, w in zip(parameters, weights, strict=True):
            p.copy_(w)
        for b, after in zip(model.buffers(), buffers_after, strict=True):
            b.copy_(after)
    torch.set_rng_state(rng_after)
    length = float(torch.cat([e.flatten() for e in perturbation]).norm())
    return gradients, float(second_loss.detach() - first_loss.detach()), length


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    *,
    rho: float,
    geometry: str = "euclidean",
    num_epochs: int = 3,
    accumulate: int = 1,
    max_norm: float | None = None,
) -> list[tuple[float, float]]:
    """Train; return the means over each epoch of the loss rise and of the length of the perturbation."""
    model.train()
    torch.manual_seed(3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    means = []
    for _ in range(num_epochs):
        rises, lengths = [], []
        for start in range(0, len(batches), accumulate):
            total = [torch.zeros_like(p) for p in parameters]
            for x, y in batches[start : start + accumulate]:
                gradients, rise, length = plain_sam_gradient(model, lambda: F.cross_entropy(model(x), y), rho, geometry)
                total = [t + g / accumulate for t, g in zip(total, gradients, strict=True)]
                rises.append(rise)
                lengths.append(length)
            for p, t in zip(parameters, total, strict=True):
                p.grad = t
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
        means.append((sum(rises) / len(rises), sum(lengths) / len(lengths)))
    return means


def assert_same_bits(first: Any, second: Any) -> None:
    """Compare nested tensors bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same_bits(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)
    else:
        assert first == second
