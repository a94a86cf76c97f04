"""The promises of SharpnessAwareMinimization: exact, without side effects, and at home in the Trainer."""

from __future__ import annotations

import copy
import math
import pickle
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from sam_reference import (
    ADAMW,
    SGD,
    Net,
    assert_same_bits,
    make_loader,
    make_network,
    make_optimizer,
    make_trainer,
    plain_loop,
    plain_perturbation,
    plain_scales,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import SAM, FlatnessMonitor, SharpnessAwareMinimization
from lightning_flatness.geometry import Geometry

GEOMETRIES = ("euclidean", "element", "layer", "filter")


class Records(Logger):
    """Keeps all that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int | None, dict[str, float]]] = []

    name = "records"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Gradients(Callback):
    """Keeps what the optimizer is given, and counts the hooks around backward."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor | None]] = []
        self.after_backward: list[list[Tensor | None]] = []
        self.num_before = 0

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.num_before += 1

    def on_after_backward(self, trainer, pl_module) -> None:
        self.after_backward.append(_gradients(pl_module))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append(_gradients(pl_module))


def _gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def fit(module: LightningModule, *callbacks: Callback, loader: Any = None, ckpt_path: Any = None, **kwargs: Any) -> Any:
    trainer = make_trainer(*callbacks, **kwargs)
    trainer.fit(module, make_loader() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def everything(module: Any, trainer: Any) -> dict[str, Any]:
    """All that a run leaves behind."""
    return {
        "weights": state_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "rng": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("sam/")},
        "global_step": trainer.global_step,
        "progress": trainer.fit_loop.state_dict(),
        "seen": getattr(module, "seen", None),
        "calls": getattr(module, "calls", None),
    }


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_rho_zero_is_bit_identical_to_no_callback(optimizer):
    ends = []
    for callbacks in ([], [SharpnessAwareMinimization(rho=0.0)]):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        module, logger = Net(optimizer, schedule=True), Records()
        trainer = fit(module, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
        ends.append(everything(module, trainer) | {"records": logger.records})
    assert_same_bits(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize(("geometry", "rho"), [("euclidean", 0.05), ("element", 0.5), ("layer", 0.05), ("filter", 0.2)])
def test_equals_a_plain_loop(geometry, rho, optimizer, dtype):
    module = Net(optimizer, dtype)
    trainer = fit(module, SharpnessAwareMinimization(rho, geometry), loader=make_loader(dtype))
    plain = make_network(dtype)
    means = plain_loop(
        plain, make_optimizer(optimizer, plain.parameters()), list(make_loader(dtype)), rho=rho, geometry=geometry
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)
    logged = trainer.callback_metrics
    torch.testing.assert_close(float(logged["sam/loss_rise"]), means[-1][0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(float(logged["sam/perturbation_norm"]), means[-1][1], rtol=1e-5, atol=0)


def test_the_plain_loop_differs_without_sam():
    """Guard of the guard: the test above can fail."""
    module, plain = Net(), make_network()
    fit(module)
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader()), rho=0.05)
    assert not torch.allclose(module.net[0].weight, plain[0].weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("accumulate", [2, 3])  # the last window of an epoch is ragged
def test_accumulated_microbatches_are_perturbed_each_on_its_own(accumulate):
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    trainer = fit(
        module,
        SharpnessAwareMinimization(0.05),
        loader=make_loader(torch.float64),
        accumulate_grad_batches=accumulate,
    )
    batches = list(make_loader(torch.float64))
    means = plain_loop(plain, make_optimizer(SGD, plain.parameters()), batches, rho=0.05, accumulate=accumulate)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert trainer.global_step == 3 * math.ceil(5 / accumulate)
    assert float(trainer.callback_metrics["sam/loss_rise"]) == pytest.approx(means[-1][0], rel=1e-5)


def test_accumulation_scheduler():
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2}), SharpnessAwareMinimization(0.05)]
    fit(module, *callbacks, loader=make_loader(torch.float64), max_epochs=2)
    optimizer, batches = make_optimizer(SGD, plain.parameters()), list(make_loader(torch.float64))
    plain_loop(plain, optimizer, batches, rho=0.05, num_epochs=1)
    rng = torch.get_rng_state()
    reseed = torch.manual_seed
    try:  # the second epoch goes on with the random numbers of the first
        torch.manual_seed = lambda seed: torch.set_rng_state(rng)
        plain_loop(plain, optimizer, batches, rho=0.05, num_epochs=1, accumulate=2)
    finally:
        torch.manual_seed = reseed
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


def test_clipping_acts_on_the_sharpness_aware_gradient_only():
    module, plain = Net(dtype=torch.float64), make_network(torch.float64)
    fit(module, SharpnessAwareMinimization(0.05), loader=make_loader(torch.float64), gradient_clip_val=0.1)
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader(torch.float64)), rho=0.05, max_norm=0.1)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-12)


