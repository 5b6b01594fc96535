"""DoRA's magnitudes, and what they do to PiSSA (arXiv 2402.09353, section 4; paper, appendix A).

    W' = m ∘ V / ‖V‖        V = W_res + s·B·A        m, ‖V‖ (out,): norms of rows, ∘ row by row

DoRA trains the length of each output's weights apart from their direction. PEFT computes ‖V‖ anew in each forward, from
the layer's own weight, which under PiSSA is the residual, plus the adapter. So m must be taken from the true W: at step
0 V is W, m / ‖V‖ = 1, and the function is preserved; m from the residual alone would shrink every output. For the
untouched base the same adapter is `V = W + s·[B | −B0]·[A ; A0]` with the same m: a DoRA of rank 2r, exactly.
A row of zeros has no direction, and 0 / 0 would make its output NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitudes(W: Tensor) -> Tensor:
    """Norms of the rows of W (out, in), as PEFT computes them: (out,) fp32."""
    return torch.linalg.vector_norm(W.float(), dim=1)


def rescaled(V: Tensor, m: Tensor) -> Tensor:
    """V (out, in) with rows of the lengths m (out,), fp32."""
    V = V.float()
    return V * (m.to(V) / magnitudes(V))[:, None]
