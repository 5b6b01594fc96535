"""Invariants of the quantisation study's numbers."""

from __future__ import annotations

import pytest
import torch
from passes import Quick

from pissa.lab.studies import quantisation
from pissa.lab.studies.quantisation import verdict_of


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
