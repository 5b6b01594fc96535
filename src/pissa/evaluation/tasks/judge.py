"""A judge: any endpoint that speaks OpenAI's chat completions, asked with retries."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError

RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
LENIENT = re.compile(r"\[\s*(\d+(?:\.\d+)?)\s*\]")
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be another one a moment later."""
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Judge:
    """An endpoint and how to ask it."""

    url: str
    """Its base, such as https://api.openai.com/v1; `/chat/completions` is put behind it."""
    model: str
    """As the endpoint calls it."""
    key_env: str | None = None
    """Environment variable that holds the key; None where none is needed. The key itself is kept nowhere."""
    tries: int = 6
    """Before an answer is given up."""
    timeout: float = 180.0
    """Seconds for one answer."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]+", self.url):
            raise ConfigError(f"--judge-url is {self.url!r}; give the address of an endpoint, such as https://HOST/v1")
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ConfigError(f"the environment has no {self.key_env}, which --judge-key-env names; set it to the key")

    def ask(self, system: str, prompt: str, *, sleep: Callable[[float], None] = time.sleep) -> str:
        """The judge's answer to one prompt.

        Raises:
            ConfigError: the endpoint refuses, or gives no answer however often it is asked.
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
                return _content(self._post(body))
            except urllib.error.HTTPError as error:
                last = f"HTTP {error.code} {_words(error)}"
                if error.code not in PASSING:
                    raise ConfigError(
                        f"the judge at {self.url} refuses model {self.model!r}: {last}; check --judge-url, "
                        "--judge-model and --judge-key-env"
                    ) from error
                wait = max(wait, _retry_after(error))
            except (OSError, http.client.HTTPException, ValueError) as error:
                last = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(
            f"the judge at {self.url} gave no answer in {self.tries} tries (last: {last}); see that it runs, then give "
            "the same command again: with --out it goes on where it was"
        )

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_env, '')}"
        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return response.read()


def rating_of(judgement: str) -> float | None:
    """The rating that a judgement gives as [[N]], in 1 to 10; None where it gives none."""
    found = RATING.search(judgement) or LENIENT.search(judgement)
    value = float(found[1]) if found else None
    return value if value is not None and 1 <= value <= 10 else None


def _content(answer: bytes) -> str:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"the answer is no chat completion: {answer[:200].decode(errors='replace')}") from error
    if not isinstance(content, str):
        raise ValueError("the answer has no text")
    return content


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read().decode(errors="replace").split())[:200]
    except OSError:
        return str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return float(error.headers.get("Retry-After") or 0)
    except ValueError:
        return 0.0
