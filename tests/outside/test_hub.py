"""A name that neither the disk nor the hub knows is one line, soon, whatever the network is like."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants

import pissa.outside.hub as hub
from pissa import PissaError, init_checkpoint
from pissa.checkpoint.read import read_adapter
from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.config import PissaConfig
from pissa.data.read import read_examples
from pissa.outside.hub import at_the_hub, why_unreachable

NAME = "no-such-organisation/no-such-name"


@contextmanager
def silent() -> Iterator[int]:
    """A server that takes what is sent and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def closed() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@contextmanager
def failing() -> Iterator[int]:
    """A server that is out of order."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(503)

        do_GET = do_HEAD

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()


ASKING: dict[str, Callable[[Path], Any]] = {
    "a base": lambda _: load_base(NAME),
    "a tokenizer": lambda _: load_tokenizer(NAME),
    "an adapter": lambda _: read_adapter(NAME),
    "a data set": lambda _: read_examples(NAME),
    "a model to split": lambda out: init_checkpoint(NAME, out / "split", PissaConfig(rank=2)),
}


@pytest.fixture(params=[silent, closed, failing], ids=lambda network: network.__name__)
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub of this kind, which is given a second to answer."""
    monkeypatch.setattr(hub, "SECONDS", 1.0)
    monkeypatch.setattr(hub, "_answers", {})
    with request.param() as port:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
        yield constants.ENDPOINT


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_name_is_one_line_whoever_asks(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    for what, ask in ASKING.items():
        with pytest.raises(PissaError, match=network) as caught:
            ask(tmp_path)
        assert NAME in str(caught.value) and "\n" not in str(caught.value), what
    assert time.monotonic() - start < 60  # a library's own repetitions take longer for each of them
    assert "Retrying" not in capsys.readouterr().err
    assert not constants.HF_HUB_OFFLINE and not datasets_config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub, "_asked", lambda endpoint: None)
    with at_the_hub():
        assert not constants.HF_HUB_OFFLINE and why_unreachable() is None


def test_what_the_environment_forbids_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_answers", {})
    with pytest.raises(PissaError, match="HF_HUB_OFFLINE") as caught:
        load_tokenizer(NAME)
    assert "\n" not in str(caught.value)
