"""A module, its data and a silent Trainer, as a run had them: from LightningCLI's config, or from names of classes."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatness.measuring.loading import CheckpointError, Weights, load_weights
from lightning_flatness.measuring.recipes import (
    PROGRAM_HINT,
    Recipe,
    data_from,
    imported,
    is_a,
    module_from,
    package_of,
    saved_class,
)

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
_LINKED_HINT = (
    "Arguments that a subclass of LightningCLI links or adds are not in it: pass --config with a complete file, or "
    "--module and --data."
)


@dataclass(frozen=True)
class Built:
    """A module with the weights of a checkpoint, and what surrounds it.

    Args:
        module: The module, on its device.
        data: A DataModule or loader; None if the module has its own.
        trainer: A Trainer without loggers and callbacks, attached to both.
        optimizers: The optimizers with their state; empty if they cannot be had, or for averaged weights, which none
            trains.
        note: Why they cannot, if the checkpoint has them.
    """

    module: LightningModule
    data: Any
    trainer: Trainer
    optimizers: list[Optimizer]
    note: str | None


def build(recipe: Recipe, checkpoint: dict[str, Any], weights: Weights, device: torch.device) -> Built:
    """Return the module of a checkpoint, built by its recipe, with its data, optimizer states and a silent Trainer.

    Raises:
        CheckpointError: If something is missing or does not fit.
    """
    config, checkpoint = recipe.completed(checkpoint)
    module_class = imported(recipe.module or saved_class(checkpoint, LightningModule))
    data = imported(recipe.data) or _datamodule(saved_class(checkpoint, LightningDataModule))
    settings = dict((config or {}).get("trainer") or {})
    settings = {key: settings[key] for key in _TRAINER_KEYS if settings.get(key) is not None}
    settings.setdefault("precision", _precision(checkpoint["state_dict"]))
    settings |= _SILENT | {"accelerator": device.type}
    if device.index is not None:
        settings["devices"] = [device.index]
    with _quiet():
        if config is not None and not inspect.isfunction(module_class):
            module, data, trainer = _from_config(config, module_class, data, settings)
        else:
            trainer = importlib.import_module(package_of(module_class)).Trainer(**settings)
            with trainer.init_module():
                module = module_from(module_class, checkpoint)
        data = data_from(data, checkpoint)
    trainer.loggers = [DummyLogger()]  # the user's code may ask for the logger's experiment
    for owner in (module, data):
        if is_a(type(owner), "LightningModule") or is_a(type(owner), "LightningDataModule"):
            owner.trainer = trainer
    if is_a(type(data), "LightningDataModule"):
        vars(trainer)["datamodule"] = data  # where Lightning has it, too
    with suppress(KeyError):  # of a version with other loops; the module then sees epoch 0
        trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    if is_a(type(data), "LightningDataModule"):
        data.prepare_data()
        data.setup("fit")
    module.prepare_data()
    module.setup("fit")
    module.configure_model()
    module = trainer.precision_plugin.convert_module(module)  # type: ignore[assignment]
    load_weights(module, checkpoint, weights)
    module.to(device)
    states = checkpoint.get("optimizer_states")
    optimizers, note = _optimizers(module, states) if states else ([], None)
    trainer.optimizers = [_without_state(optimizer) for optimizer in optimizers]
    return Built(module, data, trainer, optimizers if weights == "trained" else [], note)


def _datamodule(name: str | None) -> Any:
    found = imported(name)
    return found if is_a(found, "LightningDataModule") else None  # a checkpoint names no other code to run


def _precision(state: dict[str, Any]) -> str:
    dtypes = {t.dtype for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()}
    return _PRECISIONS.get(dtypes.pop(), "32-true") if len(dtypes) == 1 else "32-true"


def _from_config(
    config: Mapping[str, Any], module_class: Any, data: Any, trainer: dict[str, Any]
) -> tuple[LightningModule, Any, Trainer]:
    is_datamodule = is_a(data, "LightningDataModule")
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
        cli = importlib.import_module(f"{package_of(module_class)}.cli").LightningCLI(  # takes jsonargparse
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
        hint = PROGRAM_HINT if "__main__." in lines else _LINKED_HINT
        raise CheckpointError(
            "Expected to build module and data from the config of LightningCLI, got "
            f"{type(error).__name__}: {lines} {hint}"
        ) from error
    return cli.model, cli.datamodule if data is None or is_datamodule else data, cli.trainer


def _optimizers(module: LightningModule, states: list[Any]) -> tuple[list[Optimizer], str | None]:
    """Return the module's optimizers in the state of the checkpoint; none and why where that takes more than these."""
    try:
        found = list(_optimizers_in(module.configure_optimizers()))
        for optimizer, state in zip(found, states, strict=True):
            optimizer.load_state_dict(state)
    except Exception as error:  # the user's code may ask the Trainer for what only a run has
        reason = str(error).splitlines()[0] if str(error) else ""
        return [], f"no edge of stability: `configure_optimizers` failed ({type(error).__name__}: {reason})"
    return found, None


def _without_state(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer for the user's code to read the learning rate; a state would be copied with the Trainer."""
    copied = copy(optimizer)
    copied.state = defaultdict(dict)
    return copied


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
