"""A model's directory, from a path or from a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import CheckpointError
from ...outside.hub import at_the_hub, not_found
from ...stages import stage
from .files import COPIED_NAMES, COPIED_SUFFIXES
from .names import check_adapter_name, check_model_name

SMALL_FILES = [f"*{suffix}" for suffix in COPIED_SUFFIXES] + list(COPIED_NAMES)


def local_directory(model: str | os.PathLike[str]) -> Path:
    """A model's directory; of a hub id, that in the hub's cache, into which what is not there yet is downloaded.

    Safetensors are taken where the model has them, its pickles where it has not.

    Raises:
        CheckpointError: there is no such directory or model.
    """
    check_model_name(model)
    path = Path(model)
    if path.is_dir():
        return path
    snapshot = _download(os.fspath(model), "model*.safetensors")
    if not any((snapshot / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        snapshot = _download(os.fspath(model), "pytorch_model*.bin")
    return snapshot


def adapter_directory(adapter: str | os.PathLike[str]) -> Path:
    """An adapter's directory; of a hub id, that in the hub's cache, with the residual where one lies beside it.

    Raises:
        CheckpointError: there is no such directory or repository.
    """
    check_adapter_name(adapter)
    path = Path(adapter)
    if path.is_dir():
        return path
    found = _download(os.fspath(adapter), "*.safetensors")
    if not (found / "adapter_model.safetensors").exists():
        found = _download(os.fspath(adapter), "adapter_model.bin")
    return found


def in_cache(model: str, name: str) -> Path | None:
    """The directory of a repository in the hub's cache, where that holds a file of this name; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, name)
    except HFValidationError:
        return None
    return Path(found).parents[name.count("/")] if isinstance(found, str) else None


def is_in_hub(model: str, name: str) -> bool:
    """Whether the hub's repository has a file of this name; the cache remembers the answer. False where it cannot be
    asked: what needs the repository then says so itself."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if try_to_load_from_cache(model, name) is _CACHED_NO_EXIST:
            return False
        with at_the_hub():
            hf_hub_download(model, name)
    except (HfHubHTTPError, OSError, ValueError):
        return False
    return True


def first_line(error: BaseException) -> str:
    """An exception's message as one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def _download(model: str, weights: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with at_the_hub(), stage(f"fetching {model} from the hub"):
            return Path(snapshot_download(model, allow_patterns=[*SMALL_FILES, weights]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(not_found(model, error)) from error
