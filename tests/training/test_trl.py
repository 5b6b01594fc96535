"""TRL's trainers on adapted models: at step 0 the policy is the reference, and the reference stays the base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, Quantization, adapt, export_lora, reference
from pissa.errors import PissaError
from pissa.live.quantized import keep_unpacked
from tiny import largest_difference, logits_of, snapshot, tiny_llama, tiny_tokenizer

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

NOISE = 1e-5
PLACEMENTS: list[Any] = ["residual", "offset"]
both = pytest.mark.parametrize("placement", PLACEMENTS)
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [
    {"prompt": f"How many are {i}?", "chosen": f" The answer is: {i} in all", "rejected": f" Write {i} tasks"}
    for i in range(8)
]


def arguments(kind: Any, out: Path, **changes: Any) -> Any:
    """A trainer's configuration: one process on the CPU, four steps whose losses are all logged."""
    shared = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "logging_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    return kind(output_dir=str(out), lr_scheduler_type="constant", **{**shared, **quiet, **changes})


def dpo(model: Any, out: Path, **changes: Any) -> Any:
    return trl.DPOTrainer(
        model,
        args=arguments(trl.DPOConfig, out, gradient_checkpointing=False, **changes),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
    )


def grpo(model: Any, out: Path, **changes: Any) -> Any:
    def vowels(completions: list[Any], **_: Any) -> list[float]:
        return [sum(text.count(vowel) for vowel in "aeiou") / (1 + len(text)) for text in map(str, completions)]

    settings = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "gradient_checkpointing": False}
    return trl.GRPOTrainer(
        model,
        reward_funcs=vowels,
        args=arguments(trl.GRPOConfig, out, **{**settings, **changes}),
        train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]),
        processing_class=tiny_tokenizer(),
    )


def sft(model: Any, out: Path, **changes: Any) -> Any:
    return trl.SFTTrainer(
        model,
        args=arguments(trl.SFTConfig, out, gradient_checkpointing=False, **changes),
        train_dataset=Dataset.from_list([{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS]),
        processing_class=tiny_tokenizer(),
    )


def logged(trainer: Any, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def assert_reference_is_base(model: Any, base: torch.Tensor, noise: float) -> None:
    """Every way in which TRL and users reach the reference."""
    with reference(model):
        assert largest_difference(logits_of(model), base) <= noise
    with use_adapter(model, None):
        assert largest_difference(logits_of(model), base) <= noise
    if "ref" in model.peft_config:
        with use_adapter(model, "ref"):
            assert largest_difference(logits_of(model), base) <= max(noise, NOISE)


@both
def test_sft_trains_and_exports(placement: Any, tmp_path: Path) -> None:
    base = logits_of(tiny_llama())
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    trainer = sft(model, tmp_path / "out")
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert_reference_is_base(model.eval(), base, NOISE if placement == "residual" else 0)
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    assert largest_difference(logits_of(plain), logits_of(model)) < NOISE


@both
def test_what_a_trainer_saves_is_the_trained_model_on_the_base(placement: Any, tmp_path: Path) -> None:
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    trainer = sft(model, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    for place in (tmp_path, tmp_path / "checkpoint-4"):
        plain = PeftModel.from_pretrained(tiny_llama(), str(place))
        assert largest_difference(logits_of(plain), logits_of(model.eval())) < NOISE
        assert {path.name for path in place.iterdir() if path.is_dir()} <= {"checkpoint-2", "checkpoint-4"}


@both
def test_dpo_resumes_with_its_reference(placement: Any, tmp_path: Path) -> None:
    base, losses = logits_of(tiny_llama()), []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
        trainer = dpo(model, tmp_path, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        losses.append(logged(trainer, "loss"))
        assert_reference_is_base(model.eval(), base, NOISE if placement == "residual" else 0)
    assert losses[1] == losses[0] and len(losses[0]) == 4
    reference_only = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "checkpoint-4" / "ref"))
    assert largest_difference(logits_of(reference_only), base) < NOISE


@both
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2, "allow_dropout": True}, {"modules_to_save": ["norm"]}])
def test_dpo_starts_at_ln_2_with_margin_0_and_its_reference_stays_the_base(
    placement: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = logits_of(tiny_llama())
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement, **settings))
    trainer = dpo(model, tmp_path / "out")
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0
    losses = logged(trainer, "loss")
    # Trainer logs a rounded loss
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 1e-3
    model.eval()
    assert largest_difference(logits_of(model), base) > 1e-3
    assert_reference_is_base(model, base, NOISE if placement == "residual" else 0)
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    assert largest_difference(logits_of(plain), logits_of(model)) < NOISE


@both
def test_precomputed_reference_log_probabilities_are_the_policy_s_at_step_0(placement: Any, tmp_path: Path) -> None:
    trainer = dpo(
        adapt(tiny_llama(), PissaConfig(4, placement=placement)), tmp_path, precompute_ref_log_probs=True, max_steps=1
    )
    trainer.train()
    assert abs(logged(trainer, "rewards/margins")[0]) < 1e-6


@both
def test_grpo_starts_without_divergence_and_its_reference_stays_the_base(placement: Any, tmp_path: Path) -> None:
    base = logits_of(tiny_llama())
    model = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    trainer = grpo(model, tmp_path / "out")
    trainer.train()
    divergences = logged(trainer, "kl")
    assert divergences[0] == 0 and max(divergences[1:]) > 0
    assert_reference_is_base(model.eval(), base, NOISE if placement == "residual" else 0)


@pytest.mark.parametrize("kind", ["qpissa", "offset"])
def test_dpo_on_four_bits_starts_at_ln_2_with_margin_0(kind: str, tmp_path: Path) -> None:
    """TRL rounds the policy of a quantised model to bf16 after it made the reference of it."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = tiny_llama(hidden=64)
    if kind == "qpissa":
        model = adapt(plain, PissaConfig(4, quantization=Quantization(iterations=1)))
        base = logits_of(model)
    else:
        plain.save_pretrained(tmp_path / "base")
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        keep_unpacked(loaded)  # whose kernel for inference computes in bf16
        base = logits_of(loaded)
        model = adapt(loaded, PissaConfig(4, placement="offset"))
    trainer = dpo(model, tmp_path / "out")
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    with reference(model.eval()):
        assert largest_difference(logits_of(model), base) <= (NOISE if kind == "qpissa" else 0)


def test_peft_s_pissa_breaks_the_base_under_dpo(tmp_path: Path) -> None:
    """What `add_adapter` of a copy does where the configuration says "pissa"."""
    base = logits_of(tiny_llama())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights="pissa")
    theirs: Any = get_peft_model(tiny_llama(), config)  # pyright: ignore
    dpo(theirs, tmp_path)
    theirs.eval()
    for adapter in (None, "ref"):
        with use_adapter(theirs, adapter):
            assert largest_difference(logits_of(theirs), base) > 0.05


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    model = adapt(tiny_llama(), PissaConfig(4))
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    before = snapshot(model)
    for make in (dpo, grpo):
        with pytest.raises(PissaError, match="default") as caught:
            make(model, tmp_path)
        assert "\n" not in str(caught.value)
    assert before.keys() == snapshot(model).keys()
    head = adapt(tiny_llama(), PissaConfig(4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="lm_head"):
        dpo(head, tmp_path)
