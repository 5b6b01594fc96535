"""Fine-tuning within a study: a small language model, word problems, and one run as one cell of a grid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pissa.checkpoint.disk.write import output_directory
from pissa.checkpoint.source.load import load_tokenizer
from pissa.data.encode import Collator, encode
from pissa.data.rows import examples_from_rows
from pissa.evaluation.loss import held_out_loss
from pissa.lab.models import smollm2
from pissa.provenance import sha256
from pissa.training.loss import response_loss
from pissa.training.recipe import Recipe
from pissa.training.run import quieten, train

from .study import Settings

RUNS = "runs"
Row = dict[str, Any]


def language_model(settings: Settings) -> str:
    """The model that language studies train: `--model`, else SmolLM2-135M-Instruct, in a quick pass a tiny random one.

    Returns:
        A directory or hub id.
    """
    if settings.model is not None:
        return settings.model
    return str(tiny_model(settings.out / RUNS / "tiny-llama") if settings.scale == "quick" else smollm2())


def tiny_model(directory: Path, *, hidden: int = 64, layers: int = 2) -> Path:
    """A random Llama with a byte-level tokenizer, made where it does not exist; the same on every machine.

    Args:
        directory: for the model.
        hidden: its width, a multiple of 64 so that NF4 can hold it.
        layers: blocks.

    Returns:
        The directory.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (directory / "config.json").is_file():
        return directory
    symbols = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={symbol: place for place, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with output_directory(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return directory


def fine_tune(
    settings: Settings,
    recipe: Recipe,
    rows: Sequence[Row],
    held_out: Sequence[Row] = (),
    *,
    also: Callable[[Any, Any], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train once and measure, as the values of one cell; a run that was stopped goes on from its last checkpoint.

    Args:
        settings: say which model, and where the run lies while it is under way; it is removed when it has ended.
        recipe: of the run.
        rows: training rows.
        held_out: rows whose mean loss is measured afterwards.
        also: more measurements of the trained model, given it and its tokenizer.

    Returns:
        `losses` and `grad_norms` (one a step), `tokens_per_second`, `init_seconds`, `trainable_parameters`, and with
        held-out rows `held_out_loss`, in nats a token.

    Raises:
        PissaError: see `train`.
    """
    quieten()
    base = language_model(settings)
    identity = json.dumps([base, recipe.as_dict(), list(rows)], sort_keys=True, default=list)
    directory = settings.out / RUNS / sha256(identity.encode())[:16]
    run = train(base, list(rows), directory, recipe, quiet=True)
    if run.model is None:  # it had ended, and its cell was not written
        shutil.rmtree(directory)
        run = train(base, list(rows), directory, recipe, quiet=True)
    names = ("losses", "grad_norms", "tokens_per_second", "init_seconds", "trainable_parameters")
    values = {name: run.results.get(name) for name in names}
    if held_out:
        loss = held_out_loss(run.model, load_tokenizer(base), examples_from_rows(held_out))
        values["held_out_loss"] = loss.mean
    if also is not None:
        values |= also(run.model, load_tokenizer(base))
    shutil.rmtree(directory)
    return values


def batches_in_memory(source: str, rows: Sequence[Row], batch_size: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches in the order of the rows, from the start again where they end, for a loop that keeps the model at hand.

    Args:
        source: whose tokenizer.
        rows: training rows.
        batch_size: rows a batch.
        count: batches.

    Returns:
        `input_ids`, `attention_mask` and `labels` of each batch.
    """
    tokenizer = load_tokenizer(source)
    encoded = encode(examples_from_rows(rows), tokenizer, template="alpaca", max_length=512)
    collate = Collator(tokenizer.pad_token_id or 0)
    places = [[(step * batch_size + i) % len(encoded) for i in range(batch_size)] for step in range(count)]
    return [dict(collate([encoded[place] for place in batch])) for batch in places]


def response_mean(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of a batch's response tokens, as a loss for `fit`."""
    total, count = response_loss(model, model.get_output_embeddings(), batch)
    return total / max(count, 1)
