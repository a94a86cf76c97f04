"""A monitor of some of the weights: of an encoder, of adapters beside frozen weights, or of all."""

from __future__ import annotations

import pytest
import torch
from helpers.modules import Adapted, loader
from helpers.training import fit
from torch import Tensor

from lightning_flatness import FlatnessMonitor, measure


@pytest.mark.parametrize(("patterns", "number"), [(None, 28), ("up.*", 16), ("*", 111), (["net.*", "down.weight"], 95)])
def test_the_monitor_measures_the_named_weights_whether_they_are_trained_or_not(tmp_path, patterns, number):
    torch.manual_seed(0)
    module = Adapted()
    data = loader(shuffle=False)
    monitor = FlatnessMonitor(parameters=patterns, tol=1e-5)
    run = fit(tmp_path, monitor, module=module, data=(data,), max_epochs=1)
    assert monitor.metrics["lambda_max"].start.shape[-1] == number
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    expected = measure(module, data, parameters=patterns, tol=1e-5).values["lambda_max"]
    assert values["flatness/lambda_max"] == pytest.approx(expected, rel=1e-4)
    assert ("flatness/edge_of_stability" in values) == (patterns is None)
    assert [p.requires_grad for p in module.net.parameters()] == [False] * 4


def test_a_run_is_the_same_when_frozen_weights_are_measured(tmp_path):
    def trained(*callbacks: FlatnessMonitor) -> list[Tensor]:
        torch.manual_seed(0)
        module = Adapted()
        fit(tmp_path, *callbacks, module=module, max_epochs=2)
        return [p.detach().clone() for p in module.parameters()]

    watched, plain = trained(FlatnessMonitor(parameters="*", every_n_steps=2)), trained()
    assert all(map(torch.equal, watched, plain))


def test_a_name_that_is_not_there_is_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"got 'encoder.\*', which matches none. Names near it: "):
        fit(tmp_path, FlatnessMonitor(parameters="encoder.*"), max_epochs=1)
