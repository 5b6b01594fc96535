"""Token ids and labels are those of TRL's SFTTrainer, for every shape of rows and every family it has a template of.

TRL keeps what stands behind the last learned token of a conversation, and a label at the first token; no loss sees it.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pissa.data.encode import IGNORED, encode
from pissa.data.prompts import prompt_text
from pissa.data.rows import examples_from_rows
from pissa.errors import DataError
from tiny import tiny_tokenizer

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from jinja2 import TemplateError  # noqa: E402
from trl.chat_template_utils import get_training_chat_template, has_generation_markers  # noqa: E402

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))
WORDS = [
    "the",
    "answer is",
    "12",
    "3.5\n\n",
    "",
    "two  spaces",
    "<b>",
    "ünïcode",
    "①",
    "### Instruction:",
    "\t",
    "done.",
]
COUNT = 200
MULTIMODAL = ("idefics3", "llava_next", "smolvlm")
"""Families whose templates write a content only as a list of parts."""


def said(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 12))) + "x"


def texts(count: int = COUNT) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [{"text": said(draw)} for _ in range(count)]


def pairs(count: int = COUNT) -> list[dict[str, Any]]:
    draw = random.Random(1)
    return [{"prompt": said(draw), "completion": said(draw)} for _ in range(count)]


def conversations(count: int = COUNT, *, system: bool = False) -> list[dict[str, Any]]:
    draw = random.Random(2)
    rows = []
    for number in range(count):
        turns = [{"role": "system", "content": said(draw)}] if system and number % 2 else []
        for _ in range(draw.randint(1, 3)):
            turns += [{"role": role, "content": said(draw)} for role in ("user", "assistant")]
        rows.append({"messages": turns})
    return rows


def prefix_space_tokenizer() -> Any:
    """Llama 2's kind: a space before every text, "▁" for spaces."""
    core = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)  # type: ignore
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # type: ignore
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    core.train_from_iterator([" ".join(WORDS), "abcdefghijklmnopqrstuvwxyz ▁[]/INST"], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    return tokenizer


def family_tokenizer(family: str) -> Any:
    """A tokenizer with a family's chat template, which has the template's special tokens."""
    text = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(add_bos=True, chat_template=text)
    found = {*re.findall(r"<[^<>{}'\"\s%=]{1,40}>", text)}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(found)})
    return tokenizer


