"""A signal or a lack of memory at any line of a SAM step leaves all as at a stop there."""

from __future__ import annotations

import pytest
import torch
from helpers.interruptions import Interrupter
from helpers.sam_reference import Net, make_loader, make_trainer
from lightning.pytorch.callbacks import Callback

from lightning_flatness import SharpnessAwareMinimization


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.teacher = torch.nn.Linear(5, 3).requires_grad_(False)
        self.history = {"calls": 0}

    def training_step(self, batch, batch_idx):
        self.history["calls"] += 1
        self.teacher.weight.mul_(0.9)
        return super().training_step(batch, batch_idx)


def state_of(module, trainer):
    return {
        "weights": [p.detach().clone() for p in module.net.parameters()],
        "optimizer": [s["momentum_buffer"].clone() for s in trainer.optimizers[0].state.values()],
        "groups": {k: v for k, v in trainer.optimizers[0].param_groups[0].items() if k != "params"},
        "moved": [b.clone() for b in (*module.buffers(), *module.teacher.parameters())],
        "calls": (module.calls, len(module.seen), dict(module.history)),
        "attributes": {name for name in vars(module) if name != "training_step"},
        "kept": [id(vars(module)[name]) for name in ("seen", "history", "_modules", "_parameters", "_trainer")],
        "trained": [p.requires_grad for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "hooks": [[len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for m in module.modules()],
        "trainer": {name: id(value) for name, value in vars(trainer).items() if not name.startswith("_")},
        "loggers": list(map(id, trainer.loggers)),
        "callbacks": list(map(id, trainer.callbacks)),
    }


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def fit(interrupter, ascent="gradient"):
    """Return the states of one run: at its start, at the start of each step, and at the end or the interruption."""

    class Watching(Callback):
        def on_train_start(self, trainer, pl_module):
            states.append(state_of(pl_module, trainer))
            interrupter.start()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            states.append(state_of(pl_module, trainer))

        def on_train_end(self, trainer, pl_module):
            interrupter.stop()
            states.append(state_of(pl_module, trainer))

        def on_exception(self, trainer, pl_module, exception):
            interrupter.stop()
            states.append(state_of(pl_module, trainer))
            states.append("training_step" in {**vars(pl_module), **vars(trainer.strategy)})

    states = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, watching = Counting(), Watching()
        sam = SharpnessAwareMinimization(0.05, ascent=ascent)
        trainer = make_trainer(watching, sam, max_epochs=1, limit_train_batches=3)
        try:
            trainer.fit(module, make_loader())
        except (SystemExit, MemoryError):
            assert interrupter.raised
        finally:
            interrupter.stop()
    return states


FIXED = ("groups", "attributes", "trained", "modes", "hooks")


@pytest.mark.parametrize("first", [KeyboardInterrupt, pytest.param(MemoryError, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ascent", "fewest_lines"), [("gradient", 300), ("momentum", 50), ("previous", 50)])
def test_interrupted_at_any_line(first, ascent, fewest_lines):
    """Every line is interrupted: by the two exceptions in turn, and in the slow tests each by the other one."""
    counted = Interrupter()
    _, *whole = fit(counted, ascent)
    assert len(whole) == 4
    num_lines = len(counted.lines)
    assert num_lines > fewest_lines
    errors = (KeyboardInterrupt, MemoryError)
    for at in range(num_lines):
        interrupter = Interrupter(at, errors[(at + errors.index(first)) % 2])
        start, *_, end, is_recorded = fit(interrupter, ascent)
        where = list(interrupter.lines)[-1]
        assert interrupter.raised
        assert not is_recorded, where
        num_calls = end["calls"][0]
        assert end["calls"] == (num_calls, num_calls, {"calls": num_calls}), where
        assert equal(end["moved"], whole[num_calls]["moved"]), where  # BatchNorm, metrics and the teacher: once
        around = whole[max(0, num_calls - 1) : num_calls + 1]  # before the step of the optimizer, and after it
        assert any(equal(end["weights"], w["weights"]) and equal(end["optimizer"], w["optimizer"]) for w in around), (
            where
        )
        for name in FIXED:
            assert end[name] == whole[0][name], (where, name)
        for name in ("kept", "trainer", "loggers", "callbacks"):
            assert end[name] == start[name], (where, name)
