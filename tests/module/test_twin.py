"""A twin: the same loss in every forward pass, and nothing that the pass does reaches the module of the run."""

from __future__ import annotations

import array
import collections
import functools
import itertools
import os
import queue
import random
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.modules import Classifier, Plain, loader, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_flatness.module.kernels import _full_precision
from lightning_flatness.module.loss import measured_parameters
from lightning_flatness.module.twin import Twin, twin_of

X, Y = Plain(8)[:]


def losses(module: nn.Module, step: Callable[[Any], Tensor], mode: Any = "eval", num: int = 3) -> list[float]:
    """Return the loss of several forward passes of one twin, each with the same gradient, which is finite."""
    values: list[float] = []
    first: list[Any] = []
    with twin_of(module, measured_parameters(module), mode, 0) as twin:
        for _ in range(num):
            with twin.forward_pass(0):
                loss = twin.rebound(step)(twin.module)
            twin.check(loss)
            gradients = torch.autograd.grad(loss, twin.parameters, allow_unused=True)
            first = first or list(gradients)
            assert any(gradient is not None for gradient in gradients)
            for gradient, same in zip(gradients, first, strict=True):
                assert (gradient is None) == (same is None)
                assert gradient is None or (gradient.isfinite().all() and torch.equal(gradient, same))
            values.append(loss.item())
    return values


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def touch(self) -> float:
        self.count += 1
        return float(self.count)


class Slots:
    __slots__ = ("count", "missing")

    def __init__(self) -> None:
        self.count = 0


class Recent(collections.deque[float]):
    """A deque of one's own."""


class Stubborn(collections.UserDict[str, Any]):
    """Refuses what a restoring visitor would call."""

    def clear(self) -> None:
        raise TypeError("You cannot use `clear`")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("You cannot use `update`")


class Output(collections.OrderedDict[str, Any]):
    """As the ModelOutput of transformers."""

    clear = update = Stubborn.clear  # type: ignore[assignment]


def _add_slot(state: Slots) -> float:
    state.count += 1
    return state.count


def _closure() -> Callable[[], float]:
    count = 0.0

    def next_count() -> float:
        nonlocal count
        count += 1
        return count

    return next_count


def _append(items: Any) -> float:
    items.append(1.0)
    return float(len(items))


def _push(q: Any) -> float:
    q.put(1)
    return float(q.qsize())


def _write(items: Any) -> float:
    items["n"] = items["n"] + 1
    return float(items["n"])


def _add(tensor: Any) -> float:
    tensor += 1
    return float(tensor.sum())


def _add_to_data(tensor: Tensor) -> float:
    tensor.data.add_(1)
    return float(tensor.sum())


def _add_to_numpy(tensor: Tensor) -> float:
    tensor.numpy()[:] += 1
    return float(tensor.sum())


def _namespace(state: types.SimpleNamespace) -> float:
    state.n += 1
    return float(state.n)


def _sparse(tensor: Tensor) -> float:
    tensor.values().add_(1)
    return float(tensor.sum())


def _stateful_output(output: Output) -> float:
    output["a"] = output["a"] + 1
    return float(output["a"])


