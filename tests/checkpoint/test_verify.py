"""Not one byte of a sealed directory can be changed, added or taken away unseen."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from streaming import BASES, CONFIG, CONFIGS, contents, llama_on_disk, on_disk

from pissa import PissaConfig, adapt, init_checkpoint, save_residual, verify
from pissa.checkpoint.seal import is_intact, sealed
from pissa.checkpoint.stream.verify import Verification
from pissa.errors import CheckpointError
from tiny import tiny_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, what was made of it)."""
    folder = tmp_path_factory.mktemp("made")
    base = llama_on_disk(folder / "base")
    init_checkpoint(base, folder / "out", CONFIG)
    return base, folder / "out"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def test_what_was_made_is_what_it_says(made: tuple[Path, Path]) -> None:
    base, out = made
    found = verify(out)
    assert found == Verification(
        out, 10, 49, sum(map(len, contents(out).values())) - (out / "pissa.json").stat().st_size, {}
    )
    against = verify(out, base)
    assert len(against.errors) == 14 and max(against.errors.values()) < 1e-6


def test_every_flipped_bit_is_found_in_200_trials_over_all_files(copy: Path) -> None:
    draw = random.Random(0)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(files) == 10
    for trial in range(200):
        file = files[trial % len(files)]
        data = file.read_bytes()
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            verify(copy)
        file.write_bytes(data)
    verify(copy)


def test_every_byte_of_the_manifest_counts(copy: Path) -> None:
    text = (copy / "pissa.json").read_bytes().decode()
    assert is_intact(text)
    draw = random.Random(1)
    for _ in range(300):
        place = draw.randrange(len(text))
        other = draw.choice('0a \n"{x')
        if text[place] != other:
            assert not is_intact(text[:place] + other + text[place + 1 :])
            assert not is_intact(text[:place] + other + text[place:])
        assert not is_intact(text[:place] + text[place + 1 :])
    for appended in (" ", "\n", "{}"):
        assert not is_intact(text + appended)
    document = json.loads(text)
    assert list(document)[-1] == "sha256" and sealed({k: v for k, v in document.items() if k != "sha256"}) == text


def test_every_offender_is_named_at_once(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"x")
    (copy / "pissa_init" / "more.txt").write_text("", encoding="utf-8")
    (copy / ".gitattributes").write_text("", encoding="utf-8")
    with (copy / "config.json").open("a") as stream:
        stream.write(" ")
    shard = copy / "model.safetensors"
    tensors = load_file(shard)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        verify(copy)
    message = str(error.value)
    assert "\n" not in message and ".gitattributes" not in message
    for part in (
        "tokenizer.json is missing",
        "model-00001-of-00002.safetensors is not in pissa.json: remove it",
        "pissa_init/more.txt is not in pissa.json",
        "config.json has",
        "model.safetensors: model.norm.weight was changed",
    ):
        assert part in message, part
    assert message.count("was changed") == 1


@pytest.mark.parametrize(
    "name", ["llama-bf16", "gpt2", "llama-nf4", "llama-int8", "gpt2-nf4", "llama-qlora", "llama-gptq", "llama-nvfp4"]
)
def test_residual_and_adapter_are_the_base_within_what_is_stated(name: str, tmp_path: Path) -> None:
    base, out = on_disk(BASES[name](), tmp_path / "base"), tmp_path / "out"
    init_checkpoint(base, out, CONFIGS.get(name, CONFIG))
    manifest = json.loads((out / "pissa.json").read_text())
    found = verify(out, base)
    stated = {module: described["rounding"] for module, described in manifest["modules"].items()}
    assert found.errors == pytest.approx(stated, rel=1e-3, abs=1e-7)


def test_another_base_is_refused_by_its_tensors(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = made
    other = llama_on_disk(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight of the base .* is not what was split"):
        verify(out, other)
    with pytest.raises(CheckpointError, match=r"is F32 .* which is not what was split"):
        verify(out, llama_on_disk(tmp_path / "larger", hidden=64))
    assert contents(base)


def test_what_cannot_be_verified_is_said(made: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = made
    with pytest.raises(CheckpointError, match=r"has no pissa\.json"):
        verify(base)
    with pytest.raises(CheckpointError, match=r"has no pissa\.json"):
        verify(tmp_path / "nowhere")
    (tmp_path / "pissa.json").write_text('{"layout": "lossless"}')
    with pytest.raises(CheckpointError, match="describes no files"):
        verify(tmp_path)
    for text in ("[" * 10**6, '{"sha256": ' * 10**5, "\xff", '{"sha256": 3}', ""):
        (tmp_path / "pissa.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match="was changed"):
            verify(tmp_path)
    with (tmp_path / "pissa.json").open("wb") as file:
        file.truncate(40 << 30)  # a file with holes
    with pytest.raises(CheckpointError, match="could be read"):
        verify(tmp_path)
    for files in ({"../secret": {"size": 1, "sha256": ""}}, {"/etc/passwd": {"size": 1, "sha256": ""}}):
        (tmp_path / "pissa.json").write_text(sealed({"files": files}))
        with pytest.raises(CheckpointError, match="not the plain name of a file in the directory"):
            verify(tmp_path)


def test_a_residual_saved_from_memory_is_sealed_as_well(tmp_path: Path) -> None:
    save_residual(adapt(tiny_llama(), PissaConfig(4)), tmp_path / "out")
    assert verify(tmp_path / "out").tensors == 49
    with (tmp_path / "out" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* was changed"):
        verify(tmp_path / "out")
