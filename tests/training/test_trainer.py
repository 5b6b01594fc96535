"""The loss is the plain one, however its batch is cut, and nothing is left behind on the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import recipe, rows, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pissa import PissaConfig, adapt
from pissa.checkpoint.read import read_adapter
from pissa.data.encode import IGNORED, Collator, encode
from pissa.data.rows import examples_from_rows
from pissa.errors import MissingExtraError, TrainingError
from pissa.live.state import TRAINABLE, adapter_factors
from pissa.training import trainer as trainer_module
from pissa.training.engine import training_arguments
from pissa.training.loss import response_loss
from pissa.training.trainer import RunTrainer, check_trainer
from tiny import largest_difference, tiny_gpt2, tiny_llama, tiny_tokenizer

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
TARGETS = {
    "all-linear": "all-linear",
    "with the head": (r".*(q_proj|c_attn|lm_head)",),
}


def batch() -> dict[str, Tensor]:
    """Two padded rows of prompt and response."""
    return Collator(pad_id=0)(
        [
            {"input_ids": [1, 5, 6, 7, 8, 9, 2], "labels": [IGNORED, IGNORED, IGNORED, 7, 8, 9, 2]},
            {"input_ids": [1, 15, 16, 2], "labels": [IGNORED, IGNORED, 16, 2]},
        ]
    )


def plain_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The sum over response tokens of the cross-entropy of full logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    shifted = logits[:, :-1].reshape(-1, logits.shape[-1]).double()
    return cross_entropy(shifted, inputs["labels"][:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:untied")
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", MODELS)
def test_response_loss_is_the_plain_cross_entropy_with_its_gradients(kind: str, targets: str) -> None:
    chosen = TARGETS[targets]
    pattern = chosen if isinstance(chosen, str) else chosen[0]
    model = adapt(MODELS[kind](), PissaConfig(rank=4, target_modules=pattern)).train()
    inputs = batch()
    loss, count = response_loss(model, model.get_output_embeddings(), inputs)
    loss.backward()
    ours = gradients(model)
    expected = plain_loss(model, inputs)
    expected.backward()
    theirs = gradients(model)
    assert count == 6
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, gradient in theirs.items():
        assert largest_difference(ours[name], gradient) <= 1e-6 * max(1.0, float(gradient.abs().max())), name


def test_a_batch_without_responses_has_loss_0_and_gradients_0() -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=2, target_modules=r".*(q_proj|lm_head)")).train()
    inputs = Collator(pad_id=0)([{"input_ids": [0], "labels": [IGNORED]}] * 2)
    loss, count = response_loss(model, model.get_output_embeddings(), inputs)
    loss.backward()
    found = gradients(model)
    assert (float(loss.detach()), count) == (0.0, 0)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    assert all(not gradient.any() for gradient in found.values())


def test_the_head_sees_every_position_again_even_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    head = model.get_output_embeddings()
    response_loss(model, head, batch())
    assert not head._forward_pre_hooks

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(MemoryError):
        response_loss(model, head, batch())
    assert not head._forward_pre_hooks


@pytest.fixture(scope="module")
def whole_batches(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    settings = recipe(batch_size=8, micro_batch_size=8)
    return run(base_directory, tmp_path_factory.mktemp("whole") / "run", settings).results["losses"]


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch_size": 2}, {"micro_batch_size": 8, "gradient_checkpointing": True}],
    ids=["accumulated", "checkpointed"],
)
def test_cutting_a_batch_or_recomputing_activations_leaves_the_losses(
    base_directory: Path, tmp_path: Path, whole_batches: list[float], settings: dict[str, Any]
) -> None:
    # 20 rows: the third step of each epoch has 4 rows, not 8
    result = run(base_directory, tmp_path / "run", recipe(batch_size=8, **settings))
    assert result.results["losses"] == pytest.approx(whole_batches, abs=1e-5)


def test_gradient_checkpointing_does_recompute(base_directory: Path, tmp_path: Path) -> None:
    result = run(base_directory, tmp_path / "run", recipe(max_steps=1, gradient_checkpointing=True))
    assert result.model.get_base_model().model.gradient_checkpointing


def make_trainer(tmp_path: Path, model: nn.Module, tokenizer: Any) -> RunTrainer:
    """A trainer as `train` makes it."""
    settings = recipe()
    encoded = encode(examples_from_rows(rows()), tokenizer, template="none", max_length=64)
    arguments = training_arguments(settings, tmp_path / "state")
    return RunTrainer(model, arguments, encoded, tokenizer, batch_size=settings.batch_size)


def test_the_end_is_learned_although_it_is_the_padding_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    trainer = make_trainer(tmp_path, adapt(tiny_llama(), PissaConfig(rank=2)), tokenizer)
    seen = 0
    for inputs in trainer.get_train_dataloader():
        lengths = inputs["attention_mask"].sum(1)
        last = lengths - 1
        at = torch.arange(len(last))
        assert (inputs["labels"][at, last] == tokenizer.eos_token_id).all()
        padding = inputs["attention_mask"] == 0
        assert (inputs["input_ids"][padding] == tokenizer.eos_token_id).all()
        assert (inputs["labels"][padding] == IGNORED).all()
        seen += len(lengths)
    assert seen == 20


def test_a_gathered_state_is_saved_in_place_of_the_live_shards(tmp_path: Path) -> None:
    model = adapt(tiny_llama(), PissaConfig(rank=2, target_modules=["q_proj", "v_proj"]))
    trainer = make_trainer(tmp_path, model, tiny_tokenizer())
    gathered = {
        name: tensor + 1 if f".{TRAINABLE}." in name else tensor.clone() for name, tensor in model.state_dict().items()
    }
    before = adapter_factors(model)
    trainer._save(str(tmp_path / "saved"), gathered)
    saved = read_adapter(tmp_path / "saved").factors
    assert saved.keys() == before.keys()
    for name, factors in saved.items():
        old = before[name]
        assert torch.equal(factors.A, old.A + 1) and torch.equal(factors.B, old.B + 1)
        assert factors.A0 is not None and old.A0 is not None and torch.equal(factors.A0, old.A0)


@pytest.mark.parametrize("kind", ["loss", "gradient norm"])
def test_a_run_that_diverges_stops_at_the_step_and_publishes_nothing(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    original = RunTrainer.compute_loss
    steps = 0

    def diverges(self: RunTrainer, *arguments: Any, **options: Any) -> Tensor:
        nonlocal steps
        steps += 1
        loss = original(self, *arguments, **options)
        if steps < 4:
            return loss
        # the derivative of |x|^0.5 is infinite at 0, the value is not
        return loss * float("nan") if kind == "loss" else loss + ((loss - loss).abs() ** 0.5)

    monkeypatch.setattr(RunTrainer, "compute_loss", diverges)
    out = tmp_path / "run"
    with pytest.raises(TrainingError) as caught:
        run(base_directory, out, recipe(save_every=2))
    message = str(caught.value)
    assert "diverged at step 4: " in message and f"{kind} is nan" in message
    assert f"{out / 'state' / 'checkpoint-2'}" in message and "lower the learning rate (0.005)" in message
    assert {path.name for path in out.iterdir()} == {"state"}
    assert not (out / "state" / "checkpoint-4").exists()
    assert "NaN" not in (out / "state" / "log.jsonl").read_text()


def test_every_callback_sees_tokens_per_second(base_directory: Path, tmp_path: Path) -> None:
    run(base_directory, tmp_path / "run", recipe(max_steps=2))
    state = json.loads((tmp_path / "run" / "state" / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(entry["tokens_per_second"] > 0 for entry in state["log_history"] if "loss" in entry)


def test_a_transformers_without_what_is_extended_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trainer()
    monkeypatch.delattr(trainer_module.Trainer, "_run_epoch")
    with pytest.raises(MissingExtraError, match="has no _run_epoch"):
        check_trainer()
