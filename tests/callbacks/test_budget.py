"""A budget: what measuring may take of a run's gradients, counted in gradients of samples."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Classifier, Plain, loader, loaders
from helpers.sam_reference import assert_same_bits
from helpers.training import Recorder, everything, fit
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatness import (
    FlatnessMonitor,
    HessianTrace,
    LossSurfaceMonitor,
    SharpnessAwareMinimization,
    TopEigenvalues,
)
from lightning_flatness.callbacks.budget import GradientWork, percent
from lightning_flatness.callbacks.landscape_monitor import LandscapeMonitor
from lightning_flatness.metrics.presets import TYPICAL_COSTS, preset_metrics, typical_gradients

NUM_SAMPLES = 40  # of an epoch, in five steps
TYPICAL = sum(TYPICAL_COSTS[name][1] for name in ("lambda_max", "invariant_sharpness"))


class Measured(pl.Callback):
    """What training and measuring have taken at each measurement, counted by someone else."""

    def __init__(self, monitor: FlatnessMonitor) -> None:
        self.monitor = monitor
        self.trained = self.measured = 0.0
        self.shares: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained += len(batch[1])
        self.look()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look()

    def look(self) -> None:
        history = self.monitor.run.history
        self.measured = sum(m.costs["gradient_evaluations"] for _, m in history) * self.monitor.run.num_samples
        if history and history[-1][0] not in self.shares:
            self.shares[history[-1][0]] = self.measured / self.trained if self.trained else 0.0


def steps(monitor: FlatnessMonitor) -> list[int]:
    return [step for step, _ in monitor.run.history]


def run(path: Path | None, monitor: LandscapeMonitor, *others: pl.Callback, **options: Any) -> Any:
    torch.manual_seed(0)
    return fit(path, monitor, *others, **({"data": (loader(shuffle=False),)} | options))


def small(budget: float | None = 0.5, **options: Any) -> FlatnessMonitor:
    return FlatnessMonitor(budget=budget, **({"probe_size": 4} | options))


@pytest.mark.parametrize("make", [FlatnessMonitor, LossSurfaceMonitor])
@pytest.mark.parametrize("budget", [0, -0.1, 1.5, 5, True, "5 %", float("nan")])
def test_no_share(make, budget):
    with pytest.raises(ValueError, match=r"Expected `budget` to be a share in \(0, 1\], got .*Use 0.05"):
        make(budget=budget)


def test_the_share_holds_over_a_long_run_and_two_runs_measure_at_the_same_steps(tmp_path):
    first, second = small(every_n_steps=1), small(every_n_steps=1)
    counted = Measured(first)
    run(tmp_path, first, counted, max_epochs=40)
    run(tmp_path, second, max_epochs=40)
    assert steps(first) == steps(second)
    assert steps(first)[0] == 0
    assert steps(first)[-1] == 200
    inner = {step: share for step, share in counted.shares.items() if 0 < step < 200}
    assert len(inner) >= 5
    assert max(inner.values()) <= 0.5
    assert list(inner.values())[-1] > 0.2  # and the budget is used
    work = first.run.work
    assert (work.trained, work.measured) == (counted.trained, pytest.approx(counted.measured))


@pytest.mark.parametrize(("budget", "due"), [(1.0, {10, 20, 30, 40, 50, 60}), (0.02, set())])
def test_the_cadence_is_the_finest(tmp_path, budget, due):
    monitor = small(budget, every_n_epochs=2)
    run(tmp_path, monitor, max_epochs=13)
    assert {0, 65} <= set(steps(monitor)) <= due | {0, 65}
    assert (len(steps(monitor)) > 2) == (budget == 1)


def test_without_a_budget_as_before_and_with_one_the_same_weights(tmp_path):
    plain, bounded = small(None), small(0.1)
    runs = [run(tmp_path, monitor, max_epochs=3) for monitor in (plain, bounded)]
    assert (steps(plain), steps(bounded)) == ([0, 5, 10, 15], [0, 15])
    assert plain.state_dict() == {}
    first, second = (everything(r.lightning_module, r) for r in runs)
    assert_same_bits(first["weights"], second["weights"])
    assert torch.equal(first["rng"], second["rng"])


def test_a_second_fit_starts_anew(tmp_path):
    monitor = small()
    run(tmp_path, monitor, max_epochs=12)
    before, work = steps(monitor), monitor.run.work
    run(tmp_path, monitor, max_epochs=12)
    assert steps(monitor) == before
    assert monitor.run.work == work
    assert monitor.run.work is not work


# ------------------------------------------------------------------------------------------ how training is counted


class Halves(pl.LightningModule):
    """Two optimizers, each with a pass of its own; the second calls `backward` of the loss itself."""

    def __init__(self, is_hidden: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Linear(6, 3)
        self.is_hidden = is_hidden

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers() if not self.is_hidden else [self.optimizers()[0]]:
            loss = loss_of(self, batch)
            optimizer.zero_grad()
            loss.backward() if self.is_hidden else self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in self.net.parameters()], []


def loss_of(module: Any, batch: Any) -> Any:
    return torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])


class Fetching(Classifier):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return loss_of(self, batch)


class Several(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(loss_of(self, part) for part in batch.values() if part is not None)


class Skipping(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 2 else loss_of(self, batch)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        data = Plain()
        return iter([data[i] for i in range(len(data))])


@pytest.mark.filterwarnings("ignore:.*(training_step.*returned.*None|dataloader_iter|does not have many workers)")
@pytest.mark.parametrize(
    ("options", "callbacks", "expected"),
    [
        ({}, [], NUM_SAMPLES),
        ({"data": (loader(batch_size=16),)}, [], NUM_SAMPLES),
        ({"accumulate_grad_batches": 2}, [], NUM_SAMPLES),
        ({"limit_train_batches": 2}, [], 16),
        ({"data": (DataLoader(Stream(), batch_size=8),)}, [], NUM_SAMPLES),
        ({"module": Skipping()}, [], NUM_SAMPLES - 8),
        ({}, [SharpnessAwareMinimization()], 2 * NUM_SAMPLES),
        ({}, [SharpnessAwareMinimization(interval=2)], NUM_SAMPLES + 24),
        ({"accumulate_grad_batches": 2}, [SharpnessAwareMinimization()], 2 * NUM_SAMPLES),
        ({"module": Halves(is_hidden=False)}, [], 2 * NUM_SAMPLES),
        ({"module": Halves(is_hidden=True)}, [], NUM_SAMPLES),
        ({"module": Fetching()}, [], NUM_SAMPLES),
        (
            {"module": Several(), "data": (CombinedLoader({"a": loader(), "b": loader(batch_size=4)}, "min_size"),)},
            [],
            NUM_SAMPLES,  # in the unit in which the probe is counted: samples of the first loader
        ),
    ],
)
def test_what_an_epoch_of_training_takes(tmp_path, options, callbacks, expected):
    monitor = small(0.1, loss_fn=loss_of) if isinstance(options.get("module"), Halves | Fetching) else small(0.1)
    run(tmp_path, monitor, *callbacks, max_epochs=1, **options)
    assert monitor.run.work.trained == expected


def test_samples_of_a_stream_are_measured_where_the_budget_has_room(tmp_path):
    monitor = small(0.4)
    run(tmp_path, monitor, data=(DataLoader(Stream(), batch_size=8),), max_epochs=16)
    assert steps(monitor)[0] == 5 * math.ceil(TYPICAL * 4 / 0.4 / NUM_SAMPLES)
    assert steps(monitor)[-1] == 80


def test_a_module_that_gets_ready_late_is_measured_before_training(tmp_path):
    class Late(Classifier):
        def on_train_start(self) -> None:
            self.lr = 0.2

    monitor = small(0.1)
    run(tmp_path, monitor, module=Late(), max_epochs=2)
    assert steps(monitor) == [0, 10]


# ---------------------------------------------------------------------------------------------------- the last epoch


class Stop(pl.Callback):
    """Ends training at the end of the second epoch, in another hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == 10:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "callbacks", "last"),
    [
        ({"max_epochs": 2}, [], 10),
        ({"max_epochs": -1, "max_steps": 7}, [], 7),
        ({"max_epochs": 20}, [Stop("on_train_epoch_end")], 10),
        ({"max_epochs": 20}, [Stop("on_train_batch_end")], 10),
        ({"max_epochs": 20, "min_epochs": 3}, [Stop("on_train_batch_end")], 15),
        ({"max_epochs": 20, "data": loaders()}, ["early"], 10),
    ],
)
@pytest.mark.parametrize("every_n_epochs", [1, None])
def test_the_last_weights_are_measured(tmp_path, options, callbacks, last, every_n_epochs):
    monitor = small(0.01, every_n_epochs=every_n_epochs)
    callbacks = [EarlyStopping("val_loss", patience=1, min_delta=9) if c == "early" else c for c in callbacks]
    done = run(tmp_path, monitor, *callbacks, **options)
    assert done.global_step == last
    assert steps(monitor) == [0, last]
    logged = [step for step, values in done.logger.records if "flatness/lambda_max" in values]
    assert logged == [0, last]


