"""`pissa chat`: replies on stdout, everything else on stderr; a pipe and a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import exit_code
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, adapt, export_lora, export_merged
from pissa.outside.text import for_terminal
from tiny import tiny_llama, tiny_tokenizer, train_steps

SHORT = ("--max-new-tokens", "8")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tiny model whose replies depend on all that was said."""
    directory, model = tmp_path / "model", tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj" in name or "o_proj" in name:
                parameter.mul_(5)
        model.lm_head.weight.mul_(20)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command with lines on standard input; what it exits with and says."""

    def run(lines: str | bytes, *arguments: str) -> tuple[int, str, str]:
        piped = lines.encode() if isinstance(lines, str) else lines
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        code = exit_code("chat", *arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def trained(model: str, tmp_path: Path) -> Any:
    """A trained adapter on the model."""
    adapted = adapt(AutoModelForCausalLM.from_pretrained(model), PissaConfig(4))
    train_steps(adapted, 8)
    return adapted


def test_a_pipe_gets_the_replies_alone(model: str, say: Any) -> None:
    code, out, err = say("What is 2 + 2?\n\nAnd 3?\n", model, *SHORT)
    assert code == 0 and f"{model}: template chat" in err
    _, document, _ = say("What is 2 + 2?\nAnd 3?\n", model, *SHORT, "--json")
    said = json.loads(document)
    replies = [exchange["replies"][0]["text"] for exchange in said["exchanges"]]
    assert out == "".join(f"{for_terminal(reply)}\n" for reply in replies)
    assert [exchange["prompt"] for exchange in said["exchanges"]] == ["What is 2 + 2?", "And 3?"]
    assert said["settings"]["max_new_tokens"] == 8 and said["templates"] == {model: "chat"}
    _, again, _ = say("What is 2 + 2?\n/reset\nAnd 3?\n/quit\nnever said\n", model, *SHORT, "--json")
    replies_again = [exchange["replies"][0]["text"] for exchange in json.loads(again)["exchanges"]]
    assert replies_again[0] == replies[0] and replies_again[1] != replies[1]


def test_a_lora_and_a_merged_model_say_the_same_and_the_base_something_else(
    model: str, trained: Any, say: Any, tmp_path: Path
) -> None:
    lora, merged = str(tmp_path / "lora"), str(tmp_path / "merged")
    export_lora(trained, lora)
    export_merged(trained, merged)
    tiny_tokenizer().save_pretrained(merged)
    beside = json.loads(say("Hello\n", lora, "--base", model, "--compare", merged, *SHORT, "--json")[1])
    [exchange] = beside["exchanges"]
    assert [reply["from"] for reply in exchange["replies"]] == [lora, merged]
    first, second = (reply["text"] for reply in exchange["replies"])
    code, out, _ = say("Hello\n", lora, "--base", model, "--compare", "base", *SHORT)
    plain = say("Hello\n", model, *SHORT)[1]
    assert code == 0 and first == second
    first = for_terminal(first)
    assert out == f"[{lora}]\n{first}\n\n[base]\n{plain}" and plain != f"{first}\n"


@pytest.mark.parametrize(
    ("lines", "arguments", "complaint"),
    [
        ("a\n", ("MODEL", "--compare", "base"), "is a whole model without an adapter; name the other model"),
        ("/rest\n", ("MODEL",), "/rest is no command; did you mean /reset?; there are /reset, /quit"),
        (b"\xff\n", ("MODEL",), "line 1 of standard input is no UTF-8 text"),
        ("a\n", ("/no/such/model",), "/no/such/model does not exist"),
        ("a\n", ("MODEL", "--compare", "/no/such/model"), "/no/such/model does not exist"),
        ("a\n", ("MODEL", "--temperature", "hot"), "--temperature is 'hot'; give 0 or a positive number"),
        ("a\n", ("MODEL", "--template", "none", "--system", "s"), "template 'none' holds no system message"),
    ],
)
def test_wrong_input_is_one_line(lines: Any, arguments: tuple[str, ...], complaint: str, model: str, say: Any) -> None:
    code, out, err = say(lines, *(model if argument == "MODEL" else argument for argument in arguments))
    assert code == 2 and out == ""
    assert complaint in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(pty, "openpty"), reason="needs a terminal")
def test_on_a_terminal_ctrl_c_ends_a_reply_and_not_the_chat(model: str) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "pissa", "chat", model, "--max-new-tokens", "900"]
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        seen = ""

        def until(text: str, *, interrupting: bool = False) -> None:
            """Read up to a text; with a signal every second until it comes."""
            nonlocal seen
            started = time.monotonic()
            while text not in seen:
                assert time.monotonic() - started < 120, seen
                if interrupting:
                    process.send_signal(signal.SIGINT)
                if select.select([ours], [], [], 1)[0]:
                    seen += os.read(ours, 4096).decode(errors="replace")
            seen = seen[seen.index(text) + len(text) :]

        try:
            until("> ")
            os.write(ours, b"Hello\n")
            until("Hello")
            until("cut by Ctrl-C", interrupting=True)
            until("/quit or Ctrl-D leaves", interrupting=True)
            os.write(ours, b"/quit\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(ours)
