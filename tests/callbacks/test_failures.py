"""What fails in a measurement does not end the run, and changes nothing of it."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from helpers.modules import Classifier, loaders
from helpers.training import Recorder, fit
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatness import FlatnessMonitor, LossSurfaceMonitor, SharpnessAwareMinimization, TopEigenvalues


class Diverging(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e20)


def trained(*callbacks: Callback, module: type[Classifier] = Classifier, **options: Any) -> tuple[Any, Any, list[str]]:
    """Train from the same start; return what the run leaves, the Trainer, and the warnings of the callbacks."""
    torch.manual_seed(0)
    network = module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        defaults: dict[str, Any] = {"data": loaders(), "max_epochs": 2}
        run = fit(None, *callbacks, module=network, **(defaults | options))
    state = {name: value.clone() for name, value in network.state_dict().items()} | {"rng": torch.get_rng_state()}
    own = ("FlatnessMonitor", "LossSurfaceMonitor")
    return state, run, [str(w.message) for w in caught if str(w.message).startswith(own)]


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        bits = torch.uint8
        assert torch.equal(value.contiguous().view(bits), other[name].contiguous().view(bits)), name


def logged(run: Any, prefix: str = "flatness/") -> list[dict[str, float]]:
    return [m for _, m in run.logger.records if any(k.startswith(prefix) for k in m)]


@pytest.mark.parametrize("lr", [1e20, 1e3, 30.0])
def test_a_run_that_diverges_ends_as_without_callbacks(tmp_path, lr):
    class Steep(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=lr)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0.5 * (self(batch[0]) - F.one_hot(batch[1], 3)).square().sum(dim=1).mean()

    plain, *_ = trained(module=Steep)
    monitors = (FlatnessMonitor(every_n_steps=1), LossSurfaceMonitor(num_points=3, num_directions=1))
    watched, run, said = trained(*monitors, module=Steep)
    assert_same_bits(plain, watched)
    points = logged(run)
    assert len({key for point in points for key in point if "residual" in key}) == 2
    assert math.isfinite(points[0]["flatness/lambda_max"])
    if lr > 100:
        assert plain["net.0.weight"].isnan().all()
        assert math.isnan(points[-1]["flatness/lambda_max"])
        assert math.isnan(float(run.callback_metrics["flatness/lambda_max"]))
        assert len([text for text in said if "NaN is logged from step" in text]) == 1
        assert len([text for text in said if text.startswith("LossSurfaceMonitor: A measurement failed")]) == 1


def test_sam_on_a_run_that_diverges_is_the_plain_optimizer_once_gradients_are_not_finite(tmp_path):
    plain, *_ = trained(module=Diverging)
    sam, run, _ = trained(SharpnessAwareMinimization(0.05), module=Diverging)
    assert run.global_step == 10
    assert {name: value.isnan().all() for name, value in sam.items() if name != "rng"} == {
        name: value.isnan().all() for name, value in plain.items() if name != "rng"
    }
    assert_same_bits({"rng": plain["rng"]}, sam)


def fails(*_: Any) -> Any:
    raise ZeroDivisionError("the user's own")


class Broken(TopEigenvalues):
    """A metric that raises after it has looked at the landscape."""

    raises: type[BaseException] = torch.OutOfMemoryError

    def estimate(self, landscape: Any) -> Any:
        landscape.gradient(keep_graphs=True)
        raise self.raises("no memory left")


@pytest.mark.parametrize(
    ("monitor", "kind"),
    [
        (lambda: FlatnessMonitor(loss_fn=fails), "ZeroDivisionError: the user's own"),
        (lambda: FlatnessMonitor({"fine": TopEigenvalues(), "broken": Broken()}), "OutOfMemoryError: no memory left"),
        (lambda: FlatnessMonitor(top_k=84), "ValueError: Expected `k` to be between"),
        (lambda: LossSurfaceMonitor(loss_fn=fails), "ZeroDivisionError: the user's own"),
    ],
)
def test_an_exception_in_a_measurement_is_a_warning_and_changes_nothing(tmp_path, monitor, kind):
    plain, *_ = trained()
    watched, run, said = trained(monitor(), logger=[Recorder(), CSVLogger(tmp_path)])
    assert_same_bits(plain, watched)
    assert logged(run) == []
    assert not any("flatness" in key for key in run.callback_metrics)
    (text,) = said
    assert "A measurement failed at step 0 and is left out; training goes on." in text
    assert kind in text


def test_a_failure_that_passes_leaves_out_one_measurement():
    class Once(Broken):
        num_calls = 0

        def estimate(self, landscape: Any) -> Any:
            Once.num_calls += 1
            return super().estimate(landscape) if Once.num_calls == 2 else TopEigenvalues.estimate(self, landscape)

    _, run, said = trained(FlatnessMonitor({"lambda_max": Once()}))
    assert [step for step, m in run.logger.records if "flatness/lambda_max" in m] == [0, 10]
    assert len(said) == 1


def test_on_error_raise_ends_the_run():
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        trained(FlatnessMonitor(loss_fn=fails, on_error="raise"))
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        trained(LossSurfaceMonitor(loss_fn=fails, on_error="raise"))
    with pytest.raises(RuntimeError, match="Expected finite Hessian-vector products"):
        trained(FlatnessMonitor(on_error="raise", every_n_steps=1), module=Diverging)


def test_an_interruption_ends_the_run():
    class Interrupted(Broken):
        raises = KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trained(FlatnessMonitor({"lambda_max": Interrupted()}))


def test_the_memory_of_a_failed_measurement_is_free_when_training_goes_on():
    vectors: list[weakref.ref[Tensor]] = []

    class Large(Broken):
        def estimate(self, landscape: Any) -> Any:
            vector = torch.zeros(landscape.num_parameters)
            vectors.append(weakref.ref(vector))
            raise torch.OutOfMemoryError("no memory left")

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert all(vector() is None for vector in vectors)

    _, _, said = trained(FlatnessMonitor({"lambda_max": Large()}), Look())
    assert len(said) == 1
    assert len(vectors) == 3


class Words(IterableDataset[list[str]]):
    def __iter__(self) -> Any:
        return iter([["a", "b"], ["c"]])


def test_batches_without_a_tensor():
    """The module makes tensors of what it is given; a stream of such batches cannot be counted in samples."""

    class Reader(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.tensor([[float(ord(word))] * 6 for word in batch])).square().mean()

    data = (DataLoader(Words(), batch_size=None),)
    plain, *_ = trained(module=Reader, data=data)
    watched, _, said = trained(FlatnessMonitor(), module=Reader, data=data)
    assert_same_bits(plain, watched)
    assert len(said) == 1
    assert "Expected a batch with a tensor whose first axis counts the samples" in said[0]
