"""FlatnessMonitor on averaged weights: EMA and SWA, beside the trained ones."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.modules import Classifier, loader
from helpers.training import fit, state_of
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatness import FlatnessMonitor, measure

AVERAGED = {"weights": "averaged", "log_key_prefix": "flatness_averaged/", "tol": 1e-4}


def averaging(kind: str) -> pl.Callback:
    if kind == "swa":
        return StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)
    return pytest.importorskip(
        "lightning.pytorch.callbacks.weight_averaging", reason="lightning 2.6 brings WeightAveraging"
    ).EMAWeightAveraging(decay=0.8)


def curve(run: Any, key: str) -> dict[int, float]:
    return {step: m[key] for step, m in run.logger.records if key in m}


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_both_curves_under_two_prefixes(tmp_path, kind):
    torch.manual_seed(0)
    monitors = [FlatnessMonitor(tol=1e-4), FlatnessMonitor(**AVERAGED)]
    run = fit(tmp_path, averaging(kind), *monitors, max_epochs=4)
    trained, averaged = (curve(run, f"{prefix}/lambda_max") for prefix in ("flatness", "flatness_averaged"))
    assert list(trained) == [0, 5, 10, 15, 20]
    assert list(averaged) == (list(trained) if kind == "ema" else [10, 15, 20])
    assert abs(averaged[20] / trained[20] - 1) > 1e-5  # a residual of 1e-4 is an error of 1e-8
    assert "flatness_averaged/edge_of_stability" not in run.callback_metrics
    # When training ends the module gets the average.
    final = measure(run.lightning_module, loader(), tol=1e-4).values["lambda_max"]
    if kind == "ema":
        assert averaged[20] == pytest.approx(final, rel=1e-3)
    assert "of the averaged weights" in monitors[1].summary()
    assert "of the trained weights" in monitors[0].summary()


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_measuring_the_average_leaves_no_trace(tmp_path, kind):
    modules = [Classifier(), Classifier()]
    modules[1].load_state_dict(modules[0].state_dict())
    fit(tmp_path, averaging(kind), module=modules[0], data=(loader(shuffle=False),), max_epochs=3)
    monitored = (averaging(kind), FlatnessMonitor(**AVERAGED))
    fit(tmp_path, *monitored, module=modules[1], data=(loader(shuffle=False),), max_epochs=3)
    for name, value in state_of(modules[0]).items():
        assert value.equal(state_of(modules[1])[name])


def test_the_monitor_says_which_weights_it_measures(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, averaging("swa"), FlatnessMonitor(), max_epochs=2)
    assert "measures the trained weights, not those that StochasticWeightAveraging averages" in caplog.text


def test_averaged_weights_need_a_callback_that_averages(tmp_path):
    with pytest.raises(MisconfigurationException, match="Expected a callback that averages weights"):
        fit(tmp_path, FlatnessMonitor(weights="averaged"))
    with pytest.raises(ValueError, match="Expected `weights` to be 'trained' or 'averaged', got 'ema'"):
        FlatnessMonitor(weights="ema")
