"""A tokenizer and models small enough for every test to make its own, and what tests do with them."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, PeftModelForCausalLM
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, END_OF_TURN = "<pad>", "<bos>", "<eos>", "<end>"
CORPUS = [
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request.",
    "\n\n### Instruction:\n\n\n### Input:\n\n\n### Response:",
    "How many are left now? There are 12 in all. The answer is: 34 56 78 90",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def tiny_tokenizer(
    *, pad_is_eos: bool = False, add_bos: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> Any:
    """A `PreTrainedTokenizerFast`: byte-level BPE, at most 384 tokens, encodes any text without loss.

    Args:
        pad_is_eos: let the padding token be the end-of-sequence token, as many chat models have it.
        add_bos: put the beginning-of-sequence token before every text, as Llama tokenizers do.
        chat_template: a Jinja template; the default ends each turn with `<end>`, which is not the eos token.
    """
    core = Tokenizer.from_str(_core())
    if add_bos:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=EOS if pad_is_eos else PAD, bos_token=BOS, eos_token=EOS
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _core() -> str:
    """The trained tokenizer as JSON: copies are made much faster than it is trained."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[PAD, BOS, EOS, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 2, trainer)
    return core.to_str()


def tiny_llama(
    *,
    vocab_size: int = 384,
    hidden: int = 32,
    layers: int = 2,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A randomly initialised Llama, in evaluation mode, equal for equal seeds.

    Args:
        vocab_size: rows of the embedding; the default holds every token of `tiny_tokenizer`.
        hidden: hidden size; NF4 needs a multiple of its block size, 64.
        layers: how many decoder layers.
        tie: share the embedding with the output head.
        dtype: of the weights.
        seed: of the weights; the global generator is left as it was.
    """
    return deepcopy(_llama(vocab_size, hidden, layers, tie, dtype, seed))


@cache
def _llama(vocab_size: int, hidden: int, layers: int, tie: bool, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()  # type: ignore[arg-type]


def tiny_gpt2(
    *, hidden: int = 32, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2: Conv1D layers, a tied head, no dropout."""
    return deepcopy(_gpt2(hidden, layers, dtype, seed))


@cache
def _gpt2(hidden: int, layers: int, dtype: torch.dtype, seed: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=384,
        n_positions=64,
        n_embd=hidden,
        n_layer=layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    return model.to(dtype).eval()  # type: ignore[arg-type]


def token_batch(seed: int = 0) -> Tensor:
    """(2, 10) token ids that every tiny model knows."""
    return torch.randint(0, 384, (2, 10), generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module) -> Tensor:
    """A model's logits for one fixed batch, (2, 10, vocab) fp32, in whatever mode the model is."""
    with torch.no_grad():
        return model(input_ids=token_batch()).logits.float()


def train_steps(
    model: nn.Module, steps: int = 3, *, first: int = 0, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Train what is trainable for a few steps, each on a batch of its own; the mode stays as it is.

    Args:
        model: a causal language model.
        steps: how many.
        first: number of the first step, so that training can be continued with the batches that follow.
        optimizer: to be continued; None for a new AdamW with a learning rate that visibly moves a tiny model.

    Returns:
        The loss of each step.
    """
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(first, first + steps):
        batch = token_batch(seed=100 + step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def largest_difference(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return float((left.detach().double() - right.double()).abs().max())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in a model's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two dicts hold the same names with the same bits (NaN equals NaN)."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def global_generators() -> tuple[Any, ...]:
    """The states of all global random number generators."""
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def save_by_peft_alone(model: Any, directory: Path) -> None:
    """What PEFT's own code writes of an adapted model: the rank-r adapter, and `pissa_init/` beside it."""
    ours = type(model)
    model.__class__ = PeftModelForCausalLM
    try:
        PeftModel.save_pretrained(model, str(directory))
    finally:
        model.__class__ = ours
