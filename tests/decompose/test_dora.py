"""DoRA's formulas, and AdaLoRA's."""

from __future__ import annotations

import pytest
import torch

from pissa.decompose.adalora import orthogonality, orthonormal_factors, random_factors
from pissa.decompose.dora import magnitudes, rescaled


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_magnitudes_are_row_norms_and_rescaling_gives_rows_that_length() -> None:
    W, m = normal(5, 7), torch.tensor([1.0, 2.0, 0.5, 3.0, 1e-3])
    expected = [sum(float(x) ** 2 for x in row) ** 0.5 for row in W]
    assert magnitudes(W).tolist() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(magnitudes(rescaled(W, m)), m)
    torch.testing.assert_close(rescaled(W, magnitudes(W)), W)
    assert magnitudes(W.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("deficient", [False, True])
def test_orthonormal_factors_keep_the_product(deficient: bool) -> None:
    A, B = normal(4, 9), normal(6, 4, seed=1)
    if deficient:
        B[:, 3] = B[:, 0]
    P, Q, E = orthonormal_factors(A, B)
    torch.testing.assert_close(Q * E @ P, B @ A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(P @ P.mT, torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(E, torch.linalg.svdvals(B @ A)[:4], rtol=1e-4, atol=1e-5)


def test_the_penalty_and_its_gradient_vanish_at_orthonormal_factors() -> None:
    P, Q, _ = (tensor.requires_grad_() for tensor in orthonormal_factors(normal(4, 9), normal(6, 4, seed=1)))
    penalty = orthogonality(P, Q)
    penalty.backward()
    assert P.grad is not None and Q.grad is not None
    assert float(penalty.detach()) < 1e-9 and max(float(t.abs().max()) for t in (P.grad, Q.grad)) < 1e-5
    # PEFT's form, without the square, pushes as hard there as anywhere
    noisy = P.detach().requires_grad_()
    torch.linalg.matrix_norm(noisy @ noisy.mT - torch.eye(4)).backward()
    assert noisy.grad is not None and float(noisy.grad.norm()) > 0.5
    assert float(orthogonality(2 * P.detach(), Q.detach())) == pytest.approx(4 * 9, rel=1e-4)


def test_adalora_s_own_start_is_zero_and_seeded() -> None:
    A, B = normal(4, 9), normal(6, 4)
    P, Q, E = random_factors(A, B, 3)
    again = random_factors(A, B, 3)
    assert P.shape == A.shape and Q.shape == B.shape and not E.any()
    assert torch.equal(P, again[0]) and torch.equal(Q, again[1])
    assert not torch.equal(P, random_factors(A, B, 4)[0])
