"""Random number generators: seeded for a measurement, and put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw the same random numbers inside, and leave every generator outside as it was.

    Covers torch on the CPU and on ``device``, Python's ``random`` and NumPy's global generator.
    """
    with preserved_rng(device):
        seed_all(seed, device)
        yield


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Put back the states of torch's generators (CPU and ``device``), of ``random`` and of NumPy's on leaving."""
    with ExitStack() as stack:  # which puts back without a line of ours that a signal could interrupt
        for put_back in _restorers(device):
            stack.callback(put_back)
        yield


def remember_rng(device: torch.device | None) -> Callable[[], None]:
    """Return what puts every generator back to where it is now."""
    restorers = _restorers(device)

    def restore() -> None:
        for put_back in restorers:
            put_back()

    return restore


def _restorers(device: torch.device | None) -> list[Callable[[], object]]:
    restorers: list[Callable[[], object]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if (accelerator := _accelerator_module(device)) is not None:
        restorers.append(partial(accelerator.set_rng_state, accelerator.get_rng_state(device), device))
    return restorers


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's generators (CPU and ``device``), ``random`` and NumPy's; other devices are left alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if (accelerator := _accelerator_module(device)) is not None:
        with accelerator.device(device):  # not the current one
            accelerator.manual_seed(seed)


def device_of(module: nn.Module) -> torch.device | None:
    """Return where the first parameter of a module lies."""
    return next((p.device for p in module.parameters()), None)


def _accelerator_module(device: torch.device | None) -> Any:
    return None if device is None or device.type in ("cpu", "meta") else getattr(torch, device.type)
