"""A judge: any endpoint that speaks OpenAI's chat completions, asked with retries.

The endpoint may be anybody's, and it is given a key. So redirects are not followed, since they would carry the key to
another host; one answer has a time in which it must be whole, and a size; and what is not a chat completion is said in
one line.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

from ...errors import ConfigError, extra
from ...outside.documents import Unreadable, parse_object
from ...outside.schema import wrong_fields

RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
LENIENT = re.compile(r"\[\s*(\d+(?:\.\d+)?)\s*\]")
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be another one a moment later."""
LONGEST_WAIT = 60.0
LARGEST_ANSWER = 1 << 22
"""Bytes; 2048 tokens are some ten thousand."""


@dataclass(frozen=True)
class Message:
    """What the judge says."""

    content: str


@dataclass(frozen=True)
class Choice:
    """One of its answers."""

    message: Message


@dataclass(frozen=True)
class ChatCompletion:
    """The part of OpenAI's answer that counts."""

    choices: Annotated[list[Choice], len, "a list of at least one choice"]


@dataclass(frozen=True)
class Reply:
    """An endpoint's reply to one request."""

    status: int
    body: bytes
    retry_after: float


class NoReplyError(Exception):
    """The endpoint was not reached, or its reply was not whole in time or was too large."""


@dataclass(frozen=True)
class Judge:
    """An endpoint and how to ask it.

    Raises:
        ConfigError: the address is none, or the environment has no such variable.
    """

    url: str
    """Its base, such as https://api.openai.com/v1; `/chat/completions` is put behind it."""
    model: str
    """As the endpoint calls it."""
    key_env: str | None = None
    """Environment variable that holds the key; None where none is needed. The key itself is kept nowhere."""
    tries: int = 6
    """Before an answer is given up."""
    timeout: float = 180.0
    """Seconds in which one answer has to be whole, from the connection to its last byte."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^/\s]+[^\s]*", self.url):
            raise ConfigError(f"--judge-url is {self.url!r}; give the address of an endpoint, such as https://HOST/v1")
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ConfigError(f"the environment has no {self.key_env}, which --judge-key-env names; set it to the key")

    def ask(self, system: str, prompt: str, *, sleep: Callable[[float], None] = time.sleep) -> str:
        """The judge's answer to one prompt.

        Raises:
            ConfigError: the endpoint refuses, or gives no answer however often it is asked.
            MissingExtraError: aiohttp is not installed.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 2048}
        last, wait = "", 0.0
        for attempt in range(self.tries):
            if attempt:
                sleep(min(wait, LONGEST_WAIT))
            wait = 2.0**attempt
            try:
                reply = self._reply(body)
                if reply.status == 200:
                    return _content(reply.body)
            except (NoReplyError, Unreadable) as error:
                last = str(error)
                continue
            last = f"HTTP {reply.status} {_words(reply.body)}"
            if reply.status not in PASSING:
                raise ConfigError(
                    f"the judge at {self.url} refuses model {self.model!r}: {last}; check --judge-url, --judge-model "
                    "and --judge-key-env"
                )
            wait = max(wait, reply.retry_after)
        raise ConfigError(
            f"the judge at {self.url} gave no answer in {self.tries} tries (last: {last}); see that it runs, then give "
            "the same command again: with --out it goes on where it was"
        )

    def _reply(self, body: dict[str, Any]) -> Reply:
        """The reply to one request, in a thread of its own: a notebook's has an event loop already."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._post(body)).result()

    async def _post(self, body: dict[str, Any]) -> Reply:
        with extra("eval", "a judge is asked through aiohttp"):
            import aiohttp
        headers = {"Authorization": f"Bearer {os.environ.get(self.key_env, '')}"} if self.key_env is not None else {}
        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.timeout)) as session,
                session.post(address, json=body, headers=headers, allow_redirects=False) as response,
            ):
                if 300 <= response.status < 400:
                    return Reply(response.status, b"redirects to another address, which is not followed", 0.0)
                data = await _bounded(response.content)
                return Reply(response.status, data, _seconds(response.headers.get("Retry-After")))
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise NoReplyError(f"no whole answer in {self.timeout:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NoReplyError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def rating_of(judgement: str) -> float | None:
    """The rating that a judgement gives as [[N]], in 1 to 10; None where it gives none."""
    found = RATING.search(judgement) or LENIENT.search(judgement)
    value = float(found[1]) if found else None
    return value if value is not None and 1 <= value <= 10 else None


async def _bounded(stream: Any) -> bytes:
    """What a stream gives, decompressed, up to the bound."""
    parts, size = [], 0
    async for part in stream.iter_chunked(1 << 16):
        size += len(part)
        if size > LARGEST_ANSWER:
            raise NoReplyError(f"the answer is larger than {LARGEST_ANSWER:,} bytes")
        parts.append(part)
    return b"".join(parts)


def _content(answer: bytes) -> str:
    try:
        document = parse_object(answer)
    except Unreadable as error:
        raise Unreadable(f"the answer {error}: {_words(answer)}") from error
    wrong = next(wrong_fields(document, ChatCompletion), None)
    if wrong is not None:
        raise Unreadable(f"the answer is no chat completion ({wrong}): {_words(answer)}")
    return document["choices"][0]["message"]["content"]


def _words(body: bytes) -> str:
    """The beginning of a body on one line, without characters that steer a terminal."""
    text = " ".join(body[:2000].decode(errors="replace").split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:200]


def _seconds(header: str | None) -> float:
    try:
        value = float(header or 0)
    except ValueError:
        return 0.0
    return value if 0 <= value <= LONGEST_WAIT else LONGEST_WAIT if value > 0 else 0.0
