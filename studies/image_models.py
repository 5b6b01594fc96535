"""Two small image classifiers, a ViT and a convolutional network, and their pretraining, done once and kept.

Pretrained weights of that size cannot be downloaded, so a study makes its own: what PiSSA needs is a weight that has
learned something, not a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pissa.checkpoint.disk.write import output_file
from pissa.provenance import sha256_of_document

from .fit import fit
from .images import Images, image_loss

CHANNELS = (32, 64, 128, 128)


class SmallCnn(nn.Module):
    """Four 3×3 convolutions of stride 2, each with group normalisation, then the mean over positions and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        sizes = list(zip((3, *CHANNELS), CHANNELS, strict=False))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in CHANNELS)
        self.classifier = nn.Linear(CHANNELS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) -> (batch, classes)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.classifier(x.mean((-2, -1)))


def small_vit(size: int, classes: int, *, hidden: int = 96, layers: int = 4) -> nn.Module:
    """transformers' ViT with random weights, in patches of 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=size,
        patch_size=8,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=classes,  # pyright: ignore[reportCallIssue] -- PreTrainedConfig's
    )
    return ViTForImageClassification(config)


def make_network(kind: str, size: int, classes: int, seed: int = 0) -> nn.Module:
    """A network with random weights, the same for the same seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return small_vit(size, classes) if kind == "vit" else SmallCnn(classes)


def with_new_head(model: Any, classes: int, seed: int) -> Any:
    """The model with a random head for so many classes in place of its own."""
    width = model.classifier.in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.classifier = nn.Linear(width, classes)
    return model


def pretrained(
    kind: str,
    images: Images,
    directory: Path,
    *,
    classes: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    about: Mapping[str, Any],
) -> nn.Module:
    """A network trained on images from random weights; read back where an earlier call left it.

    Args:
        kind: "vit" or "cnn".
        images: what to train on, mirrored and moved at random.
        directory: where its weights are kept.
        classes, steps, batch_size, learning_rate: of the training.
        about: what tells these images from others.

    Returns:
        The network, on the CPU, in training mode.
    """
    size = images.pixels.shape[-1]
    settings = {"kind": kind, "size": size, "steps": steps, "batch": batch_size, "rate": learning_rate, **about}
    digest = sha256_of_document(settings)[:12]
    path = directory / f"{kind}-{digest}.safetensors"
    model = make_network(kind, size, classes)
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    batches = images.batches(batch_size, seed=0, augment=True)
    fit(model, batches, image_loss, learning_rate=learning_rate, steps=steps, weight_decay=0.05)
    model.cpu()
    directory.mkdir(parents=True, exist_ok=True)
    if path.is_file():  # another pass was faster
        return model
    with output_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    return model