# --------------------------------------------------------------------------------------------------------------- resume


class Repeated(Plain):
    """Batches that are all the same: Lightning goes on in the middle of an epoch, but with the first batches of it."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index % 8)


class Normalized(Classifier):
    """BatchNorm and AdamW, whose sharpness is a third eigenvalue."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), self.net[2])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


@pytest.mark.filterwarnings("ignore:.*did not converge")  # in float32, on four samples
@pytest.mark.parametrize("options", [{}, {"every_n_steps": 1}, {"every_n_epochs": None, "every_n_steps": 3}])
@pytest.mark.parametrize("module", [Classifier, Normalized])
def test_a_resumed_run_measures_at_the_same_steps(tmp_path, options, module):
    whole = small(1.0, **options)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    data = (loader(Repeated(), shuffle=False),)
    run(tmp_path, whole, saving, module=module(), data=data, max_epochs=20, enable_checkpointing=True)
    assert len(steps(whole)) > 3
    for step in {8, steps(whole)[1], steps(whole)[2] - 1}:
        resumed = small(1.0, **options)
        run(tmp_path, resumed, module=module(), data=data, max_epochs=20, ckpt_path=tmp_path / f"step={step}.ckpt")
        # A checkpoint of the last step of an epoch is written before the measurement at the epoch's end.
        first = step if step % 5 == 0 and not options else step + 1
        assert steps(resumed) == [s for s in steps(whole) if s >= first], step
        values = {s: m.values["lambda_max"] for s, m in whole.run.history}
        assert all(m.values["lambda_max"] == values[s] for s, m in resumed.run.history)


