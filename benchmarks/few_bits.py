"""Which way of fitting a model in few bits to text is worth its time: perplexity, block by block.

    independent     every layer's moment is taken in the model as it was                       min ‖(W − Ŵ) X‖
    sequential      each block's inputs X' are what the blocks before it, quantised, put out   min ‖W* X' − Ŵ X'‖

W* = W + α·W (E[x x'ᵀ] − M') M'⁻¹ is the weight that maps what now comes in to what should come out (QEP, arXiv
2504.09629; α = 1 is the least-squares answer, α = 0 leaves W alone and only takes the moments anew). SRR (arXiv
2602.02001) chooses how much of the rank begins as principal part: k* = argmin_k ρ_k(SW)·ρ_{r−k}(SE).

A method may change settings of its fit: `ours+windows=96` calibrates on more text, `ours+rounding=gptq` rounds in
another way. One text calibrates and another measures (without `--test-text`, the first text's two halves). A run that
was stopped goes on where it was.

    python benchmarks/few_bits.py --text WIKITEXT2/valid.txt.gz --windows 16
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from principal_part import relative, srr
from torch import Tensor

from pissa.adapted.adapt import adapt
from pissa.calibrate.blocks import Sweep, block_names, block_of, probe
from pissa.calibrate.moments import groups_of, second_moments
from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.config import PissaConfig, Quantization, quantization_preset
from pissa.data.text import surroundings
from pissa.data.text_files import texts_of
from pissa.evaluation.intervals import bootstrap
from pissa.evaluation.perplexity import perplexity
from pissa.lab.models import minilm, smollm2
from pissa.live.layers import place_of
from pissa.live.targets import resolve_targets
from pissa.provenance import hardware, package_versions
from pissa.split import split_weight
from pissa.training.polish import HELD_OUT, Polish, hidden_states, polish

METHODS = "plain,qpissa-5,ours,sequential-0,sequential-0.5,sequential-1,srr"
DAMPING = 0.01
NOT_RECORDED = ("out", "methods", "model", "text", "test_text", "threads", "around")
"""What does not change a row: where things lie, and which rows to measure."""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    out = Path(arguments.out)
    document: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"rows": []}
    settings = {k: v for k, v in vars(arguments).items() if k not in NOT_RECORDED}
    if document.get("settings", settings) != settings:
        raise SystemExit(f"{out} holds another measurement; name another --out")
    given = {key.replace("_", "-"): value for key, value in settings.items() if value is not False}
    flags = " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in given.items())
    document |= {"settings": settings, "versions": package_versions(), "hardware": hardware()}
    document["command"] = f"python benchmarks/few_bits.py --text TEXT {flags}"

    source = arguments.model or (minilm() if arguments.encoder else smollm2())
    tokenizer = load_tokenizer(source, must_end=False)
    arguments.around = surroundings(tokenizer) if arguments.encoder else ([], [])
    plain: dict[str, Any] = {"verbose": False, "add_special_tokens": not arguments.encoder}
    text, *others = (tokenizer("".join(texts_of(file)), **plain)["input_ids"] for file in texts(arguments))
    text, test = (text, others[0]) if others else (text[: len(text) // 2], text[len(text) // 2 :])
    states: list[Tensor] = []
    for name in ("fp32", *arguments.methods.split(",")):
        if name in {row["method"] for row in document["rows"]} and not (by_states(arguments) and name == "fp32"):
            continue
        model = load_base(
            source, dtype=torch.float32, kind="AutoModel" if arguments.encoder else "AutoModelForCausalLM"
        )
        model.eval().requires_grad_(False)
        if arguments.blocks:
            model.model.layers = model.model.layers[: arguments.blocks]
        start, load = time.process_time(), hardware()["load_average"]
        more = quantized(model, name, arguments, text) if name != "fp32" else {}
        seconds = time.process_time() - start
        row = {"method": name, **measured(model, test, arguments, states), "cpu_seconds": round(seconds, 1), **more}
        others = [other for other in document["rows"] if other["method"] != name]
        document["rows"] = [*others, {**row, "load_average": load}]
        out.write_text(json.dumps(document, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(document))
        print(f"{name:16s} {row['value']:9.4f}  {seconds:.0f} CPU s", flush=True)


def texts(arguments: Any) -> list[str]:
    """The files to calibrate on and to measure on; one of them for both."""
    return [arguments.text] + ([arguments.test_text] if arguments.test_text else [])


def measured(model: Any, test: Sequence[int], arguments: Any, states: list[Tensor]) -> dict[str, Any]:
    """The perplexity of a language model; of an encoder, or of a model's first blocks alone, how far what it puts out
    is from `states`, which the first model that is measured leaves there."""
    if not by_states(arguments):
        found = perplexity(model, test, window=512, count=arguments.windows)
        return {"value": found.value, "losses": found.losses}
    found = hidden_states(model, windows(test, arguments.windows, arguments))
    states[:] = states or found
    apart = [float((h - own).square().sum()) / float(own.square().sum()) for h, own in zip(found, states, strict=True)]
    return {"value": (sum(apart) / len(apart)) ** 0.5, "by_batch": apart}


def by_states(arguments: Any) -> bool:
    """Whether hidden states are compared, and not perplexities."""
    return bool(arguments.blocks) or arguments.encoder


def windows(ids: Sequence[int], count: int, arguments: Any, rows: int = 8) -> list[dict[str, Tensor]]:
    """Windows at even distances, so many to a batch, with the special tokens that an encoder knows around them."""
    before, after = arguments.around
    length = arguments.calibration_length - len(before) - len(after)
    found = [[*before, *ids[i * (len(ids) // count) :][:length], *after] for i in range(count)]
    return [{"input_ids": torch.tensor(found[i : i + rows])} for i in range(0, count, rows)]


def quantized(model: Any, method: str, arguments: Any, text: Sequence[int]) -> dict[str, Any]:
    """Put `Q + s·B·A` in the place of every linear layer's weight."""
    method, *changes = method.split("+")
    own: dict[str, Any] = {key: value for key, _, value in (change.partition("=") for change in changes)}
    batches = windows(text, int(own.pop("windows", arguments.calibration_windows)), arguments)
    names = [target.name for target in resolve_targets(model, PissaConfig(rank=arguments.rank))]
    form: dict[str, Any] = {"format": arguments.quantize, "bits": arguments.bits, "block_size": arguments.block_size}
    own = {key: json.loads(value) if value[0].isdigit() else value for key, value in own.items()}
    steps = own.pop("polish", 0)
    ours = Quantization(**{**form, "iterations": arguments.iterations or Quantization().iterations, **own})
    notes: dict[str, Any] = {}
    kind, _, alpha = method.partition("-")
    if kind in ("plain", "qpissa", "loftq"):
        preset = quantization_preset("qlora" if kind == "plain" else method, **form)
        way = PissaConfig(arguments.rank, method="lora-kaiming" if kind == "plain" else "pissa", quantization=preset)
        for name in names:
            put(model, name, split_weight(place_of(model.get_submodule(name)).matrices(), way, name=name).restore())
        return notes
    config = PissaConfig(arguments.rank, quantization=ours)
    if steps:
        more = windows(text, 4 * (steps + HELD_OUT), arguments, rows=4)
        return {
            "polish": asdict(polished(model, config, batches, more, steps, Path(arguments.out).with_suffix(".state")))
        }

    def fit(name: str, W: Tensor, M: Tensor) -> Tensor:
        if kind == "srr":
            notes.setdefault("principal", {})[name], restored = srr(W, M, arguments.rank, ours)
            return restored
        return split_weight(W, config, moment=M, name=name).restore()

    if kind == "sequential":
        fitted = sequential(model, batches, names, fit, float(alpha))
    else:
        fitted = independent(model, batches, names, fit)
    for name, error in fitted:
        notes.setdefault("errors", {})[name] = error
    return notes