def in_parts(turns: list[dict[str, Any]], family: str) -> list[dict[str, Any]]:
    """Turns as the family's template wants their contents."""
    if family not in MULTIMODAL:
        return turns
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def of_trl(rows: list[dict[str, Any]], tokenizer: Any, *, chat: bool = False) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) as SFTTrainer prepares rows."""
    marked = chat and has_generation_markers(tokenizer.chat_template)
    template = get_training_chat_template(tokenizer) if chat and not marked else None
    pair = "completion" in rows[0]
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=pair)
    arguments: Any = trl.SFTConfig(output_dir="unused", max_length=None, assistant_only_loss=chat, bf16=False)
    found: Any = trl.SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer, arguments, False, None, "train"
    )
    return [(row["input_ids"], row["labels"]) for row in found]


def assert_as_trl(
    rows: list[dict[str, Any]], expected: list[tuple[list[int], list[int]]], tokenizer: Any, how: Any
) -> None:
    ours = encode(examples_from_rows(rows), tokenizer, template=how, max_length=10_000)
    assert len(ours) == len(expected)
    for ids, labels, (their_ids, their_labels) in zip(ours.input_ids, ours.labels, expected, strict=True):
        stop = max(place for place, label in enumerate(their_labels) if label != IGNORED) + 1
        assert ids == their_ids[:stop]
        assert labels == [IGNORED, *their_labels[1:stop]]


TOKENIZERS = {
    "byte-level": tiny_tokenizer,
    "with bos": lambda: tiny_tokenizer(add_bos=True, pad_is_eos=True),
    "prefix space": prefix_space_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_and_pairs(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    assert_as_trl(texts(), of_trl(texts(), tokenizer), tokenizer, "auto")
    assert_as_trl(pairs(), of_trl(pairs(), tokenizer), tokenizer, "none")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_alpaca_rows_are_pairs_of_the_published_prompt(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    rows = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in pairs()]
    written = [
        {"prompt": prompt_text(example, tokenizer, "alpaca"), "completion": example.response}
        for example in examples_from_rows(rows)
    ]
    assert_as_trl(rows, of_trl(written, tokenizer), tokenizer, "alpaca")


@pytest.mark.parametrize("shape", ["messages", "conversations", "question"])
def test_conversations_under_llama_2_s_template(shape: str) -> None:
    tokenizer = prefix_space_tokenizer()
    rows = conversations()
    if shape == "question":
        rows = [{"messages": row["messages"][:2]} for row in rows]
    expected = of_trl(rows, tokenizer, chat=True)
    if shape == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        rows = [
            {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in row["messages"]]}
            for row in rows
        ]
    if shape == "question":
        rows = [{"question": row["messages"][0]["content"], "answer": row["messages"][1]["content"]} for row in rows]
    assert_as_trl(rows, expected, tokenizer, "chat")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_under_every_family_s_template(family: str) -> None:
    tokenizer = family_tokenizer(family)
    rows = conversations()
    theirs = [{"messages": in_parts(row["messages"], family)} for row in rows]
    assert_as_trl(rows, of_trl(theirs, tokenizer, chat=True), tokenizer, "auto")
    for row in encode(examples_from_rows(rows[:20]), tokenizer, template="chat", max_length=10_000).labels:
        learned = tokenizer.decode([label for label in row if label != IGNORED]).rstrip()
        assert learned.endswith(">"), "the end of the turn is learned"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3", "deepseek_r1_distill"])
def test_reasoning_is_learned_as_trl_does(family: str) -> None:
    tokenizer = family_tokenizer(family)
    rows = conversations()
    for turn in [turn for row in rows for turn in row["messages"] if turn["role"] == "assistant"]:
        turn["content"] = f"<think>\nhm {turn['content']}\n</think>\n\n{turn['content']}"
    assert_as_trl(rows, of_trl(rows, tokenizer, chat=True), tokenizer, "chat")
    apart = [
        {"messages": [{**t, "reasoning_content": "hm"} if t["role"] == "assistant" else t for t in row["messages"]]}
        for row in conversations()
    ]
    if family == "qwen3":
        assert_as_trl(apart, of_trl(apart, tokenizer, chat=True), tokenizer, "chat")


def tool(draw: random.Random, name: str) -> dict[str, Any]:
    """A function's schema, with parameters of its own."""
    kinds = draw.sample(["string", "integer", "number", "boolean", "array"], 2)
    parameters = {f"{name}_{kind}_": {"type": kind, "description": said(draw)} for kind in kinds}
    parameters = {"type": "object", "properties": parameters, "required": [*parameters][:1]}
    return {
        "type": "function",
        "function": {"name": name, "description": f"SCHEMA {said(draw)}", "parameters": parameters},
    }


def arguments_of(draw: random.Random, schema: dict[str, Any]) -> dict[str, Any]:
    """Values for the parameters of a function."""
    values = {"string": said(draw), "integer": draw.randint(-9, 99), "number": 0.5, "boolean": True, "array": ["x", 2]}
    return {name: values[given["type"]] for name, given in schema["function"]["parameters"]["properties"].items()}


