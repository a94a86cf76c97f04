"""A probe is drawn in a child process: nothing in the pipeline moves, and nothing is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_flatness.callbacks import child
from lightning_flatness.callbacks.child import ChildFailed, in_child
from lightning_flatness.callbacks.probe import draw_probe

pytestmark = pytest.mark.skipif(not child.can_fork(), reason="needs a system that forks")

Pair = namedtuple("Pair", "x y")


def descendants() -> set[int]:
    """Return the ids of all processes below this one; those of other children are not ours."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, added = {os.getpid()}, {os.getpid()}
    while added:
        added = {pid for pid, parent in parents.items() if parent in added}
        found |= added
    return found


def left_behind() -> tuple[set[int], set[str], set[str]]:
    shared = {name for name in os.listdir("/dev/shm") if f"_{os.getpid()}_" in name}
    return descendants(), shared, set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    before = left_behind()
    yield
    gc.collect()  # an error of a DataLoader in this process holds its workers
    multiprocessing.active_children()
    assert left_behind() == before


class Fails(Dataset[Tensor]):
    """Does in the child what a test asks for."""

    def __init__(self, what: Any, num_calls: int = 5) -> None:
        self.parent = os.getpid()
        self.what = what
        self.num_calls = num_calls

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        self.num_calls -= 1
        if os.getpid() != self.parent and self.num_calls == 0:
            self.what()
        return torch.full((2,), float(index))


def fail() -> None:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"SIGKILL killed it \(exit code -9\)|killed by signal: Killed"),
        (lambda: os._exit(3), r"exit code 3|exited unexpectedly"),
        (fail, r"it raised[\s\S]*what\(\)[\s\S]*ZeroDivisionError: on purpose"),
    ],
)
def test_a_child_that_dies_is_named_and_the_samples_are_drawn_in_the_process(what, message, num_workers):
    expected = draw_probe(DataLoader(Fails(int, 0), batch_size=4), 10)
    if num_workers:  # then each worker fails, in the training process as well
        with (
            pytest.warns(UserWarning, match=rf"samples of Fails .* child process.*{message}"),
            pytest.raises((RuntimeError, ZeroDivisionError), match=r"on purpose|exited unexpectedly|killed by signal"),
        ):
            draw_probe(DataLoader(Fails(what, 2), batch_size=4, num_workers=2), 10)
        return
    with pytest.warns(UserWarning, match=rf"samples of Fails .* child process.*{message}"):
        drawn = draw_probe(DataLoader(Fails(what), batch_size=4), 10)
    assert torch.equal(torch.cat(drawn), torch.cat(expected))


def test_a_file_that_refuses_other_processes_is_read_in_the_one_that_opened_it():
    """As HDF5 files that are open, and tensors of a GPU."""

    class Opened(Fails):
        def __getitem__(self, index: int) -> Tensor:
            if os.getpid() != self.parent:
                raise OSError("opened by another process")
            return torch.full((2,), float(index))

    with pytest.warns(UserWarning, match=r"samples of Opened [\s\S]*OSError: opened by another process"):
        drawn = draw_probe(DataLoader(Opened(None), batch_size=4), 10)
    assert torch.equal(torch.cat(drawn), torch.cat(draw_probe(DataLoader(Fails(int, 0), batch_size=4), 10)))


def test_a_child_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(child, "TIMEOUT", 0.5)
    with pytest.warns(UserWarning, match=r"it yielded nothing for 0 s|it yielded nothing for 1 s"):
        drawn = draw_probe(DataLoader(Fails(lambda: time.sleep(60), 1), batch_size=4), 10)
    assert sum(len(batch) for batch in drawn) == 10


def test_an_error_of_the_dataset_is_raised_with_that_of_the_child(recwarn):
    class Broken(Fails):
        def __getitem__(self, index: int) -> Tensor:
            raise KeyError("no such sample")

    with (
        pytest.warns(UserWarning, match="no such sample"),
        pytest.raises(KeyError, match="no such sample") as caught,
    ):
        draw_probe(DataLoader(Broken(None), batch_size=4), 10)
    assert isinstance(caught.value.__context__, ChildFailed)


def test_samples_that_cannot_be_serialised_are_drawn_in_the_process():
    class Local:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    dataset = [torch.full((2,), float(i)) for i in range(8)]
    with pytest.warns(UserWarning, match=r"of list to measure on [\s\S]*Local"):
        (batch,) = draw_probe(DataLoader(dataset, batch_size=8, collate_fn=lambda b: Local(torch.stack(b))), 8)
    assert batch.x.shape == (8, 2)


