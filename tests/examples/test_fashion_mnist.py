"""The reader of Fashion-MNIST: the original files and no others, with errors that say where to get them."""

from __future__ import annotations

import gzip
import hashlib
import struct

import fashion_mnist
import pytest
import torch
from fashion_mnist import FOLDER, SHA256, content, is_there, load, read_idx

installed = pytest.mark.skipif(not is_there(), reason="Debian's package dataset-fashion-mnist is not installed")

PUBLISHED_MD5 = {
    "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", 1504176606),
    "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", 1504176606),
    "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", 1504176627),
    "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", 1504176627),
}
"""Of the compressed files, as the authors' page has them, and the seconds in the headers of these."""


def small_files(folder, monkeypatch, *, compressed):
    """Write four small idx files, and accept their hashes."""
    rows = {"train": 3, "t10k": 2}
    for name in SHA256:
        num = rows[name.split("-")[0]]
        shape = (num, 2, 2) if "images" in name else (num,)
        values = bytes(range(torch.Size(shape).numel()))
        data = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values
        monkeypatch.setitem(SHA256, name, hashlib.sha256(data).hexdigest())
        (folder / f"{name}{'.gz' * compressed}").write_bytes(gzip.compress(data) if compressed else data)


@pytest.mark.parametrize("compressed", [True, False])
def test_reads_images_and_labels(tmp_path, monkeypatch, compressed):
    assert not is_there(tmp_path)
    small_files(tmp_path, monkeypatch, compressed=compressed)
    assert is_there(tmp_path)
    data = load(tmp_path)
    assert torch.equal(data.train_images, torch.arange(12, dtype=torch.uint8).view(3, 2, 2))
    assert data.train_labels.tolist() == [0, 1, 2]
    assert data.test_images.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert data.test_labels.tolist() == [0, 1]


@installed
@pytest.mark.parametrize("name", SHA256)
def test_debian_has_what_the_authors_published(name):
    """Compressed by the same gzip, but for what its header says: file name and time are gone."""
    packed = (FOLDER / f"{name}.gz").read_bytes()
    md5, seconds = PUBLISHED_MD5[name]
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", seconds) + packed[8:10] + name.encode() + b"\0"
    assert hashlib.md5(header + packed[10:]).hexdigest() == md5
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == SHA256[name]


@installed
def test_all_of_it():
    data = load()
    assert [tuple(part.shape) for part in data] == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert float(data.train_images.float().mean() / 255) == pytest.approx(0.2860, abs=1e-4)  # as is well known


def test_missing_file_says_where_to_get_it(tmp_path, monkeypatch):
    small_files(tmp_path, monkeypatch, compressed=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert not is_there(tmp_path)
    expected = r"Expected the file t10k-labels-idx1-ubyte.gz of Fashion-MNIST in .*, got no such file. .*--data-dir"
    with pytest.raises(FileNotFoundError, match=expected):
        load(tmp_path)


def test_another_data_set_is_refused(tmp_path, monkeypatch):
    small_files(tmp_path, monkeypatch, compressed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(ValueError, match=r"to hold train-images-idx3-ubyte of Fashion-MNIST .* as MNIST, or a damaged"):
        load(tmp_path)


def test_damaged_archive_is_refused(tmp_path, monkeypatch):
    small_files(tmp_path, monkeypatch, compressed=True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"Expected .*train-labels-idx1-ubyte.gz to be a whole gzip file, got: "):
        content(tmp_path, "train-labels-idx1-ubyte")
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"to be a whole gzip file, got: Not a gzipped file"):
        content(tmp_path, "train-labels-idx1-ubyte")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", r"Expected an idx file of bytes, .* got '00 00 0d'"),  # floats
        (b"\0", r"Expected an idx file of bytes, .* got '00'"),
        (b"\0\0\x08\1\0\0\0\3ab", r"Expected 3 bytes in an idx file of \[3\], got 2."),
        (b"\0\0\x08\2\0\0\0\1\0\0\0\1ab", r"Expected 1 bytes in an idx file of \[1, 1\], got 2."),
    ],
)
def test_what_is_no_idx_file_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        read_idx(data)


@installed
def test_reduced_images_are_means_of_four_pixels():
    from fashion import images

    x, y = images(5)
    raw = load().train_images[:5].double() / 255
    means = torch.stack([raw[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(dim=0)
    assert x.shape == (5, 1, 14, 14)
    assert torch.allclose(x[:, 0].double(), (means - means.mean()) / means.std(), atol=1e-5)
    assert y.tolist() == fashion_mnist.load().train_labels[:5].tolist()
