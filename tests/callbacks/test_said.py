"""What users mistype or misplace is named, with what they will have meant."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers.modules import Classifier, loader, loaders, trainer
from helpers.registry import METRICS
from helpers.training import fit
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F

from lightning_flatness import FlatnessMonitor, LossLandscape, LossSurfaceMonitor, TopEigenvalues


@pytest.mark.parametrize(
    ("name", "meant"),
    [("ASAM", "element"), ("Layer", "layer"), ("eucledian", "euclidean"), ("adam", "optimizer"), ("filters", "filter")],
)
def test_an_unknown_geometry(name, meant):
    with pytest.raises(ValueError, match=f"Expected `geometry` to be one of .*, got {name!r}. Did you mean {meant!r}"):
        TopEigenvalues(geometry=name)


def test_an_unknown_geometry_that_is_like_none():
    with pytest.raises(ValueError, match=r"got 'qqq'\.$"):
        TopEigenvalues(geometry="qqq")


def test_an_unknown_metric():
    with pytest.raises(ValueError, match=r"Expected `metrics` to be .* got 'lamda_max'. Did you mean 'lambda_max'"):
        FlatnessMonitor("lamda_max")


def test_metrics_by_name():
    assert list(FlatnessMonitor("lambda_max, hessian_trace").metrics) == ["lambda_max", "hessian_trace"]


BATCH = torch.randn(8, 6), torch.randint(3, (8,))


@pytest.mark.parametrize("batch", [BATCH, list(BATCH), BATCH[0], {"x": BATCH[0], "y": BATCH[1]}])
def test_a_batch_in_the_place_of_several(batch):
    kind = type(batch).__name__
    with pytest.raises(ValueError, match=rf"Expected `batches` to be an iterable of batches, got one batch \({kind}\)"):
        LossLandscape(Classifier(), batch)


@pytest.mark.parametrize("batches", [[BATCH], (BATCH, BATCH), iter([BATCH]), loader(), [BATCH[0], BATCH[0][:3]]])
def test_several_batches(batches):
    def loss(module: Any, batch: Any) -> Any:
        return F.cross_entropy(module(batch[0]), batch[1]) if isinstance(batch, tuple | list) else module(batch).mean()

    assert torch.isfinite(LossLandscape(Classifier(), batches, loss).loss())


@pytest.mark.parametrize("make", [FlatnessMonitor, LossSurfaceMonitor])
def test_two_monitors_with_the_same_names(tmp_path, make):
    message = f"Expected one {make.__name__} for each `log_key_prefix`, got 2 with 'flatness/'.*HINT: give one"
    other: dict[str, Any] = {"split": "val"} if make is FlatnessMonitor else {"directions": "eigenvectors"}
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, make(), make(**other), data=loaders())


def test_twice_the_same_monitor(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="Expected one FlatnessMonitor for each `log_key_prefix`, got 2"
    ):
        fit(tmp_path, FlatnessMonitor(), FlatnessMonitor())


@pytest.mark.parametrize("make", [FlatnessMonitor, LossSurfaceMonitor])
def test_validate_and_test_say_once_that_nothing_is_measured(tmp_path, make, caplog):
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    run, module = trainer(tmp_path, make()), Tested()
    with caplog.at_level(logging.INFO):
        run.validate(module, loader(shuffle=False), verbose=False)
        run.test(module, loader(shuffle=False), verbose=False)
    said = [r.getMessage() for r in caplog.records if "measures during `fit` only" in r.getMessage()]
    assert len(said) == 1
    assert f"{make.__name__} measures during `fit` only: `validate` logs no flatness." in said[0]


@pytest.mark.parametrize("name", list(METRICS))
def test_repr_shows_the_settings(name):
    metric = METRICS[name]()
    assert repr(metric).startswith(f"{type(metric).__name__}(")
    for setting in ("tol", "num_products", "num_steps", "seed", "k"):
        if setting in metric.settings and type(metric).__name__ != "InvariantSharpness":
            assert f"{setting}={metric.settings[setting]!r}" in repr(metric) or setting == "k"