def with_tools(
    count: int, *, calls: bool, reasoning: bool, most: int, says: bool, system: bool
) -> list[dict[str, Any]]:
    """Conversations in which the assistant calls functions, thinks, or both; some have several exchanges.

    Args:
        count: of rows.
        calls, reasoning: what they have.
        most: calls in one turn.
        says: whether a turn that calls says something too.
        system: whether every other row has a system message.
    """
    draw = random.Random(3)

    def turn(**more: Any) -> dict[str, Any]:
        thinks = {"reasoning_content": f"THOUGHT {said(draw)}"} if reasoning else {}
        return {"role": "assistant", "content": said(draw), **thinks, **more}

    rows = []
    for number in range(count):
        tools = [tool(draw, name) for name in draw.sample(["ADD", "look_up", "send"], draw.randint(1, 3))]
        turns = [{"role": "system", "content": said(draw)}] if system and number % 2 else []
        for _ in range(draw.randint(1, 2)):
            turns.append({"role": "user", "content": said(draw)})
            chosen = draw.choices(tools, k=draw.randint(1, most)) if calls else []
            made = [
                {"name": each["function"]["name"], "arguments": {**arguments_of(draw, each), "CALLED": number}}
                for each in chosen
            ]
            if made:
                called = [{"type": "function", "function": call} for call in made]
                turns.append(turn(tool_calls=called, **({} if says else {"content": ""})))
                turns += [{"role": "tool", "name": call["name"], "content": f"FOUND {said(draw)}"} for call in made]
            turns.append(turn())
        rows.append({"messages": turns, **({"tools": tools} if calls else {})})
    return rows


SHAPES = {
    "calls": {"calls": True, "reasoning": False},
    "reasoning": {"calls": False, "reasoning": True},
    "both": {"calls": True, "reasoning": True},
}


ASKED = {"calls": ("tools", "tool_calls"), "reasoning": ("reasoning_content",)}
ASKED["both"] = ASKED["calls"] + ASKED["reasoning"]
FORMS = [
    {"most": most, "says": says, "system": system}
    for system in (True, False)
    for says in (True, False)
    for most in (2, 1)
]
"""Forms of such conversations, the richest first: a template refuses some."""


def taken(rows: list[dict[str, Any]], family: str, tokenizer: Any) -> set[str]:
    """What of the rows the template writes that TRL has for training of a family.

    Raises:
        TemplateError, TypeError: it refuses the rows.
    """
    found = set(ASKED["both"])
    words = {"tools": "SCHEMA", "tool_calls": "CALLED", "reasoning_content": "THOUGHT"}
    template = get_training_chat_template(tokenizer)
    for row in rows:
        text = tokenizer.apply_chat_template(
            in_parts(row["messages"], family), tools=row.get("tools"), chat_template=template, tokenize=False
        )
        found -= {key for key, word in words.items() if word in str(row) and word not in text}
    return found


def check_tools(family: str, shape: str, count: int) -> None:
    """What the family's template takes is learned as by TRL, and what it leaves out or refuses is refused."""
    tokenizer = family_tokenizer(family)
    found: set[str] = set()
    rows = with_tools(count, **SHAPES[shape], **FORMS[0])
    for form in FORMS:
        tried = with_tools(count, **SHAPES[shape], **form)
        try:
            if (more := taken(tried, family, tokenizer) & {*ASKED[shape]}) > found:
                rows, found = tried, more
        except (TemplateError, TypeError):
            continue
    if missing := {*ASKED[shape]} - found:
        with pytest.raises(DataError, match="|".join(["refused", *sorted(missing)])):
            encode(examples_from_rows(rows), tokenizer, template="chat", max_length=10_000)
    if missing == {"tools"}:
        rows, missing = [{"messages": row["messages"]} for row in rows], set()
    if not missing:
        theirs = [{**row, "tools": json.dumps(row["tools"])} if "tools" in row else row for row in rows]
        assert_as_trl(rows, of_trl(theirs, tokenizer, chat=True), tokenizer, "chat")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tools_and_reasoning_are_learned_as_trl_does(family: str, shape: str) -> None:
    check_tools(family, shape, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_200_rows_of_tools_and_reasoning_are_learned_as_trl_does(family: str, shape: str) -> None:
    check_tools(family, shape, COUNT)
