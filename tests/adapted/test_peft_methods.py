"""What PEFT lets one do to a model gives what it would on the base with the exported adapters, or is refused.

The lists below hold every public method and function of PEFT that takes an adapted model. Whoever installs a PEFT with
another one decides here what it has to be.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from kinds import CASES, Case
from pissa import PissaConfig, adapt, load, reference, save_residual
from pissa.errors import PissaError, TargetError
from pissa.live.state import adapter_layers
from tiny import largest_difference, logits_of, same_tensors, snapshot, tiny_llama, token_batch, train_steps

NOISE = 2e-5
"""Of logits: a few roundings in fp32."""

# What each does on weights that are residuals
RIGHT = "as on the base"
REFUSED = "refused, with the way out"
HARMLESS = "neither the function nor a tensor has a part in it"

MODEL = {
    **dict.fromkeys(("disable_adapter", "forward", "generate", "save_pretrained", "push_to_hub"), RIGHT),
    **dict.fromkeys(("add_adapter", "delete_adapter", "set_adapter", "load_adapter", "set_requires_grad"), RIGHT),
    **dict.fromkeys(("active_adapters", "active_peft_config", "base_model_torch_dtype", "get_base_model"), HARMLESS),
    **dict.fromkeys(("create_or_update_model_card", "from_pretrained", "get_layer_status"), HARMLESS),
    **dict.fromkeys(("get_model_status", "get_nb_trainable_parameters", "has_active_enabled_adapter"), HARMLESS),
    **dict.fromkeys(("modules_to_save", "peft_config", "prepare_model_for_gradient_checkpointing"), HARMLESS),
    **dict.fromkeys(("print_trainable_parameters", "prepare_inputs_for_generation"), HARMLESS),
    **dict.fromkeys(("get_prompt", "get_prompt_embedding_to_save", "supports_lora_conversion"), HARMLESS),
}
TUNER = {
    **dict.fromkeys(("disable_adapter_layers", "enable_adapter_layers", "merge_and_unload", "unload"), RIGHT),
    **dict.fromkeys(("merge_adapter", "unmerge_adapter", "delete_adapter", "set_adapter", "forward"), RIGHT),
    **dict.fromkeys(("set_requires_grad", "inject_adapter"), RIGHT),
    "add_weighted_adapter": REFUSED,
    **dict.fromkeys(("active_adapters", "get_model_config", "prefix", "supports_lora_conversion"), HARMLESS),
    **dict.fromkeys(("target_module_mapping", "tuner_layer_cls", "uses_shared_state"), HARMLESS),
    # takes what PEFT's own initialisations changed back out of tensors on their way to a file
    "subtract_mutated_init": HARMLESS,
    # AdaLoRA's pruning, which the paper leaves out and `live/adalora.py` puts off for ever
    **dict.fromkeys(
        ("resize_modules_by_rank_pattern", "resize_state_dict_by_rank_pattern", "update_and_allocate"), HARMLESS
    ),
}
LAYER = {
    **dict.fromkeys(("enable_adapters", "set_adapter", "set_scale", "scale_layer", "unscale_layer"), RIGHT),
    **dict.fromkeys(("merge", "unmerge", "update_layer", "delete_adapter", "set_requires_grad"), RIGHT),
    **dict.fromkeys(("reset_lora_parameters", "supports_lora_conversion", "weight"), REFUSED),
    # PEFT calls these from update_layer, which refuses what would come to them
    **dict.fromkeys(("corda_init", "loftq_init", "lora_ga_init", "mica_init", "olora_init", "pissa_init"), REFUSED),
    **dict.fromkeys(("active_adapter", "active_adapters", "adapter_layer_names", "bias", "disable_adapters"), HARMLESS),
    **dict.fromkeys(("frozen_peft_weight_names", "get_base_layer", "get_base_weight", "lora_variants"), HARMLESS),
    **dict.fromkeys(("merged", "merged_adapters", "other_param_names", "quantization_backend"), HARMLESS),
    **dict.fromkeys(("resolve_lora_variant", "set_base_weight", "orthogonal_init"), HARMLESS),
}
FUNCTIONS = {
    **dict.fromkeys(("rescale_adapter_scale", "inject_adapter_in_model"), RIGHT),
    **dict.fromkeys(("get_peft_model_state_dict", "set_peft_model_state_dict", "get_base_model_state_dict"), REFUSED),
    **dict.fromkeys(("set_base_model_state_dict", "convert_to_lora", "save_as_lora"), REFUSED),
    **dict.fromkeys(("get_layer_status", "get_model_status", "cast_mixed_precision_params"), HARMLESS),
    **dict.fromkeys(("disable_input_dtype_casting", "update_forward_signature", "update_generate_signature"), HARMLESS),
    **dict.fromkeys(("update_signature", "prepare_model_for_kbit_training"), HARMLESS),
    # PEFT takes only an adapter whose configuration says "eva", or weights of bitsandbytes, for these
    **dict.fromkeys(("initialize_lora_eva_weights", "get_eva_state_dict", "replace_lora_weights_loftq"), HARMLESS),
    # of a base, before it is adapted, or of no model at all
    **dict.fromkeys(("create_arrow_model", "get_peft_model", "preprocess_loraga"), HARMLESS),
    **dict.fromkeys(("find_kappa_target_modules", "check_if_peft_model", "get_peft_config"), HARMLESS),
    **dict.fromkeys(("load_peft_weights", "shift_tokens_right"), HARMLESS),
    **dict.fromkeys(("bloom_model_postprocess_past_key_value", "compose_cartridge_adapters"), HARMLESS),
    **dict.fromkeys(("initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text"), HARMLESS),
    "prompt_embeddings_from_past_key_values": HARMLESS,
}


def public(*classes: type) -> set[str]:
    """What these classes have beside nn.Module's own, and `forward`."""
    names = {name for cls in classes for name in dir(cls) if not name.startswith("_")}
    return (names - {*dir(nn.Module)}) | ({"forward"} & names)


