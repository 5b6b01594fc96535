"""Small language models with something to lose: trained once, on generated word problems, and kept in the cache.

Studies that need many runs cannot afford a real model on a laptop's processor, and random weights have no principal
components worth the name. So a model of less than a million parameters first learns the word problems of `arithmetic`,
as a checkpoint on the disk like any other: many of the kinds in `TRAINED`, few of those in `UNSEEN`. The studies teach
it the latter, of which it knows the words, the arithmetic and a little of how they go: a pretrained model and a task
from the rare end of what it was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from pissa.checkpoint.disk.write import output_directory
from pissa.data.encode import Collator, encode
from pissa.data.prompts import prompt_text
from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError
from pissa.lab.demo.arithmetic import draw_problems
from pissa.lab.demo.problem_templates import TRAINED, UNSEEN
from pissa.lab.models import cache_directory
from pissa.provenance import sha256_of_document

from .fit import fit

VOCABULARY = 640
SEED = 1
"""The seed of the problems and of pretraining."""
COMMON, RARE = 8000, 400
"""Problems that are pretrained on, of `TRAINED` and of `UNSEEN`."""
ADAPTED_TO = 2000
"""Problems of `UNSEEN` that are left to learn."""
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 128},
    "gemma": {},
    "qwen2": {},
    "gpt2": {"n_head": 4, "n_positions": 512},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
}
"""transformers' name of a family -> what it has beside SIZES."""


def small_lm(
    family: str = "llama", *, hidden: int = 128, layers: int = 3, steps: int = 4000, progress: Progress | None = None
) -> Path:
    """The directory of a small pretrained model; trained on first use (nine minutes of one core).

    Args:
        family: one of FAMILIES.
        hidden: width, a multiple of 64 so that NF4 can hold it.
        layers: blocks.
        steps: of pretraining, on 16 problems each.
        progress: a bar to move while it is trained.

    Raises:
        ConfigError: no such family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"no small model of family {family!r}; there are {', '.join(FAMILIES)}")
    settings = {"family": family, "hidden": hidden, "layers": layers, "steps": steps, "vocabulary": VOCABULARY}
    settings |= {"seed": SEED, "common": COMMON, "rare": RARE}
    digest = sha256_of_document(settings)[:8]
    directory = cache_directory() / f"small-{family}-{digest}"
    if not (directory / "config.json").is_file():
        _pretrain(family, hidden, layers, steps, directory, progress)
    return directory


def problems() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that the models are pretrained on, and rows that they are to learn: no problem is in both."""
    rare = draw_problems(UNSEEN, RARE + ADAPTED_TO, SEED)
    rows = draw_problems(TRAINED, COMMON, SEED) + rare[:RARE]
    rng = random.Random(SEED)
    return sorted(rows, key=lambda _: rng.random()), rare[RARE:]


def _pretrain(family: str, hidden: int, layers: int, steps: int, directory: Path, progress: Progress | None) -> None:
    rows = problems()[0][: 16 * steps]
    tokenizer = _tokenizer([prompt_text(e, None, "alpaca") + e.response for e in examples_from_rows(rows)[:1500]])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(family, hidden, layers).to(device).train()
    encoded = encode(examples_from_rows(rows), tokenizer, template="alpaca", max_length=256)

    def batches() -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(SEED)
        collate = Collator(tokenizer.pad_token_id)
        while True:
            order = torch.randperm(len(encoded), generator=generator).tolist()
            for start in range(0, len(order) - 15, 16):
                batch = dict(collate([encoded[i] for i in order[start : start + 16]]))
                # a language model learns its questions too
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
                yield batch

    bar = None if progress is None else progress.add_task(f"pretraining a small {family}", total=steps, note="")

    def advance(_: int) -> None:
        if progress is not None and bar is not None:
            progress.update(bar, advance=1)

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    fit(model, batches(), loss, learning_rate=2e-3, steps=steps, weight_decay=0.01, after_step=advance)
    with output_directory(directory) as partial:
        model.cpu().save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def random_model(family: str, hidden: int, layers: int, seed: int = 0) -> Any:
    """A model of a family with random weights; the global generator is left as it was."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, "hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": hidden // 4}
    sizes["num_hidden_layers"] = layers
    own = dict(FAMILIES[family])
    if family == "gpt2":
        sizes = {"tie_word_embeddings": False}
        own |= {"n_embd": hidden, "n_inner": 2 * hidden, "n_layer": layers}
        own |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **sizes, **own, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE learned from these texts, each digit a token of its own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, words])  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
