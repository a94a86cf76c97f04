"""All that an object holds, flattened: which attributes a run has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = bool | int | float | complex | str | bytes | None | torch.dtype | torch.device | torch.Size


def attributes(value: Any, path: str = "", above: tuple[int, ...] = ()) -> dict[str, str]:
    """Return what an object holds, and what that holds, by its path: ``run.metrics['lambda_max'].value``."""
    if id(value) in above:
        return {path: "itself"}
    above = (*above, id(value))
    if isinstance(value, PLAIN):
        return {path: repr(value)}
    if isinstance(value, torch.Tensor):
        return {path: f"{value.dtype} {value.device} {value.tolist()}"}
    if isinstance(value, torch.Generator):
        return {path: str(value.get_state().tolist())}
    if callable(value) and not isinstance(value, nn.Module):
        return {path: getattr(value, "__qualname__", repr(type(value)))}
    found = {path: type(value).__name__}
    if isinstance(value, dict):
        for key, item in value.items():
            found |= attributes(item, f"{path}[{key!r}]", above)
    elif isinstance(value, set | frozenset):
        found[path] += f" {sorted(map(repr, value))}"
    else:
        for i, item in enumerate(value if hasattr(value, "__len__") and hasattr(value, "__iter__") else ()):
            found |= attributes(item, f"{path}[{i}]", above)
        for name, item in getattr(value, "__dict__", {}).items():
            found |= attributes(item, f"{path}.{name}".lstrip("."), above)
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """Return the paths that two results of :func:`attributes` do not share, or where they differ."""
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
