"""What the study of images trains: images to adapt to, pretrained networks, and one run.

    PACS      a network pretrained on art, cartoons and photos learns sketches; a `--model` learns all four domains
    DIGITS    MNIST's, with a new head

Every seed has its own 80/20 split, as in the report. A search for learning rates sees images that no seed tests on.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pissa.adapted.adapt import adapt
from pissa.checkpoint.source.no_foreign_code import through_transformers
from pissa.config import PissaConfig
from pissa.errors import ConfigError, TrainingError

from .fit import Diverged, fit
from .image_models import pretrained, with_new_head
from .images import DOMAINS, Images, accuracy, held_out_loss, image_loss, mnist, pacs, patterns, split_places
from .language import RUNS
from .study import Settings

PACS, DIGITS = "pacs", "mnist"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora-kaiming"},
    "pissa": {"method": "pissa"},
    "random-pissa": {"method": "random-pissa"},
    "robust-pissa": {"method": "robust-pissa"},
    "cura": {"method": "cura", "cur_core": "intersection"},
    "cura-optimal": {"method": "cura", "cur_core": "optimal"},
}
"""Name -> how `PissaConfig` says it. The report's CURA has the intersection's inverse; the default here is optimal."""
ADAPTED_TO = "sketch"
SIZE = 48
QUICK_SIZE = 16
QUICK_CLASSES = 4
TRAINING = 0.8
"""Share of the images that are trained on; the others are tested on, or in a search validated on."""


def image_run(
    settings: Settings,
    *,
    task: str,
    network: str,
    method: str,
    rank: int,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
) -> dict[str, Any]:
    """Adapt a network, train it, and test it.

    Returns:
        `accuracy`, 0 where training failed; `failed`, why it did, or None; `losses` by step; `first_grad_norm`;
        `accuracy_by_step`, on digits, every `look_every(settings)` steps and 0 after a failure; `residual_norm`, the
        largest ‖W_res‖ / ‖W‖ over layers, of CURA.
    """
    train, test = images_of(settings, task).split(TRAINING, seed)
    model, residual_norm = adapted(settings, task, network, method, rank, seed)
    few = test[: settings.pick(quick=8, default=250, full=len(test))]
    by_step: list[float] = []

    def look(step: int) -> None:
        if task == DIGITS and step % look_every(settings) == 0:
            by_step.append(accuracy(model, few))

    try:
        seen = fit(model, train.batches(batch, seed), image_loss, learning_rate=rate, steps=steps, after_step=look)
        right, failed = accuracy(model, test), None
    except Diverged as error:
        seen, right, failed = error.seen, 0.0, str(error)
    looks = steps // look_every(settings) if task == DIGITS else 0
    return {
        "accuracy": right,
        "failed": failed,
        "losses": seen.losses,
        "first_grad_norm": seen.grad_norms[0] if seen.grad_norms else 0.0,
        "accuracy_by_step": by_step + [0.0] * (looks - len(by_step)),
        "residual_norm": residual_norm,
    }


def image_search_run(
    settings: Settings,
    *,
    task: str,
    network: str,
    method: str,
    rank: int,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    tested: Sequence[int],
) -> dict[str, Any]:
    """The same on images that none of the seeds `tested` tests on; returns `held_out_loss` and `accuracy`.

    Raises:
        TrainingError: training failed.
    """
    train, validation = untested(images_of(settings, task), tested).split(TRAINING, seed)
    model, _ = adapted(settings, task, network, method, rank, seed)
    fit(model, train.batches(batch, seed), image_loss, learning_rate=rate, steps=steps)
    loss = held_out_loss(model, validation)
    if not math.isfinite(loss):
        raise TrainingError(f"held-out loss {loss:g} after {steps} steps at {rate:g}; lower the learning rate")
    return {"held_out_loss": loss, "accuracy": accuracy(model, validation)}


def look_every(settings: Settings) -> int:
    """Steps between two measurements of accuracy on digits."""
    return settings.pick(quick=1, default=10, full=10)


def untested(images: Images, seeds: Sequence[int]) -> Images:
    """The images on which no seed tests.

    Raises:
        ConfigError: there are so many seeds that hardly any image is left.
    """
    free = torch.ones(len(images), dtype=torch.bool)
    for seed in seeds:
        free[split_places(len(images), TRAINING, seed)[1]] = False
    if int(free.sum()) < 10:
        raise ConfigError(
            f"{len(seeds)} seeds test on nearly all {len(images)} images; give fewer, none is left to search"
        )
    return Images(images.pixels[free], images.labels[free])


def adapted(settings: Settings, task: str, network: str, method: str, rank: int, seed: int) -> tuple[Any, float | None]:
    """A pretrained network adapted in every linear (or convolutional) layer, and the norm of CURA's worst residual."""
    model = copy.deepcopy(network_of(settings, network))
    if task == DIGITS or settings.model is not None:
        model = with_new_head(model, int(images_of(settings, task).labels.max()) + 1, seed)
    config = PissaConfig(
        rank=rank,
        target_modules=r".*convs\.\d+" if network == "cnn" else "all-linear",
        modules_to_save=("classifier",),
        seed=seed,
        **METHODS[method],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a bad draw")  # it is in the results
        found = adapt(model, config).train()
    norms = [certificate.residual_norm for certificate in found.pissa.certificates.values()]
    residuals = [norm for norm in norms if norm is not None]
    return found.cuda() if torch.cuda.is_available() else found, max(residuals, default=None)


def before(settings: Settings, network: str) -> float | None:
    """Accuracy on the domain to come of a network that is not adapted; None of a `--model`, whose head is new."""
    return None if settings.model is not None else accuracy(network_of(settings, network), images_of(settings, PACS))


def images_of(settings: Settings, task: str) -> Images:
    """What is adapted to."""
    if settings.scale == "quick":
        return patterns(40, QUICK_CLASSES, QUICK_SIZE, domain=3 if task == PACS else 4)
    size = SIZE if settings.model is None else int(_from_hub(settings.model).config.image_size)
    if task == DIGITS:
        return _digits(settings.data_set("mnist"), size)
    domains = _domains(settings.data_set("pacs"), size)
    return domains[ADAPTED_TO] if settings.model is None else _joined(domains, DOMAINS)


def network_of(settings: Settings, kind: str) -> Any:
    """The network to adapt: `--model`, or the small one of this kind, pretrained."""
    if settings.model is not None:
        return _from_hub(settings.model)
    others = [name for name in DOMAINS if name != ADAPTED_TO]
    quick = settings.scale == "quick"
    images = (
        _joined({str(d): patterns(8, QUICK_CLASSES, QUICK_SIZE, domain=d) for d in range(3)}, ("0", "1", "2"))
        if quick
        else _joined(_domains(settings.data_set("pacs"), SIZE), others)
    )
    return pretrained(
        kind,
        images,
        settings.out / RUNS,
        classes=int(images.labels.max()) + 1,
        steps=settings.pick(quick=1, default=1000, full=4000),
        batch_size=settings.pick(quick=8, default=64, full=64),
        about={"domains": others, "quick": quick},
    )


@lru_cache(maxsize=1)
def _from_hub(source: str) -> Any:
    return through_transformers("AutoModelForImageClassification", source, "an image classifier", dtype=torch.float32)


@lru_cache(maxsize=2)
def _domains(directory: Path, size: int) -> dict[str, Images]:
    return pacs(directory, size)


@lru_cache(maxsize=2)
def _digits(directory: Path, size: int) -> Images:
    return mnist(directory, size)


def _joined(domains: Mapping[str, Images], names: Sequence[str]) -> Images:
    return Images(
        torch.cat([domains[name].pixels for name in names]), torch.cat([domains[name].labels for name in names])
    )
