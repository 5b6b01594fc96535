"""Streamed checkpoints are what adapting the whole model gives, whoever makes them, in whatever order, however often
stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from streaming import BASES, CONFIG, CONFIGS, at_change, contents, killed_at, llama_on_disk, note_at_once, on_disk
from transformers import AutoModelForCausalLM

import pissa
from pissa import PissaConfig, Quantization, adapt, export_lora, init_checkpoint, save_residual, verify
from pissa.checkpoint.disk.journal import read_journals
from pissa.checkpoint.stream import process, work
from pissa.checkpoint.stream.process import Step
from pissa.checkpoint.stream.unfinished import WORK
from pissa.errors import CheckpointError, ConfigError, Interrupted, OutputError, WeightError
from pissa.live.quantized import keep_unpacked
from tiny import largest_difference, logits_of, same_tensors, tiny_gpt2, train_steps

pytest.importorskip("bitsandbytes")
DOCUMENTS = ("pissa.json", "pissa_init/adapter_config.json")


def live_contents(base: Path, out: Path, config: PissaConfig) -> dict[str, bytes]:
    """What adapting the whole model in memory writes."""
    save_residual(adapt(AutoModelForCausalLM.from_pretrained(base), config), out)
    return contents(out)


def adapter_settings(files: dict[str, bytes]) -> dict[str, Any] | None:
    """An adapter's configuration; PEFT's sets come out in any order."""
    if "pissa_init/adapter_config.json" not in files:
        return None
    document = json.loads(files["pissa_init/adapter_config.json"])
    return {**document, "target_modules": sorted(document["target_modules"])}


@pytest.mark.parametrize("name", [name for name in BASES if name != "llama-nvfp4"])  # no layer holds NVFP4
def test_streamed_bytes_are_those_of_adapting_the_whole_model(name: str, tmp_path: Path) -> None:
    base, out = on_disk(BASES[name](), tmp_path / "base"), tmp_path / "out"
    config = CONFIGS.get(name, CONFIG)
    init_checkpoint(base, out, config)
    streamed = contents(out)
    shutil.rmtree(out)
    live = live_contents(base, out, config)
    assert adapter_settings(streamed) == adapter_settings(live)
    assert live.keys() == streamed.keys() - {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {n: streamed[n] for n in live if n not in DOCUMENTS} == {n: live[n] for n in live if n not in DOCUMENTS}


def test_an_adapted_head_of_a_tied_base_is_untied(tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base", tie=True), tmp_path / "out"
    config = PissaConfig(4, target_modules=r".*(lm_head|up_proj)")
    with pytest.warns(UserWarning, match=r"untied lm_head"):
        init_checkpoint(base, out, config)
    streamed = contents(out)
    shutil.rmtree(out)
    with pytest.warns(UserWarning, match="untied lm_head"):
        live = live_contents(base, out, config)
    assert streamed["model.safetensors"] == live["model.safetensors"]
    assert streamed["config.json"] == live["config.json"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_base_without_its_prefix_and_in_shards_comes_out_under_the_models_names(tmp_path: Path) -> None:
    model = tiny_gpt2()
    on_disk(model, tmp_path / "plain")
    base = on_disk(model, tmp_path / "base", max_shard_size="60KB")
    for shard in base.glob("*.safetensors"):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name.removeprefix("transformer."): f for name, f in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len({*index["weight_map"].values()}) > 2
    init_checkpoint(base, tmp_path / "out", CONFIG)
    init_checkpoint(tmp_path / "plain", tmp_path / "expected", CONFIG)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert same_tensors(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "llama-nf4"])
def test_what_was_made_trains_exports_and_moves(name: str, tmp_path: Path) -> None:
    base, out = on_disk(BASES[name](), tmp_path / "base"), tmp_path / "out"
    init_checkpoint(base, out, CONFIGS.get(name, CONFIG))
    adapted = pissa.load(out, is_trainable=True)
    start = logits_of(adapted)
    residual = AutoModelForCausalLM.from_pretrained(out)
    keep_unpacked(residual)
    plain = PeftModel.from_pretrained(residual, str(out), subfolder="pissa_init", is_trainable=True)
    assert torch.equal(logits_of(plain.eval()), start)
    assert train_steps(plain.train(), 2) == train_steps(adapted.train(), 2)
    trained = logits_of(adapted.eval())
    original = AutoModelForCausalLM.from_pretrained(base)
    if name == "llama":
        assert largest_difference(start, logits_of(original)) < 1e-5
        lora = export_lora(adapted, tmp_path / "lora")
        assert lora.base == str(base)
        on_base = PeftModel.from_pretrained(original, str(tmp_path / "lora")).eval()
        assert largest_difference(logits_of(on_base), trained) < 1e-5
    adapted.save_pretrained(str(tmp_path / "saved"))
    assert torch.equal(logits_of(pissa.load(tmp_path / "saved")), trained)
    out.rename(tmp_path / "moved")
    assert torch.equal(logits_of(pissa.load(tmp_path / "moved")), start)


def test_bytes_depend_neither_on_threads_nor_on_memory_nor_on_the_order(tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base", hidden=64), tmp_path / "out"
    found = []
    for threads, memory in ((1, None), (3, None), (2, 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            result = init_checkpoint(base, out, CONFIG, memory=memory)
            assert torch.get_num_threads() == threads and result.threads == threads
        finally:
            torch.set_num_threads(before)
        found.append(contents(out))
        shutil.rmtree(out)
    assert found[0] == found[1] == found[2]
    assert json.loads(found[0]["pissa.json"])["threads_per_matrix"] == 1


def test_weights_in_work_are_bounded_by_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama_on_disk(tmp_path / "base", hidden=64)
    running, seen = [], []
    original = work.do

    def counted(job: Any, *arguments: Any) -> Any:
        running.append(job.memory)
        seen.append((len(running), sum(running)))
        try:
            return original(job, *arguments)
        finally:
            running.remove(job.memory)

    monkeypatch.setattr(process, "do", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # four would outlive the test, and forks die of them
    init_checkpoint(base, tmp_path / "one", CONFIG, memory=1)
    assert {count for count, _ in seen} == {1}
    seen.clear()
    init_checkpoint(base, tmp_path / "some", CONFIG, memory=100 << 20)
    assert all(count == 1 or size <= 100 << 20 for count, size in seen)
    assert contents(tmp_path / "one").keys() == contents(tmp_path / "some").keys()


def test_progress_ends_at_the_whole_base(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    steps: list[Step] = []
    init_checkpoint(base, tmp_path / "out", CONFIG, progress=steps.append)
    assert [step.tensors for step in steps] == [*range(1, 22)]
    assert steps[-1].tensors == steps[-1].all_tensors and steps[-1].size == steps[-1].all_size
    assert steps[-1].all_size == sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    certified = [step for step in steps if step.certificate is not None]
    assert len(certified) == 14 and all(step.certificate["captured_energy_loss"] < 1e-3 for step in certified)  # pyright: ignore


def test_another_dtype_is_that_of_loading_the_base_so(tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base"), tmp_path / "out"
    init_checkpoint(base, out, CONFIG, dtype="bf16")
    streamed = load_file(out / "model.safetensors")
    shutil.rmtree(out)
    save_residual(adapt(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), CONFIG), out)
    assert same_tensors(streamed, load_file(out / "model.safetensors"))


def test_a_base_stored_in_more_than_its_configuration_says_is_rounded_with_a_warning(tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base"), tmp_path / "out"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.warns(UserWarning, match="give --dtype fp32"):
        init_checkpoint(base, out, CONFIG)
    streamed = AutoModelForCausalLM.from_pretrained(out)
    shutil.rmtree(out)
    live_contents(base, out, CONFIG)
    assert same_tensors(dict(streamed.state_dict()), dict(AutoModelForCausalLM.from_pretrained(out).state_dict()))


# -- stopping and continuing


def begin(tmp_path: Path) -> tuple[Path, Path, dict[str, bytes]]:
    """A base, a place, and what an uninterrupted run leaves there."""
    base, out = llama_on_disk(tmp_path / "base"), tmp_path / "out"
    init_checkpoint(base, out, CONFIG)
    expected = contents(out)
    shutil.rmtree(out)
    return base, out, expected


def refuses_to_load(out: Path) -> bool:
    """Whether neither transformers nor we load a directory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            AutoModelForCausalLM.from_pretrained(out)
    except (OSError, ValueError):
        return True
    return False


