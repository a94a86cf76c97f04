"""FlatnessMonitor in a Trainer: what it logs, when, to whom, and what it refuses."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Augmented, Busy, Classifier, Plain, loader, loaders, trainer
from helpers.training import Recorder, fit
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_flatness import FlatnessMonitor, InvariantSharpness, LossLandscape, LossSurfaceMonitor, TopEigenvalues

KEYS = {
    "flatness/lambda_max",
    "flatness_errors/lambda_max_residual",
    "flatness_errors/lambda_max_standard_error",
    "flatness_errors/invariant_sharpness_standard_error",
    "flatness/invariant_sharpness",
    "flatness_errors/invariant_sharpness_residual",
    "flatness/stability_edge",
    "flatness/edge_of_stability",
    "flatness_cost/gradient_evaluations",
    "flatness_cost/seconds",
}


def flatness_records(recorder: Recorder) -> list[tuple[int | None, dict[str, float]]]:
    return [(step, m) for step, m in recorder.records if any(k.startswith("flatness/") for k in m)]


def test_logs_the_documented_keys_before_training_and_at_every_epoch_end(tmp_path):
    run = fit(tmp_path, FlatnessMonitor())
    recorder = run.logger
    records = flatness_records(recorder)
    assert [step for step, _ in records] == [0, 5, 10, 15]
    assert [set(m) for _, m in records] == [KEYS] + [KEYS | {"flatness_cost/share_of_epoch_time"}] * 3
    assert set(run.callback_metrics) >= KEYS
    last = records[-1][1]
    for key in KEYS - {"flatness_cost/seconds"}:
        assert float(run.callback_metrics[key]) == pytest.approx(last[key], rel=1e-6)


def test_values_are_those_of_the_dense_hessian_at_the_logged_step(tmp_path):
    dense: list[tuple[float, float]] = []

    class Dense(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            weights = [p.detach().clone() for p in pl_module.parameters()]
            flat = torch.cat([w.reshape(-1) for w in weights]).double()
            data = Plain()

            def loss(w: Tensor) -> Tensor:
                pieces = [t.view_as(p) for t, p in zip(w.split([p.numel() for p in weights]), weights, strict=True)]
                hidden = torch.tanh(F.linear(data.x.double(), pieces[0], pieces[1]))
                return F.cross_entropy(F.linear(hidden, pieces[2], pieces[3]), data.y)

            hessian = torch.autograd.functional.hessian(loss, flat)
            scale = torch.cat([torch.full((w.numel(),), w.double().norm()) for w in weights])
            layered = torch.linalg.eigvalsh(scale[:, None] * hessian * scale)
            dense.append((torch.linalg.eigvalsh(hessian)[-1].item(), layered.abs().max().item()))

    recorder = fit(tmp_path, FlatnessMonitor(tol=1e-5, probe_size=1000), Dense()).logger
    logged = [(m["flatness/lambda_max"], m["flatness/invariant_sharpness"]) for _, m in flatness_records(recorder)[1:]]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(dense), rtol=1e-4, atol=0)


def test_edge_of_stability_uses_the_largest_learning_rate_of_the_step_just_taken(tmp_path):
    class Groups(Classifier):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters(), "lr": 0.5}, {"params": self.net[2].parameters(), "lr": 0.1}]
            optimizer = torch.optim.SGD(groups)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    recorder = fit(tmp_path, FlatnessMonitor(), module=Groups()).logger
    for (_, m), lr in zip(flatness_records(recorder), [0.5, 0.5, 0.25, 0.125], strict=True):
        assert m["flatness/edge_of_stability"] == pytest.approx(lr * m["flatness/lambda_max"] / 2)


def test_a_schedule_that_ends_at_zero_has_an_edge(tmp_path):
    class ToZero(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5, weight_decay=1.0)
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1)]

    recorder = fit(tmp_path, FlatnessMonitor(), module=ToZero(), max_epochs=2).logger
    edges = [m.get("flatness/stability_edge") for _, m in flatness_records(recorder)]
    assert edges == [3.0, 3.0, None]  # the second epoch is at rate zero: no edge


def test_top_k_adds_the_following_eigenvalues(tmp_path):
    recorder = fit(tmp_path, FlatnessMonitor(top_k=5), max_epochs=1).logger
    last = flatness_records(recorder)[-1][1]
    values = [last["flatness/lambda_max"], *(last[f"flatness/lambda_{i}"] for i in range(2, 6))]
    assert values == sorted(values, reverse=True)
    assert {f"flatness_errors/lambda_{i}_residual" for i in range(2, 6)} <= set(last)
    assert "flatness/lambda_6" not in last


def test_own_metrics_replace_the_set(tmp_path):
    metrics = {"sharpest": TopEigenvalues(k=2, geometry="filter"), "lowest": TopEigenvalues(which="SA")}
    recorder = fit(tmp_path, FlatnessMonitor(metrics, log_key_prefix="mine/"), max_epochs=1).logger
    names = ("sharpest", "sharpest_2", "lowest")
    expected = {f"mine/{n}" for n in names}
    expected |= {f"mine_errors/{n}_{error}" for n in names for error in ("residual", "standard_error")}
    expected |= {f"mine_cost/{n}" for n in ("seconds", "gradient_evaluations")}
    found = [set(m) for _, m in recorder.records if any(k.startswith("mine/") for k in m)]
    assert found == [expected, expected | {"mine_cost/share_of_epoch_time"}]


def test_the_share_of_the_epochs_time_is_that_of_the_measurement_at_its_end(tmp_path, monkeypatch):
    """By a clock that moves by the second at every look: what is counted, and what is left out."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("lightning_flatness.callbacks.flatness_monitor.time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr("lightning_flatness.callbacks.landscape_monitor.Progress", lambda *args: lambda: None)
    recorder = fit(tmp_path, FlatnessMonitor(every_n_steps=2), max_epochs=1).logger
    records = flatness_records(recorder)
    assert [step for step, _ in records] == [0, 2, 4, 5]
    assert all(m["flatness_cost/seconds"] == 1 for _, m in records)
    shares = [m.get("flatness_cost/share_of_epoch_time") for _, m in records]
    # Two looks around each measurement, two within. The epoch starts at 4; the measurements after steps run from 6 to 7
    # and from 10 to 11, the last one from 14 to 15.
    assert shares == [None, None, None, 1 / (14 - 4 - 2)]


