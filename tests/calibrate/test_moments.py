"""Moments equal a brute-force sum over hooked inputs, few are in memory at a time, and the model stays as it was."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM, T5Config, T5Model
from transformers.pytorch_utils import Conv1D

from pissa.calibrate import moments
from pissa.calibrate.moments import Accumulator, Moment, second_moments
from pissa.errors import DataError, TargetError
from tiny import global_generators, same_tensors, snapshot, tiny_gpt2, tiny_llama, token_batch


def linear_names(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def batches_of(count: int = 3) -> list[dict[str, Any]]:
    return [{"input_ids": token_batch(seed)} for seed in range(count)]


def brute_force(model: nn.Module, batches: list[dict[str, Any]], names: list[str]) -> dict[str, Tensor]:
    """E[xᵀx] from plain hooks, fp64, one whole pass."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name].append(args[0].double().reshape(-1, args[0].shape[-1]))

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).mT @ torch.cat(rows) / len(torch.cat(rows)) for name, rows in seen.items()}


def by_name(found: list[Moment]) -> dict[str, Tensor]:
    return {name: moment.matrix for moment in found for name in moment.names}


SIZE: dict[str, Any] = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=2, **SIZE)).eval()


def sliding() -> nn.Module:
    """Blocks that get different masks."""
    torch.manual_seed(0)
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    config = Qwen2Config(num_hidden_layers=3, num_key_value_heads=2, **SIZE, **window)
    config._attn_implementation = "eager"
    return Qwen2ForCausalLM(config).eval()


def t5() -> nn.Module:
    """Two rows of blocks, and a position bias that the first block of each returns."""
    torch.manual_seed(0)
    return T5Model(T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()


class Skipping(nn.Module):
    """The last block depends on the first one's result past the block between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(384, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, input_ids: Tensor) -> Tensor:
        first = self.blocks[0](self.embedding(input_ids))
        return self.blocks[2](self.blocks[1](first) + 5 * first)


class Repeating(nn.Module):
    """One block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(384, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh())])
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for _ in range(3):
            x = self.blocks[0](x)
        return self.head(x)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, bert, sliding, Skipping, Repeating])
def test_moments_equal_brute_force(make: Any) -> None:
    model, batches = make(), batches_of()
    names = linear_names(model)
    expected = brute_force(model, batches, names)
    found = list(second_moments(model, batches, names))
    matrices = by_name(found)
    assert matrices.keys() == expected.keys()
    assert sum(len(moment.names) for moment in found) == len(names)
    for name, matrix in matrices.items():
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_encoder_and_decoder_each_have_their_own_row() -> None:
    model = t5()
    batches = [{**batch, "decoder_input_ids": token_batch(9)[:, :6]} for batch in batches_of()]
    names = linear_names(model)
    expected = brute_force(model, batches, names)
    for name, matrix in by_name(list(second_moments(model, batches, names))).items():
        torch.testing.assert_close(matrix.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_layers_with_one_input_share_a_moment() -> None:
    names = linear_names(tiny_llama())
    groups = {moment.names for moment in second_moments(tiny_llama(), batches_of(), names)}
    block = "model.layers.0."
    assert tuple(f"{block}self_attn.{name}_proj" for name in "qkv") in groups
    assert (f"{block}mlp.gate_proj", f"{block}mlp.up_proj") in groups
    assert (f"{block}self_attn.o_proj",) in groups


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_moments_of_one_block_are_in_memory_at_a_time(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "GROUP_BYTES", 1)
    seen: dict[int, weakref.ref[Tensor]] = {}
    peak = 0
    add = Accumulator.add

    def note(tensor: Tensor) -> None:
        nonlocal peak
        seen[id(tensor)] = weakref.ref(tensor)
        peak = max(peak, sum(reference() is not None for reference in seen.values()))

    def counted(self: Accumulator, x: Tensor, mask: Tensor | None) -> None:
        add(self, x, mask)
        assert self.total is not None
        note(self.total)

    monkeypatch.setattr(Accumulator, "add", counted)
    model = make()
    total = 0
    for moment in second_moments(model, batches_of(), linear_names(model)):
        note(moment.matrix)
        total += 1
        del moment
    # a block's four moments, one of them in fp64 and fp32 at once; the model has two blocks and a head
    assert total == 9
    assert peak <= 5


def test_the_text_passes_through_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    batches, rows = batches_of(5), []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    list(second_moments(model, batches, linear_names(model)))
    assert sum(rows) == 2 * (sum(len(batch["input_ids"]) for batch in batches) + 1)  # and the first row once more


def test_padding_does_not_count() -> None:
    model = tiny_llama()
    ids = token_batch()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    padded = by_name(list(second_moments(model, [{"input_ids": ids, "attention_mask": mask}], linear_names(model))))
    rows = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :6]}]
    alone = by_name(list(second_moments(model, rows, linear_names(model))))
    for name, matrix in padded.items():
        torch.testing.assert_close(matrix, alone[name], rtol=1e-4, atol=1e-5)


def test_same_bits_every_time_and_the_model_is_left_as_it_was() -> None:
    model: Any = tiny_llama().train()
    model.model.layers[1].eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    generators = global_generators()
    names = linear_names(model)
    first = by_name(list(second_moments(model, batches_of(), names)))
    assert torch.is_grad_enabled()
    for _ in second_moments(model, batches_of(), names):
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
        break
    second = by_name(list(second_moments(model, batches_of(), names)))
    assert same_tensors(first, second)
    assert same_tensors(before, snapshot(model))
    assert generators == global_generators()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_consumer_may_change_the_layers_it_was_given() -> None:
    model: Any = tiny_llama()
    names = linear_names(model)
    expected = by_name(list(second_moments(tiny_llama(), batches_of(), names)))
    for moment in second_moments(model, batches_of(), names):
        for name in moment.names:
            assert torch.equal(moment.matrix, expected[name])
            model.get_submodule(name).weight.data.zero_()


def test_a_model_whose_blocks_are_no_row_takes_several_passes(caplog: pytest.LogCaptureFixture) -> None:
    moments_of_last = list(second_moments(Skipping(), batches_of(), ["blocks.2"]))
    assert "several passes" in caplog.text
    assert [moment.names for moment in moments_of_last] == [("blocks.2",)]


def test_blocks_after_the_last_layer_asked_for_do_not_run() -> None:
    model: Any = tiny_llama()
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    list(second_moments(model, batches_of(5), ["model.layers.0.mlp.down_proj"]))
    assert len(calls) == 1


def test_half_precision_inputs_are_summed_in_full_precision() -> None:
    model, batches = tiny_llama(dtype=torch.bfloat16), batches_of()
    names = linear_names(model)
    expected = brute_force(model, batches, names)
    for name, matrix in by_name(list(second_moments(model, batches, names))).items():
        torch.testing.assert_close(matrix.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_collected_is_named() -> None:
    model = tiny_llama()
    with pytest.raises(TargetError, match=r"no layer model\.layers\.7"):
        list(second_moments(model, batches_of(), ["model.layers.7"]))
    with pytest.raises(DataError, match="no calibration batches"):
        list(second_moments(model, [], linear_names(model)))
    model.extra = nn.Linear(2, 2)
    with pytest.raises(DataError, match="reached extra"):
        list(second_moments(model, batches_of(), ["extra"]))
    assert list(second_moments(model, batches_of(), [])) == []
