"""What the monitor says when a run ends: first and last values, and advice with the number behind it."""

from __future__ import annotations

import logging

import pytest
from helpers.training import fit

from lightning_flatness import FlatnessMonitor
from lightning_flatness.callbacks.summary import advice, summarize
from lightning_flatness.metrics.measurement import Measurement


def test_said_once_when_fit_ends_and_on_request(tmp_path, caplog):
    monitor = FlatnessMonitor(every_n_epochs=2)
    with caplog.at_level(logging.INFO):
        run = fit(tmp_path, monitor, max_epochs=4)
    text = monitor.summary()
    assert caplog.text.count("FlatnessMonitor: 3 measurements of the trained weights on 40 samples") == 1
    lines = text.splitlines()
    first, last = (m["flatness/lambda_max"] for step, m in run.logger.records if step in (0, 20) and len(m) > 5)
    assert lines[1].startswith(f"  lambda_max: {first:.4g} ± ")
    assert f", {last:.4g} ± " in lines[1]
    assert lines[1].endswith("at step 20")
    assert FlatnessMonitor().summary() == "Nothing was measured."


def run_of(*edges: float) -> list[tuple[int, Measurement]]:
    return [(step, Measurement({"edge_of_stability": edge})) for step, edge in enumerate(edges)]


def test_unstable_for_three_measurements():
    (line,) = advice(run_of(0.5, 1.5, 1.2, 1.1), 512, "batch_statistics")
    assert "(1.5, 1.2, 1.1)" in line
    assert "1.5 times smaller" in line
    assert advice(run_of(0.5, 1.5, 1.2, 0.9), 512, "batch_statistics") == []
    assert advice(run_of(1.5, 1.2), 512, "batch_statistics") == []
    assert advice(run_of(0.5, 1.5, 1.2, 1.1), 512, "eval") == []


@pytest.mark.parametrize(("error", "size"), [(0.4, None), (0.6, 1024), (2.0, 8704)])
def test_a_standard_error_above_half_of_the_value(error, size):
    found = Measurement({"lambda_max": 1.0}, {"lambda_max": {"residual": 0.9, "standard_error": error}})
    lines = advice([(0, found)], 512, "batch_statistics")
    assert len(lines) == (size is not None)
    assert all(f"probe_size={size}" in line and f"{100 * error:.0f} %" in line for line in lines)


def test_a_standard_error_of_the_measures_own_random_vectors():
    (line,) = advice([(0, Measurement({"trace": 1.0}, {"trace": {"standard_error": 0.9}}))], 512, "batch_statistics")
    assert "About 4 times its random vectors" in line


def test_a_share_above_a_tenth_and_what_has_not_converged():
    found = Measurement(
        costs={"share_of_epoch_time": 0.35, "seconds": 9.0},
        remarks={"lambda_max": "did not converge within 3 products"},
    )
    text = summarize([(7, found)], "trained", 512, "batch_statistics", 0.212)
    assert "Measuring took 35 % of the time of an epoch, 21 % of the training's gradients. budget=0.1 bounds" in text
    assert "lambda_max did not converge within 3 products" in text
    for costs in ({"share_of_epoch_time": 0.05, "seconds": 9.0}, {"share_of_epoch_time": 0.35, "seconds": 0.1}):
        assert advice([(7, Measurement(costs=costs))], 512, "batch_statistics") == []


def test_a_share_above_the_budget():
    measured = [(7, Measurement())]
    (line,) = advice(measured, 512, "batch_statistics", share=0.08, budget=0.05)
    assert "Measuring took 8 % of the training's gradients, above budget=0.05" in line
    assert "probe_size=320 would come to 5 %" in line
    assert advice(measured, 512, "batch_statistics", share=0.05, budget=0.05) == []
