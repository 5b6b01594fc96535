"""Perplexity of quantised splits: how much of what 4 bits cost a language model each method wins back.

    recovered = (perplexity(QLoRA) − perplexity(method)) / (perplexity(QLoRA) − perplexity(fp32))

Every linear layer's weight is replaced by `Q + s·B·A` in fp32, so that the figure is the split's alone and no kernel's.
All methods see the same windows of the test text; calibration is on other text. Results are written after each method,
and a run that stopped goes on where it was.

    python benchmarks/perplexity.py --model MODEL --data WIKITEXT2 --out benchmarks/results/perplexity-nf4.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.calibrate.moments import second_moments
from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.config import PissaConfig
from pissa.data.text import calibration_batches
from pissa.data.text_files import texts_of
from pissa.evaluation.perplexity import perplexity
from pissa.lab.inspection.variants import Variant, variant
from pissa.lab.models import smollm2
from pissa.live.layers import place_of
from pissa.live.targets import resolve_targets
from pissa.provenance import hardware, package_versions
from pissa.split import split_weight

METHODS = {
    "nf4": "qlora,loftq-5,qpissa-5,ours-5,ours-10,ours-5+aware,ours-10+aware,ours-4+gptq",
    "gptq": "qlora,qlora+gptq,qpissa-1+gptq,qpissa-5+gptq,ours-4+gptq",
    "int8": "qlora,qpissa-5,ours-5",
}
NOT_RECORDED = ("out", "methods", "model", "data", "moments")
"""What does not change a row: where things lie, and which rows to measure."""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    settings = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("out", "methods", "model", "data", "moments")
    }
    document: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"rows": []}
    if document.get("settings", settings) != settings:
        raise SystemExit(f"{out} holds another measurement; name another --out")
    document |= {"settings": settings, "versions": package_versions()}
    document["command"] = (
        f"python benchmarks/perplexity.py --quantize {arguments.quantize} --rank {arguments.rank} "
        f"--windows {arguments.windows} --window {arguments.window} "
        f"--calibration-windows {arguments.calibration_windows}"
    )

    model = load_base(arguments.model or smollm2(), dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = load_tokenizer(arguments.model or smollm2())
    data = Path(arguments.data)
    ids = tokenizer("".join(texts_of(data / "test.txt.gz")))["input_ids"]
    names = [target.name for target in resolve_targets(model, PissaConfig(rank=arguments.rank))]
    original = {name: place_of(model.get_submodule(name)).matrices() for name in names}
    moments: dict[str, Tensor] = {}

    def measure(method: str, seconds: float) -> None:
        load = hardware()["load_average"]
        start = time.perf_counter()
        found = perplexity(model, ids, window=arguments.window, count=arguments.windows)
        row = {"method": method, "perplexity": found.value, "tokens": found.tokens, "split_seconds": round(seconds, 1)}
        row |= {"eval_seconds": round(time.perf_counter() - start, 1), "load_average": load, "losses": found.losses}
        document["rows"] = [r for r in document["rows"] if r["method"] != method] + [row]
        document["hardware"] = hardware()
        summarize(document)
        out.write_text(json.dumps(document, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(document))
        print(f"{method:16s} {found.value:9.4f}  split {seconds:.0f} s", flush=True)

    done = {row["method"] for row in document["rows"]}
    if "fp32" not in done:
        measure("fp32", 0.0)
    for name in (arguments.methods or METHODS[arguments.quantize]).split(","):
        if name in done:
            continue
        chosen = variant(name, format=arguments.quantize)
        if chosen.aware and not moments:
            moments = collect(model, tokenizer, data / "valid.txt.gz", names, original, arguments)
        start = time.perf_counter()
        for layer, W in original.items():
            place_of(model.get_submodule(layer)).put(restored(layer, W, chosen, moments.get(layer), arguments.rank))
        measure(name, time.perf_counter() - start)


def collect(
    model: Any, tokenizer: Any, path: Path, names: list[str], original: dict[str, Tensor], arguments: Any
) -> dict[str, Tensor]:
    """Every layer's moment in the original model, kept in a file between runs where one is named."""
    kept = Path(arguments.moments) if arguments.moments else None
    if kept is not None and kept.is_file():
        return torch.load(kept)
    for layer, W in original.items():
        place_of(model.get_submodule(layer)).put(W)
    batches = calibration_batches(path, tokenizer, arguments.window, arguments.calibration_windows)
    moments = {name: m.matrix for m in second_moments(model, batches, names) for name in m.names}
    if kept is not None:
        torch.save(moments, kept)
    return moments


def restored(name: str, W: Tensor, chosen: Variant, moment: Tensor | None, rank: int) -> Tensor:
    """`Q + s·B·A` of one weight."""
    return split_weight(W, chosen.config(rank, 0), moment=moment if chosen.aware else None, name=name).restore()


def summarize(document: dict[str, Any]) -> None:
    """Each row's share of the gap from QLoRA to fp32."""
    found = {row["method"]: row["perplexity"] for row in document["rows"]}
    for row in document["rows"]:
        if "qlora" in found:
            row["recovered"] = (found["qlora"] - row["perplexity"]) / (found["qlora"] - found["fp32"])


def table(document: dict[str, Any]) -> str:
    """The rows for people."""
    settings = document["settings"]
    lines = [
        f"Perplexity on WikiText-2 test, {settings['windows']} windows of {settings['window']} tokens at even "
        f"distances; {settings['quantize']}, rank {settings['rank']}.",
        "",
        f"`{document['command']}`",
        "",
        "| method | perplexity | share of the gap recovered | seconds to split | load |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in document["rows"]:
        share = f"{100 * row['recovered']:.1f} %" if "recovered" in row else ""
        measured = f"{row['perplexity']:.3f} | {share} | {row['split_seconds']:.0f} | {row['load_average']}"
        lines.append(f"| {row['method']} | {measured} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    import os

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id; SmolLM2-135M-Instruct from the cache")
    parser.add_argument("--data", default=f"{os.environ.get('PISSA_DATA', '.')}/wikitext2")
    parser.add_argument("--quantize", default="nf4", choices=list(METHODS))
    parser.add_argument("--methods", help="separated by commas")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--calibration-windows", type=int, default=24)
    parser.add_argument("--moments", help="file to keep the moments in, for runs with the same calibration")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="perplexity.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
