"""The metric of a second moment, and the refit that is optimal in it."""

from __future__ import annotations

import pytest
import torch
from matrices import second_moment, trained_like

from pissa.errors import WeightError
from pissa.quantize.error import output_error
from pissa.quantize.lowrank import best_fit, singular_triplets
from pissa.quantize.metric import metric


def test_refit_is_the_best_of_its_rank_in_the_metric() -> None:
    E, M = trained_like(30, 40), second_moment(40, 400)
    found = best_fit(E, 5, metric(M, 40), None, tolerance=1e-6, algorithm="auto", seed=0)
    damped = metric(M, 40).moment
    error = output_error(found.subtract_from(E), damped)
    C = torch.linalg.cholesky(damped)
    optimum = torch.linalg.svdvals(E.double() @ C)[5:].norm()
    assert error == pytest.approx(float(optimum), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 10, 39])
def test_a_rank_deficient_moment_is_damped(tokens: int) -> None:
    M = metric(second_moment(40, tokens), 40)
    torch.testing.assert_close(M.factor @ M.factor.mT, M.moment)
    assert float(torch.linalg.eigvalsh(M.moment)[0]) > 0.005
    V = trained_like(3, 40)
    torch.testing.assert_close(M.undo(M.apply(V)), V, rtol=1e-3, atol=1e-5)


def test_without_damping_a_rank_deficient_moment_is_mended_by_its_eigenvectors() -> None:
    M = metric(second_moment(40, 10), 40, damping=0.0)
    assert bool(torch.isfinite(M.factor).all())


@pytest.mark.parametrize(
    ("moment", "named"),
    [
        (torch.eye(5), r"\(4, 4\)"),
        (torch.ones(4), r"\(4, 4\)"),
        (torch.eye(4, dtype=torch.int64), "float matrix"),
        (torch.full((4, 4), float("nan")), "NaN"),
        (torch.zeros(4, 4), "positive diagonal"),
        (torch.eye(4) + torch.triu(torch.ones(4, 4), 1), "symmetric"),
        (torch.ones(4, 4) * 3 - 2 * torch.eye(4), "negative eigenvalues"),
    ],
)
def test_what_is_no_second_moment_is_refused_by_name(moment: torch.Tensor, named: str) -> None:
    with pytest.raises(WeightError, match=named) as caught:
        metric(moment, 4, name="layer.0")
    assert "layer.0" in str(caught.value) and "\n" not in str(caught.value)


def test_triplets_of_a_product_are_its_svd() -> None:
    fitted = best_fit(
        trained_like(30, 40), 6, metric(second_moment(40, 99), 40), None, tolerance=0, algorithm="exact", seed=0
    )
    U, S, Vh = singular_triplets(fitted, 6)
    torch.testing.assert_close((U * S) @ Vh, fitted.left @ fitted.right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(S, torch.linalg.svdvals(fitted.left @ fitted.right)[:6], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(U.mT @ U, torch.eye(6), rtol=0, atol=1e-5)
