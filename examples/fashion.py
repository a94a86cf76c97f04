"""Fashion-MNIST at 14 x 14 pixels, as Debian's package ``dataset-fashion-mnist`` has it, and small networks for it."""

from __future__ import annotations

from pathlib import Path

from fashion_mnist import FOLDER, content, read_idx
from torch import Tensor, nn
from torch.nn import functional as F


def images(num_samples: int, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Return the first training images, shape (num_samples, 1, 14, 14), standardised, and their classes."""
    x, labels = _read("train", num_samples, folder)
    return (x - x.mean()) / x.std(), labels


def images_to_test(num_samples: int, num_train: int, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Return the first test images, moved and scaled as :func:`images` does the first training images, and classes."""
    x, labels = _read("t10k", num_samples, folder)
    train, _ = _read("train", num_train, folder)
    return (x - train.mean()) / train.std(), labels


def _read(files: str, num_samples: int, folder: Path) -> tuple[Tensor, Tensor]:
    pixels, labels = (read_idx(content(folder, f"{files}-{name}-ubyte")) for name in ("images-idx3", "labels-idx1"))
    return F.avg_pool2d(pixels[:num_samples, None].float() / 255, 2), labels[:num_samples].long()


class Lstm(nn.Module):
    """Reads the rows of an image one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(14, 24, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.cell(x.flatten(1, 2))[0][:, -1]
        outputs: Tensor = self.head(last)
        return outputs


def network(kind: str) -> nn.Module:
    """Return a network with new weights: ``"mlp"``, ``"cnn"``, ``"cnn with BatchNorm"`` or ``"lstm"``."""
    if kind == "lstm":
        return Lstm()
    if kind == "mlp":
        layers = nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        return nn.Sequential(nn.Flatten(), *layers)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if kind == "cnn with BatchNorm" else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 8), *block(8, 16), nn.Flatten(), nn.Linear(144, 10))
