"""What an adapter is made of: the settings that `PissaConfig` and `Recipe` share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from .kinds import (
    Alpha,
    AlphaPattern,
    Count,
    Modules,
    Names,
    NotNegative,
    RankPattern,
    Share,
    ShareBelowOne,
    TokenIds,
)  # fmt: skip

Method = Literal["pissa", "random-pissa", "cura", "robust-pissa", "lora-kaiming", "lora-gaussian"]
METHODS: tuple[Method, ...] = get_args(Method)
Component = Literal["principal", "medium", "minor", "scored"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
CurCore = Literal["optimal", "intersection"]
CUR_CORES: tuple[CurCore, ...] = get_args(CurCore)
Placement = Literal["residual", "offset"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Algorithm = Literal["auto", "exact", "gram", "chebyshev", "krylov", "subspace"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


@dataclass(frozen=True)
class AdapterSettings:
    """What the adapter is, where it starts and which modules get one."""

    panel: ClassVar[str] = "Adapter"

    rank: Count
    """How many components each adapter has: at least 1, at most the smaller side of every target."""
    alpha: Alpha | None = None
    """LoRA's numerator: the adapter is scaled by alpha / rank. Left out, it is the rank: a scale of 1 (paper,
    section 5)."""
    method: Method = "pissa"
    """Where the initial adapter comes from: singular triplets ("pissa", "random-pissa"), rows and columns of the weight
    ("cura"), its best approximation in the l1 norm ("robust-pissa"), or a LoRA baseline."""
    component: Component = "principal"
    """Which singular triplets pissa takes: the largest, the middle or the smallest ones, or "scored": those with the
    largest first-order effect on the loss of the user's own data. Used only when method is pissa."""
    random_fraction: Share = 1.0
    """Which share of the components is drawn at random; 0 is PiSSA. Used only when method is random-pissa."""
    cur_core: CurCore = "optimal"
    """What stands between the chosen columns and rows: the best fit, or the inverse of their intersection, which makes
    the residual several times as large as the weight on real models. Used only when method is cura."""
    cur_rcond: ShareBelowOne | None = None
    """Singular values below this share of the largest count as zero. Left out, fp64 rounding decides. Used only when
    method is cura."""
    target_modules: Modules = "all-linear"
    """Which modules get an adapter: "all-linear" (every linear layer, attention and fused expert, but neither the
    output head nor routers), names or name endings, or one regular expression that matches whole names."""
    exclude_modules: Modules = ()
    """Which modules are left alone: names, name endings or one regular expression."""
    rank_pattern: RankPattern = field(default_factory=dict)
    """Ranks of single modules where they differ from rank, by name ending or regular expression, such as
    q_proj=8,v_proj=4."""
    alpha_pattern: AlphaPattern = field(default_factory=dict)
    """Alphas of single modules where they differ from alpha, by name ending or regular expression, such as
    q_proj=8,v_proj=4."""
    rank_budget: Count | None = None
    """How many parameters all adapters may have together. The modules then share them out so that together they capture
    most, and each gets from 1 to rank components. Left out, every module gets rank components."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank. Without an alpha the scale stays 1."""
    orthogonality: NotNegative = 0.5
    """How much factors that are not orthonormal are penalised. Used only with AdaLoRA."""
    dropout: ShareBelowOne = 0.0
    """Dropout on the adapter's input. PiSSA needs 0, unless allow_dropout is set."""
    allow_dropout: bool = False
    """Permit dropout with PiSSA although it drops principal components, so that the model is not the base at step 0."""
    tolerance: ShareBelowOne = 1e-3
    """Largest certified captured-energy loss of the truncated SVD."""
    algorithm: Algorithm = "auto"
    """Which algorithm computes the truncated SVD, see `pissa.truncated_svd`."""
    modules_to_save: Names = ()
    """Modules that are trained in full beside the adapters and saved with them, as in PEFT."""
    trainable_token_indices: TokenIds = ()
    """Tokens whose embeddings are trained in full and saved with the adapters, as in PEFT: ids such as 3,7, or those of
    one embedding module, such as embed_tokens=3+7."""
    placement: Placement = "residual"
    """"residual" replaces each weight by its residual. "offset" leaves the base as it is, also one in 4 or 8 bits, and
    trains W + s(B·A − B0·A0): one LoRA of twice the rank whose second half is frozen."""
    seed: int = 0
    """Seed of every random draw; the global generators are never touched."""