def test_a_run_killed_at_any_change_continues_to_the_same_bytes(tmp_path: Path) -> None:
    base, out, expected = begin(tmp_path)
    total = at_change(0, lambda: init_checkpoint(base, out, CONFIG), lambda: None)
    shutil.rmtree(out)
    moments = [*random.Random(0).sample(range(1, total - 9), 10), *range(total - 9, total + 1)]
    for moment in moments:
        assert killed_at(moment, lambda: init_checkpoint(base, out, CONFIG)) == -signal.SIGKILL, moment
        published = (out / "config.json").exists()
        assert published or refuses_to_load(out), moment
        init_checkpoint(base, out, CONFIG)
        assert contents(out) == expected, moment
        shutil.rmtree(out)


def test_a_run_killed_again_and_again_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out, expected = begin(tmp_path)
    note_at_once(monkeypatch)
    noted: set[str] = set()
    for moment in (15, 21, 15, 18):
        killed_at(moment, lambda: init_checkpoint(base, out, CONFIG))
        before, noted = noted, {record["task"] for record in read_journals(out / WORK)}
        assert before <= noted
    assert noted
    done: list[str] = []
    original = work.do
    monkeypatch.setattr(process, "do", lambda job, *a: (done.append(job.name), original(job, *a))[1])
    result = init_checkpoint(base, out, CONFIG)
    assert result.continued == len(noted) and len(done) == 21 - len(noted) and not noted & {*done}
    assert contents(out) == expected
    assert init_checkpoint(base, out, CONFIG).seconds == 0 and len(done) == 21 - result.continued


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_good_order(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out, expected = begin(tmp_path)
    handler = signal.getsignal(number)
    stop = lambda: at_change(25, lambda: init_checkpoint(base, out, CONFIG), lambda: os.kill(os.getpid(), number))  # noqa: E731
    with pytest.raises(Interrupted, match=r"interrupted; \d+ of 21 tensors are saved in .*out: the same command"):
        stop()
    assert signal.getsignal(number) is handler
    assert [path.name for path in out.iterdir()] == [WORK]
    result = init_checkpoint(base, out, CONFIG)
    assert result.continued > 0 and contents(out) == expected


def test_a_damaged_journal_or_file_is_done_again(tmp_path: Path) -> None:
    base, out, expected = begin(tmp_path)
    stop = lambda: at_change(45, lambda: init_checkpoint(base, out, CONFIG), lambda: os.kill(os.getpid(), 2))  # noqa: E731
    for damage in ("line", "garbage", "shard", "header", "size"):
        with pytest.raises(Interrupted):
            stop()
        journal, shard = out / WORK / "journal-0.jsonl", out / WORK / "model.safetensors"
        data = bytearray(journal.read_bytes())
        if damage == "line":
            data[len(data) // 2] ^= 1
        elif damage == "garbage":
            data += os.urandom(100)
        journal.write_bytes(data)
        if damage == "shard":
            shard.unlink()
        elif damage in ("header", "size"):
            with shard.open("r+b") as stream_:
                stream_.seek(20 if damage == "header" else 0, 0 if damage == "header" else 2)
                stream_.write(b"x")
        result = init_checkpoint(base, out, CONFIG)
        assert contents(out) == expected, damage
        assert (result.continued > 0) == (damage in ("garbage", "line")), damage
        shutil.rmtree(out)


def test_another_command_base_or_version_is_refused_with_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out, expected = begin(tmp_path)
    other = llama_on_disk(tmp_path / "other", hidden=64)
    for finished in (False, True):
        if finished:
            init_checkpoint(base, out, CONFIG)
        else:
            with pytest.raises(Interrupted):
                at_change(25, lambda: init_checkpoint(base, out, CONFIG), lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(OutputError, match=r"another run \(config.rank: 4 then, 8 now\)"):
            init_checkpoint(base, out, PissaConfig(8))
        with pytest.raises(OutputError, match=r"dtype: None then, 'bf16' now"):
            init_checkpoint(base, out, CONFIG, dtype="bf16")
        with pytest.raises(OutputError, match=r"base: .*base' then, .*other' now"):
            init_checkpoint(other, out, CONFIG)
        with monkeypatch.context() as patched:
            patched.setattr("pissa.checkpoint.stream.run_identity.package_versions", lambda: {"torch": "0.0"})
            with pytest.raises(OutputError, match=r"versions.torch: '2.* then, '0.0' now"):
                init_checkpoint(base, out, CONFIG)
    assert contents(out) == expected


def test_a_base_changed_meanwhile_is_refused_by_its_tensors(tmp_path: Path) -> None:
    base, out, expected = begin(tmp_path)
    with pytest.raises(Interrupted):
        at_change(45, lambda: init_checkpoint(base, out, CONFIG), lambda: os.kill(os.getpid(), signal.SIGINT))
    file = base / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    file.unlink()
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    assert file.stat().st_size == len(whole)
    with pytest.raises(CheckpointError, match=r"changed since the run began: model\.layers"):
        init_checkpoint(base, out, CONFIG)
    file.write_bytes(whole)
    init_checkpoint(base, out, CONFIG)
    assert contents(out) == expected


def test_two_runs_into_one_directory_do_not_meet(tmp_path: Path) -> None:
    base, out, expected = begin(tmp_path)
    found = []

    def second() -> None:
        try:
            init_checkpoint(base, out, CONFIG)
        except OutputError as error:
            found.append(str(error))

    at_change(25, lambda: init_checkpoint(base, out, CONFIG), second)
    assert len(found) == 1 and "another process is writing" in found[0]
    assert contents(out) == expected


# -- what is refused


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    base = llama_on_disk(tmp_path / "base")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine", encoding="utf-8")
    for out in (taken, taken / "mine", base):
        with pytest.raises(OutputError, match=r"already holds something|is a file"):
            init_checkpoint(base, out, CONFIG)
    assert contents(taken) == {"mine": b"mine"}


def test_a_residual_is_not_split_again(tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base"), tmp_path / "out"
    init_checkpoint(base, out, CONFIG)
    with pytest.raises(CheckpointError, match=f"is a residual, not a base: .* give {base}"):
        init_checkpoint(out, tmp_path / "again", CONFIG)


def test_a_finished_directory_that_was_damaged_is_not_called_finished(tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base"), tmp_path / "out"
    init_checkpoint(base, out, CONFIG)
    (out / "model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"finished and damaged since: model\.safetensors missing"):
        init_checkpoint(base, out, CONFIG)


def test_what_lies_in_the_work_directory_by_chance_is_not_published(tmp_path: Path) -> None:
    base, out, expected = begin(tmp_path)
    with pytest.raises(Interrupted):
        at_change(25, lambda: init_checkpoint(base, out, CONFIG), lambda: os.kill(os.getpid(), signal.SIGINT))
    (out / WORK / "model-00001-of-00001.safetensors").write_text("not ours", encoding="utf-8")
    init_checkpoint(base, out, CONFIG)
    assert contents(out) == expected


def test_wrong_input_leaves_nothing_behind(tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base"), tmp_path / "out"
    wrong: list[tuple[PissaConfig, type[Exception], str]] = [
        (PissaConfig(20, target_modules=["k_proj"]), ConfigError, "rank exceeds the smaller side"),
        (PissaConfig(4, target_modules=["nothing"]), ValueError, "no module matches"),
        (PissaConfig(4, method="lora-kaiming"), ConfigError, "nothing to prepare"),
        (PissaConfig(4, placement="offset"), ConfigError, "nothing to prepare"),
        (PissaConfig(4, quantization=Quantization(calibration="t.txt")), ConfigError, "pass it as batches"),
        (PissaConfig(4, quantization=Quantization()), ValueError, "block_size"),
    ]
    for config, kind, message in wrong:
        with pytest.raises(kind, match=message):
            init_checkpoint(base, out, config)
        assert not out.exists()
    with pytest.raises(ConfigError, match="fp32, bf16, fp16"):
        init_checkpoint(base, out, CONFIG, dtype="fp8")
    assert not out.exists()


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_weight_that_is_not_finite_is_named_and_the_others_are_kept(place: str, tmp_path: Path) -> None:
    base, out = llama_on_disk(tmp_path / "base"), tmp_path / "out"
    tensors = load_file(base / "model.safetensors")
    bad = "model.layers.0.mlp.down_proj.weight" if place == "first" else "model.layers.1.self_attn.v_proj.weight"
    good = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors[bad][1, 1] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=f"{bad} holds NaN or Inf"):
        init_checkpoint(base, out, CONFIG)
    assert refuses_to_load(out)
    save_file(good, base / "model.safetensors", {"format": "pt"})
    init_checkpoint(base, out, CONFIG)
    verify(out, base)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system in memory of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_said_and_the_run_continues(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama_on_disk(tmp_path / "base", hidden=64)
    with pytest.raises(OutputError, match=r"has 0.0 GB free and 0.1 GB are needed; make room"):
        init_checkpoint(base, small_disk / "out", CONFIG)
    monkeypatch.setattr("pissa.checkpoint.stream.unfinished.MARGIN", 0)
    note_at_once(monkeypatch)
    blocker = small_disk / "blocker"
    saved = []

    def fill() -> None:
        with blocker.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass

    with pytest.raises(OutputError, match=r"the disk that holds .* is full; make room and run the same command again"):
        at_change(40, lambda: init_checkpoint(base, small_disk / "out", CONFIG), fill)
    assert refuses_to_load(small_disk / "out")
    blocker.unlink()
    saved.append(init_checkpoint(base, small_disk / "out", CONFIG).continued)
    assert saved[0] > 0
    verify(small_disk / "out", base)


@pytest.mark.slow
def test_a_gigabyte_killed_25_times_continues_to_the_same_bytes(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make = Path(__file__).parents[2] / "benchmarks" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(make), str(base), "--size", "1G"], check=True, timeout=900)
    command = [sys.executable, "-m", "pissa", "init", str(base), str(tmp_path / "out"), "--rank", "16"]
    out, expected = tmp_path / "out", tmp_path / "expected"
    begun = time.monotonic()
    subprocess.run(command, check=True, timeout=1200, capture_output=True)
    whole = time.monotonic() - begun
    out.rename(expected)
    draw, kills = random.Random(0), 0
    while kills < 25:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert child.wait(draw.uniform(0.1, whole)) == 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
        if (out / "pissa.json").exists():
            subprocess.run(["diff", "-r", "--exclude", WORK, str(expected), str(out)], check=True)
            shutil.rmtree(out)
        else:
            assert not out.exists() or (out / "config.json").exists() or refuses_to_load(out)
    subprocess.run(command, check=True, timeout=1200, capture_output=True)
    subprocess.run(["diff", "-r", str(expected), str(out)], check=True)
