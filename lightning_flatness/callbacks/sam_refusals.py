"""What SAM's callback refuses before the first step, and why."""

from __future__ import annotations

import inspect

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.optim import LBFGS, Optimizer

from lightning_flatness.callbacks.strategies import why_unsupported
from lightning_flatness.geometry import LinearGeometry
from lightning_flatness.module.sharding import has_sharded_weights, is_tensor_parallel
from lightning_flatness.sam import SAM, why_no_ascent


def check_module(trainer: Trainer, module: LightningModule) -> None:
    """Refuse modules and strategies.

    Raises:
        MisconfigurationException: If the callback cannot train them.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "SharpnessAwareMinimization works with automatic optimization only, got a module with manual "
            "optimization. HINT: Wrap its optimizer instead: lightning_flatness.SAM(optimizer, rho=0.05)."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            "SharpnessAwareMinimization needs each batch twice, got a `training_step` that takes "
            "`dataloader_iter`. HINT: Let `training_step` take `batch`."
        )
    if why_unsupported(trainer) is not None:
        raise MisconfigurationException(
            "SharpnessAwareMinimization needs the whole weights and gradients on every device, got the strategy "
            f"{type(trainer.strategy).__name__}. HINT: Use strategy='auto' or 'ddp', or "
            "ModelParallelStrategy with torch.distributed.fsdp.fully_shard."
        )


def check_weights(module: LightningModule, geometry: LinearGeometry, *, sync_perturbation: bool) -> None:
    """Refuse sharded weights that the callback cannot perturb.

    Raises:
        MisconfigurationException: If it cannot.
    """
    if not has_sharded_weights(module):
        return
    if is_tensor_parallel(module):
        raise MisconfigurationException(
            "SharpnessAwareMinimization needs gradients that are whole or sharded by FSDP2 alone, got a module "
            "with tensor parallelism. HINT: Use fully_shard with tensor_parallel_size=1, or DDP."
        )
    if not sync_perturbation:
        raise MisconfigurationException(
            "SharpnessAwareMinimization needs whole gradients for `sync_perturbation=False`, got weights "
            "sharded by FSDP2, of which each rank has a part. HINT: Use sync_perturbation=True."
        )
    if geometry.needs_whole_weights:
        raise MisconfigurationException(
            f"SharpnessAwareMinimization needs whole weights for the geometry {geometry.name!r}, got "
            "weights sharded by FSDP2. HINT: Use the geometry 'layer' or 'element', or DDP."
        )


def check_optimizer(optimizer: Optimizer, ascent: str) -> None:
    """Refuse optimizers that evaluate the closure themselves, or cannot give the direction.

    Raises:
        MisconfigurationException: If this is one.
    """
    if isinstance(optimizer, LBFGS | SAM):
        raise MisconfigurationException(
            "SharpnessAwareMinimization needs an optimizer that takes one step per gradient, got "
            f"{type(optimizer).__name__}. HINT: Return e.g. torch.optim.SGD or torch.optim.AdamW from "
            "`configure_optimizers`; SAM is for manual optimization, without this callback."
        )
    if (reason := why_no_ascent(optimizer, ascent)) is not None:
        raise MisconfigurationException(f"SharpnessAwareMinimization: {reason}")
