"""A configuration that exists is one that can be carried out."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from pissa.config import METHODS, PissaConfig, Quantization, quantization_preset
from pissa.decompose.methods import FACTORS
from pissa.errors import ConfigError, PissaError


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -3}, "rank is -3"),
        ({"rank": 4.0}, "rank is 4.0"),
        ({"rank": True}, "rank is True"),
        ({"rank": 4, "alpha": 0}, "alpha is 0"),
        ({"rank": 4, "alpha": -1.0}, "alpha is -1.0"),
        ({"rank": 4, "alpha": float("nan")}, "alpha is nan"),
        ({"rank": 4, "alpha": float("inf")}, "alpha is inf"),
        ({"rank": 4, "alpha": 1e300}, "alpha is 1e"),
        ({"rank": 4, "method": "pisa"}, "lora-kaiming"),
        ({"rank": 4, "rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"rank": 4, "alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\] is -1"),
        ({"rank": 4, "dropout": 1.0}, "dropout is 1.0"),
        ({"rank": 4, "dropout": -0.1}, "dropout is -0.1"),
        ({"rank": 4, "dropout": float("nan")}, "dropout is nan"),
        ({"rank": 4, "tolerance": 1.0}, "tolerance is 1.0"),
        ({"rank": 4, "tolerance": float("nan")}, "tolerance is nan"),
        ({"rank": 4, "target_modules": ()}, "target_modules is empty"),
        ({"rank": 4, "target_modules": "("}, "target_modules is no regular expression"),
        ({"rank": 4, "exclude_modules": "*"}, "exclude_modules is no regular expression"),
        ({"rank": 4, "rank_pattern": {"(": 2}}, r"rank_pattern\['\('\] is no regular expression"),
        ({"rank": 4, "modules_to_save": "lm_head"}, "give a list"),
        ({"rank": 4, "component": "major"}, "component is 'major'; allowed: principal, medium, minor, scored"),
        ({"rank": 4, "component": "minor", "method": "cura"}, 'component is for method "pissa", and the method is'),
        ({"rank": 4, "method": "random-pissa", "random_fraction": 1.5}, "random_fraction is 1.5; allowed: 0 to 1"),
        ({"rank": 4, "method": "random-pissa", "random_fraction": float("nan")}, "random_fraction is nan"),
        ({"rank": 4, "method": "random-pissa", "random_fraction": "half"}, "random_fraction is 'half'"),
        ({"rank": 4, "random_fraction": 0.5}, 'random_fraction is for method "random-pissa"'),
        ({"rank": 4, "method": "cura", "cur_core": "best"}, "cur_core is 'best'; allowed: optimal, intersection"),
        ({"rank": 4, "method": "cura", "cur_rcond": 1.0}, "cur_rcond is 1.0"),
        ({"rank": 4, "cur_rcond": 0.1, "cur_core": "intersection"}, "cur_core is for method.*cur_rcond is for method"),
        ({"rank": 4, "method": "cura", "quantization": Quantization()}, "method 'cura' cannot be quantised"),
        ({"rank": 4, "component": "minor", "quantization": Quantization()}, "component 'minor' cannot be quantised"),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        PissaConfig(**settings)
    assert isinstance(caught.value, PissaError) and isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_dropout_needs_consent_only_where_it_breaks_preservation() -> None:
    with pytest.raises(ConfigError, match="allow_dropout"):
        PissaConfig(4, dropout=0.1)
    assert PissaConfig(4, dropout=0.1, allow_dropout=True).dropout == 0.1
    assert PissaConfig(4, dropout=0.1, method="lora-kaiming").dropout == 0.1


@pytest.mark.parametrize(
    ("rank", "alpha", "use_rslora", "scale"),
    [(16, None, False, 1.0), (16, None, True, 1.0), (16, 8, False, 0.5), (16, 8, True, 2.0)],
)
def test_scale_is_alpha_over_rank_or_its_root(rank: int, alpha: float | None, use_rslora: bool, scale: float) -> None:
    assert PissaConfig(rank, alpha, use_rslora=use_rslora).scale(rank, alpha) == scale


def test_a_module_s_own_configuration_keeps_everything_but_rank_and_alpha() -> None:
    config = PissaConfig(8, alpha=4, use_rslora=True, rank_pattern={"q": 2}, alpha_pattern={"q": 3.0}, seed=7)
    assert config.for_module(2, 3.0) == PissaConfig(2, alpha=3.0, use_rslora=True, seed=7)


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PissaConfig(4).rank = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_every_method_has_a_function() -> None:
    assert set(METHODS) == set(FACTORS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"format": "fp4"}, "format is 'fp4'; allowed: nf4, int8, gptq, nvfp4"),
        ({"method": "lora"}, "method is 'lora'"),
        ({"iterations": 0}, "iterations is 0"),
        ({"iterations": True}, "iterations is True"),
        ({"scale_search": "both"}, "scale_search is 'both'"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"block_size": 48}, "block_size is 48"),
        ({"refit": False}, "refit is off"),
        ({"refit": False, "momentum": 0.0, "method": "loftq"}, "refit is off"),
        ({"format": "int8", "rounding": "gptq"}, "int8 takes"),
        ({"format": "x", "momentum": -1}, "format is 'x'.*momentum is -1"),
    ],
)
def test_a_quantization_that_means_nothing_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        Quantization(**settings)
    assert "\n" not in str(caught.value)


def test_presets_are_what_their_names_say() -> None:
    assert quantization_preset("ours-10") == Quantization()
    assert quantization_preset("ours-5", double_quant=False) == Quantization(iterations=5, double_quant=False)
    published = quantization_preset("qpissa-5")
    assert (published.iterations, published.refit, published.scale_search, published.momentum) == (
        5,
        False,
        "absmax",
        0,
    )
    assert not published.keeps_best and quantization_preset("loftq-1").method == "loftq"
    for name in ("qpissa", "ours-0", "loftq-x", "qlora-5", ""):
        with pytest.raises(ConfigError, match="allowed: qlora"):
            quantization_preset(name)


def test_adapter_and_quantisation_must_start_alike() -> None:
    with pytest.raises(ConfigError, match="start at zero"):
        PissaConfig(4, quantization=quantization_preset("qlora"))
    with pytest.raises(ConfigError, match="qlora"):
        PissaConfig(4, method="lora-kaiming", quantization=Quantization())
    assert PissaConfig(4, method="lora-kaiming", quantization=quantization_preset("qlora")).starts_at_zero