def _first(pair: tuple[Counter, int]) -> float:
    return pair[0].touch()


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "int in an object": (Counter, Counter.touch),
    "slots": (Slots, _add_slot),
    "list": (list, _append),
    "deque of a subclass": (lambda: Recent(maxlen=9), _append),
    "dict": (lambda: {"n": 0}, _write),
    "a mapping that refuses update and clear": (lambda: _stubborn(), _write),
    "an ordered dict that refuses update": (lambda: _filled(Output()), _stateful_output),
    "namespace": (lambda: types.SimpleNamespace(n=0), _namespace),
    "array": (lambda: array.array("f"), _append),
    "queue": (queue.Queue, _push),
    "tensor": (lambda: torch.zeros(3), _add),
    "tensor through data": (lambda: torch.zeros(3), _add_to_data),
    "tensor through numpy": (lambda: torch.zeros(3), _add_to_numpy),
    "sparse tensor": (lambda: torch.eye(3).to_sparse().coalesce(), _sparse),
    "numpy array": (lambda: np.zeros(3), _add),
    "RandomState": (lambda: np.random.RandomState(0), lambda r: float(r.randn())),
    "numpy generator": (lambda: np.random.default_rng(0), lambda r: float(r.normal())),
    "python generator": (lambda: random.Random(0), lambda r: r.random()),
    "torch generator": (lambda: torch.Generator().manual_seed(0), lambda g: float(torch.rand(1, generator=g))),
    "list iterator": (lambda: iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), next),
    "count": (lambda: itertools.count(1.5), next),
    "loader iterator": (lambda: iter(loader(shuffle=False)), lambda i: float(next(i)[0].sum())),
    "loader iterator, shuffled": (lambda: iter(loader()), lambda i: float(next(i)[0].sum())),
    "closure": (_closure, lambda f: f()),
    "partial": (lambda: functools.partial(Counter.touch, Counter()), lambda f: f()),
    "bound method": (lambda: Counter().touch, lambda f: f()),
    "bound method of a builtin": (lambda: itertools.count(1.0).__next__, lambda f: float(f() or 0)),
    "tuple": (lambda: (Counter(), 3), _first),
    "dataset": (Plain, lambda data: _add(data.x)),
    "loader": (loader, lambda data: _add(data.dataset.x)),
    "BatchNorm in a list": (lambda: [nn.BatchNorm1d(6)], lambda items: float(items[0](X).detach().square().sum())),
}


def _stubborn() -> Stubborn:
    stubborn = Stubborn()
    stubborn["n"] = 0
    return stubborn


def _filled(output: Output) -> Output:
    output["a"] = 0.0
    return output


