"""Fashion-MNIST from its four idx files, checked by hash: 60,000 images for training, 10,000 for testing, 28 x 28.

Nothing is downloaded. Debian's package ``dataset-fashion-mnist`` has the files; elsewhere a folder is named. Debian has
compressed them anew, so that what is hashed is the content: with the file names and times of the original archives put
back (2017-08-31 10:50:06 and 10:50:27 UTC), Debian's files have the four MD5 sums that the authors published.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Of Debian's package."""

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the uncompressed files."""

SOURCE = (
    "Debian and Ubuntu have it: apt-get install dataset-fashion-mnist. Elsewhere get the four files from "
    "https://github.com/zalandoresearch/fashion-mnist (data/fashion), and name their folder with --data-dir."
)


class FashionMnist(NamedTuple):
    """All images, of bytes (num_images, 28, 28), and their classes, of integers 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def is_there(folder: Path = FOLDER) -> bool:
    """Return whether a folder has all four files; what is in them is not looked at."""
    return all(_path(folder, name) is not None for name in SHA256)


def load(folder: Path = FOLDER) -> FashionMnist:
    """Read and check the four files, compressed (``.gz``) or not.

    Args:
        folder: Where they are.

    Returns:
        Images and classes.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is not that of Fashion-MNIST.
    """
    return FashionMnist(*(read_idx(content(folder, name)) for name in SHA256))


def content(folder: Path, name: str) -> bytes:
    """Return what one of the four files holds, uncompressed and checked."""
    path = _path(folder, name)
    if path is None:
        raise FileNotFoundError(f"Expected the file {name}.gz of Fashion-MNIST in {folder}, got no such file. {SOURCE}")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Expected {path} to be a whole gzip file, got: {error}. {SOURCE}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(
            f"Expected {path} to hold {name} of Fashion-MNIST (SHA-256 {SHA256[name]}), got {digest}: another data set "
            f"with these file names, as MNIST, or a damaged file. {SOURCE}"
        )
    return data


def read_idx(data: bytes) -> Tensor:
    """Return the array of bytes in an idx file: two zeros, 8 for bytes, the number of axes, their lengths, the bytes.

    Raises:
        ValueError: If it is not such a file.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"Expected an idx file of bytes, which starts with 00 00 08, got {data[:3].hex(' ')!r}.")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:]
    if len(values) != torch.Size(shape).numel():
        raise ValueError(f"Expected {torch.Size(shape).numel()} bytes in an idx file of {shape}, got {len(values)}.")
    return values.view(shape)


def _path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
