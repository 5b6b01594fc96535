"""Labelled images of the vision studies: PACS in 64 pixels, MNIST, and patterns that need no file.

PACS has seven classes in four domains (art, cartoon, photo, sketch): a network is pretrained on three of them and
adapted to the fourth. In the patterns a class is a direction of stripes and a domain a colour and a noise level.
"""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad

from pissa.errors import DataError, MissingExtraError

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS = "pacs64_jpeg.npz"
MNIST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
SHIFT = 4
"""Pixels by which augmentation moves an image at most."""


@dataclass(frozen=True)
class Images:
    """Some images of one size with their classes."""

    pixels: Tensor
    """(n, 3, size, size) uint8."""
    labels: Tensor
    """(n,) int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, places: Tensor | slice) -> Images:
        return Images(self.pixels[places], self.labels[places])

    def split(self, share: float, seed: int) -> tuple[Images, Images]:
        """A random part of this share, and the rest."""
        first, rest = split_places(len(self), share, seed)
        return self[first], self[rest]

    def batches(self, size: int, seed: int, *, augment: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for ever, each epoch in an order of its own: inputs (size, 3, s, s) fp32 in [−1, 1], labels."""
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(self))
        while True:
            order = torch.randperm(len(self), generator=generator)
            for start in range(0, len(self) - size + 1, size):
                part = self[order[start : start + size]]
                pixels = augmented(part.pixels, generator) if augment else part.pixels
                yield as_input(pixels), part.labels


def split_places(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places 0 … count − 1 in a random part of this share, and the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = round(share * count)
    return order[:first], order[first:]


def as_input(pixels: Tensor) -> Tensor:
    """uint8 pixels as a network's input, in [−1, 1]."""
    return pixels.float() / 127.5 - 1


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, all of them moved by a few pixels."""
    count, size = len(pixels), pixels.shape[-1]
    mirror = torch.rand(count, generator=generator) < 0.5
    pixels = torch.where(mirror[:, None, None, None], pixels.flip(-1), pixels)
    wide = pad(pixels, (SHIFT,) * 4, value=255)
    x, y = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    return wide[..., y : y + size, x : x + size]


def pacs(directory: Path, size: int) -> dict[str, Images]:
    """Domain -> its images.

    Args:
        directory: holds pacs64_jpeg.npz.
        size: pixels a side.

    Raises:
        DataError: the file is missing or is something else.
        MissingExtraError: Pillow, which decodes the images, is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("PACS needs Pillow: pip install 'pissa[report]'") from error
    path = directory / PACS
    try:
        with np.load(path) as archive:
            jpeg, offset = archive["jpeg"], archive["offset"]
            domain, label = archive["domain"], archive["label"]
            names = [name.decode() for name in archive["domains"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as PACS in 64 pixels: {error}") from error
    pixels = np.empty((len(label), size, size, 3), np.uint8)
    for number in range(len(label)):
        image = Image.open(io.BytesIO(jpeg[offset[number] : offset[number + 1]].tobytes())).convert("RGB")
        fitting = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
        pixels[number] = np.asarray(fitting)
    everything = Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(label.astype(np.int64)))
    return {name: everything[torch.from_numpy(domain == place)] for place, name in enumerate(names)}


def mnist(directory: Path, size: int) -> Images:
    """The ten thousand test digits, in three equal channels.

    Args:
        directory: holds the two t10k files.
        size: pixels a side.

    Raises:
        DataError: a file is missing or is something else.
    """
    try:
        digits, labels = (gzip.decompress((directory / name).read_bytes()) for name in MNIST)
    except (OSError, EOFError) as error:
        raise DataError(f"MNIST cannot be read from {directory}: {error}") from error
    grey = torch.frombuffer(bytearray(digits), dtype=torch.uint8)[16:].reshape(-1, 1, 28, 28)
    scaled = interpolate(grey.float(), (size, size), mode="bilinear", align_corners=False).round().to(torch.uint8)
    return Images(
        scaled.expand(-1, 3, -1, -1).contiguous(), torch.frombuffer(bytearray(labels), dtype=torch.uint8)[8:].long()
    )


def patterns(count: int, classes: int, size: int, *, domain: int = 0) -> Images:
    """Generated images: the class is the direction of the stripes, the domain their colour, width and noise."""
    generator = torch.Generator().manual_seed(domain)
    labels = torch.arange(count) % classes
    angle = math.pi * labels / classes
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    stripes = torch.sin(along * (0.6 + 0.2 * domain) + phase)[:, None]
    colour = torch.rand(3, generator=generator)[None, :, None, None]
    noise = 0.1 * (1 + domain) * torch.randn(count, 3, size, size, generator=generator)
    pixels = 127.5 + 90 * (colour * stripes + noise)
    return Images(pixels.clamp(0, 255).to(torch.uint8), labels)


def image_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a classifier on a batch."""
    return cross_entropy(class_scores(model, batch[0]), batch[1])


def class_scores(model: Any, inputs: Tensor) -> Tensor:
    """(batch, classes) of a network of transformers or of torch."""
    found = model(inputs)
    return getattr(found, "logits", found)


@torch.no_grad()
def scores_on(model: nn.Module, images: Images, batch_size: int = 256) -> Tensor:
    """(n, classes) on the CPU, of a model in evaluation mode; its mode stays as it was."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    starts = range(0, len(images), batch_size)
    parts = [class_scores(model, as_input(images.pixels[i : i + batch_size]).to(device)).cpu() for i in starts]
    model.train(training)
    return torch.cat(parts)


def accuracy(model: nn.Module, images: Images, batch_size: int = 256) -> float:
    """Share of the images whose class a model finds, in evaluation mode; its mode stays as it was."""
    return int((scores_on(model, images, batch_size).argmax(-1) == images.labels).sum()) / len(images)


def held_out_loss(model: nn.Module, images: Images) -> float:
    """Mean cross-entropy on images, in evaluation mode; the model's mode stays as it was."""
    return float(cross_entropy(scores_on(model, images), images.labels))