def polished(model: Any, config: PissaConfig, batches: Any, more: Any, steps: int, state: Path) -> Polish:
    """Adapt the model, and polish it on more of the same text; its own layers are then the quantised ones."""
    targets = hidden_states(model, more)
    adapted = adapt(model, config, batches=batches)
    made = polish(adapted, more, targets, steps, state=state, progress=lambda step, e: print(step, e, flush=True))
    adapted.eval().requires_grad_(False)
    state.unlink(missing_ok=True)
    return made


def put(model: Any, name: str, W: Tensor) -> None:
    place_of(model.get_submodule(name)).put(W)


def independent(model: Any, batches: Any, names: Sequence[str], fit: Any) -> Iterator[tuple[str, float]]:
    """Fit every layer to its moment in the model as it was; (name, relative output error on that text)."""
    for moment in second_moments(model, batches, names):
        for name in moment.names:
            W = place_of(model.get_submodule(name)).matrices().clone()
            restored = fit(name, W, moment.matrix)
            put(model, name, restored)
            yield name, relative(W - restored, W, moment.matrix)


def sequential(model: Any, batches: Any, names: Sequence[str], fit: Any, alpha: float) -> Iterator[tuple[str, float]]:
    """The same on what the quantised blocks put out, towards what the model as it was puts out."""
    blocks = block_names(model, names)
    trace = probe(model, batches[0], names, blocks)
    groups = [group for group in groups_of(names, trace) if block_of(group[0], blocks)]
    full, ours = Sweep(model, batches, blocks), Sweep(model, batches, blocks)
    for block in trace.calls:
        here = [group for group in groups if block_of(group[0], blocks) == block]
        wanted, found = Inputs(here), Inputs(here)
        full.advance(wanted.hear)
        for number in range(len(batches)):
            ours._run(number, found.hear(number))
        for group in here:
            x, own = wanted.of(group[0]), found.of(group[0])
            M = own.mT @ own / len(own)
            shift = x.mT @ own / len(own) - M
            damped = M + DAMPING * float(M.diagonal().mean()) * torch.eye(len(M))
            shift = torch.linalg.solve(damped, shift, left=False)
            for name in group:
                W = place_of(model.get_submodule(name)).matrices().clone()
                restored = fit(name, torch.addmm(W, W, shift, alpha=alpha), M)
                put(model, name, restored)
                apart = torch.linalg.vector_norm(x @ W.mT - own @ restored.mT)
                yield name, float(apart / torch.linalg.vector_norm(x @ W.mT))
        ours.advance(lambda number: {})


