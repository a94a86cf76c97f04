"""The way of a product: how many frames lie between the monitor and the user's ``training_step``.

    python tests/landscape/test_frames.py

prints them.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatness import FlatnessMonitor

MOST_FRAMES = 18
"""Both ends not counted: ``on_train_epoch_end`` and ``training_step``."""


class Recording(LightningModule):
    """Records, at each ``training_step``, the functions that are on the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        stack: list[str] = []
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            code = frame.f_code
            stack.append(f"{code.co_filename.rpartition('/lightning_flatness/')[2]}: {code.co_name}")
            frame = frame.f_back
        STACKS.append(stack[::-1])
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


STACKS: list[list[str]] = []  # not on the module: what a copy holds is lost


def frames_of_a_product() -> list[str]:
    """Return the functions between the monitor and the module in a product that rebuilds its graphs."""
    STACKS.clear()
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(3, (16,))), batch_size=4)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[FlatnessMonitor(engine="rebuilt", probe_size=8)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*STACKS.* changed")  # it is meant to
        trainer.fit(Recording(), loader)
    ways = []
    for stack in STACKS:
        monitor = [i for i, name in enumerate(stack) if name.endswith("monitor.py: on_train_epoch_end")]
        if monitor and any(name.endswith(": hvp") for name in stack):
            ways.append(stack[monitor[0] + 1 : -1])
    return max(ways, key=len)


def test_a_product_goes_down_once():
    frames = frames_of_a_product()
    print("\n".join(frames))
    assert len(frames) <= MOST_FRAMES
    rooms = [name.split("/")[1].partition(":")[0] for name in frames if name.startswith("landscape/")]
    assert rooms == ["loss_landscape.py", "engines", "engines", "engines", "batched_loss.py"]


if __name__ == "__main__":
    frames = frames_of_a_product()
    print("\n".join(frames))
    print(f"{len(frames)} frames")
