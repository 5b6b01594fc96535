"""Labels cover the responses and eos, nothing else; what is cut is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from pissa.data.conversation import Example, Message
from pissa.data.encode import IGNORED, Collator, Encoded, encode
from pissa.data.prompts import TEMPLATES
from pissa.data.read import read_examples
from pissa.errors import ConfigError, DataError
from tiny import tiny_llama, tiny_tokenizer

QUESTION, RESPONSE = "How many are left?\n", "12 in all.\nThe answer is: 12"
ONE = Example((Message("user", QUESTION), Message("assistant", RESPONSE)))
TWO = Example((*ONE.messages, Message("user", "And now?"), Message("assistant", "None")))


def learned(encoded: Encoded, tokenizer: Any, row: int = 0) -> str:
    return tokenizer.decode([label for label in encoded.labels[row] if label != IGNORED])


def seen(encoded: Encoded, tokenizer: Any, row: int = 0) -> str:
    return tokenizer.decode(encoded.input_ids[row])


def of_lengths(*lengths: int) -> list[Example]:
    """Examples whose responses have about as many tokens (letters that no pair was merged for)."""
    return [Example((Message("user", "Q" * 10), Message("assistant", "Z" * length))) for length in lengths]


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_response_and_eos_are_learned(template: Any, add_bos: bool, pad_is_eos: bool) -> None:
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos, add_bos=add_bos)
    encoded = encode([ONE], tokenizer, template=template, max_length=512)
    assert learned(encoded, tokenizer) == RESPONSE + "<eos>"
    assert seen(encoded, tokenizer).startswith("<bos>") == add_bos
    assert seen(encoded, tokenizer).count("<bos>") == add_bos
    assert encoded.labels[0][0] == IGNORED
    assert (encoded.truncated, encoded.dropped) == (0, 0)


def test_learned_labels_repeat_the_input_at_their_place() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode([ONE, TWO], tokenizer, template="chat", max_length=512)
    for row in range(2):
        pairs = zip(encoded.input_ids[row], encoded.labels[row], strict=True)
        assert all(label in (token, IGNORED) for token, label in pairs)


def test_chat_learns_every_turn_and_its_end() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    encoded = encode([TWO], tokenizer, template="chat", max_length=512)
    assert learned(encoded, tokenizer) == f"{RESPONSE}<end>None<end>"
    assert seen(encoded, tokenizer) == (
        f"[user]\n{QUESTION}<end>\n[assistant]\n{RESPONSE}<end>\n[user]\nAnd now?<end>\n[assistant]\nNone<end>"
    )


def test_eos_that_ends_the_turn_is_not_doubled() -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(pad_is_eos=True, chat_template=template)
    encoded = encode([TWO], tokenizer, template="chat", max_length=512)
    assert learned(encoded, tokenizer) == f"{RESPONSE}<eos>None<eos>"
    assert encoded.input_ids[0].count(tokenizer.eos_token_id) == 4


def test_a_turn_without_an_end_of_its_own_ends_in_eos() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    encoded = encode([TWO], tokenizer, template="chat", max_length=512)
    assert learned(encoded, tokenizer) == f"{RESPONSE}\nNone\n<eos>"


def test_the_ids_are_those_of_the_whole_text_and_a_token_across_the_boundary_is_learned_and_said() -> None:
    tokenizer = tiny_tokenizer()
    prompt, response = "### Instruct", "ion:\n5"
    whole = tokenizer(prompt + response)["input_ids"]
    assert whole != tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"]
    example = Example((Message("user", prompt), Message("assistant", response)))
    encoded = encode([example, ONE], tokenizer, template="none", max_length=64)
    assert encoded.input_ids[0][:-1] == whole
    assert learned(encoded, tokenizer).endswith(response + "<eos>")
    assert "in 1 rows the end of the prompt makes one token" in encoded.summary


def test_every_token_of_a_text_is_learned_under_any_template() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    for template in TEMPLATES:
        encoded = encode([Example(text="Some words."), ONE], tokenizer, template=template, max_length=512)
        assert learned(encoded, tokenizer) == "Some words.<eos>" and seen(encoded, tokenizer).startswith("<bos>")


def test_auto_is_chat_where_there_is_a_chat_template_and_alpaca_otherwise() -> None:
    for chat_template in (tiny_tokenizer().chat_template, None):
        tokenizer = tiny_tokenizer(chat_template=chat_template)
        auto = encode([ONE], tokenizer, template="auto", max_length=512)
        assert auto == encode([ONE], tokenizer, template="chat" if chat_template else "alpaca", max_length=512)


def test_the_end_of_a_row_can_be_what_is_kept() -> None:
    encoded = encode(of_lengths(20), tiny_tokenizer(), template="none", max_length=8, keep="end")
    assert encoded.input_ids[0][-1] == tiny_tokenizer().eos_token_id
    assert (encoded.labels[0][0], encoded.truncated) == (IGNORED, 1)


def test_empty_prompt_still_leaves_the_first_token_unlearned() -> None:
    example = Example((Message("user", ""), Message("assistant", "ZZ")))
    encoded = encode([example], tiny_tokenizer(), template="none", max_length=8)
    assert [label == IGNORED for label in encoded.labels[0]] == [True, False, False]


def test_truncated_and_dropped_rows_are_counted() -> None:
    encoded = encode(of_lengths(2, 20, 40), tiny_tokenizer(), template="none", max_length=16)
    assert (len(encoded), encoded.truncated, encoded.dropped) == (3, 2, 0)
    assert encoded.lengths == [13, 16, 16]
    assert encoded.labels[1][-1] != tiny_tokenizer().eos_token_id
    assert "2 rows were truncated" in encoded.summary
    long = Example((Message("user", "Q" * 30), Message("assistant", "Z")))
    encoded = encode([*of_lengths(2), long], tiny_tokenizer(), template="none", max_length=16)
    assert (len(encoded), encoded.truncated, encoded.dropped) == (1, 0, 1)
    assert "1 more were dropped" in encoded.summary


def test_a_row_of_exactly_max_length_is_whole() -> None:
    encoded = encode(of_lengths(5), tiny_tokenizer(), template="none", max_length=16)
    assert (encoded.lengths, encoded.truncated) == ([16], 0)
    assert encoded.labels[0][-1] == tiny_tokenizer().eos_token_id


def test_all_rows_dropped_is_an_error() -> None:
    with pytest.raises(DataError, match=r"max_length = 10 .*any of the 2 rows; .*shortest row has 12 tokens"):
        encode(of_lengths(1, 3), tiny_tokenizer(), template="none", max_length=10)


def test_many_rows_keep_their_order() -> None:
    examples = [Example((Message("user", "Q"), Message("assistant", f"N{number}"))) for number in range(2500)]
    tokenizer = tiny_tokenizer()
    encoded = encode(examples, tokenizer, template="none", max_length=32)
    assert [learned(encoded, tokenizer, row) for row in (0, 1023, 1024, 2499)] == [
        "N0<eos>",
        "N1023<eos>",
        "N1024<eos>",
        "N2499<eos>",
    ]


def test_examples_that_do_not_fit_the_template_are_gathered() -> None:
    placed = [Example(TWO.messages, where=f"rows.jsonl:{line}") for line in (3, 9)]
    with pytest.raises(DataError, match=r"2 of 3 rows .*rows\.jsonl:3 is not one user.*rows\.jsonl:9 is"):
        encode([ONE, *placed], tiny_tokenizer(), template="alpaca", max_length=64)


def test_settings_that_cannot_be_right_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode([ONE], tokenizer, template="alpaca", max_length=1)
    with pytest.raises(ConfigError, match="allowed"):
        encode([ONE], tokenizer, template="vicuna", max_length=64)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no examples"):
        encode([], tokenizer, template="alpaca", max_length=64)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        encode([ONE], tokenizer, template="alpaca", max_length=64)


def test_collator_pads_on_the_right_and_keeps_the_eos_label() -> None:
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    encoded = encode(of_lengths(2, 9), tokenizer, template="none", max_length=64)
    batch = Collator(tokenizer.pad_token_id)([encoded[0], encoded[1]])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (2, 24))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["attention_mask"].sum(1).tolist() == [13, 20]
    assert batch["input_ids"][0, 13:].eq(tokenizer.eos_token_id).all()
    assert batch["labels"][0].tolist() == encoded.labels[0] + [IGNORED] * 11
    assert batch["labels"][0, 12] == tokenizer.eos_token_id


def test_padding_does_not_change_the_loss() -> None:
    tokenizer, model = tiny_tokenizer(pad_is_eos=True), tiny_llama()
    encoded = encode([*of_lengths(3, 17), ONE], tokenizer, template="none", max_length=128)
    with torch.no_grad():
        together = model(**Collator(tokenizer.pad_token_id)([encoded[row] for row in range(3)])).loss
        alone = []
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
            logits = model(torch.tensor([ids])).logits[0, :-1]
            alone.append(cross_entropy(logits, torch.tensor(labels[1:]), reduction="none"))
    total = torch.cat(alone)
    assert together.item() == pytest.approx(
        total.sum().item() / sum(label != IGNORED for row in encoded.labels for label in row), rel=1e-5
    )


def test_gsm8k_responses_end_in_a_marked_number_and_eos(pissa_data: Path) -> None:
    tokenizer = tiny_tokenizer()
    examples = read_examples(pissa_data / "gsm8k" / "test.jsonl.gz")[:100]
    encoded = encode(examples, tokenizer, template="alpaca", max_length=4096)
    for row, example in enumerate(examples):
        assert learned(encoded, tokenizer, row) == example.response + "<eos>"
        assert "\n#### " in example.response
