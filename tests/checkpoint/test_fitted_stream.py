"""A streamed quantisation that is fitted to text: as good as one made in memory, with a layer in memory at a time."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import QUICK, contents, on_disk
from torch import Tensor
from transformers import AutoModelForCausalLM

from pissa import PissaConfig, Quantization, adapt, init_checkpoint
from pissa.checkpoint.stream import activations
from pissa.checkpoint.stream.process import Step
from pissa.cli import main
from pissa.errors import ConfigError, Interrupted
from tiny import tiny_gpt2, tiny_llama, token_batch

pytest.importorskip("bitsandbytes")
FITTED = PissaConfig(4, quantization=Quantization(**QUICK))
MODELS = {"llama": lambda: tiny_llama(hidden=64), "gpt2": lambda: tiny_gpt2(hidden=64)}


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": token_batch(seed=seed)} for seed in range(3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_disk(tiny_llama(hidden=64), tmp_path_factory.mktemp("base"))


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main.run([*arguments])
    return ended.value.code


def modules_of(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "pissa.json").read_text())["modules"]


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_fit_gains_what_a_fit_in_memory_gains(name: str, tmp_path: Path) -> None:
    base = on_disk(MODELS[name](), tmp_path / "base")
    init_checkpoint(base, tmp_path / "out", FITTED, batches=batches())
    adapted: Any = adapt(AutoModelForCausalLM.from_pretrained(base), FITTED, batches=batches())
    streamed = modules_of(tmp_path / "out")
    assert streamed.keys() == adapted.pissa.certificates.keys()
    for module, certificate in adapted.pissa.certificates.items():
        assert certificate.output_reduction > 5
        assert streamed[module]["output_reduction"] == pytest.approx(certificate.output_reduction, abs=2)


def test_one_layer_is_in_memory_at_a_time(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, read = 0, activations._Weights.__getitem__

    def counted(self: Any, key: str) -> Tensor:
        nonlocal most
        tensor = read(self, key)
        alive.add(tensor.untyped_storage())  # pyright: ignore[reportArgumentType]
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(activations._Weights, "__getitem__", counted)
    init_checkpoint(base, tmp_path / "out", FITTED, batches=batches())
    assert 0 < most <= 2


def test_a_stopped_fit_continues_to_the_same_bytes(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    init_checkpoint(base, out, FITTED, batches=batches())
    expected = contents(out)
    shutil.rmtree(out)
    steps: Iterator[int] = iter(range(100))

    def stop(step: Step) -> None:
        if next(steps) == 8:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="continues"):
        init_checkpoint(base, out, FITTED, batches=batches(), progress=stop)
    result = init_checkpoint(base, out, FITTED, batches=batches())
    assert result.continued > 0
    assert contents(out) == expected


def test_other_text_is_another_run_and_text_for_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    for config in (PissaConfig(4), PissaConfig(4, method="lora-kaiming", quantization=Quantization("nf4", "qlora"))):
        if config.quantization is None or not config.quantization.is_fitted:
            with pytest.raises(ConfigError, match="leave them out"):
                init_checkpoint(base, tmp_path / "out", config, batches=batches())
    named = PissaConfig(4, quantization=Quantization(calibration="text.txt"))
    with pytest.raises(ConfigError, match="pass it as batches"):
        init_checkpoint(base, tmp_path / "out", named)


def test_the_command_takes_text_from_a_file_and_has_no_rows_of_its_own(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} times {i} is {i * i}"}) + "\n" for i in range(200)))
    given = ["--quantize", "nf4", "--rank", "4", "--iterations", "1", "--calibration-length", "16"]
    command = ["init", str(base), str(tmp_path / "out"), *given, "--calibration"]
    assert exit_code(*command, "data") == 2
    assert "here are none" in capsys.readouterr().err
    assert exit_code(*command, str(text)) == 0
    assert min(module["output_reduction"] for module in modules_of(tmp_path / "out").values()) > 0
    plain = ["init", str(base), str(tmp_path / "plain"), *given]
    assert exit_code(*plain) == 0
    assert {module["output_reduction"] for module in modules_of(tmp_path / "plain").values()} == {None}


def test_the_weights_that_are_run_are_those_that_are_loaded(base: Path) -> None:
    import threading

    from pissa.checkpoint.source.reader import open_source

    with open_source(base) as source:
        model = activations.assembled(source, torch.float32, threading.Event())
        ids = token_batch(seed=7)
        with torch.no_grad():
            found = model(input_ids=ids).logits
            expected = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
