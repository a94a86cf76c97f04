"""Studies in processes of their own, to be killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.processes import ROOT

Study = subprocess.Popen[str]


@contextmanager
def study_processes(script: str) -> Iterator[Callable[..., Study]]:
    """Yield a function that starts a helper script with arguments; what is left of it in the end is killed."""
    processes: list[Study] = []

    def start(*arguments: Any) -> Study:
        command = [sys.executable, str(Path(__file__).parent / script), "--quick", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def finish(process: Study) -> str:
    """Wait for a study, and return what it printed."""
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def kill_in_the_middle(process: Study, runs: Path, at_least: int) -> None:
    """Kill a study as soon as a number of its runs are done."""
    deadline = time.monotonic() + 900
    while len(list(runs.glob("*.json"))) < at_least:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # ends when the last worker has closed its output, too