def test_batches_of_every_kind_come_back():
    data = {
        "sparse": torch.eye(3).to_sparse(),
        "grad": torch.ones(3, requires_grad=True),
        "history": (torch.ones(3, requires_grad=True) * 2),
        "pair": Pair(torch.zeros(2), "a"),
        "array": np.arange(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "none": None,
        "nested": [{"text": ["x", "y"]}, (1, 2.0)],
        "packed": torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]),
    }
    (back,) = in_child(lambda: iter([data]))
    assert back.keys() == data.keys()
    assert torch.equal(back["sparse"].to_dense(), torch.eye(3))
    assert back["grad"].requires_grad
    assert back["history"].requires_grad
    assert torch.equal(back["history"], data["history"])
    assert type(back["pair"]) is Pair
    assert type(back["parameter"]) is torch.nn.Parameter
    assert np.array_equal(back["array"], data["array"])
    assert back["empty"].shape == (0, 3)
    assert back["bfloat16"].dtype == torch.bfloat16
    assert back["nested"] == data["nested"]
    assert torch.equal(back["packed"].data, data["packed"].data)


def test_a_view_of_a_large_tensor_is_sent_alone():
    large = torch.zeros(10_000_000)
    (back,) = in_child(lambda: iter([{"view": large[5:8]}]))
    assert back["view"].untyped_storage().nbytes() == 12


def test_a_default_device_does_not_move_the_samples():
    with torch.device("meta"):
        (back,) = in_child(lambda: iter([torch.ones(3, device="cpu")]))
    assert back.device.type == "cpu"


def test_threads_of_torch_do_not_hang_the_child():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(400, 400)
        (x @ x).sum()  # starts the pool
        (back,) = in_child(lambda: iter([x @ x]))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(back, x @ x)


def test_another_thread_does_not_matter():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert in_child(lambda: iter([1, 2])) == [1, 2]
    finally:
        stop.set()
        thread.join()


def test_an_open_file_is_read_on_where_it_was(tmp_path):
    """A buffered reader that seeks within its buffer relies on the offset, which a fork shares."""
    path = tmp_path / "records"
    content = np.random.default_rng(0).integers(256, size=100_000, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    with path.open("rb") as file:
        file.read(10)

        def records() -> Any:
            file.seek(50_000)
            yield file.read(20_000)

        assert in_child(records) == [content[50_000:70_000]]
        file.seek(100)
        assert file.read(30_000) == content[100:30_100]


def test_a_daemonic_process_draws_for_itself():
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def work() -> None:
        numbers: Any = range(10)
        torch.set_num_threads(1)
        writer.send((child.can_fork(), [b.tolist() for b in draw_probe(DataLoader(numbers, batch_size=4), 5)]))

    process = context.Process(target=work, daemon=True)
    with reader, writer:
        process.start()
        assert reader.poll(60)
        assert reader.recv() == (False, [b.tolist() for b in draw_probe(DataLoader(range(10), batch_size=4), 5)])
        process.join()
        process.close()


SCRIPT = """
import os, sys, time
from torch.utils.data import DataLoader, Dataset
from lightning_flatness.callbacks.probe import draw_probe

class Waits(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        print(os.getpid(), flush=True)
        time.sleep(100)

draw_probe(DataLoader(Waits(), batch_size=4, num_workers=int(sys.argv[1])), 8)
"""


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_parent_ends_the_child_and_its_workers(number, num_workers):
    shared = set(os.listdir("/dev/shm"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(num_workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert parent.stdout is not None
    drawing = int(parent.stdout.readline())
    parent.send_signal(number)
    parent.communicate(timeout=60)
    assert parent.returncode != 0
    deadline = time.monotonic() + 20
    while Path(f"/proc/{drawing}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{drawing}").exists()
    assert {n for n in os.listdir("/dev/shm") if f"_{parent.pid}_" in n or f"_{drawing}_" in n} <= shared


def test_an_interrupt_while_drawing_leaves_no_child():
    def interrupt() -> None:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        in_child(lambda: iter([interrupt()]))


def test_the_parents_generators_do_not_move():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    in_child(lambda: iter([torch.rand(3), random.random(), np.random.rand()]))  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002
