"""A run's directory is one thing, and a run that stopped anywhere goes on as if it had not."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import in_child, kill_at_change, signal_at_step
from small_runs import (
    arguments,
    command,
    in_process,
    listing,
    log_of,
    plain_logits,
    recipe,
    result_tensors,
    rows,
    run,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from pissa import export_lora, load
from pissa.checkpoint.disk.write import TEMPORARY_PREFIX
from pissa.data.rows import examples_from_rows
from pissa.errors import CheckpointError, ConfigError, OutputError, PissaError
from pissa.lab.models import smollm2
from pissa.training import prepare
from pissa.training import rows as rows_module
from pissa.training.directory import RunDirectory, only_writer
from pissa.training.progress import StepLog
from pissa.training.recipe import Recipe
from pissa.training.run import Interrupted, train
from tiny import largest_difference, logits_of, same_tensors, tiny_llama, tiny_tokenizer

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
LORA = {"adapter_model.safetensors", "adapter_config.json", "pissa.json"}
CARD = {"README.md", "results.json", "curves.png"}
STATE = {"run.json", "log.jsonl", "checkpoint-4", "checkpoint-6"}
CONTINUES = {"checkpoint.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}

KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"method": "pissa"},
    "lora": {"method": "lora"},
    "full": {"method": "full", "learning_rate": 1e-3},
    "export rank": {"method": "pissa", "export_rank": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def finished(
    request: pytest.FixtureRequest, base_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    """(kind, directory, result) of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return request.param, out, run(base_directory, out, recipe(**KINDS[request.param]))


def test_a_finished_run_holds_exactly_this(finished: tuple[str, Path, Any]) -> None:
    kind, out, _ = finished
    model = {"model.safetensors", "config.json", "generation_config.json"} if kind == "full" else LORA
    assert listing(out) == {"state"} | CARD | TOKENIZER | model
    assert listing(out / "state") == STATE
    checkpoint = model | CONTINUES | ({"training_args.bin"} if kind == "full" else {"README.md"})
    assert listing(out / "state" / "checkpoint-6") == checkpoint
    assert len(log_of(out)) == 6


def test_the_result_on_the_untouched_base_is_the_trained_model(
    finished: tuple[str, Path, Any], base_directory: Path
) -> None:
    kind, out, result = finished
    trained = logits_of(result.model)
    assert largest_difference(trained, logits_of(tiny_llama())) > 1e-2
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(logits_of(model), trained)
        assert model.config.use_cache
        return
    plain = plain_logits(base_directory, out)
    if kind == "export rank":
        assert largest_difference(plain, trained) > 1e-4
        assert max(export_lora(out).errors.values()) == 0
        last = result_tensors(out / "state" / "checkpoint-6")
        assert same_tensors(dict(export_lora(out)), last)
    else:
        assert largest_difference(plain, trained) < 1e-5
    assert torch.equal(logits_of(load(out, str(base_directory)).eval()), trained)
    AutoTokenizer.from_pretrained(out)


def test_results_say_what_was_done(finished: tuple[str, Path, Any], base_directory: Path) -> None:
    kind, out, result = finished
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(result.results))
    assert len(results["losses"]) == len(results["grad_norms"]) == 6
    assert [record["loss"] for record in log_of(out)] == results["losses"]
    assert (results["base"], results["dtype"]) == (str(base_directory), "torch.float32")
    assert results["rank"] == (None if kind == "full" else 4)
    assert results["settings"]["learning_rate"] == results["learning_rate"]
    assert (results["largest_captured_energy_loss"] is None) == (kind == "full")
    card = (out / "README.md").read_text()
    assert f"base: `{base_directory}`" in card and results["method"] in card
    assert "base_model:" not in card  # the hub refuses directories


