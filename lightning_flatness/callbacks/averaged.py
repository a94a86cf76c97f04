"""Weights that a callback averages over the run: EMA, SWA. Only what these callbacks offer in public is used."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_flatness.callbacks.loggers.hyperparameters import callbacks
from lightning_flatness.module.copying import Copier

MeasuredWeights = Literal["trained", "averaged"]


def averaging_callback(trainer: Trainer) -> Any:
    """Return the callback that averages weights, None if there is none.

    Args:
        trainer: Whose; ``WeightAveraging`` came with lightning 2.6, so both kinds are known by name.
    """
    kinds = {"WeightAveraging", "StochasticWeightAveraging"}
    found = (c for c in callbacks(trainer) if kinds & {base.__name__ for base in type(c).__mro__})
    return next(found, None)


def check_averaging(weights: MeasuredWeights, trainer: Trainer) -> None:
    """Check that there is an average to measure, or say that it is not measured.

    Args:
        weights: The weights to measure.
        trainer: With its callbacks.

    Raises:
        MisconfigurationException: If no callback averages weights.
    """
    averaging = averaging_callback(trainer)
    if weights == "averaged" and averaging is None:
        raise MisconfigurationException(
            "Expected a callback that averages weights (WeightAveraging, StochasticWeightAveraging) beside "
            "FlatnessMonitor(weights='averaged'), got none."
        )
    if weights == "trained" and averaging is not None:
        rank_zero_info(
            f"FlatnessMonitor measures the trained weights, not those that {type(averaging).__name__} averages. "
            "HINT: weights='averaged'."
        )


def averaged_module(trainer: Trainer, pl_module: LightningModule) -> LightningModule | None:
    """Return a copy of the module with the averaged weights.

    Args:
        trainer: The Trainer with the callback.
        pl_module: The module in training; it stays as it is.

    Returns:
        The copy; None before the first average.
    """
    state = _averaged_state(averaging_callback(trainer), trainer, pl_module)
    if state is None:
        return None
    copied: LightningModule = Copier({id(trainer): trainer}).copy(pl_module)
    copied.load_state_dict(state)
    return copied


def _averaged_state(callback: Any, trainer: Trainer, pl_module: LightningModule) -> Any:
    own = callback.state_dict()
    if "average_model_state" in own:  # of StochasticWeightAveraging
        return own["average_model_state"] if own.get("n_averaged") else None
    checkpoint: dict[str, Any] = {"state_dict": {}}
    callback.on_save_checkpoint(trainer, pl_module, checkpoint)  # puts the averaged weights there
    return checkpoint["state_dict"] or None
