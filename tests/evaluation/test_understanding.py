"""GLUE by a head and by likeliest answers, against scikit-learn's figures and a plain computation of likelihoods."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from pissa.errors import ConfigError, DataError
from pissa.evaluation.load import load_subject
from pissa.evaluation.run import evaluate
from pissa.evaluation.samples import SampleLog
from pissa.evaluation.task import EvaluationOptions
from pissa.evaluation.tasks.registry import find_task
from tiny import tiny_llama, tiny_tokenizer


def bert(classes: int) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "initializer_range": 0.5, "num_labels": classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = BertConfig(vocab_size=384, max_position_embeddings=64, **sizes)
        return BertForSequenceClassification(config).eval()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"sentence1": "How many? " * (i % 5 + 1), "sentence2": f"There are {i}", "label": i % 3 // 2} for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_head_is_scored_as_scikit_learn_scores(pairs: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    task, tokenizer, model = find_task("glue/mrpc"), tiny_tokenizer(), bert(2).train()
    rows = task.load(pairs)
    found = task.run(model, tokenizer, rows, EvaluationOptions(batch_size=5))
    assert model.training
    expected = []
    for row in rows:
        with torch.no_grad():
            expected.append(int(model.eval()(**tokenizer(*row.texts, return_tensors="pt")).logits.argmax()))
    labels = [int(row.label) for row in rows]
    assert [sample["predicted"] for sample in found.samples] == expected and len(set(expected)) == 2
    assert found.value == pytest.approx(metrics.accuracy_score(labels, expected))
    assert found.others == {"f1": pytest.approx(metrics.f1_score(labels, expected))}


def test_values_are_scored_by_their_correlation(pairs: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    task = find_task("glue/stsb")
    found = task.run(bert(1), tiny_tokenizer(), task.load(pairs))
    predicted = [sample["predicted"] for sample in found.samples]
    labels = [sample["label"] for sample in found.samples]
    assert found.value == pytest.approx(stats.pearsonr(predicted, labels).statistic)
    assert found.others["spearman"] == pytest.approx(stats.spearmanr(predicted, labels).statistic)
    assert found.interval is not None and found.interval[0] <= found.value <= found.interval[1]
    with pytest.raises(ConfigError, match="asks for a value"):
        task.run(tiny_llama(), tiny_tokenizer(), task.load(pairs))
    with pytest.raises(ConfigError, match="needs 1 outputs; the model's head has 2"):
        task.run(bert(2), tiny_tokenizer(), task.load(pairs))


def test_a_causal_model_is_asked_through_lm_eval(pairs: Path) -> None:
    pytest.importorskip("lm_eval")
    peft = pytest.importorskip("peft")
    task, tokenizer = find_task("glue/mrpc"), tiny_tokenizer()
    rows = task.load(pairs, limit=4)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = task.run(model, tokenizer, rows, EvaluationOptions(batch_size=2))
    for row, sample in zip(rows, found.samples, strict=True):
        text = "Sentence 1: {}\nSentence 2: {}\nQuestion: Do both sentences mean the same thing?\nAnswer:".format(
            *row.texts
        )
        ids = tokenizer(text)["input_ids"]
        for answer, likelihood in zip((" no", " yes"), sample["outputs"], strict=True):
            more = tokenizer(text + answer)["input_ids"][len(ids) :]
            with torch.no_grad():
                logs = model.eval()(torch.tensor([ids + more])).logits[0].log_softmax(-1)
            expected = sum(float(logs[len(ids) + i - 1, token]) for i, token in enumerate(more))
            assert likelihood == pytest.approx(expected, abs=1e-3)
        assert sample["predicted"] == sample["outputs"].index(max(sample["outputs"]))


def test_a_classifier_s_directory_is_evaluated_and_goes_on(pairs: Path, tmp_path: Path) -> None:
    bert(2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    results = evaluate(str(tmp_path / "model"), "glue/mrpc", pairs, tmp_path / "out", EvaluationOptions(batch_size=5))
    assert results["metric"] == "accuracy" and set(results["others"]) == {"f1"} and results["count"] == 12
    path = tmp_path / "out" / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]))
    task = find_task("glue/mrpc")
    again = task.run(bert(2), tiny_tokenizer(), task.load(pairs), EvaluationOptions(batch_size=5), log=SampleLog(path))
    assert again.value == results["value"] and path.read_bytes() == b"".join(lines)


def test_an_adapted_classifier_brings_its_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    bert(2).bert.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    subject = load_subject(tmp_path / "adapter", classes=3)
    batch = subject.tokenizer(["How many?"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(subject.model(**batch).logits, adapted.eval()(**batch).logits, atol=1e-5)


def test_glue_s_own_files_are_read(pissa_data: Path) -> None:
    for kind, folder, count in (("sst2", "SST-2", 872), ("mrpc", "MRPC", 408), ("stsb", "STS-B", 1500)):
        rows = find_task(f"glue/{kind}").load(pissa_data / "glue" / folder / "dev.tsv.gz")
        assert len(rows) == count and all(all(row.texts) for row in rows)
    assert rows[1].texts == ("A young child is riding a horse.", "A child is riding a horse.") and rows[1].label == 4.75


def test_files_without_header_and_spelt_out_classes_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "dev.tsv.gz", "wt") as file:
        file.write("gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tBooks have quietly been.\n")
    assert [row.label for row in find_task("glue/cola").load(tmp_path / "dev.tsv.gz")] == [1.0, 0.0]
    (tmp_path / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n")
    (row,) = find_task("glue/rte").load(tmp_path / "dev.tsv")
    assert row.label == 1.0 and row.texts == ("A.", "B.")
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tA.\tB.\n")
    with pytest.raises(DataError, match=r"test.tsv:2 has no label"):
        find_task("glue/rte").load(tmp_path / "test.tsv")
    (tmp_path / "bad.jsonl").write_text('{"sentence": "x", "label": 7}\n')
    with pytest.raises(DataError, match=r"has label 7; allowed: 0, 1"):
        find_task("glue/sst2").load(tmp_path / "bad.jsonl")
    with pytest.raises(ConfigError, match=r"no task is called 'glue/sst3'; allowed: .*glue/cola"):
        find_task("glue/sst3")