def test_every_n_epochs_and_every_n_steps(tmp_path):
    def steps(**options: Any) -> list[int | None]:
        return [step for step, _ in flatness_records(fit(tmp_path, FlatnessMonitor(**options)).logger)]

    assert steps(every_n_epochs=2) == [0, 10]
    assert steps(every_n_steps=4) == [0, 4, 5, 8, 10, 12, 15]
    assert steps(every_n_steps=5) == [0, 5, 10, 15]  # once where both fall together
    assert steps(every_n_steps=4, every_n_epochs=None) == [0, 4, 8, 12]


def test_steps_count_optimizer_steps_under_gradient_accumulation(tmp_path):
    recorder = fit(tmp_path, FlatnessMonitor(every_n_steps=2), accumulate_grad_batches=2, max_epochs=2).logger
    assert [step for step, _ in flatness_records(recorder)] == [0, 2, 3, 4, 6]


def test_one_step_per_epoch_gives_one_point_per_step(tmp_path):
    recorder = fit(tmp_path, FlatnessMonitor(), data=(loader(batch_size=40),)).logger
    assert [step for step, _ in flatness_records(recorder)] == [0, 1, 2, 3]


def test_every_logger_gets_the_values(tmp_path):
    recorder, csv = Recorder(), CSVLogger(tmp_path)
    fit(tmp_path, FlatnessMonitor(), logger=[recorder, csv], max_epochs=1)
    assert len(flatness_records(recorder)) == 2
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "flatness/lambda_max" in text.splitlines()[0]


def test_two_monitors_with_their_own_prefixes(tmp_path):
    monitors = [FlatnessMonitor(), FlatnessMonitor(split="val", log_key_prefix="val_flatness/")]
    run = fit(tmp_path, *monitors, data=loaders(), max_epochs=1)
    assert "flatness/lambda_max" in run.callback_metrics
    assert "val_flatness/lambda_max" in run.callback_metrics


@pytest.mark.parametrize("with_validation", [False, True])
def test_model_checkpoint_and_early_stopping_can_monitor_flatness(tmp_path, with_validation):
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="flatness/lambda_max", mode="min", save_top_k=1)
    stopping = EarlyStopping("flatness/lambda_max", patience=0, mode="min")
    data = (loader(), loader(shuffle=False)) if with_validation else (loader(),)
    options = {"enable_checkpointing": True, "max_epochs": 20}
    torch.manual_seed(0)
    run = fit(tmp_path, FlatnessMonitor(tol=1e-4), checkpoint, stopping, data=data, **options)
    recorder = run.logger
    values = [m["flatness/lambda_max"] for _, m in flatness_records(recorder)][1:]
    assert run.current_epoch < 20
    assert values[-1] >= min(values)
    assert float(checkpoint.best_model_score) == pytest.approx(min(values), rel=1e-6)
    best = Classifier()
    best.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
    data = Plain()
    metric = TopEigenvalues()
    metric.update(LossLandscape(best, [(data.x, data.y)]))
    assert float(metric.compute()) == pytest.approx(min(values), rel=1e-3)


