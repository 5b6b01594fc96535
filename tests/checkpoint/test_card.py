"""A base of any name is a name in a card: not metadata, not a heading, not code."""

from __future__ import annotations

import ast
import re

import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from pissa.checkpoint.card import lora_card, merged_card, residual_adapter_card, residual_card, with_tags

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25) | st.text(
    st.sampled_from("`\"'\\<>*_[]()#|\n\r\t\x1b\u202e{}:-& ab/"), min_size=1, max_size=25
)


def cards(base: str, method: str) -> list[str]:
    """Every kind of card of the checkpoint room."""
    config = LoraConfig(r=4, modules_to_save=[base])
    return [
        lora_card(config, base, method, 4, {}, {}),
        residual_adapter_card(config, base, method, base),
        residual_card(base, method, 4, {}, "pissa_init"),
        merged_card(base, method),
    ]


@given(NAMES, NAMES)
def test_whatever_the_names_are_the_card_is_a_card(base: str, method: str) -> None:
    for card in [*cards(base, method), with_tags(cards(base, method)[0], ["x"])]:
        front, body = card.removeprefix("---\n").split("\n---\n", 1)
        known = yaml.safe_load(front)
        assert known.keys() <= {"base_model", "library_name", "tags"} and "pissa" in known["tags"]
        assert known.get("base_model") in (None, base)
        assert [line for line in body.splitlines() if line.startswith("#")] == body.split("\n")[1:2]
        assert "\x1b" not in card and "\u202e" not in card
        for code in re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE):
            ast.parse(code)


def test_ordinary_names_stand_as_they_are() -> None:
    card = lora_card(LoraConfig(r=4, modules_to_save=["lm_head"]), "org/model", "PiSSA", 4, {}, {})
    assert "base_model: org/model\n" in card and "- base: `org/model`\n" in card
    assert 'from_pretrained("org/model")' in card and "- method: PiSSA, rank 4\n" in card
    assert "trained in full beside it: lm_head\n" in card
