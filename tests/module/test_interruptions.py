"""A signal or a lack of memory at any line of a measurement leaves module, optimizer, Trainer and flags alone."""

from __future__ import annotations

import linecache
import random
from typing import Any

import pytest
import torch
from helpers.interruptions import Interrupter
from helpers.modules import Busy, Plain, loader, trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_flatness import HessianTrace, LossLandscape, TopEigenvalues, WorstCaseSharpness
from lightning_flatness.module.kernels import _full_precision

_STRIDE = 3
"""Every so many-th distinct line is interrupted, in three runs of the tests together all of them."""


def state_of(module: Any, run: Any) -> dict[str, Any]:
    tensors = module.state_dict(keep_vars=True)
    return {
        "weights": [(id(t), t._version, t.tolist()) for t in tensors.values()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "gradients": [p.grad for p in module.parameters()],
        "optimizer": str(run.optimizers[0].state_dict()),
        "attributes": {name: id(value) for name, value in vars(module).items()},
        "plain": (module.step, list(module.history), list(module.recent), module.total.tolist(), vars(module.meter)),
        "modes": [m.training for m in module.modules()],
        "hooks": [[len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for m in module.modules()],
        "trainer": {name: id(value) for name, value in vars(run).items()},
        "loggers": list(run.loggers),
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "generator": module.generator.get_state().tolist(),
        "flags": (
            torch.backends.mha.get_fastpath_enabled(),
            [getattr(owner, name) for owner, name, _ in _full_precision()],
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.utils.checkpoint.CheckpointFunction.__name__,
        ),
    }


def measure(module: Any, run: Any) -> None:
    data = Plain(12)
    batches = [data[:6], data[6:]]
    for metrics, num_total in [
        ([TopEigenvalues(geometry="optimizer", max_products=3, tol=1.0)], None),
        ([HessianTrace(num_products=4), WorstCaseSharpness(rho=0.01, num_steps=1, num_restarts=1)], 12),
    ]:  # of all samples: the standard errors of the others are zero without evaluations, which are many
        landscape = LossLandscape(module, batches, mode="train", optimizer=run.optimizers, num_total=num_total)
        with landscape.measurement():
            for metric in metrics:
                metric.update(landscape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_at_any_line_of_a_measurement(tmp_path, part):
    """By a signal and by a lack of memory in turn."""
    torch.manual_seed(0)
    module = Busy()
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=2, logger=CSVLogger(tmp_path))
    run.fit(module, loader())
    before = state_of(module, run)
    measure(module, run)
    counted = Interrupter()
    counted.run(lambda: measure(module, run))
    assert state_of(module, run) == before
    assert len(counted.lines) > 500
    for at in range(part, len(counted.lines), _STRIDE):
        error = (KeyboardInterrupt, MemoryError)[(at // _STRIDE) % 2]
        interrupter = Interrupter(at, error)
        with pytest.raises(error):
            interrupter.run(lambda: measure(module, run))
        after = state_of(module, run)
        file, number = list(interrupter.lines)[-1]
        leaves_block = linecache.getline(file, number).lstrip().startswith("with ")
        for name, value in before.items():
            if name not in ("random", "flags") or not leaves_block:  # there Python itself drops the context manager
                assert after[name] == value, (name, file, number)