def test_large_and_small_batches_and_workers_are_measured_on_the_same_samples(tmp_path):
    def before_training(batch_size: int, **options: Any) -> float:
        torch.manual_seed(0)
        data = (loader(Augmented(), batch_size=batch_size, **options),)
        recorder = fit(
            tmp_path, FlatnessMonitor(probe_size=20, tol=1e-5), module=Classifier(), data=data, max_epochs=1
        ).logger
        return flatness_records(recorder)[0][1]["flatness/lambda_max"]

    expected = before_training(4)
    assert before_training(48) == pytest.approx(expected, rel=1e-5)
    assert before_training(8, num_workers=2) == pytest.approx(expected, rel=1e-5)


def test_non_convergence_is_said_once_per_metric_and_the_residual_is_logged(tmp_path):
    metrics = {"lambda_max": TopEigenvalues(tol=1e-9, max_products=3), "sharpness": InvariantSharpness(max_products=2)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = fit(tmp_path, FlatnessMonitor(metrics)).logger
    messages = [str(w.message) for w in caught if "did not converge" in str(w.message)]
    assert len(messages) == 2
    assert "'flatness/lambda_max' did not converge within 3 Hessian-vector products" in messages[0]
    assert all(m["flatness_errors/lambda_max_residual"] > 0 for _, m in flatness_records(recorder))


def test_a_long_measurement_reports_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_flatness.callbacks.progress.FIRST_MESSAGE_AFTER", 0.0)
    fit(tmp_path, FlatnessMonitor(), max_epochs=1, enable_progress_bar=True)
    assert "FlatnessMonitor: measuring for" in capsys.readouterr().out


def test_loss_fn_replaces_the_training_step(tmp_path):
    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 3 * F.cross_entropy(module(batch[0]), batch[1])

    torch.manual_seed(0)
    module = Classifier()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    plain = fit(tmp_path, FlatnessMonitor(tol=1e-5), module=module, max_epochs=1).logger
    module.load_state_dict(state)
    scaled = fit(tmp_path, FlatnessMonitor(loss_fn=loss_fn, tol=1e-5), module=module, max_epochs=1).logger
    one, three = (flatness_records(r)[0][1]["flatness/lambda_max"] for r in (plain, scaled))
    assert three == pytest.approx(3 * one, rel=1e-5)


def test_train_mode_measures_with_batch_statistics(tmp_path):
    one = fit(tmp_path, FlatnessMonitor(), module=Busy(), max_epochs=1).logger
    other = fit(tmp_path, FlatnessMonitor(mode="train"), module=Busy(), max_epochs=1).logger
    values = [flatness_records(r)[0][1]["flatness/lambda_max"] for r in (one, other)]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_transfer_hooks_of_the_user_are_applied_to_the_probe(tmp_path):
    class Scaling(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.trainer.lightning_module.num_transfers += 1
            return batch[0] + 1, batch[1]

    seen: list[Tensor] = []

    def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[0])
        return F.cross_entropy(module(batch[0]), batch[1])

    run = trainer(tmp_path, FlatnessMonitor(loss_fn=loss_fn), max_epochs=1)
    module = Classifier()
    module.num_transfers = 0
    run.fit(module, datamodule=Scaling())
    assert module.num_transfers == 5  # those of training
    values = torch.cat(seen[:5])
    expected = Plain().x * 2 + 1
    assert all(any(torch.equal(v, e) for e in expected) for v in values)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    num_started = 0

    def __iter__(self) -> Any:
        self.num_started += 1
        data = Plain()
        return iter([data[i] for i in range(len(data))])


def test_a_stream_is_measured_on_the_first_samples_that_training_sees(tmp_path):
    stream, data = Stream(), Plain()
    torch.manual_seed(0)
    module = Classifier()
    recorder = fit(
        tmp_path,
        FlatnessMonitor(probe_size=12, tol=1e-5),
        module=module,
        data=(DataLoader(stream, batch_size=8),),
        max_epochs=2,
    ).logger
    assert stream.num_started == 2
    records = flatness_records(recorder)
    assert [step for step, _ in records] == [5, 10]
    metric = TopEigenvalues(tol=1e-5)
    metric.update(LossLandscape(module, [(data.x[:12], data.y[:12])]))
    assert records[-1][1]["flatness/lambda_max"] == pytest.approx(float(metric.compute()), rel=1e-4)


def test_several_loaders_are_measured_on_the_batches_that_training_sees(tmp_path):
    class Two(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(F.cross_entropy(self(x), y) for x, y in batch.values())

    data = ({"a": loader(), "b": loader()},)
    recorder = fit(tmp_path, FlatnessMonitor(), module=Two(), data=data, max_epochs=1).logger
    assert [step for step, _ in flatness_records(recorder)] == [5]


# --------------------------------------------------------------------------------- trainers that do other things


def test_validate_test_and_predict_measure_nothing(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, FlatnessMonitor(), logger=recorder)
    run.validate(Classifier(), loader(shuffle=False), verbose=False)
    assert flatness_records(recorder) == []


def test_the_sanity_check_measures_nothing(tmp_path):
    data = (loader(), loader(shuffle=False))
    recorder = fit(tmp_path, FlatnessMonitor(split="val"), data=data, max_epochs=1, num_sanity_val_steps=2).logger
    assert [step for step, _ in flatness_records(recorder)] == [0, 5]


def test_fast_dev_run(tmp_path):
    run = trainer(tmp_path, FlatnessMonitor(), fast_dev_run=True)
    run.fit(Classifier(), loader())
    assert run.callback_metrics["flatness/lambda_max"] > 0


def test_barebones(tmp_path):
    options = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    run = trainer(tmp_path, FlatnessMonitor(), barebones=True, log_every_n_steps=None, **options)
    run.fit(Classifier(), loader())
    assert not any("flatness" in key for key in run.callback_metrics)


def test_no_training_batches(tmp_path):
    run = fit(tmp_path, FlatnessMonitor(), limit_train_batches=0)
    recorder = run.logger
    assert flatness_records(recorder) == []
    assert not run.callback_metrics


def test_without_loggers(tmp_path):
    run = trainer(tmp_path, FlatnessMonitor(), logger=False, max_epochs=1)
    run.fit(Classifier(), loader())
    assert math.isfinite(run.callback_metrics["flatness/invariant_sharpness"])


def test_a_second_fit_starts_anew(tmp_path):
    monitor = FlatnessMonitor()
    for _ in range(2):
        recorder = fit(tmp_path, monitor, max_epochs=1).logger
        assert [step for step, _ in flatness_records(recorder)] == [0, 5]


def test_the_monitor_can_be_pickled():
    assert pickle.loads(pickle.dumps(FlatnessMonitor(top_k=3))).probe_size == FlatnessMonitor().probe_size


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_size": 0}, r"Expected `probe_size` to be an integer >= 1, got 0"),
        ({"probe_size": -3}, r"Expected `probe_size` to be an integer >= 1, got -3"),
        ({"probe_size": 0.5}, r"Expected `probe_size` to be an integer >= 1, got 0.5"),
        ({"probe_batch_size": 0}, r"Expected `probe_batch_size` to be an integer >= 1, got 0"),
        ({"every_n_epochs": 0}, r"Expected `every_n_epochs` to be an integer >= 1, got 0"),
        ({"every_n_steps": -1}, r"Expected `every_n_steps` to be an integer >= 1, got -1"),
        ({"top_k": 0}, r"Expected `k` to be an integer >= 1, got 0"),
        ({"split": "test"}, r"Expected `split` to be 'train' or 'val', got 'test'"),
        ({"on_error": "ignore"}, r"Expected `on_error` to be 'warn' or 'raise', got 'ignore'"),
        ({"mode": "evaluation"}, r"Expected `mode` to be 'batch_statistics', 'eval' or 'train', got 'evaluation'"),
        ({"metrics": {}}, r"Expected `metrics` to be a non-empty dict"),
        ({"metrics": {"loss": 3}}, r"Expected `metrics\['loss'\]` to be a flatness metric such as.*got int"),
        (
            {"engine": "no"},
            r"Expected `engine` to be one of .auto., .exact., .*, got .no.",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FlatnessMonitor(**options)


def assert_fit_fails(
    path: Any, monitor: FlatnessMonitor, module: Classifier, error: type[Exception], message: str
) -> None:
    """The error comes before the first step; weights and logs are as before."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    recorder = Recorder()
    run = trainer(path, monitor, logger=recorder)
    with pytest.raises(error, match=message):
        run.fit(module, loader())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert recorder.records == []
    assert run.loggers == [recorder]
    assert run.global_step == 0


def test_k_larger_than_the_number_of_parameters(tmp_path):
    message = r"Expected `k` to be between 1 and the number of coordinates, 83, got 84"
    assert_fit_fails(tmp_path, FlatnessMonitor(top_k=84, on_error="raise"), Classifier(), ValueError, message)


def test_a_training_step_that_returns_none(tmp_path):
    class Nothing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    assert_fit_fails(
        tmp_path, FlatnessMonitor(on_error="raise"), Nothing(), TypeError, r"training_step\) to return.*got None"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda l: l * torch.nan, r"Expected a finite loss, got nan"),
        (lambda l: l.expand(3), r"Expected the loss to be a scalar"),
    ],
)
def test_losses_that_are_not_finite_or_not_scalar(tmp_path, change, message):
    class Bad(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return change(F.cross_entropy(self(batch[0]), batch[1]))

    assert_fit_fails(tmp_path, FlatnessMonitor(on_error="raise"), Bad(), ValueError, message)


def test_no_measured_parameters(tmp_path):
    class Frozen(Classifier):
        def configure_optimizers(self) -> Any:
            return None

    module = Frozen()
    module.requires_grad_(False)
    message = r"Expected trainable parameters, got Frozen"
    assert_fit_fails(tmp_path, FlatnessMonitor(on_error="raise"), module, ValueError, message)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_without_a_loss(tmp_path):
    message = r"Expected `FlatnessMonitor\(loss_fn=...\)` for a module with manual optimization.*HINT: pass loss_fn"
    assert_fit_fails(tmp_path, FlatnessMonitor(), Manual(), MisconfigurationException, message)


def test_manual_optimization_with_a_loss(tmp_path):
    monitor = FlatnessMonitor(loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    recorder = fit(tmp_path, monitor, module=Manual()).logger
    assert [step for step, _ in flatness_records(recorder)] == [0, 5, 10, 15]


def test_an_operator_without_second_derivative(tmp_path):
    from helpers.once_differentiable import OnceDifferentiable

    class Once(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = OnceDifferentiable.apply(self.net[0](batch[0]))
            return F.cross_entropy(self.net[2](hidden), batch[1])

    message = r"Expected operators with a second derivative, got one without"
    assert_fit_fails(tmp_path, FlatnessMonitor(engine="exact", on_error="raise"), Once(), RuntimeError, message)
    with pytest.warns(UserWarning, match="finite differences") as caught:
        recorder = fit(tmp_path, FlatnessMonitor(), module=Once()).logger
    assert len([w for w in caught if "finite differences" in str(w.message)]) == 1
    assert len(flatness_records(recorder)) == 4


def test_the_val_split_without_validation_data(tmp_path):
    message = r"Expected a val dataloader for FlatnessMonitor\(split='val'\), got none. HINT"
    assert_fit_fails(tmp_path, FlatnessMonitor(split="val"), Classifier(), MisconfigurationException, message)


def test_an_empty_loader(tmp_path):
    empty = DataLoader(TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)))
    run = trainer(tmp_path, FlatnessMonitor(split="val", on_error="raise"))
    with pytest.raises(ValueError, match=r"Expected at least one sample in `batches`, got none"):
        run.fit(Classifier(), loader(), empty)
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FSDPStrategy", r"slices of flattened weights \(FSDP1\)"),
        ("DeepSpeedStrategy", "partitions weights or optimizer states"),
        ("XLAStrategy", "no process group of torch.distributed"),
        ("SingleDeviceXLAStrategy", "whose generator torch cannot seed"),
        ("XLAFSDPStrategy", "on XLA devices"),
    ],
)
@pytest.mark.parametrize("monitor", [FlatnessMonitor, LossSurfaceMonitor])
def test_strategies_whose_weights_cannot_be_put_together(tmp_path, name, reason, monitor):
    """The classes stand in for those that cannot be built here; they are recognised by their names."""
    strategy = type("Custom", (type(name, (SingleDeviceStrategy,), {}),), {})("cpu")
    run = trainer(tmp_path, monitor(), strategy=strategy, accelerator="auto", devices="auto")
    message = (
        rf"which {monitor.__name__} can put the weights together .*got Custom, wh.*{reason}.*HINT: use strategy='ddp'"
    )
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(Classifier(), loader())
    assert run.global_step == 0


def test_ranks_that_cannot_be_reduced_over(tmp_path, monkeypatch):
    class Elsewhere(SingleDeviceStrategy):
        """Says that there is another rank, which no process group knows of."""

    run = trainer(tmp_path, FlatnessMonitor(), strategy=Elsewhere("cpu"), accelerator="auto", devices="auto")
    monkeypatch.setattr(type(run), "world_size", property(lambda self: 2))
    with pytest.raises(MisconfigurationException, match=r"got Elsewhere, whose ranks are no process group"):
        run.fit(Classifier(), loader())