def test_a_finished_run_given_again_does_nothing_and_says_so(
    finished: tuple[str, Path, Any], base_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, out, result = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = train(str(base_directory), rows(), out, recipe(**KINDS[kind]))
    assert again.model is None and again.results == json.loads(json.dumps(result.results))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    said = capsys.readouterr()
    assert "finished already" in said.err and not said.out


def test_every_checkpoint_on_the_untouched_base_is_the_model_at_that_step(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, torch.Tensor] = {}
    original = StepLog.on_log

    def on_log(self: StepLog, args: Any, state: Any, control: Any, logs: Any = None, **context: Any) -> None:
        original(self, args, state, control, logs, **context)
        if logs and "loss" in logs:
            seen[state.global_step] = logits_of(self.trainer.model)

    monkeypatch.setattr(StepLog, "on_log", on_log)
    monkeypatch.setattr("pissa.training.saved.KEPT_CHECKPOINTS", 10)
    run(base_directory, tmp_path / "run", recipe(save_every=2))
    for step in (2, 4, 6):
        plain = plain_logits(base_directory, tmp_path / "run" / "state" / f"checkpoint-{step}")
        assert largest_difference(plain, seen[step]) < 1e-5
    assert largest_difference(seen[2], seen[4]) > 1e-3


LONG: dict[str, dict[str, Any]] = {
    "pissa": {"method": "pissa"},
    "lora with dropout": {"method": "lora", "dropout": 0.2, "alpha": 10.0, "rank": 3},
    "full": {"method": "full"},
}


def long_recipe(kind: str) -> Recipe:
    """Twelve steps, of which five are an epoch; checkpoints after every second: inside epochs and at their ends."""
    return recipe(**{"learning_rate": 2e-3, "max_steps": 12, "save_every": 2, **LONG[kind]})


@pytest.fixture(scope="module", params=LONG)
def uninterrupted(
    request: pytest.FixtureRequest, base_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(base_directory, out, long_recipe(request.param))
    return request.param, out


def history_of(out: Path) -> list[dict[str, float]]:
    """What trackers were told up to the last checkpoint, without what depends on the clock."""
    last = max((out / "state").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in history]


def assert_same_run(out: Path, expected: Path) -> None:
    """Losses, gradient norms and weights to the last bit, each step once, and nothing left over."""
    assert log_of(out) == log_of(expected)
    assert history_of(out) == history_of(expected)
    assert [record["step"] for record in log_of(out)] == list(range(1, len(log_of(out)) + 1))
    assert same_tensors(result_tensors(out), result_tensors(expected))
    assert not list(out.rglob(f"{TEMPORARY_PREFIX}*"))
    assert listing(out) == listing(expected) and listing(out / "state") == listing(expected / "state")
    ours, theirs = (json.loads((place / "results.json").read_text()) for place in (out, expected))
    assert ours.keys() == theirs.keys()
    for key in ("losses", "grad_norms", "largest_captured_energy_loss", "trainable_parameters", "data", "fingerprints"):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize(
    "step", [1, pytest.param(3, marks=pytest.mark.slow), 6, pytest.param(12, marks=pytest.mark.slow)]
)
def test_a_run_killed_after_any_step_goes_on_bit_for_bit(
    uninterrupted: tuple[str, Path], base_directory: Path, tmp_path: Path, step: int
) -> None:
    kind, expected = uninterrupted
    out, settings = tmp_path / "run", long_recipe(kind)
    assert in_child(lambda: signal_at_step(step, lambda: run(base_directory, out, settings))) == -signal.SIGKILL
    assert not (out / "results.json").exists()
    run(base_directory, out, settings)
    assert_same_run(out, expected)


@pytest.mark.parametrize("stop", [5, 10])
def test_a_run_goes_on_from_the_end_of_an_epoch(
    uninterrupted: tuple[str, Path], base_directory: Path, tmp_path: Path, stop: int
) -> None:
    kind, expected = uninterrupted
    out, settings = tmp_path / "run", long_recipe(kind)
    with pytest.raises(Interrupted, match=f"checkpoint-{stop} is saved"):
        signal_at_step(stop - 1, lambda: run(base_directory, out, settings), number=signal.SIGTERM)
    run(base_directory, out, settings)
    assert log_of(out) == log_of(expected)
    assert same_tensors(result_tensors(out), result_tensors(expected))


def check_kill(base: Path, out: Path, expected: Path, settings: Recipe, moment: int) -> bool:
    """Kill a run at a moment and go on; whether the kill came at all."""
    code = in_child(lambda: kill_at_change(moment, out, lambda: run(base, out, settings)))
    if (out / "adapter_config.json").is_file():
        # whatever loads is the trained model
        assert largest_difference(plain_logits(base, out), plain_logits(base, expected)) == 0
    run(base, out, settings)
    assert_same_run(out, expected)
    return code == -signal.SIGKILL


@pytest.fixture(scope="module")
def four_steps(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four") / "run"
    run(base_directory, out, recipe(max_steps=4))
    return out


@pytest.mark.parametrize("moment", [2, 9, 16, 27, 40, 55])
def test_a_kill_while_files_are_written_costs_nothing_but_time(
    base_directory: Path, tmp_path: Path, four_steps: Path, moment: int
) -> None:
    assert check_kill(base_directory, tmp_path / "run", four_steps, recipe(max_steps=4), moment)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_at_any_change_of_the_directory_costs_nothing_but_time(
    base_directory: Path, tmp_path: Path, four_steps: Path
) -> None:
    moment = 1
    while check_kill(base_directory, tmp_path / str(moment), four_steps, recipe(max_steps=4), moment):
        shutil.rmtree(tmp_path / str(moment))
        moment += 1
    assert moment > 40


def test_ctrl_c_saves_the_finished_step_and_says_how_to_go_on(
    base_directory: Path, tmp_path: Path, four_steps: Path
) -> None:
    out, settings = tmp_path / "run", recipe(max_steps=4)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=r"checkpoint-3 is saved: the same command continues from there"):
        signal_at_step(2, lambda: run(base_directory, out, settings), number=signal.SIGINT, times=2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(log_of(out)) == 3
    run(base_directory, out, settings)
    assert log_of(out) == log_of(four_steps)
    assert same_tensors(result_tensors(out), result_tensors(four_steps))


def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_is_saved(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "adapt", interrupt)
    with pytest.raises(Interrupted, match="nothing is saved"):
        run(base_directory, tmp_path / "run", recipe())
    assert not (tmp_path / "run").exists()


def test_ctrl_c_on_the_last_step_is_a_finished_run(base_directory: Path, tmp_path: Path, four_steps: Path) -> None:
    out = tmp_path / "run"
    signal_at_step(4, lambda: run(base_directory, out, recipe(max_steps=4)), number=signal.SIGINT)
    assert_same_run(out, four_steps)


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_goes_on(
    base_directory: Path, tmp_path: Path, four_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pissa.training.progress.SAME_REQUEST_SECONDS", -1)
    out, settings = tmp_path / "run", recipe(max_steps=4)
    with pytest.raises(Interrupted, match=r"checkpoint-2 is saved"):
        signal_at_step(3, lambda: run(base_directory, out, settings), number=signal.SIGINT, times=2)
    assert len(log_of(out)) == 3
    run(base_directory, out, settings)
    assert_same_run(out, four_steps)


def test_a_result_without_its_last_file_is_not_taken_for_finished(
    base_directory: Path, tmp_path: Path, four_steps: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(four_steps, out)
    (out / "adapter_config.json").unlink()
    run(base_directory, out, recipe(max_steps=4))
    assert_same_run(out, four_steps)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_exits_130_with_one_line(base_directory: Path, tmp_path: Path, number: int) -> None:
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "run"
    settings = recipe(max_steps=5000, save_every=5000)
    process = subprocess.Popen(command(base_directory, data, out, settings), stderr=subprocess.PIPE, text=True)
    log = out / "state" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert re.search(r"pissa: interrupted; \S+checkpoint-\d+ is saved: the same command continues", said)
    assert "Traceback" not in said
    [checkpoint] = (out / "state").glob("checkpoint-*")
    assert len(log_of(out)) == int(checkpoint.name.partition("-")[2])


def test_a_run_with_other_settings_is_refused_with_what_differs(base_directory: Path, four_steps: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in four_steps.rglob("*")}
    with pytest.raises(OutputError, match=r"rank: 4 then, 2 now; seed: 0 then, 1 now\)"):
        run(base_directory, four_steps, recipe(max_steps=4, rank=2, seed=1))
    with pytest.raises(OutputError, match=r"data: '20 rows, sha256 \w+' then, '19 rows"):
        run(base_directory, four_steps, recipe(max_steps=4), rows(19))
    assert {path: path.stat().st_mtime_ns for path in four_steps.rglob("*")} == before


def test_subset_and_split_reach_the_hub_and_are_refused_for_rows(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def read(source: str, *, split: str, subset: str | None) -> Any:
        asked.append((source, split, subset))
        return examples_from_rows(rows())

    monkeypatch.setattr(rows_module, "read_examples", read)
    settings = recipe(max_steps=1, data_split="test", data_subset="main")
    run(base_directory, tmp_path / "run", settings, "some/data")
    assert asked == [("some/data", "test", "main")]
    with pytest.raises(ConfigError, match="are for data on the hub; leave them out for the list of rows"):
        run(base_directory, tmp_path / "other", settings)


def test_a_run_with_modules_trained_in_full_goes_on_and_exports(base_directory: Path, tmp_path: Path) -> None:
    settings = recipe(modules_to_save="lm_head", exclude_modules="o_proj", use_rslora=True, rank_pattern={"q_proj": 2})
    out, other = tmp_path / "run", tmp_path / "other"
    result = run(base_directory, out, settings)
    with pytest.raises(Interrupted):
        signal_at_step(2, lambda: run(base_directory, other, settings), number=signal.SIGTERM)
    run(base_directory, other, settings)
    assert same_tensors(result_tensors(other), result_tensors(out))
    assert any("lm_head" in name for name in result_tensors(out))
    assert not any("o_proj" in name for name in result_tensors(out))
    assert largest_difference(plain_logits(base_directory, out), logits_of(result.model)) < 1e-5


def test_a_run_that_trains_some_tokens_in_full_exports_them(base_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = recipe(trainable_token_indices="3, 7", target_modules="q_proj", learning_rate=1e-2)
    result = run(base_directory, out, settings)
    assert largest_difference(plain_logits(base_directory, out), logits_of(result.model)) < 1e-5
    [trained] = [tensor for name, tensor in result_tensors(out).items() if "embed" in name]
    assert len(trained) == 2


def test_what_was_stopped_before_its_first_checkpoint_makes_way_for_other_settings(
    base_directory: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "run", recipe(rank=2, max_steps=2)
    assert in_child(lambda: signal_at_step(1, lambda: run(base_directory, out, recipe()))) == -signal.SIGKILL
    assert listing(out / "state") == {"run.json", "log.jsonl"}
    run(base_directory, out, settings)
    run(base_directory, tmp_path / "expected", settings)
    assert log_of(out) == log_of(tmp_path / "expected")
    with pytest.raises(OutputError, match="rank: 2 then, 4 now"):
        run(base_directory, out, recipe(max_steps=2))


def test_a_relative_base_is_recorded_so_that_it_is_found_from_everywhere(
    base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(base_directory.parent)
    out, settings = tmp_path / "run", recipe(max_steps=1)
    first = train(base_directory.name, rows(), out, settings)
    # what the data came to is said before the first step
    assert "769, of which 550 are learned" in capsys.readouterr().err
    assert first.results["data"] == "20 rows, 769 tokens, 550 of them learned"
    assert first.results["base"] == str(base_directory)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_directory)
    assert train(str(base_directory), rows(), out, settings).model is None


def test_another_base_or_other_data_under_the_same_name_is_refused(tmp_path: Path) -> None:
    base, data, out = tmp_path / "base", write_rows(tmp_path / "data.jsonl"), tmp_path / "run"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    with pytest.raises(Interrupted):
        signal_at_step(2, lambda: run(base, out, recipe(), str(data)), number=signal.SIGINT)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    tiny_llama(seed=1).save_pretrained(base)
    with pytest.raises(CheckpointError, match=f"was trained on another base than the one given.*load it on {base}"):
        run(base, out, recipe(), str(data))
    tiny_llama().save_pretrained(base)
    write_rows(data, 21)
    with pytest.raises(OutputError, match=f"the rows of {data} are not those that {out} was started with"):
        run(base, out, recipe(), str(data))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    write_rows(data)
    run(base, out, recipe(), str(data))


def test_two_processes_never_write_one_run(base_directory: Path, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with (
        only_writer(directory),
        pytest.raises(OutputError, match=f"another process is training into {directory.path}"),
    ):
        run(base_directory, directory.path, recipe())
    assert not directory.state.exists()  # nothing was done there
    run(base_directory, directory.path, recipe(max_steps=1))


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_run(base_directory: Path, tmp_path: Path) -> None:
    settings = {"method": "lora", "max_steps": 2, "save_every": 9}
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (3, 3, 4), strict=True):
        torch.manual_seed(seed + len(out.name))
        run(base_directory, out, recipe(seed=seed, **settings))
    assert log_of(outs[0]) == log_of(outs[1]) != log_of(outs[2])
    assert same_tensors(result_tensors(outs[0]), result_tensors(outs[1]))


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_bf16_keeps_what_is_trained_in_fp32_and_is_recorded(base_directory: Path, tmp_path: Path, method: Any) -> None:
    result = run(base_directory, tmp_path / "run", recipe(method=method, dtype="bf16", max_steps=2))
    trained = {p.dtype for p in result.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    frozen = {p.dtype for n, p in result.model.named_parameters() if "base_layer" in n}
    assert frozen == (set() if method == "full" else {torch.bfloat16})
    assert "bfloat16" in result.results["dtype"] and "bfloat16" in (tmp_path / "run" / "README.md").read_text()
    fp32 = run(base_directory, tmp_path / "fp32", recipe(method=method, max_steps=2))
    losses = result.results["losses"], fp32.results["losses"]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_the_command_trains_and_prints(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "run"
    done = in_process([*arguments(base_directory, data, out, recipe(max_steps=2)), "--json"], capsys)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["losses"] == [record["loss"] for record in log_of(out)]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pissa_learns_gsm8k_faster_than_lora_at_the_same_learning_rate(pissa_data: Path, tmp_path: Path) -> None:
    try:
        model = smollm2()
    except PissaError as reason:
        pytest.skip(f"needs the real model: {reason}")
    data = pissa_data / "gsm8k" / "train.jsonl.gz"
    results = {}
    for method in ("pissa", "lora"):
        settings = Recipe(
            method=method,
            rank=32,
            learning_rate=2e-4,
            batch_size=4,
            micro_batch_size=4,
            max_length=256,
            max_steps=20,
            dtype="fp32",
        )
        results[method] = train(str(model), str(data), tmp_path / method, settings, quiet=True).results
    losses = {method: sum(found["losses"][-10:]) / 10 for method, found in results.items()}
    first = {method: found["grad_norms"][0] for method, found in results.items()}
    assert losses["pissa"] < losses["lora"] - 0.05
    assert first["pissa"] > 3 * first["lora"]
    assert results["pissa"]["losses"][0] == pytest.approx(results["lora"]["losses"][0], abs=1e-3)
