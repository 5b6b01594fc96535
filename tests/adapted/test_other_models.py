"""Adapters of models that are no causal language models: config.json says what is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from pissa import PissaConfig, adapt, init_checkpoint, load, save_residual
from pissa.checkpoint.source.architecture import class_for
from pissa.errors import CheckpointError, TargetError
from tiny import largest_difference, logits_of, save_by_peft_alone, tiny_llama, train_steps

pytestmark = pytest.mark.filterwarnings("ignore")


def settings(**values: Any) -> dict[str, Any]:
    return values


TEXT = settings(
    **settings(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
    **settings(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
)
LABELLED = {**TEXT, "num_labels": 3}
SEQUENCES = settings(
    **settings(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4),
    **settings(decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1),
    **settings(eos_token_id=2, decoder_start_token_id=2),
)
VISION = settings(
    **settings(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
    **settings(image_size=16, patch_size=8),
)
SOUND = settings(
    **settings(conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8),
    **settings(num_conv_pos_embedding_groups=4, num_feat_extract_layers=2),
)


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, **settings(decoder_start_token_id=0)
    )
    return hf.T5ForConditionalGeneration(config)


def whisper() -> Any:
    config = hf.WhisperConfig(num_mel_bins=8, max_source_positions=10, max_target_positions=32, **SEQUENCES)
    return hf.WhisperForConditionalGeneration(config)


def swin() -> Any:
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    return hf.SwinForImageClassification(config)


def clip() -> Any:
    config = hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return hf.CLIPModel(config)


def llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_index=5
    )
    return hf.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQUENCES)),
    "whisper": whisper,
    "roberta classifier": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**LABELLED)),
    "llama classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LABELLED)),
    "distilbert classifier": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(**settings(num_labels=3), vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
    ),
    "tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**LABELLED)),
    "questions": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**TEXT)),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "backbone": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
    "swin": swin,
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**settings(num_labels=3), **VISION)),
    "clip": clip,
    "llava": llava,
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**TEXT, **SOUND)),
    "causal": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
}


@pytest.mark.parametrize("name", MODELS)
def test_load_gives_the_class_and_the_tensors_that_were_saved(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(tmp_path / "base")
    cls = type(MODELS[name]())
    model = adapt(cls.from_pretrained(tmp_path / "base"), PissaConfig(2))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.ones_like(parameter) * (1 + len(key) % 3))
    model.save_pretrained(str(tmp_path / "run"))
    loaded = load(tmp_path / "run")
    assert type(loaded.get_base_model()) is cls
    ours = {k: v for k, v in model.state_dict().items() if "original_module" not in k}
    theirs = {k: v for k, v in loaded.state_dict().items() if "original_module" not in k}
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["roberta classifier", "distilbert classifier", "tokens", "vit", "t5"])
def test_peft_loads_the_initial_adapter_that_init_and_save_residual_write(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(tmp_path / "base")
    cls = type(MODELS[name]())
    init_checkpoint(tmp_path / "base", tmp_path / "init", PissaConfig(2))
    save_residual(adapt(cls.from_pretrained(tmp_path / "base"), PissaConfig(2)), tmp_path / "saved")
    base = cls.from_pretrained(tmp_path / "base")
    for made in ("init", "saved"):
        plain = cls.from_pretrained(tmp_path / made)
        whole = PeftModel.from_pretrained(plain, str(tmp_path / made), subfolder="pissa_init").merge_and_unload()
        for key, tensor in base.state_dict().items():
            torch.testing.assert_close(whole.state_dict()[key], tensor, rtol=0, atol=1e-5)


def test_a_head_that_was_added_in_training_is_asked_for(tmp_path: Path) -> None:
    MODELS["masked"]().save_pretrained(tmp_path / "base")

    def with_a_head() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    adapted = adapt(with_a_head(), PissaConfig(2))
    adapted.save_pretrained(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"trained for SEQ_CLS.*BertForMaskedLM.*base=model") as caught:
        load(tmp_path / "run")
    assert "\n" not in str(caught.value)
    again = with_a_head()
    batch = {"input_ids": torch.arange(3, 12)[None]}
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
        found = load(tmp_path / "run", again).eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_tensors_that_the_base_has_no_place_for_are_refused(tmp_path: Path) -> None:
    model = adapt(MODELS["roberta classifier"](), PissaConfig(2))
    model.save_pretrained(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="classifier"):
        load(tmp_path / "run", hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT)))


@pytest.mark.parametrize(
    ("architectures", "task", "trained", "expected"),
    [
        (["LlamaForCausalLM"], "CAUSAL_LM", None, "LlamaForCausalLM"),
        (["LlamaModel"], "CAUSAL_LM", None, "AutoModelForCausalLM"),
        (["T5ForConditionalGeneration"], "SEQ_2_SEQ_LM", None, "T5ForConditionalGeneration"),
        (None, None, None, "AutoModelForCausalLM"),
        (None, None, "ViTForImageClassification", "ViTForImageClassification"),
        (["ViTModel"], None, None, "ViTModel"),
        (["NoSuchForCausalLM"], "CAUSAL_LM", None, "AutoModelForCausalLM"),
        (["__import__"], None, "os", "AutoModelForCausalLM"),
        ("LlamaForCausalLM", None, "PreTrainedTokenizer", "AutoModelForCausalLM"),
    ],
)
def test_what_is_loaded(architectures: Any, task: str | None, trained: str | None, expected: str) -> None:
    assert class_for(architectures, task, trained, "x") == expected


def test_names_that_are_lost_on_the_way_back_are_refused_before_anything_is_split(tmp_path: Path) -> None:
    """transformers renames `mlp.shared_expert.` of older checkpoints, and finds that in this model's own names too."""
    config = hf.LagunaConfig(
        **settings(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16),
        **settings(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4),
        **settings(num_experts_per_tok=2, shared_expert_intermediate_size=24, max_position_embeddings=64),
    )
    model = hf.LagunaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    for act in (
        lambda: adapt(model, PissaConfig(2)),
        lambda: init_checkpoint(tmp_path / "base", tmp_path / "init", PissaConfig(2)),
    ):
        with pytest.raises(TargetError, match=r"shared_experts.*exclude_modules"):
            act()


# Older files


def test_an_adapter_in_a_pickle_is_read_and_no_code_of_it_run(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    train_steps(model, 2)
    PeftModel.save_pretrained(model, str(tmp_path / "old"), safe_serialization=False)
    assert not (tmp_path / "old" / "adapter_model.safetensors").exists()
    assert largest_difference(logits_of(load(tmp_path / "old")), logits_of(model)) < 1e-6

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        load(tmp_path / "old")
    assert not (tmp_path / "ran").exists()


def test_the_rank_r_adapter_that_peft_alone_saved_is_still_read(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapt(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), PissaConfig(4))
    train_steps(model, 2)
    save_by_peft_alone(model, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 4
    assert largest_difference(logits_of(load(tmp_path / "run")), logits_of(model)) < 1e-5
