"""Run code in a forked child process and take what it yields.

The child works on a copy of everything in memory: generators, caches and counters that it moves are its own. Items come
back through a pipe, so that no shared memory and no file can be left behind. The child dies with its parent, and it is
killed, together with its own workers, when the parent is interrupted.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import signal
import stat
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.module.batches import map_tensors

TIMEOUT = 120.0
"""Seconds without an item after which a child is taken to hang: a library that does not survive a fork deadlocks."""

_SECONDS_TO_EXIT = 5.0


class ChildFailed(RuntimeError):
    """The child did not yield all its items; the message says why."""


def can_fork() -> bool:
    """Return whether this process may fork a child.

    Not on Windows, which cannot, nor on macOS, whose system libraries break after a fork; nor in a daemonic process,
    which Python allows no children.
    """
    forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return forks and not multiprocessing.current_process().daemon


def in_child(items: Callable[[], Iterable[Any]]) -> list[Any]:
    """Return copies of the items that ``items`` yields in a forked child, made by ``torch.save``.

    Raises:
        ChildFailed: If the child cannot be started, raises (the message holds its traceback), dies, hangs or yields
            what cannot be serialised.
    """
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(items, reader, writer), name="lightning_flatness_probe")
    with reader, _kept_file_offsets():
        try:
            with writer, warnings.catch_warnings():
                # Python warns that threads and forks do not mix. They do as in a worker of a DataLoader: see `_serve`.
                warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
                process.start()
            return list(_received(reader, process))
        except (OSError, EOFError) as error:
            raise ChildFailed(_cause_of_death(process, error)) from error
        finally:
            _end(process)


def _serve(items: Callable[[], Iterable[Any]], reader: Connection[Any, Any], writer: Connection[Any, Any]) -> None:
    """Send items to the parent; runs in the child."""
    os.setsid()  # a group of its own: Ctrl-C reaches the parent only, which kills the group with all workers in it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # the Trainer's handlers would act for the whole job
    threading.Thread(target=_die_with_parent, daemon=True).start()
    gc.freeze()  # objects of the parent are not finalised here: files flushed twice, memory of a GPU freed
    torch.set_num_threads(1)  # threads of the parent's pool do not exist here; OpenMP would wait for them
    reader.close()
    try:
        for item in items():
            buffer = io.BytesIO()
            torch.save(map_tensors(_without_excess, item, other=lambda unknown: unknown), buffer)
            writer.send("item")
            writer.send_bytes(buffer.getbuffer())
        writer.send("end")
    except Exception:
        writer.send(traceback.format_exc())


def _without_excess(tensor: Tensor) -> Tensor:
    """Return a copy of a small part of a large tensor, of which ``torch.save`` would write the whole memory."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_nested:
        return tensor
    if tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes:
        return tensor
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _received(reader: Connection[Any, Any], process: Any) -> Iterator[Any]:
    while True:
        # Not the end of the file alone: workers of the child hold the pipe open after its death.
        if not wait([reader, process.sentinel], TIMEOUT):
            raise ChildFailed(f"it yielded nothing for {TIMEOUT:.0f} s")
        if not reader.poll():
            raise EOFError
        message = reader.recv()
        if message == "end":
            return
        if message != "item":
            raise ChildFailed(f"it raised\n\n{message}")
        yield _loaded(reader.recv_bytes())


def _loaded(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), weights_only=False)
    except Exception as error:
        raise ChildFailed(f"what it sent cannot be read: {type(error).__name__}: {error}") from error


def _cause_of_death(process: Any, error: Exception) -> str:
    if process.pid is None:
        return f"it could not be started: {error}"
    process.join(_SECONDS_TO_EXIT)
    code = process.exitcode
    if code is not None and code < 0:
        return f"{signal.Signals(-code).name} killed it (exit code {code})"
    return f"it ended with exit code {code}"


def _end(process: Any) -> None:
    """Leave no process behind."""
    if process.pid is None:
        return
    if sys.exc_info()[0] is None:
        process.join(_SECONDS_TO_EXIT)
    with suppress(ProcessLookupError, PermissionError):  # before `setsid` there is no such group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    process.close()


@contextmanager
def _kept_file_offsets() -> Iterator[None]:
    """Put back where open files are read: a fork shares the offset, and buffered readers rely on it."""
    offsets = dict(_offsets())
    try:
        yield
    finally:
        for descriptor, offset in offsets.items():
            with suppress(OSError):
                os.lseek(descriptor, offset, os.SEEK_SET)


def _offsets() -> Iterator[tuple[int, int]]:
    import fcntl  # not on Windows, where nothing is forked

    for name in os.listdir("/dev/fd"):
        with suppress(OSError):
            descriptor = int(name)
            is_read_only = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            if is_read_only and stat.S_ISREG(os.fstat(descriptor).st_mode):
                yield descriptor, os.lseek(descriptor, 0, os.SEEK_CUR)
