"""Invariants of the quantisation study's numbers."""

from __future__ import annotations

import pytest
import torch
from passes import Quick

from studies import quantisation
from studies.interval import mean_interval
from studies.quantisation import parts_of


def test_more_iterations_and_our_fit_reduce_more(quick: Quick) -> None:
    results = quick("quantisation")["results"]
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(set(line["by_kind"]) == kinds for line in results["table"])
    for row in results["rows"]:
        found = row["reduction"]
        assert all(value < 100 for value in found.values())
        assert found["qpissa-5"] > found["qpissa-1"]
        if row["format"] == "nf4":
            assert found["ours-5"] > max(found["qpissa-5"], found["loftq-5"])


def test_a_reduction_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against bitsandbytes' own NF4 and a dense SVD, on a matrix whose principal part stands out."""
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    left, right, noise = (torch.randn(*size, generator=generator) for size in ((64, 4), (4, 128), (64, 128)))
    W = left @ right + 0.1 * noise
    monkeypatch.setattr(quantisation, "loaded", lambda source: {"q_proj": (W, 4)})

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        codes, state = functional.quantize_4bit(matrix.contiguous(), quant_type="nf4", blocksize=64)
        return functional.dequantize_4bit(codes, state).float()

    def nuclear(matrix: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(matrix.double(), "nuc"))

    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    principal = (U[:, :4] * S[:4]) @ Vh[:4]
    expected = 100 * (1 - nuclear(W - principal - rounded(W - principal)) / nuclear(W - rounded(W)))
    found = quantisation.reductions("", "q_proj", "nf4", 4)
    assert found["kind"] == "q_proj"
    assert found["plain_error"] == pytest.approx(nuclear(W - rounded(W)), rel=1e-3)
    assert found["reduction"]["qpissa-1"] == pytest.approx(expected, abs=0.3)
    assert expected > 80


def test_the_parts_are_ranks_kinds_and_formats_each_over_layers() -> None:
    """Two layers of each kind: q leads by 4 and 6, k by -1 and 1, and the other formats gain 1 and 3."""
    leads = {"layers.0.q": 4.0, "layers.1.q": 6.0, "layers.0.k": -1.0, "layers.1.k": 1.0}
    rows = [
        {"source": source, "layer": layer, "kind": layer[-1], "format": form, "rank": rank}
        | {"reduction": {"loftq-1": 5.0, "qpissa-1": 5 + lead, "loftq-5": 5.0, "qpissa-5": 5 + lead + 100}}
        for source in ("m", "another")
        for rank, form in ((4, "nf4"), (8, "nf4"), (4, "int8"), (4, "gptq"))
        for layer, lead in leads.items()
    ]
    rows += [{**rows[0], "rank": 8, "layer": "layers.2.q", "reduction": {**rows[0]["reduction"], "qpissa-1": 205.0}}]
    parts = parts_of(rows, "m", 4)
    counted = ("rank 4", "rank 8", "q", "k", "int8", "gptq")
    assert set(parts) == {f"{name} (T={count})" for name in counted for count in (1, 5)}
    assert parts["rank 4 (T=1)"] == mean_interval([4.0, 6.0, -1.0, 1.0])
    assert parts["rank 8 (T=1)"].values == (4.0, 6.0, -1.0, 1.0, 200.0)
    assert parts["q (T=1)"] == mean_interval([4.0, 6.0])  # at its own rank 4, not at 8
    assert parts["k (T=5)"] == mean_interval([99.0, 101.0])
    assert parts["int8 (T=1)"] == mean_interval([9.0, 11.0, 4.0, 6.0])


def test_the_parts_decide_the_verdict_and_are_named_in_the_figures(quick: Quick) -> None:
    document = quick("quantisation")
    parts = document["results"]["parts"]
    assert len(parts) == 2 * (3 + 7 + 2)  # T = 1 and 5 of three ranks, seven kinds and two formats
    shown = [part["low"] is not None and part["low"] > 0 for part in parts.values()]
    assert (document["verdict"] == "holds in part") == (any(shown) and not all(shown))
    undecided = document["figures"].partition("undecided over layers: ")[2].partition("; behind: ")[0].split(", ")
    one_layer = {name.partition(": ")[2] for name, part in parts.items() if part["low"] is None}
    assert one_layer and one_layer <= set(undecided)
