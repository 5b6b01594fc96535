"""One trained run, for every runtime: lossless, small, merged, vLLM, llama.cpp.

    python examples/export.py RUN OUT [--base BASE]

RUN is what `pissa train` wrote, or any PEFT LoRA. Nothing is read of the base but for OUT/merged and, its
config.json, for OUT/llama-cpp.gguf, which is used as: llama-cli -m BASE.gguf --lora OUT/llama-cpp.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pissa import export_lora, export_merged


def main() -> None:
    """Write all of them and say what each costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--base")
    options = parser.parse_args()
    lossless = export_lora(options.run, options.out / "lossless")
    print(f"lossless: rank {lossless.config.r}; `pissa export --check vllm` says what vLLM makes of it")
    small = export_lora(options.run, options.out / "small", tolerance=0.1)
    print(f"small: rank {small.config.r}, largest relative error {max(small.errors.values()):.3f}")
    export_lora(options.run, options.out / "llama-cpp.gguf", format="gguf", base=options.base)
    export_merged(options.run, options.out / "merged", base=options.base)


if __name__ == "__main__":
    main()