class Stateful(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.state = state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support:DeprecationWarning")
def test_state_of_every_kind_starts_anew_in_every_pass_and_never_reaches_the_module(kind):
    make, act = KINDS[kind]
    torch.manual_seed(0)
    module = Stateful(make())
    found = losses(module, lambda m: F.cross_entropy(m.net(X), Y) * (1 + 0.1 * act(m.state)))
    assert found[0] == found[1] == found[2]
    watched = act(module.state)
    torch.manual_seed(0)
    assert watched == act(Stateful(make()).state)


class Teacher(nn.Module):
    """A teacher that follows its student within the step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.teacher = nn.Linear(6, 3).requires_grad_(False)

    def move(self) -> None:
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                t.mul_(0.9).add_(s, alpha=0.1)


def _teacher_step(m: Any) -> Tensor:
    m.move()
    return F.mse_loss(m.net(X), m.teacher(X))


def _clamping_step(m: Any) -> Tensor:
    m.net.weight.data.clamp_(-0.05, 0.05)
    return F.cross_entropy(m.net(X), Y)


def _shrinking_step(m: Any) -> Tensor:
    with torch.no_grad():
        m.net.weight.mul_(0.5)
    return F.cross_entropy(m.net(X), Y)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4, max_norm=0.5)
        self.net = nn.Linear(4, 3)


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.average = AveragedModel(self.net, avg_fn=lambda a, p, n: 0.5 * a + 0.5 * p)
        self.average.update_parameters(nn.Linear(6, 3))


def _averaging_step(m: Any) -> Tensor:
    m.average.update_parameters(m.net)
    return F.mse_loss(m.net(X), m.average(X).detach())


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (Teacher, _teacher_step),
        (lambda: Stateful(None), _clamping_step),
        (lambda: Stateful(None), _shrinking_step),
        (Embedded, lambda m: F.cross_entropy(m.net(m.table(Y)), Y)),
        (Averaged, _averaging_step),
    ],
    ids=["momentum encoder", "weight clamping", "in place", "max_norm", "AveragedModel"],
)
def test_parameters_that_a_forward_pass_moves_come_back(make, step):
    torch.manual_seed(0)
    module = make()
    before = {name: (p, p.clone(), p._version) for name, p in module.state_dict(keep_vars=True).items()}
    found = losses(module, step)
    assert found[0] == found[1] == found[2]
    for name, p in module.state_dict(keep_vars=True).items():
        same, values, version = before[name]
        assert p is same
        assert p._version == version
        assert torch.equal(p, values), name


def test_a_twin_knows_that_a_forward_pass_moves_its_parameters():
    for step, moves in ((_shrinking_step, True), (_clamping_step, True), (lambda m: m.net(X).sum(), False)):
        module = Stateful(None)
        with twin_of(module, list(module.parameters()), "eval", 0) as twin:
            with twin.forward_pass(0):
                step(twin.module)
            assert twin.moves_parameters is moves


def test_displaced_parameters_come_back_from_where_they_were_displaced_to():
    module = Stateful(None)
    module.net.weight.data.fill_(1.0)
    with twin_of(module, list(module.parameters()), "eval", 0) as twin:
        with twin.forward_pass(0):
            _shrinking_step(twin.module)
        with twin.at([p + 1 for p in module.parameters()]):
            for _ in range(2):
                with twin.forward_pass(0):
                    assert torch.equal(twin.module.net.weight, torch.full((3, 6), 2.0))
                    _shrinking_step(twin.module)
        with twin.forward_pass(0):
            assert torch.equal(twin.module.net.weight, torch.ones(3, 6))


# -------------------------------------------------------------------------------------------------------- structure


def make_twin(module: nn.Module, mode: Any = "eval") -> Twin:
    with twin_of(module, measured_parameters(module), mode, 0) as twin:
        return twin


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 4)
        self.head.weight = self.first.weight
        self.in_a_list = [self.head]
        self.register_buffer("table", torch.zeros(4, 2))
        self.column = self.table[:, 0]
        self.parent = weakref.ref(self.head)
        self.loss = lambda x: self.head(x).sum()
        self.method = self.forward
        self.handle = self.head.register_forward_pre_hook(lambda m, args: (2 * args[0],))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))


def test_what_is_one_object_in_the_module_is_one_in_the_twin():
    module = Tied()
    twin = make_twin(module).module
    assert twin.first is twin.again
    assert twin.first is not module.first
    assert twin.head.weight is twin.first.weight
    assert twin.in_a_list[0] is twin.head
    assert twin.parent() is twin.head
    assert twin.method.__self__ is twin
    assert twin.column.data_ptr() == twin.table.data_ptr() != module.table.data_ptr()
    assert len(list(twin.parameters())) == len(list(module.parameters()))
    assert torch.autograd.grad(twin.loss(torch.ones(4)), twin.head.weight)[0].shape == (4, 4)
    assert torch.equal(twin(torch.ones(4)), module(torch.ones(4)))
    twin.handle.remove()
    assert not twin.head._forward_pre_hooks
    assert module.head._forward_pre_hooks


def test_tensors_with_a_history_become_detached_copies():
    module = Stateful([torch.ones(2, requires_grad=True) * 2])
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module.net)
    module.net(X)
    copied = make_twin(module).module
    assert copied.state[0] is not module.state[0]
    assert copied.state[0].grad_fn is None
    assert torch.equal(copied.state[0], module.state[0])
    assert module.state[0].grad_fn is not None
    loss = copied.net(X).sum()
    assert torch.autograd.grad(loss, copied.net.weight_v)[0].isfinite().all()


def test_what_cannot_be_copied_is_shared_and_named_once(tmp_path):
    def running() -> Any:
        yield 1.0

    with open(tmp_path / "file", "w") as file:
        module = Stateful({"stream": running(), "file": file, "lock": threading.Lock()})
        with pytest.warns(UserWarning, match=r"'state.file' \(TextIOWrapper\), 'state.stream' \(generator\)"):
            twin = make_twin(module).module
        assert twin.state["stream"] is module.state["stream"]
        assert twin.state["lock"] is not module.state["lock"]
        make_twin(module)  # warnings are errors here


class CountsOutside(nn.Module):
    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        type(self).total += 1
        CALLS.append(1)
        return self.net(x)


CALLS: list[int] = []


def test_class_attributes_and_global_variables_that_change_are_named_once():
    module = CountsOutside()
    with pytest.warns(UserWarning, match=r"'CountsOutside.total', '.*test_twin.CALLS' changed while the loss of"):
        losses(module, lambda m: m(X).sum())
    losses(module, lambda m: m(X).sum())  # warnings are errors here


class Worker(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)


def test_the_owner_of_a_thread_is_shared():
    module = Stateful(types.SimpleNamespace(thread=Worker()))
    with pytest.warns(UserWarning, match=r"'state' \(SimpleNamespace\)"):
        assert make_twin(module).module.state is module.state


def test_a_checkpoint_function_of_torch_on_the_module():
    module = Stateful(functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
    found = losses(module, lambda m: m.state(m.net, X).square().sum())
    assert found[0] == found[2]


def test_large_frozen_weights_are_shared_and_a_write_to_them_is_an_error(monkeypatch):
    monkeypatch.setattr("lightning_flatness.module.twin.MAX_COPIED_BYTES", 0)
    monkeypatch.setattr("lightning_flatness.module.twin._MAX_COPIED_FROZEN_BYTES", 64)
    module = Teacher()
    module.teacher = nn.Linear(6, 60).requires_grad_(False)
    twin = make_twin(module).module
    assert twin.teacher.weight is module.teacher.weight
    assert twin.net.weight is not module.net.weight

    def add(m: Any) -> Tensor:
        m.teacher.weight.data.add_(1)
        return m.net(X).sum()

    with pytest.raises(RuntimeError, match=r"only reads 'teacher.weight'.*Pass loss_fn"):
        losses(module, add)


def test_hooks_on_gradients_do_not_come_along_and_those_of_the_forward_pass_do():
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    calls: list[str] = []
    module[0].weight.register_hook(lambda g: 100 * g)
    module[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulate"))
    module[1].register_full_backward_hook(lambda *args: calls.append("backward"))
    module[1].register_full_backward_pre_hook(lambda m, g: (100 * g[0],))
    recorder = Counter()
    module[1].register_forward_hook(lambda m, args, output: 2 * output * recorder.touch())

    def step(m: nn.Module) -> Tensor:
        h = m[0](X)
        h.register_hook(lambda g: 100 * g)
        return m[1](h).sum()

    with twin_of(module, list(module.parameters()), "eval", 0) as twin, twin.forward_pass(0):
        gradient = torch.autograd.grad(step(twin.module), twin.parameters[0])[0]
    weight = module[1].weight.sum(0)[:, None] * X.sum(0)
    torch.testing.assert_close(gradient, 2 * weight)
    assert calls == []
    assert recorder.count == 0


def test_a_step_that_freezes_parameters_leaves_them_as_they_were():
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))

    def step(m: nn.Module) -> Tensor:
        m[0].requires_grad_(False)
        return m(X).square().sum()

    losses(module, step)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("compile_", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(compile_):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    scripted = nn.ModuleDict({"net": compile_(inner)})
    found = losses(scripted, lambda m: F.cross_entropy(m["net"](X), Y))
    assert found == losses(nn.ModuleDict({"net": inner}), lambda m: F.cross_entropy(m["net"](X), Y))
    buffers = [b.clone() for b in scripted.buffers()]
    found = losses(scripted.train(), lambda m: F.cross_entropy(m["net"](X), Y), "train")
    assert found[0] == found[1] == found[2]
    for buffer, before in zip(scripted.buffers(), buffers, strict=True):
        assert torch.equal(buffer, before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_around_the_first_layer_give_its_true_gradient(use_reentrant):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3))

    def step(m: nn.Module) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(m[0], X, use_reentrant=use_reentrant)
        return F.cross_entropy(m[1](hidden), Y)

    gradients = []
    for loss_of in (step, lambda m: F.cross_entropy(m(X), Y)):
        with twin_of(module, list(module.parameters()), "train", 0) as twin:
            with twin.forward_pass(0):
                loss = loss_of(twin.module)
            gradients.append(torch.autograd.grad(loss, twin.parameters))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert int(module[0][1].num_batches_tracked) == 0


def test_a_frozen_bfloat16_backbone_under_autocast():
    module = nn.Sequential(nn.Linear(6, 4).bfloat16().requires_grad_(False), nn.Linear(4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(module, lambda m: F.cross_entropy(m(X), Y))
        assert torch.is_autocast_enabled("cpu")
    assert found[0] == pytest.approx(F.cross_entropy(module.float()(X), Y).item(), rel=1e-6)


def test_a_sparse_embedding_gives_a_dense_gradient():
    module = nn.Embedding(5, 4, sparse=True, scale_grad_by_freq=True)
    with twin_of(module, [module.weight], "eval", 0) as twin, twin.forward_pass(0):
        gradient = torch.autograd.grad(twin.module(Y).sum(), twin.parameters)[0]
    expected = torch.bincount(Y, minlength=5)[:, None].float().expand(5, 4)
    torch.testing.assert_close(gradient, expected)
    assert module.sparse


def test_loss_functions_that_reach_the_module_by_themselves_reach_the_twin():
    module = Classifier()
    seen: list[float] = []

    def closure(m: Any) -> Tensor:
        seen.append(1.0)
        return F.cross_entropy(module(X), Y)

    class Holder:
        def __init__(self) -> None:
            self.nets = {"net": module.net}

        def __call__(self, m: Any) -> Tensor:
            return F.cross_entropy(self.nets["net"](X), Y)

    for step in (closure, Holder(), functools.partial(lambda net, m: F.cross_entropy(net(X), Y), module.net)):
        with twin_of(module, list(module.parameters()), "eval", 0) as twin, twin.forward_pass(0):
            loss = twin.rebound(step)(twin.module)
        assert all(g.any() for g in torch.autograd.grad(loss, twin.parameters))
    assert seen == [1.0]


def test_global_state_is_as_before():
    module = nn.LSTM(6, 3)
    owner, name, full = _full_precision()[0]
    default, fast = getattr(owner, name), "tf32" if isinstance(full, str) else True
    setattr(owner, name, fast)
    before = torch.get_rng_state(), random.getstate(), torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    try:
        losses(module, lambda m: m(X)[0].sum() + torch.rand(()) + random.random())
        assert getattr(owner, name) == fast
    finally:
        setattr(owner, name, default)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert before[1:] == (random.getstate(), torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled)


# ---------------------------------------------------------------------------------------------------------- Lightning


class Logging(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        run = self.trainer
        assert isinstance(self.logger, pl.loggers.CSVLogger)
        assert isinstance(run, pl.Trainer)
        self.logger.experiment.summary["x"] = 1
        os.path.join(self.logger.experiment.log_dir, "file")
        log_dir: Any = run.log_dir
        os.path.join(log_dir, self.logger.name, str(self.logger.version))
        self.logger.log_metrics({"direct": 1.0}, step=0)
        self.print("something")
        run.should_stop = True
        run.user_count = getattr(run, "user_count", 0) + 1
        run.callback_metrics["x"] = torch.ones(())
        run.callbacks[0].count += 1
        run.train_dataloader.dataset.x.add_(1)
        run.optimizers[0].param_groups[0]["lr"] *= 0.9
        self.optimizers().param_groups[0]["momentum"] = 0.5
        self.optimizers().state[self.net[0].weight]["touched"] = True
        self.lr_schedulers().step()
        assert run.lightning_module is self
        assert self.optimizers().param_groups[0]["params"][0] is self.net[0].weight
        return loss * self.lr_schedulers().get_last_lr()[0]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Counting(pl.Callback):
    count = 0


def test_trainer_loggers_optimizers_and_schedulers_are_twins(tmp_path, capsys):
    data = Plain()
    module, callback, logger = Classifier(), Counting(), pl.loggers.CSVLogger(tmp_path)
    module.configure_optimizers = functools.partial(Logging.configure_optimizers, module)
    run = trainer(tmp_path, callback, max_epochs=1, logger=logger)
    run.fit(module, loader(data))
    module.__class__ = Logging
    x, state = data.x.clone(), run.optimizers[0].state_dict()
    scheduler = run.lr_scheduler_configs[0].scheduler.state_dict()
    files, run.should_stop, metrics = set(tmp_path.rglob("*")), False, dict(run.callback_metrics)
    capsys.readouterr()
    found = losses(module, lambda m: m.training_step((X, Y), 0))
    assert found[0] == found[1] == found[2] > 0
    assert capsys.readouterr().out == ""
    assert run.should_stop is False
    assert not hasattr(run, "user_count")
    assert callback.count == 0
    assert torch.equal(data.x, x)
    assert str(run.optimizers[0].state_dict()) == str(state)
    assert run.lr_scheduler_configs[0].scheduler.state_dict() == scheduler
    assert run.callback_metrics == metrics
    assert run.loggers == [logger]
    assert set(tmp_path.rglob("*")) == files


def test_a_loader_of_workers_gives_the_twin_samples_without_workers():
    module = Stateful(iter(DataLoader(Plain(), batch_size=4, num_workers=1)))
    found = losses(module, lambda m: m.net(next(m.state)[0]).sum())
    assert found[0] == found[1]
    assert torch.equal(next(module.state)[0], Plain()[:4][0])
