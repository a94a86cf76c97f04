"""What ``training_step`` changes beside gradients is changed once: by the first pass of SAM, not by the second one.

The perturbation is too small to change a weight, so every run must end as the one without SAM, bit for bit.
"""

from __future__ import annotations

import functools
import io
import itertools
import queue
from array import array
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sam_reference import Net, assert_same_bits, make_loader, make_trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_flatness import SharpnessAwareMinimization
from lightning_flatness.module import replay

TINY = 1e-30


class Stateful(Net):
    """Changes some state in each step; the loss depends on nothing of it unless a subclass says so."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def prepare(self) -> None: ...

    def change(self) -> Any: ...

    def left(self) -> Any:
        """Return what the run leaves behind."""

    def loss(self, batch):
        factor = self.change()
        return super().loss(batch) * (1 if factor is None else factor)


class TeacherThatIsTrainable(Stateful):
    def prepare(self):
        self.teacher = nn.Linear(5, 12, bias=False)
        nn.init.ones_(self.teacher.weight)

    def change(self):
        self.teacher.weight.data.mul_(0.9).add_(self.net[0].weight.data, alpha=0.1)
        return 1 + self.teacher.weight.detach().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class TeacherBesideTheOptimizer(TeacherThatIsTrainable):
    """Held by the optimizer, without a gradient."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def change(self):
        self.teacher.weight.data.mul_(0.9)


