"""A model on disk is read tensor by tensor, whatever its files are, and only from files that are its own."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa.checkpoint.source.load import check_model_directory, load_base
from pissa.checkpoint.source.reader import Source, open_source
from pissa.errors import CheckpointError, PissaError
from tiny import same_tensors, tiny_llama, tiny_tokenizer

INDEX = "model.safetensors.index.json"


def saved(directory: Path, *, shards: bool = True, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A tiny model with its tokenizer in `directory`; returns its tensors."""
    model = tiny_llama(dtype=dtype)
    model.save_pretrained(directory, max_shard_size="20KB" if shards else "5GB")
    tiny_tokenizer().save_pretrained(directory)
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def saved_as_pickle(directory: Path, tensors: dict[str, Any], **options: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    torch.save(tensors, directory / "pytorch_model.bin", **options)
    return directory / "pytorch_model.bin"


def everything(source: Source) -> dict[str, Tensor]:
    found = {name: source.read(name) for name in source.entries}
    for name, tensor in found.items():
        entry = source.entries[name]
        assert tensor.is_contiguous() and tensor.dtype == entry.dtype and tensor.shape == entry.shape
        assert tensor.untyped_storage().nbytes() == entry.nbytes
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(source.chunks(name)) == b"".join(source.chunks(name, 37)) == data
    return found


# What can be read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shards", [False, True])
def test_every_tensor_is_read_as_safetensors_reads_it(tmp_path: Path, shards: bool, dtype: torch.dtype) -> None:
    tensors = saved(tmp_path, shards=shards, dtype=dtype)
    assert (tmp_path / INDEX).exists() == shards
    with open_source(str(tmp_path)) as source:
        assert source.path == tmp_path and source.config["model_type"] == "llama"
        assert same_tensors(everything(source), tensors)
        again = list(source.entries)
    with open_source(tmp_path) as source:
        assert list(source.entries) == again


def test_reading_needs_the_tensor_s_memory_and_maps_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    with open_source(tmp_path) as source:
        name = "model.embed_tokens.weight"
        first, second = source.read(name), source.read(name)
        first.zero_()
        assert bool(second.any()) and torch.equal(source.read(name), second)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_source_closes_its_files(tmp_path: Path) -> None:
    saved(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with open_source(tmp_path):
        assert len(os.listdir("/proc/self/fd")) > before
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError):
        open_source(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_copy_takes_tokenizer_and_licence_along_and_no_code(tmp_path: Path) -> None:
    saved(tmp_path)
    kept = ["LICENSE", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in (
        "modeling_llama.py",
        "run.sh",
        "extra.so",
        "training_args.bin",
        "LICENSE",
        "tokenizer.model",
        "pissa.json",
    ):
        (tmp_path / name).write_text("x")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("x")
    with open_source(tmp_path) as source:
        assert [str(p.relative_to(tmp_path)) for p in source.others] == [
            "LICENSE", "chat_template.jinja", *kept[1:], "additional_chat_templates/tool.jinja",
        ]  # fmt: skip


def test_a_pickle_s_tensors_are_read_where_they_lie(tmp_path: Path) -> None:
    square, generator = torch.arange(12.0).view(3, 4), torch.Generator().manual_seed(0)
    tensors = {
        "weight": square,
        "tied": square,
        "transposed": square.T,
        "rows": square[1:],
        "swapped": torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1),
        "half": torch.nn.Parameter(torch.randn(5, 2, generator=generator).bfloat16()),
        "codes": torch.arange(9, dtype=torch.uint8),
        "scalar": torch.tensor(4),
        "nothing": torch.empty(0, 3),
    }
    file = saved_as_pickle(tmp_path, tensors)
    expected = {name: tensor.detach().contiguous() for name, tensor in torch.load(file, weights_only=True).items()}
    with open_source(tmp_path) as source:
        assert {entry.file for entry in source.entries.values()} == {file}
        found = {name: source.read(name) for name in source.entries}
        assert same_tensors(found, expected) and all(tensor.is_contiguous() for tensor in found.values())
        for name, tensor in expected.items():
            assert b"".join(source.chunks(name, 5)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_pickle_of_old_torch_is_converted_into_a_directory_that_vanishes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(4).half()}
    file = saved_as_pickle(tmp_path / "model", {**tensors, "c": tensors["a"].T}, _use_new_zipfile_serialization=False)
    with open_source(tmp_path / "model") as source:
        assert same_tensors(everything(source), {**tensors, "c": tensors["a"].T.contiguous()})
        places = {entry.file.parent for entry in source.entries.values()}
        assert file.parent not in places and all(place.exists() for place in places)
    assert not any(place.exists() for place in places)


def test_sharded_pickles_are_read_by_their_index(tmp_path: Path) -> None:
    saved_as_pickle(tmp_path, {})
    (tmp_path / "pytorch_model.bin").unlink()
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in names.items():
        torch.save({name: torch.full((2,), float(ord(name)))}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    with open_source(tmp_path) as source:
        assert {name: source.read(name).tolist() for name in source.entries} == {"a": [97.0] * 2, "b": [98.0] * 2}


def test_safetensors_come_before_pickles_and_one_file_before_shards(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.save({"pickle": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with open_source(tmp_path) as source:
        assert "pickle" not in source.entries and len(source.entries) > 10
    save_file({"single": torch.zeros(1)}, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert list(source.entries) == ["single"]


def test_a_gguf_file_is_read_dequantised_as_transformers_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model" / "tiny.gguf")
    from transformers import AutoModelForCausalLM, GgufConfig

    quantization: Any = GgufConfig(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", gguf_file="tiny.gguf", quantization_config=quantization
    ).state_dict()
    for model in (tmp_path / "model", tmp_path / "model" / "tiny.gguf"):
        with open_source(model) as source:
            found = everything(source)
            assert source.config["model_type"] == "llama" and "quantization_config" not in source.config
            assert any(file.name == "tokenizer.json" for file in source.others)
            place = source.path
        assert found and all(torch.equal(found[name], expected[name]) for name in found)
        assert not place.exists()
    shutil.copy(tmp_path / "model" / "tiny.gguf", tmp_path / "model" / "other.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(other\.gguf, tiny\.gguf\); give the one"):
        open_source(tmp_path / "model")
    (tmp_path / "model" / "other.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match=r"cannot load other\.gguf as a GGUF model"):
        open_source(tmp_path / "model" / "other.gguf")


def write_gguf(file: Path) -> None:
    """A Llama with one layer, its matrices in 8 bits, and a tokenizer of 32 tokens."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    file.parent.mkdir()
    writer = GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(bytes([97 + i]) for i in range(26)), b"ab", b"cd", b"ef"])
    writer.add_token_scores([0.0] * 32)
    writer.add_token_types([2, 3, 3] + [1] * 29)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (32, 32), "output": (32, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32),
        "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        kind = GGMLQuantizationType.Q8_0
        weights = quantize(rng.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(f"{name}.weight", weights, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Hub caches


def cached(cache: Path, files: Path) -> Path:
    """A model as huggingface_hub keeps it: snapshots of links into blobs."""
    model = cache / "models--org--name"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(files.iterdir())):
        shutil.copy(file, model / "blobs" / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064}"))
    return snapshot


def test_a_hub_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    tensors = saved(tmp_path / "model")
    snapshot = cached(tmp_path / "cache", tmp_path / "model")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for model in (snapshot, "org/name"):
        with open_source(model) as source:
            assert source.path.resolve() == snapshot.resolve()
            assert same_tensors(everything(source), tensors)
    with pytest.raises(
        CheckpointError, match=r"^there is no directory org/other, and as a hub id it cannot be loaded: "
    ):
        open_source("org/other")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_snapshot_s_links_end_in_its_own_blobs(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "model", shards=False)
    snapshot = cached(tmp_path / "cache", tmp_path / "model")
    for target in (tmp_path / "model" / name, Path("../../../other-blobs/x"), Path("../../refs/main")):
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(target)
        (tmp_path / "cache" / "other-blobs").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "model" / name, tmp_path / "cache" / "other-blobs" / "x")
        with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out of its directory"):
            open_source(snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of its directory"):
        open_source(snapshot)


# What is refused


def rewrite_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((directory / INDEX).read_text())
    change(document)
    (directory / INDEX).write_text(json.dumps(document))


def point_first_to(name: str) -> Callable[[Path], object]:
    def change(document: dict[str, Any]) -> None:
        document["weight_map"][next(iter(document["weight_map"]))] = name

    return lambda directory: rewrite_index(directory, change)


def drop_name(name: str) -> Callable[[Path], object]:
    return lambda directory: rewrite_index(directory, lambda index: index["weight_map"].pop(name))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def first_shard(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


def link_out(directory: Path) -> None:
    outside = directory.parent / "outside"
    shutil.move(first_shard(directory), outside)
    first_name = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))[0]
    (directory / first_name).symlink_to(outside)


def replaced(kind: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        shard = first_shard(directory)
        shard.unlink()
        kind(shard)

    return change


def drop_tensor(directory: Path) -> None:
    shard = first_shard(directory)
    tensors = load_file(shard)
    tensors.pop(min(tensors))
    save_file(tensors or {"other": torch.zeros(1)}, shard)


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


SHARD = r"model-00001-of-\d+\.safetensors"
UNNAMED = rf"{INDEX} does not name model-0000\d-of-00004\.safetensors, which lies beside it"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "name goes up": (point_first_to("../outside.safetensors"), rf"{INDEX} names '\.\./outside\.safetensors'"),
    "absolute name": (point_first_to("/etc/passwd"), rf"{INDEX} names '/etc/passwd'"),
    "windows name": (point_first_to("..\\x.safetensors"), rf"{INDEX} names '\.\.\\{{2}}x"),
    "zero byte": (point_first_to("a\0.safetensors"), rf"{INDEX} names 'a\\x00"),
    "new line": (point_first_to("a\n.safetensors"), rf"{INDEX} names 'a\\n"),
    "directory": (point_first_to("."), rf"{INDEX} names '\.'"),
    "no name": (point_first_to(""), rf"{INDEX} names ''"),
    "other kind": (point_first_to("pytorch_model.bin"), rf"{INDEX} names 'pytorch_model\.bin'"),
    "absent file": (point_first_to("absent.safetensors"), r"lacks 1 shard.*absent\.safetensors"),
    "other shard": (point_first_to("model-00002-of-00004.safetensors"), UNNAMED),
    "a number": (lambda d: rewrite_index(d, lambda i: i["weight_map"].update(a=1)), rf"{INDEX} is not a shard index"),
    "empty map": (lambda d: rewrite_index(d, lambda i: i.update(weight_map={})), rf"{INDEX} is not a shard index"),
    "list map": (lambda d: rewrite_index(d, lambda i: i.update(weight_map=[])), rf"{INDEX} is not a shard index"),
    "absent tensor": (drop_tensor, rf"{SHARD} is not the shard that {INDEX} describes: it lacks '"),
    "unnamed tensor": (drop_name("model.norm.weight"), "holds, unnamed there, 'model.norm.weight'"),
    "unnamed shard": (drop_name("lm_head.weight"), UNNAMED),
    "negative total": (
        lambda d: rewrite_index(d, lambda i: i["metadata"].update(total_size=-1)), rf"{INDEX}: total_size is '-1'"
    ),
    "total of text": (
        lambda d: rewrite_index(d, lambda i: i["metadata"].update(total_size="1")), rf"{INDEX}: total_size is '1'"
    ),
    "huge total": (
        lambda d: rewrite_index(d, lambda i: i["metadata"].update(total_size=10**30)), rf"{INDEX}: total_size is '10+'"
    ),
    "total is NaN": (write(INDEX, '{"metadata": {"total_size": NaN}, "weight_map": {"a": "a.safetensors"}}'), INDEX),
    "index is a list": (write(INDEX, "[]"), rf"{INDEX} holds a JSON list instead of an object"),
    "index twice": (write(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), rf"{INDEX} is not valid JSON: the key 'a'"),
    "index not UTF-8": (write(INDEX, b'{"\xff": 1}'), rf"{INDEX} is not valid JSON: 'utf-8'"),
    "index nested": (write(INDEX, b"[" * 100_000), rf"{INDEX} is nested too deeply"),
    "index empty": (write(INDEX, ""), rf"{INDEX} is not valid JSON"),
    "index huge number": (write(INDEX, b'{"a": ' + b"9" * 5000 + b"}"), rf"{INDEX} is not valid JSON"),
    "index too large": (
        lambda d: os.truncate(d / INDEX, 1 << 40), rf"{INDEX} is 1,099,511,627,776 bytes"
    ),
    "config is a list": (write("config.json", "[]"), r"config\.json holds a JSON list"),
    "config twice": (write("config.json", '{"a": 1, "a": 2}'), r"config\.json is not valid JSON: the key 'a' occurs"),
    "config empty": (write("config.json", ""), r"config\.json is not valid JSON"),
    "config nested": (write("config.json", b'{"a":' * 100_000), r"config\.json is nested too deeply"),
    "config of code": (
        write("config.json", '{"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}}'),
        r"config\.json asks for code that comes with the model \(auto_map\), which pissa never runs",
    ),
    "config is absent": (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    "config leads out": (
        lambda d: ((d / "config.json").rename(d.parent / "c"), (d / "config.json").symlink_to(d.parent / "c")),
        r"config\.json is a link that leads out of its directory",
    ),
    "shard leads out": (link_out, rf"{SHARD} is a link that leads out of its directory"),
    "link to nothing": (replaced(lambda shard: shard.symlink_to("nothing")), rf"{SHARD} is missing, or a link"),
    "link to itself": (replaced(lambda shard: shard.symlink_to(shard.name)), rf"{SHARD} is missing, or a link"),
    "shard is absent": (replaced(lambda shard: None), rf"lacks 1 shard.*{SHARD}"),
    "shard is a directory": (replaced(Path.mkdir), rf"{SHARD} is a directory and not a file"),
    "shard is a FIFO": (replaced(os.mkfifo), rf"{SHARD} is a FIFO and not a file"),
    "shard is a device": (replaced(lambda shard: shard.symlink_to("/dev/zero")), rf"{SHARD} is a link that leads out"),
    "shard is empty": (replaced(Path.touch), rf"{SHARD} has 0 bytes"),
    "shard is cut": (lambda d: cut(first_shard(d)), rf"{SHARD} is not whole"),
    "shard is longer": (lambda d: os.truncate(first_shard(d), 1 << 42), rf"{SHARD} is not whole"),
    "tokenizer leads out": (
        lambda d: ((d / "tokenizer.json").unlink(), (d / "tokenizer.json").symlink_to("/etc/passwd")),
        r"tokenizer\.json is a link that leads out of its directory, to /etc/passwd",
    ),
    "tokenizer is a FIFO": (lambda d: os.mkfifo(d / "extra.json"), r"extra\.json is a FIFO"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    directory = tmp_path / "model"
    saved(directory)
    damage(directory)
    before = sorted(tmp_path.rglob("*"))
    for reader in (open_source, check_model_directory, load_base):
        with pytest.raises(CheckpointError, match=said) as caught:
            reader(directory)
        message = str(caught.value)
        assert message.startswith(str(directory)) and "\n" not in message and len(message) < 1000
    assert sorted(tmp_path.rglob("*")) == before


def test_code_that_is_not_needed_is_named_and_left_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (tmp_path / "modeling.py").write_text("raise SystemExit")
    with pytest.warns(UserWarning, match=r"config\.json: the code that it names \(auto_map\) is not used"):
        source = open_source(tmp_path)
    with source:
        assert source.config == config
        assert not any(file.suffix == ".py" for file in source.others)


def test_an_index_that_miscounts_bytes_is_warned_of_and_read(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(tmp_path).close()
    rewrite_index(tmp_path, lambda index: index["metadata"].update(total_size=5))
    with pytest.warns(UserWarning, match=rf"{INDEX}: total_size is 5, the tensors are [\d,]+ bytes"):
        source = open_source(tmp_path)
    with source:
        assert same_tensors(everything(source), tensors)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, shards=False)
    with open_source(tmp_path) as source:
        name, entry = list(source.entries.items())[-1]
        os.truncate(entry.file, entry.offset + entry.nbytes - 1)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors ended in the middle of {name}"):
            source.read(name)
        with pytest.raises(CheckpointError, match="ended in the middle"):
            list(source.chunks(name))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("/tmp/pissa-was-run",)


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def large_pickle(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive, archive.open("model/data.pkl", "w") as record:
        for _ in range(33):
            record.write(bytes(1 << 20))


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda f: torch.save({"a": Evil()}, f), "loading it would run code, which pissa never does"),
    "old code": (
        lambda f: torch.save({"a": Evil()}, f, _use_new_zipfile_serialization=False), "loading it would run code"
    ),
    "plain pickle of code": (lambda f: f.write_bytes(pickle.dumps(Evil(), 2)), "would run code|cannot be read"),
    "module": (lambda f: torch.save(torch.nn.Linear(2, 2), f), "loading it would run code"),
    "a list": (lambda f: torch.save([torch.zeros(2)], f), "holds a list instead of a dict of tensors"),
    "a number": (lambda f: torch.save({"a": torch.zeros(2), "n": 3}, f), "holds what is no dense tensor: 'n'"),
    "a number for a name": (lambda f: torch.save({1: torch.zeros(2)}, f), "holds what is no dense tensor: '1'"),
    "sparse": (lambda f: torch.save({"a": torch.eye(2).to_sparse()}, f), "cannot be read|no dense tensor: 'a'"),
    "repeated": (lambda f: torch.save({"a": torch.zeros(1).expand(1 << 40)}, f), "does not fit its record"),
    "skipping": (lambda f: torch.save({"a": torch.zeros(9)[::2]}, f), "skips or repeats elements"),
    "garbage": (lambda f: f.write_bytes(b"PK" + bytes(100)), "is no whole zip archive"),
    "zeros": (lambda f: f.write_bytes(bytes(100)), "cannot be read|would run code"),
    "empty": (lambda f: f.write_bytes(b""), "cannot be read"),
    "cut": (lambda f: os.truncate(f, f.stat().st_size // 2), "is no whole zip archive"),
    "compressed": (compressed, "is a compressed archive"),
    "large pickle": (large_pickle, "its pickle is 34,603,008 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_is_more_or_less_than_tensors_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    file = saved_as_pickle(tmp_path, {"a": torch.zeros(100)})
    damage(file)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_source(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(file)) and "\n" not in message and len(message) < 1000
    assert not Path("/tmp/pissa-was-run").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_damaged_pickle_is_refused_or_read(tmp_path: Path, old: bool) -> None:
    rng, tensors = random.Random(0), {"a": torch.arange(8.0), "b": torch.ones(2, 3).half()}
    file = saved_as_pickle(tmp_path, tensors, _use_new_zipfile_serialization=not old)
    whole, outcomes = file.read_bytes(), set()
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
        try:
            with open_source(tmp_path) as source:
                for name in source.entries:
                    source.read(name)
            outcomes.add("read")
        except PissaError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
