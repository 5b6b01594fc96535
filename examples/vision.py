"""Vision: a small ViT that knows the digits 0 to 4 learns 5 to 9 through its principal components.

    python examples/vision.py OUT [--data DIR] [--pretraining 300] [--steps 100] [--rank 8]

DIR holds MNIST's two t10k files; without it the images are generated stripes. OUT/base is the pretrained network,
OUT/lora what training changed, OUT/merged one ordinary transformers model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from pissa import PissaConfig, adapt, export_lora, export_merged
from studies.fit import fit
from studies.image_models import make_network, with_new_head
from studies.images import Images, accuracy, image_loss, mnist, patterns

SIZE, CLASSES, BATCH = 32, 5, 64


def tasks(data: Path | None) -> tuple[Images, Images]:
    """What is known, and what is to be learned; five classes each."""
    if data is None:
        return patterns(600, CLASSES, SIZE), patterns(600, CLASSES, SIZE, domain=1)
    digits = mnist(data, SIZE)
    known, new = digits[digits.labels < CLASSES], digits[digits.labels >= CLASSES]
    return known, Images(new.pixels, new.labels - CLASSES)


def main() -> None:
    """Pretrain, adapt, train, export, and look at what each cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pretraining", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    known, new = tasks(options.data)
    network = make_network("vit", SIZE, CLASSES).train()
    fit(network, known.batches(BATCH, 0), image_loss, learning_rate=1e-3, steps=options.pretraining)
    with_new_head(network, CLASSES, seed=0).save_pretrained(options.out / "base")

    base = AutoModelForImageClassification.from_pretrained(options.out / "base")
    train, test = new.split(0.8, seed=0)
    model = adapt(base, PissaConfig(rank=options.rank, modules_to_save=["classifier"]))
    before = accuracy(model, test)
    fit(model.train(), train.batches(BATCH, 0), image_loss, learning_rate=1e-3, steps=options.steps)
    print(f"accuracy: {before:.3f} before, {accuracy(model, test):.3f} after {options.steps} steps")

    export_lora(model, options.out / "lora")
    export_merged(model, options.out / "merged")
    merged = AutoModelForImageClassification.from_pretrained(options.out / "merged").eval()
    with torch.no_grad():
        inputs = next(test.batches(8, 0))[0]
        off = float((merged(inputs).logits - model.eval()(inputs).logits).abs().max())
    print(f"the merged model, by transformers alone, is off by {off:.1e}")


if __name__ == "__main__":
    main()
