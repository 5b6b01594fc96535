"""A judge's endpoint that redirects, dawdles, floods or talks nonsense: the key stays, and one line says why."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa.errors import ConfigError
from pissa.evaluation.tasks import judge as judge_module
from pissa.evaluation.tasks.judge import Judge
from pissa.outside.documents import Unreadable


class Raw:
    """A server that answers every connection with the same bytes, piece by piece."""

    def __init__(self, pieces: list[bytes], pause: float = 0.0) -> None:
        self.seen: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, args=(pieces, pause), daemon=True).start()

    def _serve(self, pieces: list[bytes], pause: float) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            with client:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += client.recv(65536)
                self.seen.append(request)
                try:
                    for piece in pieces:
                        client.sendall(piece)
                        time.sleep(pause)
                except OSError:
                    continue


def refused(server: Raw, **settings: Any) -> str:
    """What `ask` says of an endpoint that gives no answer."""
    with pytest.raises(ConfigError) as caught:
        Judge(server.url, "grader", tries=1, **settings).ask("", "Hello", sleep=lambda _: None)
    server.socket.close()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def whole(body: bytes, headers: bytes = b"") -> list[bytes]:
    """A reply of status 200."""
    return [b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_no_other_host_sees_the_key(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    other = Raw(whole(b"{}"))
    place = other.url.replace("127.0.0.1", "localhost")
    first = Raw([f"HTTP/1.1 {status} Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()])
    assert f"HTTP {status} redirects to another address, which is not followed" in refused(first, key_env="MY_KEY")
    assert not other.seen and b"sk-secret" in first.seen[0]


def test_the_time_is_that_of_a_whole_answer_and_not_of_each_piece() -> None:
    for pieces in (
        [b"HTTP/1.1 200 OK\r\n", *[b"a"] * 200],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", *[b"x"] * 200],
    ):
        start = time.monotonic()
        assert "no whole answer in 1 s" in refused(Raw(pieces, pause=0.1), timeout=1.0)
        assert time.monotonic() - start < 15  # 20 s of pauses


def test_an_answer_has_a_largest_size_also_when_it_is_packed() -> None:
    packed = gzip.compress(bytes(1 << 26))
    assert len(packed) < 1 << 20
    assert "larger than" in refused(Raw(whole(packed, b"Content-Encoding: gzip\r\n")))
    assert "larger than" in refused(Raw(whole(bytes(judge_module.LARGEST_ANSWER + 1))))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": 3}}]}', b'{"choices": {"0": 1}}', b"[" * 100_000, b"\xff\xfe",
        b'{"choices": [{"message": {"content": "\\ud800"}}]}', b'{"a": 1, "a": 2}', b"\x1b]0;title\x07<html>",
        b'{"choices": [{"message": {"content": "cut',
    ],
)  # fmt: skip
def test_what_is_no_chat_completion_is_one_line(body: bytes) -> None:
    assert "the answer" in refused(Raw(whole(body)))


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["choices", "message", "content"]), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_any_json_is_an_answer_or_said_to_be_none(document: Any) -> None:
    try:
        assert isinstance(judge_module._content(json.dumps(document).encode()), str)
    except Unreadable as error:
        assert "\n" not in str(error) and str(error).isprintable()
