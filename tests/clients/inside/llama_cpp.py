"""Runs where xllamacpp is installed: continuations by llama.cpp, with and without a LoRA; a JSON job in, JSON out.

    python llama_cpp.py JOB.json OUT.json

A job is {"model": GGUF, "lora": GGUF or null, "prompts": [[token ids]], "new_tokens": n, "chat": [messages] or null}.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]

FIXED = {"temperature": 0.0, "top_k": 1, "n_probs": 1, "cache_prompt": False}


def server(job: dict[str, Any]) -> Any:
    """A server in this process, on one thread, in fp32 where the model is."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["model"]
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.n_gpu_layers, parameters.fit_params = 0, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job.get("lora"):
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = job["lora"], 1.0
        parameters.lora_adapters = [adapter]
    return xllamacpp.Server(parameters)


def continued(running: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float | None]]:
    """Greedy tokens after a prompt, one by one, and the log-probability of each; None for half a character, of which
    the server says none."""
    tokens, values = [], []
    for _ in range(new_tokens):
        body = {**FIXED, "prompt": prompt + tokens, "n_predict": 1, "return_tokens": True}
        request = urllib.request.Request(
            f"{running.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answered:
            answer = json.loads(answered.read())
        tokens += answer["tokens"]
        (said,) = answer.get("completion_probabilities") or [{"logprob": None}]
        values.append(said["logprob"])
    return tokens, values


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    running = server(job)
    found = [continued(running, prompt, job["new_tokens"]) for prompt in job["prompts"]]
    result: dict[str, Any] = {"tokens": [tokens for tokens, _ in found], "logprobs": [values for _, values in found]}
    if job.get("chat"):
        request = {"messages": job["chat"], "temperature": 0.0, "max_tokens": job["chat_tokens"]}
        answer = running.handle_chat_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        result["chat"] = answer["choices"][0]["message"]["content"]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
