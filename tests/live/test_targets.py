"""Which modules are adapted: what was asked for, nothing else, and no offender goes unnamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from pissa import PissaConfig, adapt
from pissa.errors import ConfigError, PissaError, TargetError, WeightError
from pissa.live.state import adapter_layers
from pissa.live.targets import resolve_targets
from tiny import same_tensors, snapshot, tiny_gpt2, tiny_llama


def names(model: nn.Module, **settings: Any) -> list[str]:
    return [target.name for target in resolve_targets(model, PissaConfig(2, **settings))]


def test_all_linear_is_every_linear_layer_but_the_output_head() -> None:
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    linear = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    assert names(llama) == [name for name in linear if name != "lm_head"]
    assert len(linear) == 2 * 7 + 1
    assert sorted({name.rpartition(".")[2] for name in names(gpt2)}) == ["c_attn", "c_fc", "c_proj"]
    assert len(names(gpt2)) == 2 * 4


def test_all_linear_leaves_a_classifier_s_head() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert "score" not in names(LlamaForSequenceClassification(config))
    assert names(LlamaForSequenceClassification(config), target_modules=["score"]) == ["score"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, ["1.mlp.up_proj"]),
        ({"target_modules": ["0.mlp.up_proj"]}, ["0.mlp.up_proj"]),
        ({"target_modules": r".*\.1\..*(gate|down)_proj"}, ["1.mlp.gate_proj", "1.mlp.down_proj"]),
        ({"target_modules": "lm_head"}, ["lm_head"]),
        ({"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]}, ["1.self_attn.q_proj"]),
        ({"exclude_modules": r".*(mlp|layers\.0|[kvo]_proj).*"}, ["1.self_attn.q_proj"]),
        (
            {"target_modules": ["o_proj", "lm_head"], "exclude_modules": r".*\.0\..*"},
            ["1.self_attn.o_proj", "lm_head"],
        ),
    ],
)
def test_names_endings_and_expressions_select_what_they_say(settings: dict[str, Any], expected: list[str]) -> None:
    model = tiny_llama()
    expected = [name if name == "lm_head" else f"model.layers.{name}" for name in expected]
    assert names(model, **settings) == expected
    assert sorted(adapter_layers(adapt(model, PissaConfig(2, **settings)))) == sorted(expected)


def test_modules_to_save_are_no_targets() -> None:
    left = names(tiny_llama(), modules_to_save=["layers.1"])
    assert len(left) == 7 and all(name.startswith("model.layers.0.") for name in left)


def spoiled(*modules: str, value: float = float("nan")) -> nn.Module:
    model = tiny_llama()
    for name in modules:
        with torch.no_grad():
            model.get_submodule(name).weight[1, 2] = value  # pyright: ignore[reportIndexIssue]
    return model


def quantised(name: str) -> nn.Module:
    model = tiny_llama()
    module: Any = model.get_submodule(name)
    module.weight = nn.Parameter(torch.zeros(32 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    return model


def on_meta(name: str) -> nn.Module:
    model = tiny_llama()
    model.get_submodule(name).to("meta")
    return model


def adapted_by_peft() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]


REFUSALS: list[tuple[Any, dict[str, Any], type[PissaError], list[str]]] = [
    (tiny_llama, {"target_modules": ["q_porj", "up_prj"]}, TargetError, ["'q_porj'", "'up_prj'", "q_proj", "up_proj"]),
    (tiny_llama, {"target_modules": ["q_proj", "nothing_like_it"]}, TargetError, ["'nothing_like_it'"]),
    (tiny_llama, {"target_modules": "q_proj"}, TargetError, ["'q_proj'", "closest names: q_proj"]),
    (tiny_llama, {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, TargetError, ["taken away"]),
    (tiny_llama, {"exclude_modules": ["up_projj"]}, TargetError, ["exclude_modules", "'up_projj'", "up_proj"]),
    (tiny_llama, {"modules_to_save": ["lm_haed"]}, TargetError, ["modules_to_save", "'lm_haed'", "lm_head"]),
    (
        tiny_llama,
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "layers.1.self_attn"]},
        TargetError,
        ["lm_head", "model.layers.1.self_attn.q_proj", "modules_to_save at once"],
    ),
    (
        tiny_llama,
        {"target_modules": ["embed_tokens", "q_proj", "norm"]},
        TargetError,
        ["cannot adapt model.norm (LlamaRMSNorm)"],
    ),
    (
        tiny_llama,
        {"rank": 33},
        ConfigError,
        ["model.layers.0.self_attn.q_proj (32, 32): 33 > 32", "self_attn.k_proj (16, 32): 33 > 16", " and 11 more"],
    ),
    (
        tiny_llama,
        {"rank_pattern": {"v_proj": 17, "0.mlp.up_proj": 99}},
        ConfigError,
        ["layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj", "layers.0.mlp.up_proj (64, 32): 99 > 32"],
    ),
    (
        tiny_llama,
        {"rank_pattern": {"q_prj": 2, "q_proj": 3}, "alpha_pattern": {"embed_tokens": 2}},
        ConfigError,
        ["rank_pattern['q_prj']", "alpha_pattern['embed_tokens']"],
    ),
    (
        lambda: spoiled("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"),
        {},
        WeightError,
        ["NaN or Inf", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"],
    ),
    (lambda: spoiled("model.layers.1.mlp.down_proj", value=float("inf")), {}, WeightError, ["layers.1.mlp.down_proj"]),
    (
        lambda: quantised("model.layers.1.self_attn.q_proj"),
        {},
        WeightError,
        ["model.layers.1.self_attn.q_proj (torch.uint8", "quantis"],
    ),
    (lambda: on_meta("model.layers.0.self_attn.k_proj"), {}, WeightError, ["layers.0.self_attn.k_proj", "meta"]),
    (
        lambda: nn.TransformerEncoderLayer(8, 2, 8),
        {"target_modules": ["linear1", "out_proj"]},
        TargetError,
        ["self_attn.out_proj", "without calling it", "name the attention itself"],
    ),
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 3)), {}, TargetError, ["it has none"]),
    (adapted_by_peft, {}, TargetError, ["already carries adapters", "pissa.restore"]),
    (lambda: adapt(tiny_llama(), PissaConfig(2)), {}, TargetError, ["already carries adapters", "pissa.restore"]),
]


@pytest.mark.parametrize(("make", "settings", "error", "named"), REFUSALS)
def test_a_refused_adapt_names_every_offender_and_changes_nothing(
    make: Any, settings: dict[str, Any], error: type[PissaError], named: list[str]
) -> None:
    model = make()
    values = {name: tensor for name, tensor in snapshot(model).items() if not tensor.is_meta}
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(error) as caught:
        adapt(model, PissaConfig(**{"rank": 2, **settings}))
    message = str(caught.value)
    assert [part for part in named if part not in message] == [] and "\n" not in message
    assert modules == {name: id(module) for name, module in model.named_modules()}
    assert parameters == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    assert same_tensors(values, {name: tensor for name, tensor in snapshot(model).items() if not tensor.is_meta})


def test_a_refused_adapt_leaves_tied_weights_tied() -> None:
    model = tiny_llama(tie=True)
    with pytest.raises(ConfigError, match="rank exceeds"):
        adapt(model, PissaConfig(64, target_modules=["lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_patterns_set_rank_and_alpha_where_they_match() -> None:
    config = PissaConfig(
        4,
        alpha=2.0,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"0.self_attn.q_proj": 2, "v_proj": 3},
        alpha_pattern={r"layers\.1\..*": 9.0},
    )
    found = {t.name.removeprefix("model.layers."): (t.rank, t.alpha) for t in resolve_targets(tiny_llama(), config)}
    assert found == {
        "0.self_attn.q_proj": (2, 2.0),
        "0.self_attn.v_proj": (3, 2.0),
        "1.self_attn.q_proj": (4, 9.0),
        "1.self_attn.v_proj": (3, 9.0),
    }


class Nested(nn.Module):
    """A module name that is the ending of another one's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["fc"](self.fc(x))