class Inputs:
    """What some layers were given, batch after batch."""

    def __init__(self, groups: Sequence[Sequence[str]]) -> None:
        self.seen: dict[str, list[Tensor]] = {group[0]: [] for group in groups}

    def hear(self, number: int) -> Mapping[str, Any]:
        """Functions that keep the inputs of the next batch."""
        return {name: lambda x, kept=kept: kept.append(x.reshape(-1, x.shape[-1])) for name, kept in self.seen.items()}

    def of(self, name: str) -> Tensor:
        """(tokens, in)."""
        return torch.cat(self.seen[name])


def table(document: dict[str, Any]) -> str:
    """The rows for people."""
    rows = {row["method"]: row for row in document["rows"]}
    hidden = document["settings"]["blocks"] or document["settings"]["encoder"]
    what = "error of the hidden states" if hidden else "perplexity"
    lines = [f"`{document['command']}`", "", f"| method | {what} | share of the gap recovered | CPU s to split |"]
    lines.append("| --- | --- | --- | --- |")
    for row in document["rows"]:
        recovered = share(rows, row) if "plain" in rows else ""
        lines.append(f"| {row['method']} | {row['value']:.4f} | {recovered} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def share(rows: dict[str, dict[str, Any]], row: dict[str, Any]) -> str:
    """How much of what plain rounding costs a method wins back, with a 95 % interval over windows, or batches."""
    part, back = ("losses", math.exp) if "losses" in row else ("by_batch", math.sqrt)
    full, plain, own = (each[part] for each in (rows["fp32"], rows["plain"], row))

    def recovered(triples: Sequence[tuple[float, float, float]]) -> float:
        best, worst, found = (back(fmean(column)) for column in zip(*triples, strict=True))
        return 100 * (worst - found) / (worst - best)

    triples = list(zip(full, plain, own, strict=True))
    low, high = bootstrap(triples, recovered) or (math.nan, math.nan)
    return f"{recovered(triples):.1f} % ({low:.1f} to {high:.1f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id; SmolLM2-135M-Instruct from the cache")
    parser.add_argument("--text", default=f"{os.environ.get('PISSA_DATA', '.')}/wikitext2/valid.txt.gz")
    parser.add_argument("--test-text", help="another text to measure on; left out, the second half of --text")
    parser.add_argument("--methods", default=METHODS, help="separated by commas")
    parser.add_argument("--quantize", default="nf4", choices=("nf4", "gptq"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=0, help="0 for the default")
    parser.add_argument("--encoder", action="store_true", help="the model is no language model: compare hidden states")
    parser.add_argument("--blocks", type=int, default=0, help="only the first ones, and their hidden states; 0 for all")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--calibration-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="few-bits.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
