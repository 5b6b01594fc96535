"""DDP, FSDP2 and DeepSpeed by accelerate's own files, two processes over gloo: each trains what one process trains."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import settings
from small_runs import finish, log_of, plain_logits, run, write_rows
from test_distributed import free_port

from pissa import load
from pissa.errors import ConfigError
from pissa.training.engine import DEEPSPEED, FSDP
from pissa.training.sharding import check_engine
from tiny import largest_difference, logits_of, tiny_llama, tiny_tokenizer

FILES = Path(__file__).parents[2] / "examples" / "recipes" / "accelerate"
TRAINED = {
    "ddp": ["residual", "offset", "quantised", "dora", "adalora"],
    "fsdp2": ["residual", "resumed", "offset", "loraplus", "dora"],
    "zero2": ["residual", "resumed", "offset", "quantised", "adalora"],
    "zero3": ["residual", "resumed", "offset", "loraplus"],
}
REFUSED = {
    "fsdp2": {"quantised": "a quantised residual is made of whole layers, and FSDP shards them; use ZeRO-2"},
    "zero3": {
        "quantised": "a quantised residual is made of whole layers, and ZeRO-3 shards them; use ZeRO-2",
        "dora": "DoRA takes the norms of whole weights, and ZeRO-3 shards them",
        "adalora": "AdaLoRA's penalty reads whole factors, and ZeRO-3 shards them",
    },
}
CLOSE = 1e-4
SCRIPT = Path(__file__).with_name("engines.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base wide enough for blocks of 64, and rows."""
    directory = tmp_path_factory.mktemp("engines")
    tiny_llama(hidden=64).save_pretrained(directory / "base")
    tiny_tokenizer().save_pretrained(directory / "base")
    write_rows(directory / "data.jsonl")
    return directory


@pytest.fixture(scope="module")
def alone(place: Path) -> Callable[[str], Path]:
    """The run of one process, by case."""

    def directory(case: str) -> Path:
        out = place / "alone" / case
        if not (out / "results.json").exists():
            run(place / "base", out, settings(case), str(place / "data.jsonl"))
        return out

    return directory


@pytest.fixture(scope="module")
def launched(place: Path) -> Callable[[str], Path]:
    """All cases of an engine, in two processes that are started once."""

    def directory(engine: str) -> Path:
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
        out = place / engine
        if out.exists():
            return out
        out.mkdir()
        cases = [*TRAINED[engine], *REFUSED.get(engine, {})]
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        options = ["--config_file", str(FILES / f"{engine}.yaml"), "--num_processes", "2"]
        ours = [str(SCRIPT), str(place / "base"), str(place / "data.jsonl"), str(out), *cases]
        environment = {"DS_ACCELERATOR": "cpu", **({"FSDP_ON_CPU": "1"} if engine == "fsdp2" else {})}
        done = finish([*launch, *options, "--main_process_port", str(free_port()), *ours], **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    return directory


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine in TRAINED for case in TRAINED[engine]])
def test_two_processes_train_and_save_what_one_does(
    engine: str, case: str, place: Path, alone: Callable[[str], Path], launched: Callable[[str], Path]
) -> None:
    out, expected = launched(engine) / case, alone(case)
    ours, theirs = log_of(out), log_of(expected)
    assert [record["step"] for record in ours] == [1, 2, 3, 4, 5]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)
    base = None if case == "quantised" else str(place / "base")
    for part in (".", "state/checkpoint-4"):
        found, wanted = (logits_of(load(directory / part, base).eval()) for directory in (out, expected))
        assert largest_difference(found, wanted) < 1e-3
    if base is not None:
        assert largest_difference(plain_logits(Path(base), out), logits_of(load(out, base).eval())) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine in REFUSED for case in REFUSED[engine]])
def test_what_cannot_be_sharded_is_refused_in_one_line(engine: str, case: str, launched: Callable[[str], Path]) -> None:
    out = launched(engine)
    said = (out / f"{case}.txt").read_text()
    assert said.startswith(REFUSED[engine][case]) and said.count("\n") == 1
    assert not (out / case / "adapter_config.json").exists()


def trainer_under(*, spectral: bool = False, **engine: Any) -> Any:
    """What `check_engine` looks at of a trainer."""
    plugins = {name: SimpleNamespace(**value) for name, value in engine.items()}
    return SimpleNamespace(
        is_fsdp_enabled="fsdp_plugin" in plugins,
        is_deepspeed_enabled="deepspeed_plugin" in plugins,
        spectral=spectral,
        keep_best=False,
        model=tiny_llama(),
        accelerator=SimpleNamespace(state=SimpleNamespace(**plugins), unwrap_model=lambda model: model),
    )


def test_a_sharded_state_dict_is_refused() -> None:
    with pytest.raises(ConfigError, match="set fsdp_state_dict_type: FULL_STATE_DICT"):
        check_engine(trainer_under(fsdp_plugin={"state_dict_type": "SHARDED_STATE_DICT"}))


@pytest.mark.parametrize(
    ("engine", "remedy"),
    [
        ({"deepspeed_plugin": {"zero_stage": 2}}, "use DDP or FSDP2"),
        ({"fsdp_plugin": {"fsdp_version": 1}}, "set fsdp_version: 2"),
    ],
)
def test_the_spectral_optimizer_wants_whole_matrices(engine: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        check_engine(trainer_under(spectral=True, **engine))


@pytest.mark.parametrize("engine", [FSDP, DEEPSPEED])
def test_an_engine_that_accelerate_leaves_out_without_a_word_is_refused(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_engine(trainer_under())
    monkeypatch.setenv(engine, "true")
    with pytest.raises(ConfigError, match="but plain DDP in its place"):
        check_engine(trainer_under())
