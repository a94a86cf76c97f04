"""Starts the scripts of this folder as the ranks of one run, as torchrun does, and reads what they have written."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HELPERS = Path(__file__).parent


def free_port() -> int:
    """Return a port below those that the system hands out, so that no other process gets it in between."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) != 0:
                return port


def start_ranks(script: str, *arguments: str, out: Path, world_size: int = 2) -> list[subprocess.Popen[str]]:
    """Start the script once per rank; each writes what it prints to a file in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HELPERS.parent), str(HELPERS.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    processes = []
    for rank in range(world_size):
        with (out / f"output{rank}").open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(HELPERS / script), *arguments],
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return processes


def printed(out: Path) -> str:
    return "\n".join(f.read_text() for f in sorted(out.glob("output*")))


def run_ranks(command: str, out: Path, *numbers: int, world_size: int = 2, script: str = "ddp_worker.py") -> list[Any]:
    """Run the worker on every rank and return what each has written."""
    processes = start_ranks(script, command, str(out), *map(str, numbers), out=out, world_size=world_size)
    try:
        for process in processes:
            process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
            process.wait()
        pytest.fail(f"deadlock in {command}:\n{printed(out)}")
    results = [out / f"rank{rank}.json" for rank in range(world_size)]
    assert all(r.exists() for r in results), printed(out)
    return [json.loads(r.read_text()) for r in results]
