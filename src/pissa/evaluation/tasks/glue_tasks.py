"""GLUE's tasks as data: their columns, metrics and questions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE."""

    texts: tuple[str, ...]
    """Columns of one or two texts, as the hub's rows have them."""
    metrics: tuple[str, ...]
    """GLUE's."""
    prompt: str = ""
    """What a causal model is asked, with the texts in order."""
    answers: tuple[str, ...] = ()
    """Its possible answers, by class; none for a value to regress."""
    columns: tuple[str, ...] = ()
    """In GLUE's own files: the texts' columns and the label's, where they have other names than the hub's."""


PAIR = ("sentence1", "sentence2")
GLUE_TASKS = {
    "cola": GlueTask(
        ("sentence",),
        ("matthews",),
        "{}\nQuestion: Does this sentence make sense?\nAnswer:",
        ("no", "yes"),
        ("3", "1"),
    ),
    "sst2": GlueTask(
        ("sentence",),
        ("accuracy",),
        "{}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
    ),
    "mrpc": GlueTask(
        PAIR,
        ("accuracy", "f1"),
        "Sentence 1: {}\nSentence 2: {}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
        ("#1 String", "#2 String", "Quality"),
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("accuracy", "f1"),
        "Question 1: {}\nQuestion 2: {}\nQuestion: Do both questions ask the same thing?\nAnswer:",
        ("no", "yes"),
        ("question1", "question2", "is_duplicate"),
    ),
    "stsb": GlueTask(PAIR, ("pearson", "spearman"), columns=(*PAIR, "score")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("accuracy",),
        "{}\nQuestion: {} True, False or Neither?\nAnswer:",
        ("True", "Neither", "False"),
        (*PAIR, "gold_label"),
    ),
    "qnli": GlueTask(
        ("question", "sentence"),
        ("accuracy",),
        "{}\n{}\nQuestion: Does this response answer the question?\nAnswer:",
        ("yes", "no"),
    ),
    "rte": GlueTask(PAIR, ("accuracy",), "{}\nQuestion: {} True or False?\nAnswer:", ("True", "False")),
    "wnli": GlueTask(PAIR, ("accuracy",), "{}\nQuestion: {} True or False?\nAnswer:", ("False", "True")),
}