def test_interval_and_start_epoch_choose_the_steps():
    class Counting(Net):
        num_forwards = 0

        def loss(self, batch):
            Counting.num_forwards += 1  # on the class: not put back
            return super().loss(batch)

    for arguments, expected in (({}, 30), ({"interval": 3}, 15 + 5), ({"start_epoch": 2}, 15 + 5)):
        Counting.num_forwards = 0
        module = Counting()
        fit(module, SharpnessAwareMinimization(0.05, **arguments))
        assert Counting.num_forwards == expected, arguments
        assert module.calls == 15


def test_a_schedule_of_ones_own():
    class Late(SharpnessAwareMinimization):
        def should_perturb(self, step_idx: int, epoch_idx: int) -> bool:
            return step_idx == 14

    module, without = Net(), Net()
    fit(module, Late(0.05))
    fit(without)
    weights = module.net[0].weight - without.net[0].weight
    assert 0 < weights.norm().item() < 0.1


# ------------------------------------------------------------------------------------------------ leaving no trace


def test_nothing_but_the_gradient_differs_from_a_clean_pass():
    """With a learning rate of zero the runs see the same weights, so all else must be the same, bit for bit."""

    class Still(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ends = []
    for callbacks in ([], [SharpnessAwareMinimization(rho=0.5)]):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        module, logger = Still(), Records()
        trainer = fit(module, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
        records = [(s, {k: v for k, v in m.items() if not k.startswith("sam/")}) for s, m in logger.records]
        ends.append(everything(module, trainer) | {"records": [r for r in records if set(r[1]) - {"epoch"}]})
        assert any("loss_step" in m for _, m in records)
    assert_same_bits(*ends)


def test_hooks_run_once_and_see_the_sharpness_aware_gradient():
    class Hooked(Net):
        num_before, num_after = 0, 0

        def on_before_backward(self, loss):
            Hooked.num_before += 1

        def on_after_backward(self):
            Hooked.num_after += 1
            self.gradient = _gradients(self.net)

    first, last, module = Gradients(), Gradients(), Hooked(dtype=torch.float64)
    fit(module, first, SharpnessAwareMinimization(0.05), last, loader=make_loader(torch.float64), max_epochs=1)
    assert first.num_before == last.num_before == Hooked.num_before == Hooked.num_after == 5
    for a, b, c in zip(first.after_backward, last.after_backward, last.gradients, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(b, c)
    assert_same_bits(module.gradient, last.gradients[-1])
    assert first.gradients[0][0].norm() > 0


def test_both_passes_start_from_the_same_state():
    """A queue in a buffer, a count and a momentum encoder: what the step changes must not change its function."""

    class Stateful(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_network(torch.float64)
            self.target = copy.deepcopy(self.net).requires_grad_(False)
            for p in self.target.parameters():
                p += 1
            self.register_buffer("queue", torch.zeros(3, dtype=torch.float64))
            self.count = 0
            self.history = {}
            self.trace = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x + random.random() + torch.from_numpy(np.random.standard_normal(x.shape))  # noqa: NPY002
            self.count += 1
            with torch.no_grad():
                for mine, its in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    mine.data.mul_(0.9).add_(its.data, alpha=0.1)
            trace.append((self.count, self.queue.clone(), float(self.target[0].weight.sum()), x, dict(self.history)))
            self.history[self.count] = batch_idx
            logits = self.net(x)
            loss = F.cross_entropy(logits + self.queue, y) + (self.target(x) - logits).square().mean() / self.count
            self.queue.add_(1)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.0)

    trace: list[Any] = []
    module = Stateful()
    fit(module, SharpnessAwareMinimization(1e-300), loader=make_loader(torch.float64), max_epochs=1)
    assert len(trace) == 10
    for clean, perturbed in zip(trace[::2], trace[1::2], strict=True):
        assert_same_bits(clean, perturbed)
    assert module.count == 5
    assert list(module.history) == [1, 2, 3, 4, 5]
    assert module.queue.tolist() == [5, 5, 5]
    # The target has moved once per step, and by the clean weights.
    expected = make_network(torch.float64)[0].weight + 0.9**5
    torch.testing.assert_close(module.target[0].weight.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_batch_that_the_step_takes_apart():
    class Destructive(Net):
        def training_step(self, batch, batch_idx):
            x = batch.pop("x")
            x.mul_(2).add_(1)
            return self.loss((x, batch["nested"].pop()))

    def collate(samples):
        x, y = torch.utils.data.default_collate(samples)
        return {"x": x, "nested": [y]}

    module, plain = Destructive(dtype=torch.float64), make_network(torch.float64)
    fit(module, SharpnessAwareMinimization(0.05), loader=make_loader(torch.float64, collate_fn=collate))
    batches = [(2 * x + 1, y) for x, y in make_loader(torch.float64)]
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), batches, rho=0.05)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


def test_random_numbers_drawn_between_the_hooks():
    """Mixup in a callback or in the module's on_train_batch_start comes after this callback's own hook."""

    class Mixup(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch[0].add_(torch.randn(()))

    class Drawing(Net):
        masks: list[Tensor] = []  # noqa: RUF012

        def on_train_batch_start(self, batch, batch_idx):
            torch.rand(7)

        def training_step(self, batch, batch_idx):
            Drawing.masks.append(torch.cat([batch[0].flatten(), torch.rand(3)]))
            torch.set_rng_state(torch.get_rng_state())
            return super().training_step(batch, batch_idx)

    fit(Drawing(), SharpnessAwareMinimization(0.05), Mixup(), max_epochs=1)
    for clean, perturbed in zip(Drawing.masks[::2], Drawing.masks[1::2], strict=True):
        assert torch.equal(clean, perturbed)


# ------------------------------------------------------------------------------------------------- mixed precision


class Scaled(MixedPrecision):
    """A loss scaler without half precision, so that scaling by a power of two changes no bit."""

    def __init__(self, scale: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**9))

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_perturbation_does_not_depend_on_the_loss_scale(geometry):
    ends = []
    for scale in (None, 2.0**16, 2.0**40):
        module, plugins = Net(), [] if scale is None else [Scaled(scale)]
        trainer = fit(module, SharpnessAwareMinimization(0.05, geometry), plugins=plugins, gradient_clip_val=0.5)
        ends.append((state_of(module), trainer.callback_metrics["sam/loss_rise"]))
    assert_same_bits(ends[0], ends[1])
    torch.testing.assert_close(ends[0][0], ends[2][0], rtol=1e-6, atol=1e-6)


def test_half_precision_with_the_cpu_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    module = Net()
    fit(module, SharpnessAwareMinimization(0.05), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    exact = Net()
    fit(exact, SharpnessAwareMinimization(0.05))
    torch.testing.assert_close(module.net[0].weight, exact.net[0].weight, rtol=0, atol=0.03)


class Overflowing(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


def test_a_gradient_that_is_not_finite_perturbs_nothing_and_the_scaler_skips_the_step():
    class Watch(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights.append(state_of(pl_module.net))

    scales = []
    for sam in ([], [SharpnessAwareMinimization(0.05)]):
        watch, plugin, module = Watch(), Scaled(2.0**16), Overflowing()
        trainer = fit(module, *sam, watch, plugins=[plugin], max_epochs=1)
        assert torch.equal(watch.weights[2]["0.weight"], watch.weights[3]["0.weight"])
        assert not torch.equal(watch.weights[3]["0.weight"], watch.weights[4]["0.weight"])
        assert torch.isfinite(module.net[0].weight).all()
        scales.append((plugin.scaler.get_scale(), trainer.global_step))
    assert scales[0] == scales[1] == (2.0**15, 5)
    assert math.isfinite(trainer.callback_metrics["sam/loss_rise"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module, exact = Net(), Net()
    fit(module, SharpnessAwareMinimization(0.5, "element"), precision=precision, loader=make_loader(dtype))
    fit(exact, SharpnessAwareMinimization(0.5, "element"))
    torch.testing.assert_close(module.net[0].weight.float(), exact.net[0].weight, rtol=0, atol=0.2)


def test_the_second_pass_runs_under_the_same_autocast():
    class Watching(Net):
        dtypes: list[torch.dtype] = []  # noqa: RUF012

        def loss(self, batch):
            Watching.dtypes.append(self.net[0](batch[0]).dtype)
            return super().loss(batch)

    fit(Watching(), SharpnessAwareMinimization(0.05), precision="bf16-mixed", max_epochs=1)
    assert Watching.dtypes == [torch.bfloat16] * 10


# --------------------------------------------------------------------------------------------- the Trainer's floor


def test_steps_schedulers_and_checkpoints_count_as_without_sam(tmp_path):
    ends = []
    for sam in ([], [SharpnessAwareMinimization(0.05)]):
        directory = tmp_path / f"{len(sam)}"
        checkpoint = ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_top_k=-1)
        module = Net(schedule=True)
        trainer = fit(module, *sam, checkpoint, enable_checkpointing=True, max_epochs=-1, max_steps=7)
        saved = sorted(p.name for p in directory.iterdir())
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        ends.append((trainer.global_step, trainer.current_epoch, saved, rate, module.calls))
    assert ends[0] == ends[1]
    assert ends[0][2] == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]


def test_early_stopping_works_as_without_sam():
    epochs = []
    for sam in ([], [SharpnessAwareMinimization(0.0)], [SharpnessAwareMinimization(0.05)]):
        stopping = EarlyStopping("loss", mode="max", patience=1)
        trainer = fit(Net(), *sam, stopping, max_epochs=20)
        epochs.append(trainer.current_epoch)
    assert epochs[0] == epochs[1]
    assert epochs[2] < 20


def test_early_stopping_can_watch_the_loss_rise():
    stopping = EarlyStopping("sam/loss_rise", mode="min", patience=0, stopping_threshold=1e9)
    trainer = fit(Net(), stopping, SharpnessAwareMinimization(0.05), max_epochs=20)
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("geometry", ["euclidean", "element"])
@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 4}])
def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(tmp_path, every, geometry):
    class Resumable(Net):  # the masks must not depend on when the run was started
        def on_train_start(self):
            pass

        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(self.trainer.global_step)

    def sam():
        return SharpnessAwareMinimization(0.05, geometry, interval=2)

    def run(module, *callbacks, ckpt_path=None, logger):
        loader = make_loader(num_samples=40)
        enabled = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        trainer = make_trainer(*callbacks, enable_checkpointing=enabled, logger=logger, log_every_n_steps=1)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return trainer

    uninterrupted, whole = Resumable(ADAMW, schedule=True), Records()
    trainer = run(
        uninterrupted, sam(), ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, **every), logger=whole
    )
    path = tmp_path / "all" / ("step=5.ckpt" if "every_n_epochs" in every else "step=4.ckpt")
    resumed, rest = Resumable(ADAMW, schedule=True), Records()
    if "every_n_epochs" in every:
        again = run(resumed, sam(), ckpt_path=path, logger=rest)
    else:  # in the middle of an epoch: a loader that starts where it stopped
        loader = list(make_loader())
        again = make_trainer(sam(), max_epochs=3, logger=rest, log_every_n_steps=1)

        class Skipping:
            start = 4

            def __iter__(self):
                for batch in loader[Skipping.start :]:
                    Skipping.start = 0
                    yield batch

            def __len__(self):
                return 5

            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        again.fit(resumed, Skipping(), ckpt_path=path)
    assert_same_bits(state_of(resumed), state_of(uninterrupted))
    assert_same_bits(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())
    assert again.global_step == trainer.global_step
    rises = [(s, m["sam/loss_rise"]) for s, m in whole.records if "sam/loss_rise" in m]
    rises_again = [(s, m["sam/loss_rise"]) for s, m in rest.records if "sam/loss_rise" in m]
    assert len(rises) == 3
    assert rises_again == rises[-len(rises_again) :]
    assert len(rises_again) == (2 if "every_n_epochs" in every else 3)


def test_checkpoint_of_a_run_with_sam_loads_without(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    fit(Net(), SharpnessAwareMinimization(0.05), checkpoint, enable_checkpointing=True, max_epochs=1)
    content = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert not any("Sharpness" in key for key in content["callbacks"])
    assert "momentum_buffer" in content["optimizer_states"][0]["state"][0]
    trainer = fit(Net(), ckpt_path=tmp_path / "step=5.ckpt", max_epochs=2)
    assert trainer.global_step == 10


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("averaging", [StochasticWeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_works_as_without_sam(averaging, first):
    def make():
        if averaging is StochasticWeightAveraging:
            return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
        return EMAWeightAveraging(decay=0.5, update_starting_at_epoch=0)

    ends = []
    for rho in (None, 0.0, 1e-30, 0.05):
        sam = [] if rho is None else [SharpnessAwareMinimization(rho)]
        module = Net()
        fit(module, *([*sam, make()] if first else [make(), *sam]), max_epochs=5)
        ends.append((state_of(module), module.calls))
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0][0], ends[2][0])  # a perturbation that changes no weight: all else is as without
    assert ends[0][1] == ends[2][1] == ends[3][1]
    assert not torch.equal(ends[0][0]["net.0.weight"], ends[3][0]["net.0.weight"])


@pytest.mark.parametrize("geometry", ["euclidean", "element"])
def test_monitor_in_either_order_gives_the_same_numbers(geometry):
    ends = []
    for order in (1, -1):
        torch.manual_seed(0)
        module, logger = Net(schedule=True), Records()
        monitor = FlatnessMonitor(every_n_steps=2, probe_size=24)
        callbacks = [SharpnessAwareMinimization(0.05, geometry), monitor][::order]
        trainer = fit(module, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
        times = ("flatness/seconds", "flatness/share_of_epoch_time")
        records = [(s, {k: v for k, v in m.items() if k not in times}) for s, m in logger.records]
        end = everything(module, trainer) | {"records": [r for r in records if r[1]]}
        for key in times:
            end["metrics"].pop(key)
        ends.append(end | {"rise": trainer.callback_metrics["sam/loss_rise"]})
    assert any("flatness/lambda_max" in m for _, m in ends[0]["records"])
    assert_same_bits(*ends)
    alone = Net(schedule=True)  # and watching changes nothing
    fit(alone, SharpnessAwareMinimization(0.05, geometry), accumulate_grad_batches=2)
    assert_same_bits(state_of(alone), ends[0]["weights"])


# ---------------------------------------------------------------------------------- parameters, gradients, failures


class Odd(LightningModule):
    """Frozen, unused, tied and toggled parameters, and one that is used in the first pass of a step only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_network(torch.float64)
        self.net[1].bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.not_optimized = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.tied = nn.Linear(12, 12, dtype=torch.float64)
        self.tied_too = nn.Linear(12, 12, dtype=torch.float64)
        self.tied_too.weight = self.tied.weight

    def training_step(self, batch, batch_idx):
        self.net[4].bias.requires_grad_(batch_idx % 2 == 0)
        x, y = batch
        hidden = self.tied_too(self.tied(self.net[:2](x)).tanh())
        return F.cross_entropy(self.net[4](hidden) + self.not_optimized, y)

    def configure_optimizers(self):
        decayed = [self.net[0].weight, self.tied.weight, self.unused]
        rest = [*self.net[1].parameters(), *self.net[4].parameters(), self.tied.bias, self.tied_too.bias]
        return torch.optim.SGD([{"params": decayed, "lr": 0.05, "weight_decay": 0.1}, {"params": rest, "lr": 0.2}])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_frozen_unused_tied_toggled_parameters_and_groups(geometry):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Odd()
    plain = copy.deepcopy(module)
    fit(module, SharpnessAwareMinimization(0.1, geometry), loader=make_loader(torch.float64), max_epochs=1)
    optimizer = plain.configure_optimizers()
    for index, batch in enumerate(make_loader(torch.float64)):
        loss = plain.training_step(batch, index)
        held = {id(p): p for g in optimizer.param_groups for p in g["params"] if p.requires_grad}.values()
        held = [p for p in held if p is not plain.unused]
        first = torch.autograd.grad(loss, held)
        changes = plain_perturbation(first, plain_scales(held, geometry), 0.1)
        weights, buffers = [p.detach().clone() for p in held], [b.clone() for b in plain.buffers()]
        with torch.no_grad():
            for p, e in zip(held, changes, strict=True):
                p += e
        second = torch.autograd.grad(plain.training_step(batch, index), held)
        with torch.no_grad():
            for p, w in zip(held, weights, strict=True):
                p.copy_(w)
            for b, saved in zip(plain.buffers(), buffers, strict=True):
                b.copy_(saved)
        optimizer.zero_grad()
        for p, g in zip(held, second, strict=True):
            p.grad = g
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert module.unused.grad is None


def test_parameters_that_no_optimizer_holds_get_one_gradient_per_step():
    with_sam, without, module = Gradients(), Gradients(), Odd()
    other = copy.deepcopy(module)
    fit(module, SharpnessAwareMinimization(1e-300), with_sam, loader=make_loader(torch.float64), max_epochs=1)
    fit(other, without, loader=make_loader(torch.float64), max_epochs=1)
    assert_same_bits(with_sam.gradients, without.gradients)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("used_in", ["clean", "perturbed"])
def test_a_parameter_with_a_gradient_in_only_one_of_the_passes(used_in, accumulate):
    class Partly(LightningModule):
        def __init__(self):
            super().__init__()
            self.always = nn.Parameter(torch.ones(2))
            self.sometimes = nn.Parameter(torch.ones(2))

        def training_step(self, batch, batch_idx):
            moved = bool(self.always[0] != 1)
            loss = self.always.square().sum()
            return loss + self.sometimes.sum() if moved == (used_in == "perturbed") else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    gradients, module = Gradients(), Partly()
    fit(module, SharpnessAwareMinimization(0.1), gradients, max_epochs=1, accumulate_grad_batches=accumulate)
    assert module.always.tolist() == module.sometimes.tolist() == [1, 1]
    for _, sometimes in gradients.gradients:
        if used_in == "clean":
            assert sometimes is None
        else:
            assert sometimes is not None
            assert float(sometimes[0]) in (1.0, 1 / accumulate)


def test_training_step_that_returns_none_now_and_then():
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.calls % 3 == 0 else {"loss": loss, "extra": loss.detach()}

    ends = []
    for rho in (None, 1e-30, 0.05):
        module = Skipping()
        trainer = fit(module, *([] if rho is None else [SharpnessAwareMinimization(rho)]))
        assert "training_step" not in module.__dict__
        ends.append((state_of(module), trainer.global_step, module.calls))
    assert_same_bits(ends[0], ends[1])
    assert ends[2][1:] == ends[0][1:]


def test_a_step_that_returns_none_at_the_perturbed_weights_only():
    class Careful(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if float(self.net[0].weight.detach().norm()) > 100 else loss

    module, without = Careful(), Careful()
    trainer = fit(module, SharpnessAwareMinimization(1e4))
    fit(without)
    assert_same_bits(state_of(module.net), state_of(without.net))
    assert float(trainer.callback_metrics["sam/perturbation_norm"]) == 0


def test_a_gradient_of_zero_perturbs_nothing():
    class Flat(Net):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx)

    module, without = Flat(), Flat()
    trainer = fit(module, SharpnessAwareMinimization(0.05))
    fit(without)
    assert_same_bits(state_of(module), state_of(without))
    assert float(trainer.callback_metrics["sam/perturbation_norm"]) == 0


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_second_pass_that_raises_leaves_everything_as_it_was(where, geometry):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            before.setdefault("weights", state_of(self.net))
            loss = super().training_step(batch, batch_idx)
            changed = not torch.equal(before["weights"]["0.weight"], self.net[0].weight)
            if not changed:
                before["all"] = (state_of(self), self.calls, len(self.seen), torch.get_rng_state())
            elif where == "forward":
                raise RuntimeError("as a test")
            else:
                loss.register_hook(self.fail)
            return loss

        def fail(self, gradient):
            raise RuntimeError("as a test")

    before: dict[str, Any] = {}
    module, other = Failing(), Callback()
    sam = SharpnessAwareMinimization(0.05, geometry)
    trainer = make_trainer(other, sam)
    with pytest.raises(RuntimeError, match="as a test"):
        trainer.fit(module, make_loader())
    for name, value in before["weights"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, module.net.state_dict()[name])
    assert_same_bits((state_of(module), module.calls, len(module.seen), torch.get_rng_state()), before["all"])
    assert trainer.callbacks == [sam, other]
    assert not {"training_step", "on_after_backward", "log"} & set(module.__dict__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_submodules_see_one_pass():
    class Scripted(Net):
        def __init__(self):
            super().__init__()
            self.extra = torch.jit.script(nn.BatchNorm1d(5, momentum=0.5))

        def loss(self, batch):
            return super().loss((self.extra(batch[0]), batch[1]))

    ends = []
    for rho in (None, 1e-30):
        module = Scripted()
        fit(module, *([] if rho is None else [SharpnessAwareMinimization(rho)]))
        ends.append(state_of(module))
    assert_same_bits(*ends)


def test_tensor_hooks_act_on_the_sharpness_aware_gradient():
    module, gradients = Net(), Gradients()
    mask = (torch.rand(12, 5) < 0.5).float()
    module.net[0].weight.register_hook(lambda gradient: gradient * mask)  # e.g. pruning
    fit(module, SharpnessAwareMinimization(0.05), gradients, max_epochs=1)
    assert all((g[0] * (1 - mask)).abs().max() == 0 for g in gradients.gradients)
    assert gradients.gradients[0][0].norm() > 0


def test_gradients_kept_by_the_user_are_added_to():
    """A module that zeroes in place, or not at all, gets what it would get without SAM."""

    class InPlace(Net):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    class Never(Net):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            pass

    reference, in_place = Net(), InPlace()
    fit(reference, SharpnessAwareMinimization(0.05))
    fit(in_place, SharpnessAwareMinimization(0.05))
    assert_same_bits(state_of(reference.net), state_of(in_place.net))
    never, without = Never(), Never()
    fit(never, SharpnessAwareMinimization(1e-30))
    fit(without)
    assert_same_bits(state_of(never.net), state_of(without.net))


def test_custom_backward_and_compiled_training_step():
    class Custom(Net):
        num_backwards = 0

        def backward(self, loss, *args, **kwargs):
            Custom.num_backwards += 1
            (2 * loss).backward()

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for p in self.parameters():
                if p.grad is not None:
                    p.grad /= 2

    module, reference = Custom(), Net()
    own = module.training_step
    module.training_step = lambda batch, batch_idx: own(batch, batch_idx)  # where a compiled step is kept
    kept = module.training_step
    fit(module, SharpnessAwareMinimization(0.05))
    fit(reference, SharpnessAwareMinimization(0.05))
    assert module.training_step is kept
    assert Custom.num_backwards == 30
    assert_same_bits(state_of(module.net), state_of(reference.net))


# ---------------------------------------------------------------------------------------- what is refused, and how


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TakesIterator(Net):
    def training_step(self, dataloader_iter):
        return super().training_step(*next(dataloader_iter)[:2])


class UsesLbfgs(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class UsesSam(Net):
    def configure_optimizers(self):
        return SAM(torch.optim.SGD(self.parameters(), lr=0.1))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "manual optimization. HINT: Wrap its optimizer"),
        (TakesIterator, "`dataloader_iter`. HINT: Let `training_step` take `batch`"),
        (UsesLbfgs, "got LBFGS. HINT: Return e.g. torch.optim.SGD"),
        (UsesSam, "got SAM. HINT: Return e.g. torch.optim.SGD"),
    ],
)
def test_modules_that_are_refused(module, message):
    instance = module()
    before = state_of(instance)
    with pytest.raises(MisconfigurationException, match=message):
        fit(instance, SharpnessAwareMinimization())
    assert instance.calls == 0
    assert_same_bits(state_of(instance), before)


class DeepSpeedStrategy(SingleDeviceStrategy):  # the real one needs deepspeed
    pass


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_are_refused(strategy):
    sam, module, trainer = SharpnessAwareMinimization(), Net(), make_trainer()
    trainer.strategy.__class__ = strategy  # what `setup` sees on machines that can run them
    with pytest.raises(MisconfigurationException, match=rf"{strategy.__name__}. HINT: Use strategy='auto' or 'ddp'"):
        sam.setup(trainer, module, "fit")


class _Curved(Geometry):
    name = "curved"

    def chart(self, module, parameters, dtype):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "Expected `rho` to be >= 0 and finite, got -0.1. Use 0.0"),
        ({"rho": float("nan")}, ValueError, "Expected `rho` to be >= 0 and finite, got nan"),
        ({"rho": float("inf")}, ValueError, "Expected `rho` to be >= 0 and finite, got inf"),
        ({"interval": 0}, ValueError, "Expected `interval` to be >= 1, got 0"),
        ({"start_epoch": -1}, ValueError, "Expected `start_epoch` to be >= 0, got -1"),
        ({"geometry": "round"}, ValueError, "Expected `geometry` to be one of .*, got 'round'"),
        ({"geometry": 3}, TypeError, "Expected `geometry` to be a name or a Geometry, got int"),
        ({"geometry": _Curved()}, ValueError, "Expected `geometry` to be linear .* got _Curved"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SharpnessAwareMinimization(**arguments)


# ------------------------------------------------------------------------------------------------- running anywhere


def test_fast_dev_run_barebones_validation_and_limits():
    sam = SharpnessAwareMinimization(0.05)
    for options in ({"fast_dev_run": True}, {"limit_train_batches": 0}, {"limit_train_batches": 1}):
        trainer = fit(Net(), sam, **options)
        assert ("sam/loss_rise" in trainer.callback_metrics) == (options.get("limit_train_batches") != 0)
    from lightning.pytorch import Trainer

    class Silent(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

        validation_step = training_step

    trainer = Trainer(barebones=True, max_epochs=1, callbacks=[sam], accelerator="cpu", devices=1)
    trainer.fit(Silent(), make_loader())
    assert trainer.global_step == 5
    make_trainer(sam).validate(Silent(), make_loader(), verbose=False)


def test_epoch_that_the_module_ends_early():
    class Impatient(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    module = Impatient()
    trainer = fit(module, SharpnessAwareMinimization(0.05))
    assert module.calls == trainer.global_step == 6
    assert "training_step" not in module.__dict__


def test_no_keys_without_a_sharpness_aware_step():
    for sam in (SharpnessAwareMinimization(0.0), SharpnessAwareMinimization(0.1, start_epoch=9)):
        trainer = fit(Net(), sam)
        assert not any(key.startswith("sam/") for key in trainer.callback_metrics)


def test_logged_once_per_epoch_at_its_last_step():
    logger = Records()
    fit(Net(), SharpnessAwareMinimization(0.05), logger=logger, log_every_n_steps=1)
    points = [(s, m["sam/perturbation_norm"]) for s, m in logger.records if "sam/perturbation_norm" in m]
    assert [s for s, _ in points] == [4, 9, 14]
    assert all(value == pytest.approx(0.05) for _, value in points)


def test_pickle_and_deepcopy_before_and_after_training():
    sam = SharpnessAwareMinimization(0.05, "element", interval=2, start_epoch=1, sync_perturbation=False)
    fit(Net(), sam)
    for other in (pickle.loads(pickle.dumps(sam)), copy.deepcopy(sam)):
        assert (other.rho, other.geometry.name, other.interval) == (0.05, "element", 2)
        assert (other.start_epoch, other.sync_perturbation) == (1, False)
        fit(Net(), other)


def test_one_callback_can_serve_several_fits():
    sam, first, second = SharpnessAwareMinimization(0.05), Net(), Net()
    fit(first, sam)
    fit(second, sam)
    assert_same_bits(state_of(first), state_of(second))


@pytest.mark.filterwarnings("ignore:.*")  # two copies of Lightning in one process
def test_pytorch_lightning_trainer_and_module():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_network(torch.float64)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        on_train_start = Net.on_train_start

        def configure_optimizers(self):
            return make_optimizer(SGD, self.parameters())

    module, plain = Other(), make_network(torch.float64)
    trainer = pytorch_lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SharpnessAwareMinimization(0.05)],
    )
    trainer.fit(module, make_loader(torch.float64))
    plain_loop(plain, make_optimizer(SGD, plain.parameters()), list(make_loader(torch.float64)), rho=0.05)
    torch.testing.assert_close(module.net.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    assert "sam/loss_rise" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:No seed found", "ignore::DeprecationWarning")
def test_lightning_cli_builds_it_from_yaml(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  enable_checkpointing: false\n  callbacks:\n"
        "    - class_path: lightning_flatness.SharpnessAwareMinimization\n"
        "      init_args: {rho: 0.5, geometry: element, interval: 2, start_epoch: 1, sync_perturbation: false}\n"
    )
    cli = LightningCLI(Net, run=False, args=["--config", str(config)], save_config_callback=None)
    sam = next(c for c in cli.trainer.callbacks if isinstance(c, SharpnessAwareMinimization))
    assert (sam.rho, sam.geometry.name, sam.interval, sam.start_epoch) == (0.5, "element", 2, 1)
    assert sam.sync_perturbation is False