def test_a_name_that_ends_another_one_s_means_its_own_module_alone() -> None:
    x = torch.ones(2, 8)
    model, before = Nested(), Nested()(x)
    adapted = adapt(model, PissaConfig(3, target_modules="fc"))
    assert list(adapter_layers(adapted)) == ["fc"]
    torch.testing.assert_close(adapted(x), before, rtol=1e-5, atol=1e-5)

    adapted = adapt(Nested(), PissaConfig(3, rank_pattern={"^fc": 2}, alpha_pattern={"^fc": 5.0}))
    layers = adapter_layers(adapted)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"fc": 2, "block.fc": 3}
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == {"fc": 2.5, "block.fc": 1.0}
    torch.testing.assert_close(adapted(x), before, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One module under two names, and another in a list twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.a = nn.Linear(8, 8)
        self.b = self.a
        layer = nn.Linear(8, 8)
        self.stack = nn.ModuleList([layer, layer])


def test_a_module_under_several_names_is_refused_by_all_of_them() -> None:
    model = Twice()
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"cannot adapt a = b, stack\.0 = stack\.1: one module under several names"):
        adapt(model, PissaConfig(2))
    assert same_tensors(before, snapshot(model))
    assert names(model, exclude_modules=["a", "0"]) == ["plain"]


def test_a_weight_that_is_computed_is_refused_by_name() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    nn.utils.parametrizations.orthogonal(model[1])
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[3])
    before = snapshot(model)
    with pytest.raises(TargetError, match="cannot adapt 1, 2, 3: the weight is computed by a parametrisation"):
        adapt(model, PissaConfig(2))
    assert same_tensors(before, snapshot(model))
    assert names(model, exclude_modules=["1", "2", "3"]) == ["0"]


def test_random_pissa_needs_residual_triplets_to_draw_and_names_every_layer_that_has_too_few() -> None:
    with pytest.raises(ConfigError, match=r"random_fraction 1 draws more .* in model\.layers\.0\.self_attn\.k_proj \("):
        resolve_targets(tiny_llama(), PissaConfig(9, method="random-pissa"))
    resolve_targets(tiny_llama(), PissaConfig(9, method="random-pissa", random_fraction=0.5))
