"""A program as a user writes it: LightningCLI with a module that has hyperparameters, and a DataModule of its own."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, widths: list[int], lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip([6, *widths], widths, strict=False)]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


class Data(pl.LightningDataModule):
    """Draws its samples from the global generator, as many do: only the run's seed brings them back."""

    def __init__(self, size: int = 40, batch_size: int = 10) -> None:
        super().__init__()
        self.size = size
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(7)
        self.train = TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(3, (size,)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)


class DataWithVal(Data):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.utils.data.Subset(self.train, range(20)), batch_size=self.batch_size)


class OtherNet(Net):
    def __init__(self, widths: list[int], lr: float = 0.1) -> None:
        super().__init__([2 * width for width in widths], lr)


if __name__ == "__main__":
    LightningCLI(Net, Data)
