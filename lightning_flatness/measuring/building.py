"""A module, its data and a silent Trainer, as a run had them: from LightningCLI's config, or from names of classes."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatness.measuring.loading import CheckpointError, Weights, load_weights

_CLI_KEYS = ("seed_everything", "model", "data", "optimizer", "lr_scheduler")
_TRAINER_KEYS = ("precision", "limit_train_batches", "limit_val_batches", "accumulate_grad_batches", "max_epochs")
_PRECISIONS = {torch.float64: "64-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}
_SILENT: dict[str, Any] = {
    "logger": False,
    "callbacks": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
    "num_nodes": 1,
}


@dataclass(frozen=True)
class Recipe:
    """Instructions to build the module and the data of a run.

    Args:
        module: A class of modules, or its name ``package.mod:Class``.
        data: A DataModule or loader, a class or function that makes one, or its name ``package.mod:Class``.
        config: What LightningCLI saved.
    """

    module: Any = None
    data: Any = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Built:
    """A module with the weights of a checkpoint, and what surrounds it.

    Args:
        module: The module, on its device.
        data: A DataModule or loader; None if the module has its own.
        trainer: A Trainer without loggers and callbacks, attached to both.
        optimizers: The optimizers with their state; empty if they cannot be had.
    """

    module: LightningModule
    data: Any
    trainer: Trainer
    optimizers: list[Optimizer]


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
        raise CheckpointError(
            f"Expected {name!r} to name something that can be imported, as package.mod:Class ({error}). The folder in "
            "which you call the command is on the path."
        ) from error


def build(recipe: Recipe, checkpoint: dict[str, Any], weights: Weights, device: torch.device) -> Built:
    """Return the module of a checkpoint, built by its recipe, with its data, optimizer states and a silent Trainer.

    Raises:
        CheckpointError: If something is missing or does not fit.
    """
    hyperparameters = dict(checkpoint.get("hyper_parameters", {}))
    module_class = imported(recipe.module or hyperparameters.get("_class_path"))
    data = imported(recipe.data or dict(checkpoint.get("datamodule_hyper_parameters", {})).get("_class_path"))
    settings = dict((recipe.config or {}).get("trainer") or {})
    settings = {key: settings[key] for key in _TRAINER_KEYS if settings.get(key) is not None}
    settings.setdefault("precision", _precision(checkpoint["state_dict"]))
    settings |= _SILENT | {"accelerator": device.type}
    if device.index is not None:
        settings["devices"] = [device.index]
    with _quiet():
        if recipe.config is not None:
            module, data, trainer = _from_config(recipe.config, module_class, data, settings)
        else:
            trainer = Trainer(**settings)
            with trainer.init_module():
                module = _from_hyperparameters(module_class, hyperparameters)
        if inspect.isclass(data) and issubclass(data, LightningDataModule):
            data = _made(data, dict(checkpoint.get("datamodule_hyper_parameters", {})))
        elif inspect.isfunction(data):
            data = data()
    for owner in (module, data):
        if isinstance(owner, LightningModule | LightningDataModule):
            owner.trainer = trainer
    if isinstance(data, LightningDataModule):
        vars(trainer)["datamodule"] = data  # where Lightning has it, too
    with suppress(KeyError):  # of a version with other loops; the module then sees epoch 0
        trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("fit")
    module.prepare_data()
    module.setup("fit")
    module.configure_model()
    module = trainer.precision_plugin.convert_module(module)  # type: ignore[assignment]
    load_weights(module, checkpoint, weights)
    module.to(device)
    return Built(module, data, trainer, _optimizers(module, checkpoint.get("optimizer_states", [])))


def _precision(state: dict[str, Any]) -> str:
    dtypes = {t.dtype for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()}
    return _PRECISIONS.get(dtypes.pop(), "32-true") if len(dtypes) == 1 else "32-true"


def _from_config(
    config: Mapping[str, Any], module_class: Any, data: Any, trainer: dict[str, Any]
) -> tuple[LightningModule, Any, Trainer]:
    from lightning.pytorch.cli import LightningCLI  # takes jsonargparse

    is_datamodule = inspect.isclass(data) and issubclass(data, LightningDataModule)
    for name, given, option in [("model", module_class, "module"), ("data", data, "data")]:
        if given is None and config.get(name) and "class_path" not in config[name]:
            raise CheckpointError(
                f"Expected the class of `{name}`, which a config of LightningCLI does not name if the program does. "
                f"Pass --{option} package.mod:Class."
            )
    arguments = {key: config[key] for key in _CLI_KEYS if config.get(key) is not None}
    if data is not None and not is_datamodule:
        arguments.pop("data", None)
    try:
        cli = LightningCLI(
            module_class,
            data if is_datamodule else None,
            subclass_mode_model="class_path" in (config["model"] or {}),
            subclass_mode_data="class_path" in (config.get("data") or {}),
            save_config_callback=None,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
            args=arguments | {"trainer": trainer},
            run=False,
        )
    except Exception as error:  # of the user's constructors, too
        lines = re.sub(r"\s+", " ", str(error))
        raise CheckpointError(
            f"Expected to build module and data from the config of LightningCLI, got {type(error).__name__}: {lines} "
            "Arguments that a subclass of LightningCLI links or adds are not in it: pass --config with a complete "
            "file, or --module and --data."
        ) from error
    return cli.model, cli.datamodule if data is None or is_datamodule else data, cli.trainer


def _from_hyperparameters(module_class: Any, hyperparameters: dict[str, Any]) -> LightningModule:
    if module_class is None:
        raise CheckpointError(
            "Expected to know the class of the module, got neither a config of LightningCLI beside the checkpoint nor "
            "--module. Pass --module package.mod:Class."
        )
    if not (inspect.isclass(module_class) and issubclass(module_class, LightningModule)):
        raise CheckpointError(f"Expected --module to be a LightningModule, got {module_class!r}.")
    made: LightningModule = _made(module_class, hyperparameters)
    return made


def _made(kind: Any, hyperparameters: dict[str, Any]) -> Any:
    """Build an object from the hyperparameters that a checkpoint has, as ``load_from_checkpoint`` does."""
    instantiator = hyperparameters.pop("_instantiator", None)
    accepted = inspect.signature(kind).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    kept = {k: v for k, v in hyperparameters.items() if takes_all or k in accepted or k == "_class_path"}
    try:
        if instantiator is not None:  # LightningCLI's, for nested classes
            return imported(instantiator)(kind, kept)
        kept.pop("_class_path", None)
        return kind(**kept)
    except TypeError as error:
        raise CheckpointError(
            f"Expected the hyperparameters of {kind.__name__} in the checkpoint, got {sorted(kept) or 'none'} "
            f"({error}). HINT: save_hyperparameters() in its constructor keeps them; or pass --config with a file of "
            "LightningCLI, or name a function or subclass that needs no arguments."
        ) from error


def _optimizers(module: LightningModule, states: list[Any]) -> list[Optimizer]:
    """Return the module's optimizers in the state of the checkpoint; none where that takes more than the module."""
    try:
        found = list(_optimizers_in(module.configure_optimizers()))
        for optimizer, state in zip(found, states, strict=True):
            optimizer.load_state_dict(state)
    except Exception:  # the user's code may ask the Trainer for what only a run has; then there is no edge to show
        return []
    return found


def _optimizers_in(configured: Any) -> Iterator[Optimizer]:
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for part in configured:
            yield from _optimizers_in(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from telling which accelerators there are, and from leaving its seed in the environment."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    environment = dict(os.environ)
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a run that is not made here
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