class Averaged(Stateful):
    def prepare(self):
        self.average = torch.optim.swa_utils.AveragedModel(self.net)

    def change(self):
        self.average.update_parameters(self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class SchedulerInStep(Stateful):
    def change(self):
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def left(self):
        return self.lr_schedulers().state_dict()


class GroupInStep(Stateful):
    def change(self):
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9

    def left(self):
        return self.optimizers().param_groups[0]["lr"]


class OwnOptimizer(Stateful):
    def prepare(self):
        self.scale = nn.Parameter(torch.ones(()))
        self.own = torch.optim.Adam([self.scale], lr=0.01)

    def change(self):
        self.own.zero_grad()
        (self.scale - 3).square().backward()
        self.own.step()
        return self.scale.detach()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def left(self):
        return self.own.state_dict()


class TrainerAttribute(Stateful):
    def change(self):
        self.trainer.steps_seen = getattr(self.trainer, "steps_seen", 0) + 1

    def left(self):
        return self.trainer.steps_seen


class Counter(Callback):
    count = 0

    def __init__(self):
        self.counts = {"steps": 0}


class OtherCallback(Stateful):
    def change(self):
        counter = next(c for c in self.trainer.callbacks if isinstance(c, Counter))
        counter.count += 1
        counter.counts["steps"] += 1

    def left(self):
        counter = next(c for c in self.trainer.callbacks if isinstance(c, Counter))
        return counter.count, counter.counts


class DatasetOfTheTrainer(Stateful):
    def change(self):
        dataset = self.trainer.train_dataloader.dataset
        dataset.count = getattr(dataset, "count", 0) + 1

    def left(self):
        return self.trainer.train_dataloader.dataset.count


class OldGenerator(Stateful):
    def prepare(self):
        self.generator = np.random.RandomState(0)

    def change(self):
        return self.generator.uniform(0.5, 1)

    def left(self):
        return self.generator.get_state()[1].tolist()


class Namespace(Stateful):
    def prepare(self):
        self.box = SimpleNamespace(count=0)

    def change(self):
        self.box.count += 1
        return self.box.count

    def left(self):
        return self.box.count


class Slotted:
    __slots__ = ("count", "extra", "history")

    def __init__(self):
        self.count, self.history = 0, []


class Slots(Namespace):
    def prepare(self):
        self.box = Slotted()

    def change(self):
        self.box.extra = self.box.count
        self.box.history.append(1)
        return super().change()

    def left(self):
        return self.box.count, self.box.history, self.box.extra


class Window(deque):
    def clear(self):
        raise RuntimeError("this window is never cleared")


class DequeOfASubclass(Stateful):
    def prepare(self):
        self.window = Window(maxlen=4)

    def change(self):
        self.window.append(len(self.seen))

    def left(self):
        return list(self.window)


class Queue(Stateful):
    def prepare(self):
        self.queue = queue.Queue()

    def change(self):
        self.queue.put(len(self.seen))
        return 1 + self.queue.qsize()

    def left(self):
        return list(self.queue.queue), self.queue.unfinished_tasks


class Iterators(Stateful):
    def prepare(self):
        self.numbers, self.more = iter([1.0, 2.0, 3.0] * 9), [itertools.cycle([1.0, 2.0]), itertools.count()]
        self.text = io.StringIO()
        self.append = functools.partial(list.append, [])

    def change(self):
        self.text.write("x")
        self.append(1)
        return next(self.numbers) + next(self.more[0]) + next(self.more[1])

    def left(self):
        return next(self.numbers), next(self.more[0]), next(self.more[1]), self.text.getvalue(), self.append.args


class Array(Stateful):
    def prepare(self):
        self.numbers, self.bytes = array("d", [1.0]), bytearray(b"a")

    def change(self):
        self.numbers[0] += 1
        self.numbers.append(2)
        self.bytes.append(1)
        return self.numbers[0]

    def left(self):
        return list(self.numbers), bytes(self.bytes)


class Sparse(Stateful):
    def prepare(self):
        self.sparse = torch.eye(3).to_sparse()

    def change(self):
        self.sparse.mul_(2)
        return self.sparse.to_dense().mean()

    def left(self):
        return self.sparse.to_dense()


class WrittenThroughData(Stateful):
    def prepare(self):
        self.seen_by_data = torch.zeros(2)
        self.register_buffer("seen_by_numpy", torch.zeros(2))

    def change(self):
        self.seen_by_data.data.add_(1)
        self.seen_by_numpy.numpy()[:] += 1
        return 1 + self.seen_by_data.sum()

    def left(self):
        return self.seen_by_data


class InAList(Stateful):
    def prepare(self):
        self.hidden = [nn.BatchNorm1d(5), nn.Linear(2, 2)]

    def change(self):
        self.hidden[0](torch.randn(4, 5))
        self.hidden[1].weight.data.mul_(0.9)

    def left(self):
        return [dict(m.state_dict()) for m in self.hidden]


class Refusing(OrderedDict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__["attributes"] = 0

    def clear(self):
        raise RuntimeError("this mapping is not cleared")

    update = setdefault = pop = __delitem__ = clear  # type: ignore[assignment]


class MappingThatRefuses(Stateful):
    def prepare(self):
        self.last, self.same = None, Refusing(count=0)

    def change(self):
        self.last = Refusing(loss=len(self.seen))
        self.same["count"] += 1
        self.same[len(self.seen)] = 1

    def left(self):
        return dict(self.last), dict(self.same)


class HookOfForward(Stateful):
    def prepare(self):
        self.norms = []

    def loss(self, batch):
        x, y = batch
        hidden = self.net[0](x)
        hidden.register_hook(lambda gradient: self.norms.append(gradient.norm()))
        logits = self.net[1:](hidden)
        self.accuracy(logits, y)
        return nn.functional.cross_entropy(logits, y)

    def left(self):
        return self.norms


class HooksThatStay(Stateful):
    def change(self):
        self.net[0].weight.register_hook(lambda gradient: gradient * 0.9)
        self.net[0].register_forward_hook(lambda module, args, output: output * 1.1)


class Toggled(Stateful):
    def prepare(self):
        self.head = nn.Linear(3, 3)

    def change(self):
        self.head.requires_grad_(len(self.seen) >= 7)

    def left(self):
        return [p.requires_grad for p in self.parameters()]


class ModeOfASubmodule(Stateful):
    def change(self):
        self.net[3].train(not self.net[3].training)

    def left(self):
        return self.net[3].training


FEATURES = [
    TeacherThatIsTrainable,
    TeacherBesideTheOptimizer,
    Averaged,
    SchedulerInStep,
    GroupInStep,
    OwnOptimizer,
    TrainerAttribute,
    OtherCallback,
    DatasetOfTheTrainer,
    OldGenerator,
    Namespace,
    Slots,
    DequeOfASubclass,
    Queue,
    Iterators,
    Array,
    Sparse,
    WrittenThroughData,
    InAList,
    MappingThatRefuses,
    HookOfForward,
    HooksThatStay,
    Toggled,
    ModeOfASubmodule,
]


def run(make, *callbacks, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
        torch.manual_seed(1)
        trainer = make_trainer(*callbacks, **options)
        trainer.fit(module, make_loader())
        left = module.left()
    return {"state": dict(module.state_dict()), "left": left, "calls": module.calls, "steps": trainer.global_step}


@pytest.mark.parametrize("feature", FEATURES)
def test_state_is_changed_once(feature):
    assert_same_bits(run(feature, Counter(), SharpnessAwareMinimization(TINY)), run(feature, Counter()))


class LargeTeacher(Stateful):
    """Takes more memory than what is trained; written to through `.data` and not."""

    def prepare(self):
        self.teacher = nn.Linear(5, 4000, bias=False).requires_grad_(False)
        self.slow = nn.Linear(5, 4000, bias=False).requires_grad_(False)
        self.still = nn.Linear(5, 4000).requires_grad_(False)
        nn.init.ones_(self.teacher.weight)

    def change(self):
        self.teacher.weight.data.mul_(0.9).add_(0.1 * self.net[0].weight.data.mean())
        self.slow.weight.mul_(0.9)

    def left(self):
        return self.still.weight._version


def test_large_frozen_parameters_are_copied_only_if_a_pass_moves_them(monkeypatch):
    copied = []
    copy = replay.TENSOR.copy
    monkeypatch.setattr(replay, "TENSOR", replay.TENSOR._replace(copy=lambda t: (copied.append(t.shape), copy(t))[1]))
    assert_same_bits(run(LargeTeacher, SharpnessAwareMinimization(TINY), max_epochs=1), run(LargeTeacher, max_epochs=1))
    assert copied.count(torch.Size([4000, 5])) == 4 * 5, "two of them, before the first and the second pass of 5 steps"
