"""Generation equals a plain greedy loop, and leaves model and tokenizer as they were."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from pissa.errors import ConfigError, DataError
from pissa.evaluation import generate as module
from pissa.evaluation.generate import generate
from tiny import tiny_llama, tiny_tokenizer

PROMPTS: list[str] = ["How many?", "a", "Below is an instruction that describes a task.", "12 34", "zzzz zz"]


@pytest.fixture(autouse=True)
def reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' log records reach pytest."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


def greedy(model: Any, tokenizer: Any, prompt: str, new: int) -> str:
    """One prompt, one token at a time, without padding and without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    written: list[int] = []
    with torch.no_grad():
        while len(written) < new:
            token = int(model(torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.fixture
def model() -> Any:
    """A model of clear preferences that writes eos now and then."""
    model = tiny_llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.weight[2].mul_(1.5)
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
@pytest.mark.parametrize("add_bos", [False, True])
def test_batches_equal_a_plain_greedy_loop(model: Any, batch_size: int, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(pad_is_eos=True, add_bos=add_bos)
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert texts == [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(texts)) == len(PROMPTS)


def test_generation_stops_at_eos(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        ids = torch.tensor([tokenizer("!")["input_ids"]])
        direction = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight[2] = direction
    assert generate(model, tokenizer, ["!"], max_new_tokens=5, batch_size=1) == [""]


def test_model_and_tokenizer_are_left_as_they_were(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    modes = [part.training for part in model.modules()]
    defaults = model.generation_config.to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, tokenizer, PROMPTS, max_new_tokens=3, batch_size=2)
    assert [part.training for part in model.modules()] == modes
    assert model.config.use_cache is False
    assert model.generation_config.to_dict() == defaults
    assert tokenizer.padding_side == "right"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_adapted_model_generates_and_keeps_its_settings(model: Any) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2)
    own = model.generation_config
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.train()
    assert generate(adapted, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2) == expected
    assert model.generation_config is own and adapted.generation_config is own
    assert adapted.training and model.training


def test_modes_are_restored_after_a_failure(model: Any) -> None:
    model.train()

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=2, batch_size=2, progress=fail)
    assert all(part.training for part in model.modules())


def test_sampling_defaults_neither_matter_nor_warn(
    model: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer = tiny_tokenizer()
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=2)
    bent = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 5,
        "max_length": 20,
        "repetition_penalty": 5.0,
    }
    for name, value in bent.items():
        setattr(model.generation_config, name, value)
    model.generation_config.no_repeat_ngram_size = 1
    caplog.clear()
    capsys.readouterr()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=2) == plain
    assert not caplog.records and not recwarn.list
    assert capsys.readouterr().err == ""


def test_progress_counts_prompts(model: Any) -> None:
    calls: list[tuple[int, int]] = []
    generate(
        model, tiny_tokenizer(), PROMPTS, max_new_tokens=1, batch_size=2, progress=lambda *call: calls.append(call)
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_chat_prompts_get_no_second_bos(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []

    def record(_: Any, prompts: list[list[int]], *settings: Any) -> list[tuple[list[int], bool]]:
        given.extend(prompts)
        return [([], True)] * len(prompts)

    monkeypatch.setattr(module, "_continue", record)
    tokenizer = tiny_tokenizer(add_bos=True)
    generate(model, tokenizer, ["<bos>a"], max_new_tokens=1, batch_size=1, add_bos=False)
    generate(model, tokenizer, ["a"], max_new_tokens=1, batch_size=1)
    assert given[0] == given[1] == tokenizer("a")["input_ids"]


def test_no_prompts_give_no_texts(model: Any) -> None:
    assert generate(model, tiny_tokenizer(), [], max_new_tokens=1, batch_size=1) == []


def test_what_cannot_be_generated_is_refused(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate(model, tokenizer, ["a"], max_new_tokens=0, batch_size=1)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        generate(model, tokenizer, ["a"], max_new_tokens=1, batch_size=0)
    with pytest.raises(DataError, match="no tokens: 2"):
        generate(model, tokenizer, ["a", ""], max_new_tokens=1, batch_size=1)
