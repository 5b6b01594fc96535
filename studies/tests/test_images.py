"""Images as they come from files, their batches and their augmentation."""

from __future__ import annotations

import gzip
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pissa.errors import DataError
from studies.images import Images, accuracy, augmented, mnist, pacs, patterns


def test_pacs_is_decoded_by_domain(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    files, offset = b"", [0]
    for level in (30, 200, 90):
        buffer = io.BytesIO()
        image.new("RGB", (64, 64), (level, 0, 0)).save(buffer, "JPEG", quality=95)
        files += buffer.getvalue()
        offset.append(len(files))
    np.savez(
        tmp_path / "pacs64_jpeg.npz",
        jpeg=np.frombuffer(files, np.uint8),
        offset=np.array(offset),
        domain=np.array([0, 1, 0], np.uint8),
        label=np.array([4, 2, 6], np.uint8),
        domains=np.array([b"photo", b"sketch"]),
    )
    found = pacs(tmp_path, 48)
    assert found.keys() == {"photo", "sketch"}
    assert found["photo"].labels.tolist() == [4, 6]
    assert found["photo"].pixels.shape == (2, 3, 48, 48)
    for picture, level in zip(found["photo"].pixels, (30, 90), strict=True):
        assert picture[0].float().mean() == pytest.approx(level, abs=4)
        assert picture[1:].float().mean() < 6


def test_mnist_is_read_and_scaled(tmp_path: Path) -> None:
    digits = np.zeros((2, 28, 28), np.uint8)
    digits[1] = 255
    header = bytes(16)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + digits.tobytes()))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes([3, 9])))
    found = mnist(tmp_path, 32)
    assert found.labels.tolist() == [3, 9]
    assert found.pixels.shape == (2, 3, 32, 32)
    assert found.pixels.float().mean((1, 2, 3)).tolist() == [0, 255]


def test_missing_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(DataError, match="PACS in 64 pixels"):
        pacs(tmp_path, 48)
    with pytest.raises(DataError, match="MNIST cannot be read"):
        mnist(tmp_path, 28)


def test_split_and_batches_use_every_image_once_an_epoch() -> None:
    images = patterns(20, 4, 16)
    first, rest = images.split(0.8, seed=3)
    assert (len(first), len(rest)) == (16, 4)
    rows = {tuple(p.flatten().tolist()) for part in (first, rest) for p in part.pixels}
    assert len(rows) == 20
    again, _ = images.split(0.8, seed=3)
    assert torch.equal(first.pixels, again.pixels)
    batches = list(itertools.islice(images.batches(5, seed=0), 8))
    for epoch in (batches[:4], batches[4:]):
        assert sorted(label for _, labels in epoch for label in labels.tolist()) == sorted(images.labels.tolist())
    assert not torch.equal(torch.cat([b[1] for b in batches[:4]]), torch.cat([b[1] for b in batches[4:]]))
    assert batches[0][0].abs().max() <= 1


def test_augmentation_moves_and_mirrors_whole_images() -> None:
    pixels = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    pixels[:, :, 8, 6] = 100
    moved = augmented(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape
    places = (moved[:, 0] == 100).nonzero()
    assert len(places) == 400
    columns = places[:, 2].unique()
    assert len(columns) == 2  # as it was, or mirrored; moved alike
    assert 120 < int((places[:, 2] == columns[0]).sum()) < 280


def test_accuracy_counts_right_answers_and_leaves_the_mode() -> None:
    class Oracle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return nn.functional.one_hot(((x[:, 0, 0, 0] + 1) * 127.5).round().long(), 10).float()

    labels = torch.arange(10)
    shown = labels.clone()
    shown[0] = 5
    images = Images(shown[:, None, None, None].expand(-1, 3, 4, 4).to(torch.uint8), labels)
    model = Oracle().train()
    assert accuracy(model, images, batch_size=3) == 0.9
    assert model.training
