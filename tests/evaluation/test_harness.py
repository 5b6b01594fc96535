"""Scores of a fixed set of generations equal lm-eval's own, and its generations on a live PeftModel equal ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa.evaluation.generate import Continuation, generate
from pissa.evaluation.harness import run_harness, run_task
from pissa.evaluation.tasks.registry import find_task
from tiny import tiny_llama, tiny_tokenizer

lm_eval_model = pytest.importorskip("lm_eval.api.model")

# gsm8k.yaml of lm-eval, but for prompt and data: its metric, its strict filter.
GSM8K = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
        }
    ],
    "generation_kwargs": {"until": ["</s>"], "do_sample": False, "max_gen_toks": 8},
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [
                {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                {"function": "take_first"},
            ],
        }
    ],
}
# Reference and generation of each problem.
GENERATIONS = [
    ("So 2.\n#### 2", "1 + 1 = 2\n#### 2"),
    ("So 2.\n#### 2", "#### 3"),
    ("#### 1,234", "It is 1234.\n#### 1234"),
    ("#### 1234", "#### 1,234"),
    ("#### -5", "#### -5"),
    ("#### 5", "#### -5"),
    ("#### 18", "She has 18."),
    ("#### 18", ""),
    ("#### 18", "#### 18."),
    ("#### 18", "#### 18 apples"),
    ("#### 7", "####7"),
    ("#### 42", "#### 42\n\nThat is all."),
]


class Fixed(lm_eval_model.LM):
    """Writes what it was given, whatever it is asked."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def generate_until(self, requests: list[Any], *_: Any, **__: Any) -> list[str]:
        return [self.texts[request.doc_id] for request in requests]

    def loglikelihood(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def ours(name: str, rows: list[dict[str, str]], texts: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task(name)

    def fixed(*_: Any, **__: Any) -> Any:
        yield list(range(len(texts))), [Continuation(text, True) for text in texts]

    patch.setattr("pissa.evaluation.generate.continuations", fixed)
    return task.run(None, None, task.load(path))


def test_gsm8k_is_scored_as_lm_eval_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"{i}?", "answer": reference} for i, (reference, _) in enumerate(GENERATIONS)]
    texts = [text for _, text in GENERATIONS]
    theirs = run_task(Fixed(texts), rows, GSM8K)
    found = ours("gsm8k", rows, texts, tmp_path, monkeypatch)
    verdicts = [bool(sample["exact_match"]) for sample in theirs["samples"]]
    mine = [sample["correct"] for sample in found.samples]
    # "####7" without a space: theirs reads nothing, ours the number
    assert [i for i, pair in enumerate(zip(mine, verdicts, strict=True)) if pair[0] != pair[1]] == [10]
    assert theirs["results"]["exact_match,strict-match"] == pytest.approx(found.value - 1 / 12)


def test_math_is_scored_as_hendrycks_math_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils")
    pairs = [
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"\frac{1}{2}", "1/2"),
        ("0.5", r"\frac{1}{2}"),
        (r"2\sqrt{3}", r"2\sqrt3"),
        (r"10\text{ cm}", "10"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        (r"\left(1, 2\right)", "(1,2)"),
        ("x=5", "5"),
        ("(1,2)", "(2,1)"),
        ("5", "6"),
        (r"\frac{3}{4}", r"\frac{4}{3}"),
        (r"\text{even}", r"\text{odd}"),
    ]
    rows = [{"problem": f"{i}?", "solution": rf"It is $\boxed{{{a}}}$."} for i, (a, _) in enumerate(pairs)]
    texts = [rf"We get $\boxed{{{b}}}$." for _, b in pairs]
    found = ours("math", rows, texts, tmp_path, monkeypatch)
    theirs = [utils.is_equiv(*pair) for pair in pairs]
    assert [sample["correct"] for sample in found.samples] == theirs
    assert found.value == pytest.approx(9 / 13)


def test_lm_eval_generates_on_a_live_peft_model_what_we_generate() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    tokenizer = tiny_tokenizer()
    rows = [{"question": text, "answer": "#### 1"} for text in ("How many?", "a", "There are 12", "zz")]
    before = tokenizer.init_kwargs.copy(), tokenizer.padding_side, torch.get_rng_state().tolist()
    theirs = run_harness(adapted, tokenizer, rows, GSM8K, batch_size=2)
    assert (
        tokenizer.init_kwargs,
        tokenizer.padding_side,
        torch.get_rng_state().tolist(),
    ) == before and adapted.training
    prompts = [row["question"] for row in rows]
    mine = generate(adapted, tokenizer, prompts, max_new_tokens=8, batch_size=2)
    assert [sample["resps"][0][0] for sample in theirs["samples"]] == mine
    assert len(set(mine)) > 1
