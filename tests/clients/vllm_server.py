"""vLLM's own OpenAI server as a process on the loopback, and what is asked of it over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 1500
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to a request; raises `Refused` with the server's words."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from error
        return json.loads(text) if text.startswith(("{", "[")) else text

    def models(self) -> list[str]:
        """The names that it serves."""
        return [each["id"] for each in self.ask("/v1/models")["data"]]

    def load(self, name: str, adapter: Path) -> None:
        """Load an adapter into the running server."""
        self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter)})

    def unload(self, name: str) -> None:
        """Take an adapter out of the running server."""
        self.ask("/v1/unload_lora_adapter", {"lora_name": name})

    def continued(self, model: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Greedy tokens after each prompt, and the log-probability of each."""
        body = {
            "model": model, "prompt": prompts, "max_tokens": new_tokens, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choices = sorted(self.ask("/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        found = [choice["logprobs"] for choice in choices]
        tokens = [[int(token.removeprefix("token_id:")) for token in each["tokens"]] for each in found]
        return {"tokens": tokens, "logprobs": [each["token_logprobs"] for each in found]}


class Refused(Exception):
    """The server's answer to what it does not take."""


@contextmanager
def serving(
    python: Path,
    model: Path,
    log: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    max_rank: int = 16,
    dtype: str = "float32",
) -> Iterator[Server]:
    """A server, for as long as the block runs.

    Args:
        python: of vLLM's environment.
        model: the base's directory.
        log: where its output goes.
        adapters: name -> directory of what is loaded at the start.
        max_rank: `--max-lora-rank`.
        dtype: that it computes in.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager", "--max-model-len", "256",
        "--enable-lora", "--max-lora-rank", str(max_rank), "--max-loras", "4", "--max-num-seqs", "4",
    ]  # fmt: skip
    if adapters:
        command += ["--lora-modules", *(f"{name}={place}" for name, place in adapters.items())]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **ENVIRONMENT}, start_new_session=True
        )
        try:
            server = Server(port)
            _wait(server, process, log)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # with its engine, which is a process of its own
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers; an error with its last lines where it ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            server.ask("/health")
            return
        except (OSError, Refused):
            time.sleep(2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"vLLM's server did not come up:\n{tail}")
