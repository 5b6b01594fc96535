"""A tokenizer and a model small enough for every test to make its own."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    if add_bos:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=EOS if pad_is_eos else PAD, bos_token=BOS, eos_token=EOS
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(
    *, vocab_size: int = 384, tie: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlamaForCausalLM:
    """A randomly initialised Llama of hidden size 32 with 2 layers, in evaluation mode, equal for equal seeds.

    Args:
        vocab_size: rows of the embedding; the default holds every token of `tiny_tokenizer`.
        tie: share the embedding with the output head.
        dtype: of the weights.
        seed: of the weights; the global generator is left as it was.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
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
