"""What training changed, as an ordinary LoRA or a merged model for the untouched base (paper, appendix C).

    ΔW = s·(B·A − B0·A0) = s · [B | −B0] · [A ; A0]

is a LoRA of rank 2r, exactly. Its optimal rank-R approximation needs no dense matrix: with thin QR factorisations
`[B | −B0] = Q_B R_B` and `[A ; A0]ᵀ = Q_A R_A`, the singular values of ΔW are those of the 2r × 2r core
`s·R_B·R_Aᵀ`, and the discarded ones are the error (Eckart and Young).
"""

from .files import LoraExport as LoraExport
from .files import gap_figures as gap_figures
from .files import write_lora as write_lora
from .lora import export_lora as export_lora
from .lora import export_state as export_state
from .low_rank import optimal_low_rank as optimal_low_rank
from .merged import export_merged as export_merged
