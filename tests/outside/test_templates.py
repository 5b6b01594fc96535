"""A chat template that loops, recurses, divides by zero or makes gigabytes is one line, soon."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from pissa.data.encode import encode
from pissa.data.rows import examples_from_rows
from pissa.errors import PissaError
from pissa.outside import templates
from pissa.outside.templates import TemplateRefusedError, apply_template
from tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]


def rendered(template: str | dict[str, str], **options: Any) -> str:
    """The conversation under a template."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = template
    return apply_template(tokenizer, MESSAGES, tokenize=False, **options)


def test_an_ordinary_template_is_rendered_as_transformers_does() -> None:
    text = "{% for m in messages %}[{{ m.role }}]{{ dict(m, **{'x': 1}).content }}{% endfor %}"
    assert rendered(text) == "[user]Hello"
    assert rendered("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}") == "Hello"
    assert rendered({"default": text, "other": "x"}) == "[user]Hello"


HOSTILE = {
    "loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}x",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 // 0 }}",
    "a list and a number": "{{ messages + 3 }}",
    "an attribute of nothing": "{{ nothing.at.all }}",
    "an index": "{{ messages[7].content }}",
    "gigabytes of text": "{{ 'a' * 10000000000 }}",
    "gigabytes by a width": "{{ 'a'.center(10000000000) }}",
    "gigabytes by a format": "{{ '%9999999999d' % 1 }}",
    "gigabytes by a loop": "{% set ns = namespace(t='aaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "a power": "{{ 9 ** 99999999999 }}",
    "a power without blanks": "{{9**(9**9)}}",
    "a power by rounding": "{{ 1 | round(999999999, 'ceil') }}",
    "a power by the name of a filter": "{{ [1] | map('ro' ~ 'und', 999999999, 'ceil') | list }}",
    "a square of a square": "{% set ns = namespace(n=7) %}"
    "{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n % 10 }}",
    "a division": "{% set n = ('f' * 50000000) | int(base=16) %}{{ n // 3 % ((n + 1) // 7) }}",
    "its own error": "{{ raise_exception('no\n\x1b[31msuch role') }}",
    "syntax": "{% for %}",
    "a tag of its own": "{% own %}",
    "deep": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
    "the interpreter": "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(TemplateRefusedError) as caught:
        rendered(HOSTILE[name])
    assert "\n" not in str(caught.value) and time.monotonic() - start < 60


def test_a_template_that_is_given_is_bounded_too() -> None:
    with pytest.raises(TemplateRefusedError, match="numbers of more than 100,000 bits"):
        rendered("x", chat_template="{{ 9 ** (9 ** 9) }}")
    assert rendered("x", chat_template="{{ 9 ** 9 }} {{ 7 // 2 }} {{ 1.26 | round(1) }}") == "387420489 3 1.3"


@pytest.mark.parametrize("name", ["loop", "division", "recursion", "a power"])
def test_rows_under_a_hostile_template_are_one_error_after_one_of_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever renders the template, TRL too, does it within the limits, and only once where it takes for ever."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE[name]
    rows = examples_from_rows([{"question": "a", "answer": f"b{i}"} for i in range(200)])
    start = time.monotonic()
    with pytest.raises(PissaError) as caught:
        encode(rows, tokenizer, template="chat", max_length=64)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 60


def test_a_template_that_writes_far_more_than_it_reads_is_refused() -> None:
    with pytest.raises(TemplateRefusedError, match="it writes 1,000,000 characters or tokens for one conversation"):
        rendered("{{ 'a ' * 500000 }}")
    long: Any = [{"role": "user", "content": "a" * 1_000_000}]
    tokenizer: Any = tiny_tokenizer(chat_template="{{ messages[0].content * 2 }}")
    assert len(apply_template(tokenizer, long, tokenize=False)) == 2_000_000


def test_a_template_that_is_slow_again_and_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(templates, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setattr(templates, "_spent", {})
    for _ in range(4):  # 5 seconds each, by this clock
        assert templates.within_limits("slow", lambda: 1) == 1
    with pytest.raises(TemplateRefusedError, match=r"it takes 5.0 s on average for one conversation"):
        templates.within_limits("slow", lambda: 1)
    assert templates.within_limits("another", lambda: 1) == 1
    for _ in range(4):  # what is long may take long
        templates.within_limits("reads", lambda: 1, 1_000_000)
    assert templates.within_limits("reads", lambda: 1, 1_000_000) == 1