def test_a_checkpoint_of_a_run_without_a_budget_can_go_on_with_one(tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    run(tmp_path, small(None), saving, max_epochs=2, enable_checkpointing=True)
    monitor = small(1.0)
    run(tmp_path, monitor, max_epochs=9, ckpt_path=tmp_path / "step=5.ckpt")
    # Counted from the resume: not before the gradients of a measurement on 4 samples are earned.
    assert steps(monitor)[0] == 5 + 5 * math.ceil(TYPICAL * 4 / NUM_SAMPLES)
    assert steps(monitor)[-1] == 45


def test_two_monitors_with_budgets_keep_their_counts_apart():
    keys = {small(log_key_prefix=prefix).state_key for prefix in ("flatness/", "other/")}
    assert len(keys) == 2
    surface = LossSurfaceMonitor(budget=0.1)
    surface.run.work.trained = 7
    resumed = LossSurfaceMonitor(budget=0.1)
    resumed.load_state_dict(surface.state_dict())
    assert resumed.run.work.trained == 7


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.filterwarnings("ignore:LossSurfaceMonitor. no logger")
@pytest.mark.parametrize("directions", ["random", "eigenvectors"])
def test_pictures_keep_to_a_budget(tmp_path, directions):
    budget = 0.3 if directions == "random" else 1.0
    monitor = LossSurfaceMonitor(
        budget=budget,
        num_points=3,
        num_directions=1,
        probe_size=16 if directions == "random" else 8,
        directions=directions,
    )
    drawn: list[int] = []
    measure = monitor.measure_and_log
    monitor.measure_and_log = lambda t, m, **k: (drawn.append(t.global_step), measure(t, m, **k))[1]
    run(tmp_path, monitor, max_epochs=12)
    assert drawn[0] == 0
    assert drawn[-1] == 60
    assert 3 < len(drawn) < 13
    work = monitor.run.work
    assert (len(drawn) - 1) * work.measured / len(drawn) <= budget * work.trained  # the last one is always drawn


# ----------------------------------------------------------------------------------------------------------- accounting


def test_the_next_is_expected_to_take_as_much_as_any_so_far():
    work = GradientWork(trained=1000.0, largest=30.0)
    for gradients in (10, 20):
        work.add(gradients)
    assert (work.measured, work.share) == (30, 0.03)
    assert not work.affords(0.059)  # the 30 that the first was expected to take
    assert work.affords(0.06)
    work.add(40)
    assert not work.affords(0.109)
    assert work.affords(0.11)


def test_typical_gradients_grow_with_what_is_asked_for():
    costs = {name: costs[1] for name, costs in TYPICAL_COSTS.items()}
    expected = 5 * costs["lambda_max"] + costs["hessian_trace"] / 2
    assert typical_gradients([TopEigenvalues(k=5), HessianTrace(num_products=24)]) == expected
    assert typical_gradients([TopEigenvalues(which="SA")]) == costs["lambda_min"]
    assert typical_gradients(preset_metrics().values()) == TYPICAL

    class Own(TopEigenvalues): ...

    assert typical_gradients([Own()]) == costs["lambda_max"]


# ------------------------------------------------------------------------------------------------------- what it says


def said(caplog: Any, words: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if words in r.getMessage()]


def test_a_large_share_without_a_budget_is_said_once_after_the_second_epoch(tmp_path, caplog):
    monitor = small(None)
    with caplog.at_level(logging.INFO):
        run(tmp_path, monitor, max_epochs=1)
        assert not said(caplog, "gradients so far")
        run(tmp_path, monitor, max_epochs=2)
        share = monitor.run.work.share
        (line,) = said(caplog, "gradients so far")
    halved = float(f"{share / 2:.2g}")
    assert 0.4 < share < 4
    assert line.startswith(
        f"FlatnessMonitor: measuring has taken {float(f'{100 * share:.2g}'):.0f} % of the training's"
    )
    assert line.endswith(f"budget={halved:g} would halve that." if share <= 2 else "at 100 % at most.")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tmp_path, monitor, max_epochs=4)
        assert len(said(caplog, "gradients so far")) == 1
        run(tmp_path, small(1.0), max_epochs=4)  # has a budget
        assert len(said(caplog, "gradients so far")) == 1


