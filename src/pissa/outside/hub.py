"""The hub, asked once whether it answers, before anything is asked of it.

huggingface_hub waits without a limit for a network that swallows what is sent to it, and tries again for a minute and a
half, file by file, where there is none. So whatever may go to the hub goes through `at_the_hub`: a hub that does not
answer within seconds is one that is not there, and its cache alone is looked into, at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataError

SECONDS = 8.0
"""In which the hub has to answer."""
REMEMBERED = 60.0
"""Seconds for which it is not asked again."""
_answers: dict[str, tuple[float, str | None]] = {}


@contextmanager
def at_the_hub() -> Iterator[None]:
    """Inside, libraries ask the hub where it can be reached; where not, they look into its cache alone."""
    if why_unreachable() is None:
        yield
        return
    from huggingface_hub import constants

    held = [(constants, "HF_HUB_OFFLINE")]
    if "datasets" in sys.modules:
        held.append((sys.modules["datasets"].config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in held]
    for module, name in held:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(held, before, strict=True):
            setattr(module, name, value)


def why_unreachable() -> str | None:
    """Why nothing can be fetched from the hub, in words that follow "since"; None where something can."""
    from huggingface_hub import constants

    asked, found = _answers.get(constants.ENDPOINT, (-REMEMBERED, None))
    fresh = time.monotonic() - asked < REMEMBERED
    if constants.HF_HUB_OFFLINE:  # by `at_the_hub`, or from the start
        return found if fresh and found else "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set in the environment"
    if not fresh:
        found = _asked(constants.ENDPOINT)
        _answers[constants.ENDPOINT] = time.monotonic(), found
    return found


def check_data_set(name: str) -> None:
    """Refuse the id of a data set that no cache has and that the hub does not have, or cannot be asked for.

    Raises:
        DataError: with what the hub says.
    """
    from huggingface_hub import HfApi, constants

    owner, _, _ = name.rpartition("/")
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))
    # datasets spells names in a way of its own
    if Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}").is_dir() or any(
        prepared.glob(f"{owner}___*" if owner else "*")
    ):
        return
    try:
        with at_the_hub():
            HfApi().repo_info(name, repo_type="dataset", timeout=SECONDS)
    except Exception as error:  # of the hub's, of the network's, of the system's
        raise DataError(not_found(name, error, kind="file")) from error


def not_found(name: str | os.PathLike[str], error: BaseException, kind: str = "directory") -> str:
    """One line for a name that is no directory here and that the hub did not give.

    Args:
        name: what was asked for.
        error: what the library said.
        kind: what it might have been here.
    """
    words, reason = " ".join(str(error).split())[:400] or type(error).__name__, why_unreachable()
    if reason is not None:
        words = f"it is not in the hub's cache, and the hub is not asked, since {reason}"
    return f"there is no {kind} {name}, and as a hub id it cannot be loaded: {words}"


def _asked(endpoint: str) -> str | None:
    """Ask the hub, in a thread that is left behind when it does not come back: names are looked up without a limit."""
    found: list[str | None] = []

    def ask() -> None:
        from huggingface_hub.utils import get_session

        try:
            status = get_session().head(endpoint, timeout=SECONDS, follow_redirects=False).status_code
            found.append(f"{endpoint} answers with HTTP {status}" if status >= 500 else None)
        except Exception as error:  # whatever a network, a proxy or a certificate can be wrong in
            found.append(f"{endpoint} cannot be reached ({' '.join(str(error).split())[:200] or type(error).__name__})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else f"{endpoint} does not answer within {SECONDS:g} s"
