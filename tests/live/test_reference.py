"""The base's function is always reachable, and asking for it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pissa import PissaConfig, PissaError, adapt, reference, restore
from pissa.config import METHODS, Method
from pissa.live.state import INITIAL, TRAINABLE, adapter_layers
from sampled import thinned
from tiny import largest_difference, logits_of, same_tensors, snapshot, tiny_gpt2, tiny_llama, train_steps

MODELS: dict[str, Callable[..., Any]] = {
    "llama": partial(tiny_llama, layers=1),
    "gpt2": partial(tiny_gpt2, layers=1),
}
NOISE = 1e-5


def noise(method: Method) -> float:
    return NOISE if not method.startswith("lora-") else 0


def state_of(model: PeftModel) -> Any:
    """All that a block might leave changed."""
    layers = adapter_layers(model)
    return (
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: (list(layer.active_adapters), layer.disable_adapters) for name, layer in layers.items()},
        model.active_adapter,
        list(model.active_adapters),
    )


@pytest.mark.parametrize(("kind", "method", "training"), thinned(MODELS, METHODS, [False, True]))
def test_reference_is_the_base_before_and_after_training(kind: str, method: Method, training: bool) -> None:
    base = logits_of(MODELS[kind]())
    model = adapt(MODELS[kind]().train(training), PissaConfig(4, method=method))
    with reference(model) as same:
        assert same is model
        assert largest_difference(logits_of(model), base) <= noise(method)
    train_steps(model, 4)
    trained = logits_of(model)
    assert largest_difference(trained, base) > 1e-2
    with reference(model):
        assert largest_difference(logits_of(model), base) <= noise(method)
    assert torch.equal(logits_of(model), trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reference_in_16_bits_is_the_base_up_to_the_residual_s_rounding(dtype: torch.dtype) -> None:
    base = tiny_llama(dtype=dtype)
    model = adapt(copy.deepcopy(base), PissaConfig(4))
    start = logits_of(model)
    train_steps(model)
    with reference(model):
        assert torch.equal(logits_of(model), start)
        assert largest_difference(logits_of(model), logits_of(base)) < 5e-2


@pytest.mark.parametrize(
    ("method", "training", "trainable"), thinned(METHODS, product([False, True], [True, False]), whole=["pissa"])
)
def test_a_block_leaves_flags_modes_and_adapters_as_they_were(method: Method, training: bool, trainable: bool) -> None:
    model = adapt(tiny_llama(layers=1), PissaConfig(4, method=method, modules_to_save=["lm_head"])).train(training)
    if not trainable:
        model.requires_grad_(False)
    frozen = next(parameter for name, parameter in model.named_parameters() if ".lora_A.default" in name)
    frozen.requires_grad_(False)
    before = state_of(model)
    with reference(model):
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name)
    assert state_of(model) == before
    with suppress(KeyboardInterrupt), reference(model):
        raise KeyboardInterrupt
    assert state_of(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_blocks_nest(method: Method) -> None:
    base = logits_of(tiny_llama(layers=1))
    model = adapt(tiny_llama(layers=1), PissaConfig(4, method=method))
    train_steps(model)
    trained, before = logits_of(model), state_of(model)
    with reference(model):
        with reference(model):
            assert largest_difference(logits_of(model), base) <= noise(method)
        assert largest_difference(logits_of(model), base) <= noise(method)
    assert state_of(model) == before and torch.equal(logits_of(model), trained)


@pytest.mark.parametrize("method", METHODS)
def test_reference_is_the_base_inside_disable_adapter_too(method: Method) -> None:
    base = logits_of(tiny_llama(layers=1))
    model = adapt(tiny_llama(layers=1), PissaConfig(4, method=method))
    train_steps(model)
    trained = logits_of(model)
    with model.disable_adapter():
        disabled = logits_of(model)
        with reference(model):
            assert largest_difference(logits_of(model), base) <= noise(method)
        assert torch.equal(logits_of(model), disabled)
    assert torch.equal(logits_of(model), trained)


def test_a_block_in_the_middle_of_training_changes_no_loss() -> None:
    plain, watched = (adapt(tiny_llama(), PissaConfig(4)) for _ in range(2))
    expected = train_steps(plain, 4)
    optimizer = torch.optim.AdamW([p for p in watched.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        with reference(watched):
            logits_of(watched)
        losses += train_steps(watched, 1, first=step, optimizer=optimizer)
    assert losses == expected


def peft_pissa() -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    return get_peft_model(tiny_llama(), config)  # pyright: ignore


def merged() -> PeftModel:
    model: Any = adapt(tiny_llama(), PissaConfig(4))
    model.merge_adapter()
    return model


def decomposed_again() -> PeftModel:
    model = adapt(tiny_llama(), PissaConfig(4))
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa")
    PeftModel.add_adapter(model, "second", config)  # the model's own add_adapter refuses it, and so do its layers
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tiny_llama, "LlamaForCausalLM"),
        (peft_pissa, "cannot be known"),
        (merged, "unmerge_adapter"),
        (decomposed_again, "second"),
    ],
)
def test_where_the_base_cannot_be_known_neither_reference_nor_restore_pretends(
    make: Callable[[], Any], said: str
) -> None:
    model = make()
    with pytest.raises(PissaError, match=said), reference(model):
        pass
    with pytest.raises(PissaError, match=said):
        restore(model)


# restore


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_restore_gives_the_base_back(kind: str, method: Method) -> None:
    base = MODELS[kind]()
    model = adapt(
        MODELS[kind](), PissaConfig(4, method=method, modules_to_save=["wpe"] if kind == "gpt2" else ["norm"])
    )
    train_steps(model)
    restored: Any = restore(model)
    assert type(restored) is type(base)
    before, after = snapshot(base), snapshot(restored)
    assert before.keys() == after.keys()
    assert max(largest_difference(before[name], after[name]) for name in before) <= (
        1e-6 if not method.startswith("lora-") else 0
    )
    assert {n: p.requires_grad for n, p in restored.named_parameters()} == {
        n: p.requires_grad for n, p in base.named_parameters()
    }
    assert {n: type(m) for n, m in restored.named_modules()} == {n: type(m) for n, m in base.named_modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_restore_is_bit_exact_with_the_base_at_hand(kind: str, dtype: torch.dtype) -> None:
    base = MODELS[kind](dtype=dtype)
    model = adapt(MODELS[kind](dtype=dtype), PissaConfig(4))
    train_steps(model, 1)
    before = snapshot(base)
    restored = restore(model, base)
    assert same_tensors(before, snapshot(restored))
    with torch.no_grad():
        for parameter in restored.parameters():
            parameter.add_(1)
    assert same_tensors(before, snapshot(base))


def test_what_was_frozen_before_adapt_is_frozen_after_restore() -> None:
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    restored = restore(adapt(model, PissaConfig(4)))
    assert before == {name: parameter.requires_grad for name, parameter in restored.named_parameters()}


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:untied")
def test_restore_ties_again_what_was_tied(kind: str, with_base: bool) -> None:
    def make() -> Any:
        return tiny_llama(tie=True) if kind == "llama" else tiny_gpt2()

    base = make()
    model = adapt(make(), PissaConfig(4, target_modules=["lm_head"]))
    train_steps(model)
    restored: Any = restore(model, base if with_base else None)
    assert restored.lm_head.weight is restored.get_input_embeddings().weight
    assert restored.config.tie_word_embeddings
    assert restored.all_tied_weights_keys == base.all_tied_weights_keys
    assert same_tensors(snapshot(restored), snapshot(base))
    again = adapt(restored, PissaConfig(4, target_modules=["lm_head"]))
    assert largest_difference(logits_of(again), logits_of(base)) < NOISE


def test_two_linear_layers_that_share_a_weight_are_split_apart_and_tied_again() -> None:
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        for layer in (model[0], model[2]):
            layer.weight.data = torch.linspace(-1, 1, 64).sin().view(8, 8)  # pyright: ignore
            layer.bias.data.zero_()  # pyright: ignore
        model[2].weight = model[0].weight  # pyright: ignore
        return model

    x = torch.eye(8)
    expected = make()(x)
    with pytest.warns(UserWarning, match="untied 2 from 0"):
        adapted = adapt(make(), PissaConfig(3))
    torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)
    restored: Any = restore(adapted)
    assert restored[2].weight is restored[0].weight
    torch.testing.assert_close(restored(x), expected, rtol=1e-5, atol=1e-5)


def test_adapting_a_restored_base_gives_the_same_bits() -> None:
    first = adapt(tiny_llama(), PissaConfig(4))
    bits = snapshot(first)
    train_steps(first)
    assert same_tensors(bits, snapshot(adapt(restore(first, tiny_llama()), PissaConfig(4))))


def test_restore_refuses_another_model_s_weights_and_keeps_the_adapted_one() -> None:
    model = adapt(tiny_llama(), PissaConfig(4))
    before = snapshot(model)
    with pytest.raises(PissaError, match=r"another model.*model\.layers\.0\.self_attn\.q_proj"):
        restore(model, tiny_gpt2())
    assert same_tensors(before, snapshot(model)) and list(model.peft_config) == [TRAINABLE, INITIAL]
