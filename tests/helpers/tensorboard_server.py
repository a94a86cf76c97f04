"""TensorBoard itself, as a process on a free port of this machine, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

PATIENCE = 120.0
"""Seconds until the server has to have read its logs, on a machine that is busy with other tests."""


class Server:
    """A running TensorBoard."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log
        self._open = build_opener(ProxyHandler({})).open  # a proxy of the machine's has no business here

    def get(self, path: str, **query: Any) -> Any:
        return json.loads(self.read(f"{path}?{urlencode(query)}"))

    def post(self, path: str, **body: Any) -> Any:
        return json.loads(self.read(path, json.dumps(body).encode()))

    def read(self, path: str, body: bytes | None = None) -> bytes:
        request = Request(f"{self.url}/{path}", body, {"Content-Type": "application/json"} if body else {})
        with self._open(request, timeout=30) as response:
            return response.read()

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """Ask until there is an answer: TensorBoard answers before it has read its logs."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if answer := what():
                    return answer
            except (URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.3)
        raise AssertionError(f"TensorBoard does not answer:\n{self._log.read_text()[-4000:]}")


@contextmanager
def tensorboard(logs: Path, log: Path, *, fast: bool = False) -> Iterator[Server]:
    """Serve logs, and end the server and all that it started, whatever happens.

    Without `fast` the second process that loads faster is left out: one less to end, and the same on every machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logs),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--load_fast", "true" if fast else "false", "--reload_interval", "1"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            yield Server(f"http://127.0.0.1:{port}", process, log)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
