"""What training changed, as an ordinary LoRA or a merged model for the untouched base (paper, appendix C).

    ΔW = s·(B·A − B0·A0) = s · [B | −B0] · [A ; A0]

is a LoRA of rank 2r, exactly. Its optimal rank-R approximation needs no dense matrix: with thin QR factorisations
`[B | −B0] = Q_B R_B` and `[A ; A0]ᵀ = Q_A R_A`, the singular values of ΔW are those of the 2r × 2r core
`s·R_B·R_Aᵀ`, and the discarded ones are the error (Eckart and Young).
"""
