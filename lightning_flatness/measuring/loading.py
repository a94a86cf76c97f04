"""Checkpoints as files: read without running what is in them, and their weights given to a module."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Weights = Literal["trained", "averaged"]
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_forward_module)\.")
"""What ``torch.compile`` and Fabric put into the names of weights."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be measured; the message says why and what to do."""


def read_checkpoint(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint of Lightning, or a plain ``state_dict``, into memory that the file backs.

    Args:
        path: The file; it is not written to.
        weights_only: Refuse what is more than tensors and plain values: unpickling runs code.

    Returns:
        Its content, with the weights under ``"state_dict"``.

    Raises:
        CheckpointError: If it is damaged, no checkpoint, or needs more than ``weights_only`` allows.
    """
    if path.is_dir():
        raise CheckpointError(
            "Expected a file, got a folder, in which a sharded checkpoint is saved. Put it together first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_needs_more(path, error)) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"Expected a checkpoint, got a file that is cut off or none ({reason}).") from error
    if isinstance(content, dict) and "optimizer_states" in content and weights_only:
        # Mapped on their own: pages of the weights, once these are copied, do not stay for as long as an optimizer.
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["optimizer_states"]
        content["optimizer_states"] = states
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return {"state_dict": content}
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        kind = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"Expected a checkpoint with 'state_dict', or a state_dict, got {kind}.")
    return content


def _needs_more(path: Path, error: Exception) -> str:
    try:
        names = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # what the safe reader cannot read, this cannot either
        return f"Expected a checkpoint, got a file that is cut off or none ({str(error).splitlines()[0]})."
    return (
        f"Expected a checkpoint of weights and plain values, got one that also holds {names or 'other objects'}, "
        "mostly as hyperparameters. Reading these runs code of the file. If you trust it, pass --no-weights-only "
        "(`weights_only=False` in Python)."
    )


def state_of(checkpoint: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the trained or the averaged weights of a checkpoint.

    Lightning's ``WeightAveraging`` saves the averaged weights as ``state_dict`` and the trained ones beside them;
    ``StochasticWeightAveraging`` keeps the average in its own state; torch's ``AveragedModel`` is nothing but averaged.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        weights: Which.

    Returns:
        Weights by name.

    Raises:
        CheckpointError: If it has none of that kind.
        ValueError: If there is no such kind.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"Expected `weights` to be 'trained' or 'averaged', got {weights!r}.")
    state: dict[str, Any] = checkpoint["state_dict"]
    current = checkpoint.get("current_model_state")
    if weights == "trained":
        if "n_averaged" in state:
            raise CheckpointError("Expected trained weights, got an AveragedModel. Pass --weights averaged.")
        return state if current is None else current
    if current is not None or "n_averaged" in state:
        return state
    for callback in checkpoint.get("callbacks", {}).values():
        if isinstance(callback, dict) and callback.get("average_model_state") and callback.get("n_averaged"):
            average: dict[str, Any] = callback["average_model_state"]
            return average
    raise CheckpointError(
        "Expected averaged weights, got a checkpoint without them: neither WeightAveraging nor "
        "StochasticWeightAveraging (from its start on) nor torch's AveragedModel saved it. Pass --weights trained."
    )


def load_weights(module: nn.Module, checkpoint: dict[str, Any], weights: Weights = "trained") -> None:
    """Give a new module of the class that was trained the weights of a checkpoint, whatever wrapper renamed them.

    Raises:
        CheckpointError: If names or shapes are those of another module.
    """
    content = {**checkpoint, "state_dict": state_of(checkpoint, weights)}
    if callable(hook := getattr(module, "on_load_checkpoint", None)):
        hook(content)
    own = {_plain(name): name for name in module.state_dict()}
    given = _without_wrapper(content["state_dict"], own)
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    is_strict = getattr(module, "strict_loading", True)
    if is_strict and (missing or unknown):
        raise CheckpointError(
            f"Expected the weights of {type(module).__name__}, got a checkpoint that lacks {_some(missing)} and has "
            f"{_some(unknown)} besides. It was saved by another class, or with other hyperparameters."
        )
    try:
        module.load_state_dict({own.get(name, name): value for name, value in given.items()}, strict=is_strict)
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(
            f"Expected the weights of {type(module).__name__}, got others: {lines} It was saved with other "
            "hyperparameters."
        ) from error


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _without_wrapper(state: dict[str, Any], own: dict[str, str]) -> dict[str, Any]:
    """Return weights by their plain names, without the ``module.`` of DDP and of ``AveragedModel``."""
    given = {_plain(name): value for name, value in state.items() if name != "n_averaged" or name in own}
    if given and all(name.startswith("module.") for name in given) and not given.keys() <= own.keys():
        return {name.removeprefix("module."): value for name, value in given.items()}
    return given


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "none"
