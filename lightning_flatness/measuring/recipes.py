"""How to build the module and the data of a run: by LightningCLI's config, the checkpoint, and what the user names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_flatness.measuring.loading import CheckpointError

PROGRAM_HINT = "`__main__` is the program that was run: name it with --module, as in --module main:Net for main.py."
_PROGRAM = "__main__."
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_INSTANTIATORS = tuple(f"{package}.cli.instantiate_module" for package in _PACKAGES)


@dataclass(frozen=True)
class Recipe:
    """Instructions to build the module and the data of a run.

    Args:
        module: A class of modules or a function that makes one, or its name ``package.mod:Class``.
        data: A DataModule or loader, a class or function that makes one, or its name ``package.mod:Class``.
        config: What LightningCLI saved.
    """

    module: Any = None
    data: Any = None
    config: Mapping[str, Any] | None = None

    def completed(self, checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
        """Return config and checkpoint in which classes of ``__main__``, the program that was run, can be imported.

        The program's name is known if the user named a class of it.
        """
        given = [
            g for g in (self.module, self.data) if isinstance(g, str) or inspect.isclass(g) or inspect.isfunction(g)
        ]
        if not given:
            return self.config, dict(checkpoint)
        first = given[0]
        place = first.rpartition(":" if ":" in first else ".")[0] if isinstance(first, str) else first.__module__
        saved = {key: value for key, value in checkpoint.items() if key.endswith("hyper_parameters")}
        return _renamed(self.config, f"{place}."), {**checkpoint, **_renamed(saved, f"{place}.")}


def _renamed(content: Any, place: str) -> Any:
    if isinstance(content, Mapping):
        return {
            key: place + value.removeprefix(_PROGRAM)
            if key in ("class_path", "_class_path") and isinstance(value, str) and value.startswith(_PROGRAM)
            else _renamed(value, place)
            for key, value in content.items()
        }
    return [_renamed(value, place) for value in content] if isinstance(content, list) else content


def is_a(kind: Any, name: str) -> bool:
    """Return whether something is a class that inherits from one of Lightning's, of either package.

    Args:
        kind: Anything.
        name: ``"LightningModule"`` or ``"LightningDataModule"``.
    """
    bases = kind.__mro__ if inspect.isclass(kind) else ()
    return any(base.__name__ == name and base.__module__.startswith(_PACKAGES) for base in bases)


def package_of(kind: Any) -> str:
    """Return the package of Lightning that a class inherits from; ``lightning.pytorch`` for anything else."""
    bases = kind.__mro__ if inspect.isclass(kind) else ()
    return next((_PACKAGES[1] for base in bases if base.__module__.startswith(_PACKAGES[1])), _PACKAGES[0])


def read_config(path: Path) -> Mapping[str, Any] | None:
    """Return the config that LightningCLI has saved, None if the file is something else.

    Args:
        path: A YAML file.

    Raises:
        CheckpointError: If it is no YAML.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"Expected {path} to be YAML that LightningCLI saved ({error}).") from error
    return content if isinstance(content, dict) and "model" in content and "trainer" in content else None


def imported(name: Any) -> Any:
    """Return what ``package.mod:Name`` or ``package.mod.Name`` names; anything but a string as it is.

    Raises:
        CheckpointError: If there is nothing of that name.
    """
    if not isinstance(name, str):
        return name
    place, _, attribute = name.rpartition(":" if ":" in name else ".")
    try:
        return getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "The folder in which you call the command is on the path."
        if name.startswith(_PROGRAM):
            hint = PROGRAM_HINT
        raise CheckpointError(
            f"Expected {name!r} to name something that can be imported, as package.mod:Class ({error}). {hint}"
        ) from error


def saved_class(checkpoint: Mapping[str, Any], owner: type) -> str | None:
    """Return the name of the class whose hyperparameters a checkpoint holds, None if it does not say.

    Args:
        checkpoint: Its content.
        owner: ``LightningModule`` or ``LightningDataModule``.
    """
    return _hyperparameters(checkpoint, owner).get("_class_path")


def _hyperparameters(checkpoint: Mapping[str, Any], owner: Any) -> dict[str, Any]:
    return dict(checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_KEY, {}))


def module_from(kind: Any, checkpoint: Mapping[str, Any]) -> LightningModule:
    """Build a module: by the user's function, or of the user's class with the hyperparameters of a checkpoint.

    Args:
        kind: The class or function.
        checkpoint: Its content.

    Returns:
        The module, with new weights.

    Raises:
        CheckpointError: If it cannot be built.
    """
    if kind is None:
        raise CheckpointError(
            "Expected to know the class of the module, got neither a config of LightningCLI beside the checkpoint nor "
            "--module. Pass --module package.mod:Class."
        )
    if inspect.isfunction(kind):
        module = kind()
    else:
        module = made(kind, LightningModule, checkpoint) if is_a(kind, "LightningModule") else kind
    if not is_a(type(module), "LightningModule"):
        raise CheckpointError(f"Expected --module to be a LightningModule or a function that makes one, got {kind!r}.")
    built: LightningModule = module
    return built


def data_from(source: Any, checkpoint: Mapping[str, Any]) -> Any:
    """Build the data that a class or function makes.

    Args:
        source: The class or function.
        checkpoint: Its content.

    Returns:
        The data; any other ``source`` as it is.

    Raises:
        CheckpointError: If it cannot be built.
    """
    if is_a(source, "LightningDataModule"):
        return made(source, LightningDataModule, checkpoint)
    return source() if inspect.isfunction(source) else source


def made(kind: type, owner: Any, checkpoint: Mapping[str, Any]) -> Any:
    """Build an object from the hyperparameters that a checkpoint has, as ``load_from_checkpoint`` does.

    Args:
        kind: Its class.
        owner: ``LightningModule`` or ``LightningDataModule``, under whose keys the hyperparameters are.
        checkpoint: Its content.

    Returns:
        The object.

    Raises:
        CheckpointError: If hyperparameters are missing, or name other code to call than LightningCLI's.
    """
    saved = _hyperparameters(checkpoint, owner)
    instantiator = saved.pop("_instantiator", None)
    if instantiator not in (None, *_INSTANTIATORS):
        raise CheckpointError(
            f"Expected hyperparameters of LightningCLI, got a checkpoint that asks to call {instantiator!r}. Pass as "
            "--module or --data a function that needs no arguments."
        )
    accepted = inspect.signature(kind).parameters
    variable = {name for name, p in accepted.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    kept = {k: v for k, v in saved.items() if takes_all or k in accepted or k == "_class_path"}
    name = checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_NAME)
    if (
        isinstance(name, str) and name in accepted and name not in variable and name not in saved
    ):  # one argument held them all
        kept = {name: AttributeDict(saved)}
    try:
        if instantiator is not None:  # for nested classes
            return imported(instantiator)(kind, kept)
        kept.pop("_class_path", None)
        return kind(**kept)
    except TypeError as error:
        raise CheckpointError(
            f"Expected the hyperparameters of {kind.__name__} in the checkpoint, got {sorted(kept) or 'none'} "
            f"({error}). HINT: save_hyperparameters() in its constructor keeps them; or pass --config with a file of "
            "LightningCLI, or name a function that needs no arguments."
        ) from error
