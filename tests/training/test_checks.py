"""What would train and be wrong is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import recipe, rows, run
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from pissa import PissaConfig, adapt, export_merged, load
from pissa.data.encode import encode
from pissa.data.rows import examples_from_rows
from pissa.errors import ConfigError, DataError, TrainingError
from pissa.training.checks import check_causal, check_packs
from pissa.training.engine import micro_batch, training_arguments
from pissa.training.recipe import Recipe
from pissa.training.trainer import DataCollatorForLanguageModeling, RunTrainer
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


def bert(*, is_decoder: bool) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(vocab_size=384, num_attention_heads=2, is_decoder=is_decoder, **sizes))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: bert(is_decoder=True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_causal_models_pass_and_are_left_as_they_were(make: Any, frozen: bool) -> None:
    model = make().train().requires_grad_(not frozen)
    check_causal(model)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="BertLMHeadModel sees the tokens that it is to predict"):
        check_causal(bert(is_decoder=False))


def test_a_run_on_an_encoder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bert(is_decoder=False).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="an encoder"):
        run(tmp_path / "base", tmp_path / "out", recipe(target_modules=("query",)))
    assert not (tmp_path / "out").exists()


def test_a_token_without_an_embedding_is_named_before_the_split(tmp_path: Path) -> None:
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    said = r"knows 300 tokens, and the tokenizer has [0-9,]+: token 3\d\d .* or train with resize_embeddings"
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "base", tmp_path / "out", recipe())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{}, {"placement": "offset"}, {"trainable_token_indices": (301, 305)}])
def test_a_run_that_enlarges_the_base_is_loaded_and_merged_as_it_was_trained(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    result = run(tmp_path / "base", tmp_path / "run", recipe(resize_embeddings=True, **settings))
    assert result.model is not None
    tokens = torch.arange(290, 310)[None]
    with torch.no_grad():
        trained = result.model.eval()(input_ids=tokens).logits
        loaded = load(tmp_path / "run").eval()(input_ids=tokens).logits
        export_merged(tmp_path / "run", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=tokens).logits
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)


def test_packed_documents_that_see_each_other_are_refused() -> None:
    collate = DataCollatorForLanguageModeling(0, padding_free=True)
    check_packs(tiny_llama(), collate)

    class Leaking(nn.Module):
        """Without positions no attention knows where a document begins."""

        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()
            self.config = self.model.config
            self.get_input_embeddings = self.model.get_input_embeddings

        def forward(self, input_ids: torch.Tensor, use_cache: bool, **_: Any) -> Any:
            return self.model(input_ids=input_ids, use_cache=use_cache)

    with pytest.raises(ConfigError, match="packed examples see each other"):
        check_packs(Leaking(), collate)


@pytest.mark.parametrize("how", ["cut off", "multiplied by zero"])
def test_an_adapter_that_no_gradient_reaches_ends_the_run(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def cut(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x).detach() if how == "cut off" else 0 * self.up_proj(x) + 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    monkeypatch.setattr(LlamaMLP, "forward", cut)
    with pytest.raises(TrainingError, match=r"no gradient reached model\.layers\.0\.mlp\.up_proj, .*exclude_modules"):
        run(base_directory, tmp_path / "out", recipe())


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_factors_that_start_at_zero_are_no_reason_to_stop(base_directory: Path, tmp_path: Path, method: Any) -> None:
    run(base_directory, tmp_path / "out", recipe(method=method, max_steps=1))


def test_packing_that_joins_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packing_strategy wrapped lets packed examples see each other"):
        training_arguments(recipe(packing=True, training={"packing_strategy": "wrapped"}), tmp_path)


def test_a_run_that_would_lose_most_of_its_rows_is_refused(base_directory: Path, tmp_path: Path) -> None:
    lengths = sorted(encode(examples_from_rows(rows()), tiny_tokenizer(), template="none", max_length=999).lengths)
    # as many rows are longer as are not
    settings: dict[str, Any] = {"max_length": lengths[len(lengths) // 2 - 1], "max_steps": 1}
    lost = sum(length > settings["max_length"] for length in lengths) / len(lengths)
    said = rf"{lost:.0%}, and max_cut_share allows 10%; raise max_length \(the longest row has {lengths[-1]} tokens\)"
    with pytest.raises(DataError, match=said):
        run(base_directory, tmp_path / "out", recipe(max_cut_share=0.1, **settings))
    assert not (tmp_path / "out").exists()
    run(base_directory, tmp_path / "out", recipe(max_cut_share=lost, **settings))


def test_an_eos_that_comes_out_as_text_is_refused() -> None:
    class Spelled:
        """A tokenizer whose eos is no token of its vocabulary."""

        eos_token = "the end"
        tokenizer: Any = tiny_tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return self.tokenizer(*arguments, **options)

    with pytest.raises(ConfigError, match="its eos token 'the end' comes out as text that ends in"):
        encode(examples_from_rows(rows()), Spelled(), template="none", max_length=64)


def test_a_batch_of_any_size_is_made_of_whole_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for processes in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        for size in range(processes, 20, processes):
            micro = micro_batch(Recipe(batch_size=size))
            assert 1 <= micro <= 4 and size % (micro * processes) == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="batch_size 4 is no multiple of 3 processes"):
        micro_batch(Recipe(batch_size=4))


@pytest.mark.parametrize("targets", ["all-linear", r".*(q_proj|lm_head)"])
def test_the_head_s_own_loss_is_used_where_it_is_adapted(targets: str, tmp_path: Path) -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=2, target_modules=targets))
    forward = vars(model.get_base_model()).get("forward")
    encoded = encode(examples_from_rows(rows()), tiny_tokenizer(), template="none", max_length=64)
    trainer = RunTrainer(
        model, training_arguments(recipe(max_steps=1), tmp_path), encoded, tiny_tokenizer(), batch_size=4
    )
    trainer.train()
    assert trainer.fused is (targets == "all-linear")
    trainer.release()
    assert vars(model.get_base_model()).get("forward") is forward