def test_a_small_share_is_not_worth_a_line(tmp_path, caplog):
    monitor = FlatnessMonitor("fisher_trace", probe_size=2)
    with caplog.at_level(logging.INFO):
        run(tmp_path, monitor, max_epochs=3)
    assert 0 < monitor.run.work.share < 0.2
    assert not said(caplog, "gradients so far")


def test_the_plan_says_what_a_measurement_costs(tmp_path, caplog):
    monitor = small(0.5)
    assert monitor.plan() == f"A measurement on 4 samples takes about {TYPICAL} gradients of these."
    with caplog.at_level(logging.INFO):
        run(tmp_path, monitor, max_epochs=1)
    share = TYPICAL * 4 / NUM_SAMPLES
    expected = (
        f"A measurement on 4 samples takes about {TYPICAL} gradients of these, {percent(share)} of an epoch. "
        f"budget=0.5 allows about one in {2 * share:.2g} epochs."
    )
    assert monitor.plan() == expected
    assert said(caplog, "A measurement on") == [f"FlatnessMonitor: {expected}"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tmp_path, small(None), SharpnessAwareMinimization(), max_epochs=1)
    assert not said(caplog, "A measurement on")


def test_the_plan_counts_the_second_pass_of_sam_and_the_samples_there_are(tmp_path):
    monitor = FlatnessMonitor(budget=1.0)  # 512 samples are more than there are
    run(tmp_path, monitor, SharpnessAwareMinimization(interval=2), max_epochs=1, logger=Recorder())
    share = TYPICAL * 40 / (1.5 * NUM_SAMPLES)
    assert f"on 40 samples takes about {TYPICAL} gradients of these, {percent(share)} of an epoch" in monitor.plan()


def test_the_summary_says_what_a_budget_cannot_hold(tmp_path):
    monitor = small(0.01)
    run(tmp_path, monitor, max_epochs=2)
    assert "above budget=0.01: it always measures before training and after the last epoch" in monitor.summary()
