"""How much of the rank should begin as principal part: SRR's k* (arXiv 2602.02001), layer kind by layer kind.

    k* = argmin_k ρ_k(W C) · ρ_{r−k}(E C)       ρ_k(M) = ‖M − SVD_k(M)‖ / ‖M‖,  E uniform in [−1, 1],  C Cᵀ the moment

The first quantisation leaves k components of W out; what it leaves of W is then fitted with the whole rank, and the two
go on by turns. k = 0 begins as LoftQ and QERA do, k = r as QPiSSA. Errors are those of a layer's output on held-out
text, relative to plain rounding's, after one turn and after as many as the default takes at most.

    python benchmarks/principal_part.py --text WIKITEXT2/valid.txt.gz --blocks 3,15,27 --out principal-part.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pissa.calibrate.moments import second_moments
from pissa.checkpoint.source.load import load_base, load_tokenizer
from pissa.config import Quantization
from pissa.data.text_files import texts_of
from pissa.lab.models import smollm2
from pissa.provenance import hardware, package_versions
from pissa.quantize.alternate import MOMENTUM_IN_METRIC, less
from pissa.quantize.formats import quantize_matrix
from pissa.quantize.lowrank import LowRank, best_fit, extrapolated, power_step
from pissa.quantize.metric import Metric, metric

FORMS: dict[str, dict[str, Any]] = {
    "NF4": {"format": "nf4"},
    "GPTQ 3 bits": {"format": "gptq", "bits": 3},
    "GPTQ 2 bits": {"format": "gptq", "bits": 2},
}
SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the rank, that begin as principal part."""
WINDOWS, LENGTH = 16, 256


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    out = Path(arguments.out)
    document: dict[str, Any] = {"rank": arguments.rank, "blocks": arguments.blocks, "rows": []}
    document |= {"versions": package_versions(), "hardware": hardware()}
    document["command"] = f"python benchmarks/principal_part.py --text TEXT --blocks {arguments.blocks}"
    for name, W, M, held in layers(arguments):
        for form in FORMS:
            document["rows"].append({"layer": name, "format": form, **measured(W, M, held, arguments.rank, form)})
            print(document["rows"][-1], flush=True)
        out.write_text(json.dumps(document, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(document))


def layers(arguments: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, weight, second moment, second moment on held-out text) of every linear layer of the blocks."""
    model = load_base(arguments.model or smollm2(), dtype=torch.float32).eval().requires_grad_(False)
    ids = load_tokenizer(arguments.model or smollm2())("".join(texts_of(arguments.text)), verbose=False)["input_ids"]
    blocks = tuple(f".{number}." for number in arguments.blocks.split(","))
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    names = [name for name in linear if any(block in name for block in blocks)]
    halves = (ids[: len(ids) // 2], ids[len(ids) // 2 :])
    found = []
    for half in halves:
        rows = [half[i * (len(half) // WINDOWS) :][:LENGTH] for i in range(WINDOWS)]
        batches = [{"input_ids": torch.tensor(rows[i : i + 8])} for i in range(0, WINDOWS, 8)]
        found.append({name: m.matrix for m in second_moments(model, batches, names) for name in m.names})
    for name in names:
        yield name, linear[name].weight.detach(), found[0][name], found[1][name]


def measured(W: Tensor, M: Tensor, held: Tensor, rank: int, form: str) -> dict[str, Any]:
    """k*, and for each share of the rank the error after one turn and in the end, as a share of plain rounding's."""
    weighting, config = metric(M, W.shape[1]), Quantization(**FORMS[form])
    plain = relative(less(W, quantize_matrix(W, Quantization(**FORMS[form], scale_search="absmax"), W.dtype)), W, held)
    best = principal_part(W, weighting, rank)
    errors: dict[str, list[float]] = {}
    for k in sorted({round(share * rank) for share in SHARES} | {best}):
        turns = list(begun_with(W, k, weighting, rank, config))
        kept = min(turns, key=lambda turn: turn[1])[0]
        errors[str(k)] = [relative(W - turn, W, held) / plain for turn in (turns[0][0], kept)]
    return {"k": best, "plain": plain, "errors": errors}


def relative(E: Tensor, W: Tensor, M: Tensor) -> float:
    """`‖E X‖ / ‖W X‖` on the text of the moment."""
    return float((((E @ M) * E).sum().clamp_min(0) / ((W @ M) * W).sum()).sqrt())


def principal_part(W: Tensor, weighting: Metric, rank: int, seed: int = 0) -> int:
    """SRR's k*: how many of the rank's components begin as principal part."""
    E = torch.empty_like(W).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    of_weight, of_error = (left_over(torch.linalg.svdvals(weighting.apply(X)), rank) for X in (W, E))
    return int((of_weight * of_error.flip(0)).argmin())


def left_over(S: Tensor, rank: int) -> Tensor:
    """ρ_k for k = 0 … rank: the share of the norm that the best rank-k matrix leaves."""
    squares = S.double().square()
    tail = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])[: rank + 1]
    return (tail.clamp_min(0) / squares.sum()).sqrt()


def srr(W: Tensor, M: Tensor, rank: int, config: Quantization) -> tuple[int, Tensor]:
    """(k*, `Q + L`) of the alternation begun with k* principal components."""
    weighting = metric(M, W.shape[1])
    k = principal_part(W, weighting, rank)
    return k, min(begun_with(W, k, weighting, rank, config), key=lambda turn: turn[1])[0]


def begun_with(W: Tensor, k: int, weighting: Metric, rank: int, config: Quantization) -> Iterator[tuple[Tensor, float]]:
    """`Q + L` and its error, turn by turn, of the alternation whose first quantisation leaves out k components."""
    L: LowRank | None = None
    target, packed = W, None
    if k:
        start = best_fit(W, k, weighting, None, tolerance=1e-3, algorithm="auto", seed=0)
        target = start.subtract_from(W)
    for _ in range(config.iterations):
        packed = quantize_matrix(target, config, W.dtype, weighting, near=packed)
        E = less(W, packed)
        before, L = L, power_step(E, rank, weighting, L, 0)
        yield torch.addmm(packed.dequantize(), L.left, L.right), L.error
        target = (extrapolated(L, before, MOMENTUM_IN_METRIC) if before is not None else L).subtract_from(W)


def table(document: dict[str, Any]) -> str:
    """Means over the layers of a kind, for people."""
    lines = [f"`{document['command']}`, rank {document['rank']}", ""]
    lines += ["Held-out output error as a share of plain rounding's, after one turn and in the end.", ""]
    starts = [f"k = {round(share * document['rank'])}" for share in SHARES]
    lines += [f"| format | layers | k* | {' | '.join(starts)} | k = k* |", "| --- " * (len(starts) + 4) + "|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault((row["format"], row["layer"].rpartition(".")[2]), []).append(row)
    for (form, kind), rows in groups.items():
        cells = [cell(rows, str(round(share * document["rank"]))) for share in SHARES] + [cell(rows, None)]
        lines.append(f"| {form} | {kind} | {', '.join(str(row['k']) for row in rows)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(rows: list[dict[str, Any]], k: str | None) -> str:
    """The mean errors of a start; None for each row's own k*."""
    found = [row["errors"][k or str(row["k"])] for row in rows]
    return ", ".join(f"{fmean(pair[turn] for pair in found):.3f}" for turn in (0, 1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id; SmolLM2-135M-Instruct from the cache")
    parser.add_argument("--text", default=f"{os.environ.get('PISSA_DATA', '.')}/wikitext2/valid.txt.gz")
    parser.add_argument("--blocks", default="3,15,27", help="their numbers")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--out", default="principal-part.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
