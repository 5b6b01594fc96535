"""Our GGUF LoRA in llama.cpp itself: SmolLM2 there and in transformers predict the same next tokens.

llama-cpp-python has no ready package and compiles for minutes, so it is not among the tests' requirements. Name an
interpreter that has it: PISSA_LLAMA_PYTHON=/path/to/python make test-all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pissa import PissaConfig, adapt, export_lora
from pissa.lab.models import GGUF, GGUF_SHA256, PACKAGE, _fetch, smollm2

pytestmark = pytest.mark.slow

IN_LLAMA_CPP = """
import sys
import numpy as np
from llama_cpp import Llama

model, lora, tokens, out = sys.argv[1:]
runtime = Llama(model, lora_path=lora or None, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
rows = []
for prompt in np.load(tokens):
    runtime.reset()
    runtime.eval(prompt.tolist())
    rows.append(np.array(runtime.scores[: len(prompt)]))
np.save(out, np.stack(rows))
"""
PROMPTS = [
    "The capital of France is the city of Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(",
    "Water boils at one hundred degrees and it freezes at zero degrees when",
]


@pytest.fixture(scope="module")
def interpreter() -> str:
    named = os.environ.get("PISSA_LLAMA_PYTHON")
    if named is None and find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python: name an interpreter that has it with PISSA_LLAMA_PYTHON")
    return named or sys.executable


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p ‖ q) of next-token distributions given as logits, in nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_llama_cpp_predicts_what_transformers_predicts(interpreter: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [gguf] = _fetch(PACKAGE, [GGUF], GGUF_SHA256, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokens = torch.tensor([tokenizer(prompt)["input_ids"][:12] for prompt in PROMPTS])
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    base: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()

    def here(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits

    def there(lora: str) -> torch.Tensor:
        arguments = [str(gguf), lora, str(tmp_path / "tokens.npy"), str(tmp_path / "out.npy")]
        done = subprocess.run(
            [interpreter, "-c", IN_LLAMA_CPP, *arguments], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.from_numpy(np.load(tmp_path / "out.npy"))

    plain = here(base)
    noise = divergence(plain, there(""))
    model = adapt(base, PissaConfig(8, alpha=4.0, use_rslora=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(input_ids=tokens.flip(1), labels=tokens.flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = here(model.eval())
    export_lora(model, tmp_path / "lora.gguf", format="gguf")
    off, effect = divergence(trained, there(str(tmp_path / "lora.gguf"))), divergence(trained, plain)
    print(f"KL without adapter {noise:.2e}, with {off:.2e}; of the adapter itself {effect:.2e}")
    assert effect > 20 * noise
    assert off < 2 * noise
