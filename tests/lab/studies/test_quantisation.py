"""Invariants of the quantisation study's numbers."""

from __future__ import annotations

import pytest
import torch
from passes import Quick

from pissa.lab.studies.quantisation import reductions, verdict_of
from pissa.lab.studies.weights import loaded


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


def test_a_reduction_is_that_of_the_definition(quick: Quick) -> None:
    """Against bitsandbytes' own NF4 and a dense SVD."""
    functional = pytest.importorskip("bitsandbytes.functional")
    document = quick("quantisation")
    row = next(row for row in document["results"]["rows"] if row["format"] == "nf4" and row["rank"] == 4)
    source = f"{document['out']}/runs/tiny-llama"
    W = loaded(source)[row["layer"]][0]

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        codes, state = functional.quantize_4bit(matrix.contiguous(), quant_type="nf4", blocksize=64)
        return functional.dequantize_4bit(codes, state).float()

    def nuclear(matrix: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(matrix.double(), "nuc"))

    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    principal = (U[:, :4] * S[:4]) @ Vh[:4]
    expected = 100 * (1 - nuclear(W - principal - rounded(W - principal)) / nuclear(W - rounded(W)))
    assert row["reduction"]["qpissa-1"] == pytest.approx(expected, abs=0.2)
    assert reductions(source, row["layer"], "nf4", 4)["reduction"] == pytest.approx(row["reduction"], abs=1e-6)


def test_the_verdict_follows_the_intervals() -> None:
    def results(low: float, gain: float) -> dict:
        table = [
            {"source": "m", "method": f"{name}-{count}", "by_kind": {"q": value}}
            for count in (1, 5)
            for name, value in (("qpissa", low), ("loftq", 0.0))
        ]
        formats = [{"qpissa-1": {"low": gain}, "qpissa-5": {"low": gain}}]
        return {
            "comparisons": [{"difference": {"low": low}}],
            "formats": formats,
            "table": table,
            "paper_rank": {"m": 4},
        }

    assert verdict_of(results(1, 1)) == "holds"
    assert verdict_of(results(-1, 1)) == verdict_of(results(1, -1)) == "holds in part"
    assert verdict_of(results(-1, -1)) == "does not hold here"