def test_every_public_method_of_peft_is_decided_on() -> None:
    kinds = [cls for name, cls in vars(peft).items() if name.startswith("PeftModel") and isinstance(cls, type)]
    assert public(*kinds) == {*MODEL}
    assert public(LoraModel, AdaLoraModel) == {*TUNER}
    assert public(LoraLayer) - {"forward"} == {*LAYER}
    functions = {name for name in peft.__all__ if inspect.isfunction(getattr(peft, name))}
    functions |= {n for n, f in vars(peft.helpers).items() if inspect.isfunction(f) and f.__module__ == "peft.helpers"}
    assert functions == {*FUNCTIONS}


def two_adapters(placement: Any = "residual") -> Any:
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    train_steps(model, 3)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    train_steps(model, 5)
    model.set_adapter("default")
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model of residuals with two adapters, and the same two as LoRAs on the base."""
    model, out = two_adapters(), tmp_path_factory.mktemp("saved")
    model.save_pretrained(str(out))
    plain = PeftModel.from_pretrained(tiny_llama(), str(out)).eval()
    plain.load_adapter(str(out / "second"), "second")
    return model, plain


def agree(pair: tuple[Any, Any], do: Callable[[Any], Tensor]) -> None:
    ours, theirs = (copy.deepcopy(model) for model in pair)
    assert largest_difference(do(ours), do(theirs)) < NOISE


def base_logits() -> Tensor:
    return logits_of(tiny_llama())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    active=st.lists(st.sampled_from(["default", "second"]), unique=True),
    scales=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 1.5, -1.0])] * 2),
    everywhere=st.sampled_from([0.0, 0.25, 1.0, 2.0]),
    enabled=st.booleans(),
)
def test_any_mixture_of_adapters_is_the_one_for_the_base(
    pair: tuple[Any, Any], active: list[str], scales: tuple[float, float], everywhere: float, enabled: bool
) -> None:
    def mixed(model: Any) -> Tensor:
        model.base_model.set_adapter(active)
        for layer in adapter_layers(model).values():
            for adapter, scale in zip(("default", "second"), scales, strict=True):
                layer.set_scale(adapter, scale)
        if not enabled:
            model.base_model.disable_adapter_layers()
        with rescale_adapter_scale(model, everywhere):
            return logits_of(model)

    agree(pair, mixed)


ROWS = ["default", "__base__", "second", "__base__"]


def rows(model: Any) -> Tensor:
    tokens = torch.arange(40).reshape(4, 10) % 30
    with torch.no_grad():
        return model(input_ids=tokens, adapter_names=ROWS).logits


def scaled_and_back(model: Any) -> Tensor:
    for layer in adapter_layers(model).values():
        layer.scale_layer(0.5)
        layer.unscale_layer()
    return logits_of(model)


def merged_and_back(model: Any) -> Tensor:
    model.merge_adapter()
    merged = logits_of(model)
    model.unmerge_adapter()
    assert largest_difference(logits_of(model), merged) < NOISE
    with model.disable_adapter():
        assert largest_difference(logits_of(model), base_logits()) < NOISE
    return merged


def merged_then_second(model: Any) -> Tensor:
    return logits_of(model.merge_and_unload(adapter_names=["second"]))


def without_default(model: Any) -> Tensor:
    model.delete_adapter("default")
    model.set_adapter("second")
    return logits_of(model)


def off_and_on(model: Any) -> Tensor:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    return logits_of(model)


def generated(model: Any) -> Tensor:
    with model.disable_adapter():
        return model.generate(input_ids=token_batch()[:1, :4], max_new_tokens=6, do_sample=False).float()


@pytest.mark.parametrize(
    "do",
    [
        *(rows, scaled_and_back, merged_and_back, merged_then_second, without_default, off_and_on, generated),
        *(lambda model: logits_of(model.unload()), lambda model: logits_of(model.base_model.unload())),
        lambda model: logits_of(model.merge_and_unload()),
        lambda model: logits_of(model.merge_and_unload(safe_merge=True)),
    ],
)
def test_it_gives_what_the_same_adapters_give_on_the_base(pair: tuple[Any, Any], do: Callable[[Any], Tensor]) -> None:
    agree(pair, do)


def test_an_adapter_added_in_another_s_place_starts_at_the_base(pair: tuple[Any, Any]) -> None:
    model = copy.deepcopy(pair[0])
    config = copy.deepcopy(model.peft_config["default"])
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    model.delete_adapter("second")
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert largest_difference(logits_of(model), base_logits()) < NOISE
    model.add_adapter("default", config)
    model.set_adapter("default")
    assert largest_difference(logits_of(model), base_logits()) < NOISE
    train_steps(model, 2)
    assert largest_difference(logits_of(model), base_logits()) > 1e-3


def test_a_lora_that_another_library_injects_is_added_to_the_base(pair: tuple[Any, Any]) -> None:
    model = copy.deepcopy(pair[0])
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model.base_model.peft_config["theirs"] = config
    model.base_model.inject_adapter(model.get_base_model(), "theirs")
    model.base_model.set_adapter("theirs")
    assert largest_difference(logits_of(model), base_logits()) < NOISE


def convert(model: Any) -> Any:
    return peft.convert_to_lora(model, rank=2)


REFUSALS: dict[str, Callable[[Any, Path], Any]] = {
    "get_peft_model_state_dict": lambda model, _: peft.get_peft_model_state_dict(model),
    "its own state": lambda model, _: peft.get_peft_model_state_dict(model, model.state_dict()),
    "set_peft_model_state_dict": lambda model, _: peft.set_peft_model_state_dict(model, {}),
    "get_base_model_state_dict": lambda model, _: peft.get_base_model_state_dict(model),
    "set_base_model_state_dict": lambda model, _: peft.set_base_model_state_dict(model, {}),
    "convert_to_lora": lambda model, _: convert(model),
    "save_as_lora": lambda model, out: peft.save_as_lora(str(out), model, rank=2),
    "add_weighted_adapter": lambda model, _: model.add_weighted_adapter(["default", "second"], [1, 1], "mix", "cat"),
    "add_weighted_adapter of one": lambda model, _: model.add_weighted_adapter(["default"], [0.5], "mix"),
    "merge two": lambda model, _: model.merge_adapter(["default", "second"]),
    "train the initial one": lambda model, _: model.set_adapter("pissa_init"),
    "of the tuner": lambda model, _: model.base_model.set_adapter(["default", "pissa_init"]),
    "by its flag": lambda model, _: model.set_requires_grad("pissa_init"),
    "delete the initial one": lambda model, _: model.delete_adapter("pissa_init"),
    "base_model.model.save_pretrained": lambda model, out: model.base_model.model.save_pretrained(str(out)),
    "get_base_model().save_pretrained": lambda model, out: model.get_base_model().save_pretrained(str(out)),
    "reset": lambda model, _: next(iter(adapter_layers(model).values())).reset_lora_parameters("default", True),
    "another initialisation": lambda model, _: model.add_adapter("x", LoraConfig(r=4, init_lora_weights="olora")),
    "read a weight": lambda model, _: F.linear(
        torch.ones(1, 32), model.get_base_model().model.layers[0].mlp.up_proj.weight
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_right_is_refused_in_one_line_and_changes_nothing(
    pair: tuple[Any, Any], name: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(pair[0])
    before, function = snapshot(model), logits_of(model)
    with pytest.raises(PissaError) as caught:
        REFUSALS[name](model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert same_tensors(snapshot(model), before) and torch.equal(logits_of(model), function)
    assert {*model.peft_config} == {"default", "second", "pissa_init"}


def test_the_reference_of_a_merged_model_is_refused_and_back_after_unmerging(pair: tuple[Any, Any]) -> None:
    model = copy.deepcopy(pair[0])
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(PissaError, match="unmerge_adapter"):
        logits_of(model)
    model.base_model.enable_adapter_layers()
    model.unmerge_adapter()
    with reference(model):
        assert largest_difference(logits_of(model), base_logits()) < NOISE


@pytest.mark.parametrize("after", ["unload", "merge_and_unload"])
def test_a_base_without_adapters_can_be_saved_again(after: str, pair: tuple[Any, Any], tmp_path: Path) -> None:
    plain = getattr(copy.deepcopy(pair[0]), after)()
    plain.save_pretrained(str(tmp_path))
    assert largest_difference(logits_of(type(plain).from_pretrained(str(tmp_path))), logits_of(plain)) < NOISE


def saved_whole(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("placement", ["residual", "offset"])
@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), saved_whole, copy.deepcopy])
def test_a_model_out_of_a_pickle_is_as_good_as_the_one_in_it(
    placement: str, again: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = two_adapters(placement)
    twin = again(model)
    assert type(twin) is type(model) and torch.equal(logits_of(twin), logits_of(model))
    with twin.disable_adapter():
        assert largest_difference(logits_of(twin), base_logits()) < NOISE
    twin.save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert largest_difference(logits_of(plain), logits_of(model)) < NOISE
    assert largest_difference(logits_of(load(tmp_path, tiny_llama())), logits_of(model)) < NOISE
    train_steps(twin, 2)
    assert largest_difference(logits_of(twin), logits_of(model)) > 1e-4
    assert largest_difference(logits_of(twin.unload()), base_logits()) < NOISE


def test_a_copy_keeps_what_is_known_of_the_model(tmp_path: Path) -> None:
    twin: Any = pickle.loads(pickle.dumps(adapt(tiny_llama(), PissaConfig(4))))
    assert twin.pissa.config == PissaConfig(4) and len(twin.pissa.certificates) == 14
    save_residual(twin, tmp_path / "residual")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_layers_of_every_kind_give_the_base_whoever_takes_the_adapters_away(name: str) -> None:
    case: Case = CASES[name]
    model = case.model()
    with torch.no_grad():
        before = model(case.batch())
    adapted: Any = adapt(model, PissaConfig(2, target_modules=case.targets, **case.settings)).eval()
    with torch.no_grad():
        for parameter in (p for n, p in adapted.named_parameters() if ".default" in n and "out_proj" not in n):
            parameter.add_(0.05)
        trained = adapted(case.batch())
        assert not torch.allclose(trained, before, atol=1e-3)
        adapted.base_model.disable_adapter_layers()
        torch.testing.assert_close(adapted(case.batch()), before, rtol=0, atol=NOISE)
        adapted.base_model.enable_adapter_layers()
        torch.testing.assert_close(adapted(case.batch()), trained, rtol=0, atol=0)
        with rescale_adapter_scale(adapted, 0.0):
            torch.testing.assert_close(adapted(case.batch()), before, rtol=0, atol=NOISE)
        torch.testing.assert_close(adapted.unload()(case.batch()), before, rtol=0, atol=NOISE)


@pytest.mark.parametrize("placement", ["residual", "offset"])
def test_a_weight_read_where_no_source_shows_it_is_refused_at_the_first_forward(placement: Any) -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for name in ("a", "b"):
                x = torch.tanh(F.linear(x, getattr(self, name).weight))
            return x

    model = adapt(Sly(), PissaConfig(2, placement=placement))
    with pytest.raises(TargetError, match=r"weight of a without calling.*exclude_modules") as caught:
        model(torch.ones(1, 6))
    assert "\n" not in str(caught.value)
    assert model.get_base_model().a.weight.dtype == torch.float32  # pyright: ignore
    assert tuple(model.get_base_model().a.weight.shape) == (6, 6)  # pyright: ignore
