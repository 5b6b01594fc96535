"""A setting is declared once: its flag, its help, its check and its YAML name come from the declaration."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
import typer
import yaml
from commands import exit_code
from safetensors.numpy import save

from pissa import PissaConfig, Quantization, Recipe
from pissa.cli.flags import naming_flags, with_settings
from pissa.cli.parser import COMMANDS, Command, load_command
from pissa.config.kinds import Count, Share
from pissa.config.settings import MISSING, settings_of
from pissa.evaluation.options import EvaluationOptions
from pissa.lab.comparison.plan import ComparisonPlan
from pissa.lab.inspection.settings import InspectionSettings
from pissa.training.recipe import read_recipe, recipe_from

GROUPS = ("Adapter", "Quantisation", "Training", "Validation", "Data")
SAME = {
    "rank": ("8", 8),
    "alpha": ("3.5", 3.5),
    "method": ("cura", "cura"),
    "cur_rcond": ("1e-3", 1e-3),
    "target_modules": ("self_attn.q_proj, v_proj", ["self_attn.q_proj", "v_proj"]),
    "exclude_modules": (r".*\.\d{1,2}\.(q|v)", r".*\.\d{1,2}\.(q|v)"),
    "rank_pattern": (r"q_proj=8,.*\.\d{1,2}\.v=4", {"q_proj": 8, r".*\.\d{1,2}\.v": 4}),
    "alpha_pattern": ("q_proj = 0.5, v_proj=1e1", {"q_proj": 0.5, "v_proj": 10.0}),
    "modules_to_save": ("lm_head,norm", ["lm_head", "norm"]),
    "trainable_token_indices": ("embed_tokens=3+7,other=1", {"embed_tokens": [3, 7], "other": [1]}),
    "use_rslora": ("true", True),
    "learning_rate": ("auto", "auto"),
    "max_steps": ("1e2", 100),
    "block_size": ("128", 128),
    "double_quant": ("false", False),
}
"""Settings as text and as YAML's value."""
NEEDED = {"cur_rcond": {"method": "cura"}, "block_size": {"quantize": "nf4"}, "double_quant": {"quantize": "nf4"}}


@pytest.mark.parametrize(
    "owner", [Recipe, PissaConfig, Quantization, EvaluationOptions, ComparisonPlan, InspectionSettings]
)
def test_every_setting_is_explained_in_sentences(owner: type) -> None:
    texts = {name: setting.doc for name, setting in settings_of(owner).items()}
    assert set(texts) == {field.name for field in fields(owner)}
    assert [name for name, text in texts.items() if not re.fullmatch(r"[\w\"].{15,}[.]", text)] == []
    assert [name for name, text in texts.items() if re.match(r"Of ", text)] == []


def test_every_setting_of_a_run_is_a_flag_in_its_group_with_its_text_and_default() -> None:
    options: dict[str, Any] = {option.name: option for option in load_command("train").params}
    settings = dict(settings_of(Recipe))
    del settings["training"]  # a mapping, whose entries are given one by one as --set NAME=VALUE
    assert set(settings) <= set(options)
    assert tuple(dict.fromkeys(options[name].rich_help_panel for name in options if name in settings)) == GROUPS
    for name, setting in settings.items():
        option = options[name]
        assert f"--{name.replace('_', '-')}" in option.opts and option.default is None
        said, meant = (re.sub(r"--([\w-]+)", lambda m: m[1].replace("-", "_"), t) for t in (option.help, setting.doc))
        assert said.startswith(meant), name
        if setting.default not in (None, False, MISSING, (), {}):
            stated = re.search(r"\(default: (.+)\)$", option.help)
            assert stated is not None, name
            needed = NEEDED.get(name, {})
            assert recipe_from({name: stated[1], **needed}) == recipe_from(needed), name


@pytest.mark.parametrize("name", SAME)
def test_a_setting_means_the_same_in_flag_yaml_and_python(name: str, tmp_path: Path) -> None:
    text, value = SAME[name]
    needed = NEEDED.get(name, {})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({name.replace("_", "-"): value, **needed}))
    made = read_recipe(path)
    assert made == recipe_from({name: text, **needed}) == recipe_from({name: value, **needed})
    assert made != recipe_from(needed)


@dataclass(frozen=True)
class Garden:
    """Settings that nobody has heard of."""

    panel: ClassVar[str] = "Garden"

    trees: Count
    """How many trees there are."""
    shade: Share = 0.25
    """Which share of trees_and_lawn lies in the shade."""
    soil: Literal["sand", "clay"] | None = None
    """What the trees stand in."""
    trees_and_lawn: bool = True
    """Whether there is a lawn."""


def grown(words: list[str]) -> dict[str, Any]:
    """What a command with these settings is given."""
    found: dict[str, Any] = {}

    @with_settings(Garden)
    def command(place: Annotated[str, typer.Argument()], settings: dict[str, Any], loud: bool = False) -> None:
        found.update(settings, place=place, loud=loud)

    app = typer.Typer(add_completion=False)
    app.command(cls=Command)(command)
    app(words, standalone_mode=False)
    return found


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("here", {}),
        ("here --trees 3 --shade 1 --soil clay", {"trees": 3, "shade": 1.0, "soil": "clay"}),
        ("here --trees-and-lawn", {"trees_and_lawn": True}),
        ("--trees-and-lawn here", {"trees_and_lawn": True}),
        ("--trees-and-lawn yes here", {"trees_and_lawn": True}),
        ("here --trees-and-lawn 0 --loud 1", {"trees_and_lawn": False, "loud": True}),
        ("here --trees-and-lawn=ON --loud=no", {"trees_and_lawn": True}),
        ("--trees-and-lawn true here", {"trees_and_lawn": True}),
        ("here --trees-and-lawn=False", {"trees_and_lawn": False}),
        ("here --no-trees-and-lawn --trees 1", {"trees_and_lawn": False, "trees": 1}),
        ("--loud true here", {"loud": True}),
        ("here --loud=true", {"loud": True}),
        ("here --loud false", {"loud": False}),
        ("--trees 2 -- --trees-and-lawn", {"trees": 2, "place": "--trees-and-lawn"}),
    ],
)
def test_a_declared_field_is_a_flag(words: str, meant: dict[str, Any]) -> None:
    assert grown(words.split()) == {"place": "here", "loud": False, **meant}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--trees 0", "--trees is 0; give a whole number of at least 1"),
        ("--trees 1.5", "--trees is '1.5'; give a whole number of at least 1"),
        ("--trees none", "--trees is 'none'; give a whole number"),
        ("--shade 2 --trees -1", "--trees is -1; give a whole number of at least 1; --shade is 2.0; allowed: 0 to 1"),
        ("--shade nan", "--shade is nan"),
        ("--soil CLAY", "--soil is 'CLAY'; allowed: sand, clay; did you mean clay?"),
        ("--soil snd", "did you mean sand?"),
        ("--soil water", "--soil is 'water'; allowed: sand, clay"),
        ("--trees-and-lawn=maybe", "--trees-and-lawn is 'maybe'; give true or false"),
        ("--trees-and-lawn=", "--trees-and-lawn is ''"),
    ],
)
def test_a_wrong_value_names_the_flag_and_what_is_allowed(words: str, said: str) -> None:
    from pissa import PissaError

    with pytest.raises(PissaError, match=re.escape(said)):
        grown(["here", *words.split()])


def test_the_help_of_a_field_names_flags_choices_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    grown(["--help"])
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "Which share of --trees-and-lawn lies in the shade. (default: 0.25)" in text
    assert "What the trees stand in. One of sand, clay." in text
    assert "Whether there is a lawn. (default: true)" in text and "<bool>" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_no_switch_promises_a_value_that_it_does_not_take(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(name, "--help") == 0
    assert "<bool>" not in capsys.readouterr().out


HOSTILE = """
trian
--frobnicate
train {model} --data {rows} --out O --rnak 3
train {model} --data {rows} --out O --rank
train {model} --data {rows} --out O --rank -3
train {model} --data {rows} --out O --method PiSSA
train {model} --data {rows} --out O --rank-pattern q_proj:8
train {model} --data {rows} --out O --rank-pattern q_proj=0
train {model} --data {rows} --out O --lr fast
train {model} --data {rows} --out O --dropout 0.1
train {model} --data {rows} --out O --template Chat
train {model} --data {rows} --out O --config none.yaml
train {model} --data {rows} --out O --config {here}
train {here}/none --data {rows} --out O
train {here} --data {rows} --out O
train {bare} --data {rows} --out O
train {adapter} --data {rows} --out O
train {file} --data {rows} --out O
train {model} --data {here} --out O
train {model} --data none.jsonl --out O
train {model} --data {empty} --out O
train {model} --data {odd} --out O
train {model} --data {rows} --out {file}
train {model} --data {rows} --out {file}/below
train {model} --data {rows} --out {adapter}
train {model} --data {rows} --out O --quantize nf4 --calibration none.txt
train {model} --data {rows} --out O --optimizer adamw_trch -> did you mean adamw_torch?
train {model} --data {rows} --out O --optimizer AdamW_8bit -> did you mean adamw_8bit?
train {model} --data {rows} --out O --optimizer nothing -> allowed: spectral, adamw_torch,
train {model} --data {rows} --out O --set adam_bta2=0.9 -> did you mean adam_beta2?
train {model} --data {rows} --out O --set adam_beta2=high -> adam_beta2 is 'high'; SFTConfig takes float
train {model} --data {rows} --out O --set dataloader_num_workers=true -> SFTConfig takes int
train {model} --data {rows} --out O --set bf16=true -> has a setting of its own, dtype
train {model} --data {rows} --out O --set adam_beta2 -> --set is adam_beta2; give NAME=VALUE
train {model} --data {rows} --out O --target-modules q_prj -> no module matches 'q_prj'; closest names: q_proj
train {model} --data {rows} --out O --target-modules .*q_prj -> no module matches '.*q_prj'
train {model} --data {rows} --out O --target-modules {file} -> no module matches
train {model} --data {rows} --out O --exclude-modules lm_hed -> exclude_modules: no module matches 'lm_hed'
train {model} --data {rows} --out O --rank-pattern q_porj=3 -> rank_pattern: no module matches 'q_porj'
train {model} --data {rows} --out O --rank 17 -> k_proj (8, 16): 17 > 8, model.layers.0.self_attn.v_proj (8, 16): 17 > 8
train {model} --data {rows} --out O --config {twice}
init {model} O --rank 9 -> model.layers.0.self_attn.k_proj (8, 16): 9 > 8, model
init {model} O --target-modules k_proj,mlp.down_prj -> no module matches 'mlp.down_prj'; closest names
init {model} O --use-rslora=maybe -> --use-rslora is 'maybe'; give true or false
inspect {model} --rank 1000 -> 1000 > 16
inspect {model} --target-modules v_prj -> closest names: v_proj
compare --out O --model {model} --data {rows} --rank 1000 -> 1000 > 16
init {model} O --method pisa
init {model} O --dtype fp8
init {model} O --memory much
init {model} O --memory 0
init {here}/none O
init {here} O
init {bare} O
init {broken} O
init {adapter} O
init {model} {file}
init {model} {adapter}
init {model}
inspect {model} --rank 4,x
inspect {model} --norm max
inspect {model} --windows 0 --quantize nf4
inspect {here}/none
inspect {bare}
inspect {adapter}
inspect {model} --quantize nf4 --calibration {here}
eval {model} --task gsm9k --data {rows}
eval {model} --task GSM8K --data {rows}
eval {model} --task gsm8k --data {rows} --batch-size 0
eval {model} --task gsm8k --data {rows} --judge-prompts none.jsonl
eval {model} --task gsm8k --data {empty}
eval {model} --task mbpp --data {rows}
eval {model} --task glue/sst2 --data {rows}
eval {model} --task gsm8k --data {rows} --out {adapter}
eval {model} --task gsm8k --data {rows} --base {here}
eval {here} --task gsm8k --data {rows}
eval {bare} --task gsm8k --data {rows}
eval {half} --task gsm8k --data {rows}
chat {here}/none
chat {here}
chat {half}
chat {model} --compare {bare}
chat {model} --base {here}
chat {model} --top-k 3
chat {model} --max-new-tokens 0
train --config {here}/none.yaml
train {model} --out O
chat {here}
chat {bare}
chat {half}
chat {model} --compare {here}
chat {model} --base {here}
compare --out O
compare --out O --model {model} --data {rows} --methods lora,pisa
compare --out O --model {model} --data {rows} --seeds 0
compare --out O --model {here}/none --data {rows}
compare --out O --model {here} --data {rows}
compare --out O --model {model} --data none.jsonl
compare --out O --model {model} --data {odd}
compare --out O --model {model} --data {rows} --test {empty}
compare --out O --model {model} --data {rows} --eval gsm9k
compare --out O --model {model} --data {rows} --eval mbpp
compare --out O --model {model} --data {rows} --eval-data {rows}
compare --out {adapter} --model {model} --data {rows}
compare --out {here}/none --rebuild
compare --out {adapter} --rebuild
export {here}/none O
export {here} O
export {half} O
export {model} O
export {adapter} {file}
export {adapter} {model}
export {adapter} O --to onnx
export {adapter} O --to GGUF
export {adapter} O --to gguf --form F16
export {adapter} O --to gguf --llama-cpp {here}
export {adapter} O.bin --to gguf-lora
export {adapter} O --rank -1
export {adapter} O --rank many -> --rank is 'many'; give a whole number
export {adapter} O --tolerance x -> --tolerance is 'x'; give a number
demo --seed 1.5 -> --seed is '1.5'; give a whole number
export {adapter} O --tolerance 2
export {adapter} O --check VLLM
export {adapter} O --merged --base {here}
verify {here}/none
verify {here}
verify {model}
verify {here} --base {file}
demo --data none.jsonl
demo --data {odd}
demo --model {here}
demo --seed -1
demo --out {file}
demo --out {adapter}
demo surplus
""".strip().splitlines()


def hostile_places(here: Path) -> dict[str, Path]:
    """What wrong commands name: a model and an adapter as far as names tell, and what is neither."""
    rows = '{"question": "1 + 1?", "answer": "2"}\n' * 4
    files: dict[str, str | bytes] = {
        "file": "a file", "rows.jsonl": rows, "empty.jsonl": "", "odd.jsonl": '{"foo": "bar"}\n',
        "model/config.json": '{"model_type": "llama"}', "model/model.safetensors": weights(),
        "twice.yaml": "rank: 8\nrank: 9\n", "bare/config.json": '{"model_type": "llama"}',
        "broken/config.json": '{"model_type": ', "broken/model.safetensors": "",
        "adapter/adapter_config.json": '{"peft_type": "LORA"}', "adapter/adapter_model.safetensors": "",
        "half/adapter_config.json": '{"peft_type": "LORA"}',
    }  # fmt: skip
    for name, text in files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return {"here": here, **{name.split("/")[0].partition(".")[0]: here / name.split("/")[0] for name in files}}


def weights() -> bytes:
    """A checkpoint of an attention, in safetensors."""
    shapes = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    tensors = {f"model.layers.0.self_attn.{name}.weight": np.zeros(shape, "float32") for name, shape in shapes.items()}
    return save(tensors)


def answers_to(commands: Sequence[str], heavy: set[str], here: Path) -> list[str]:
    """What a fresh process says to commands, one after the other: code, number of lines, lines; none may import what
    is heavy."""
    known = hostile_places(here)
    code = f"""
import contextlib, io, sys
from pissa.cli.main import run
for words in {[[word.format(**known) for word in line.split()] for line in commands]!r}:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            run(words)
    except SystemExit as stopped:
        print(stopped.code, said.getvalue().count(chr(10)), said.getvalue().strip(), sep="|")
    heavy = {heavy!r} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_wrong_is_said_in_one_line_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """All in one fresh process: none of these needs torch, and none leaves anything behind."""
    before = set(hostile_places(tmp_path).values())
    lines = [line.partition(" -> ") for line in HOSTILE]
    commands, expected = [words for words, _, _ in lines], [said for _, _, said in lines]
    answers = answers_to(commands, {"torch", "transformers", "peft", "trl", "datasets", "huggingface_hub"}, tmp_path)
    said = zip(commands, expected, answers, strict=True)
    wrong = [it for it in said if not re.fullmatch(r"2\|1\|pissa: .{10,}", it[2]) or it[1] not in it[2]]
    assert wrong == []
    assert {tmp_path, *tmp_path.iterdir()} == before


def test_an_id_that_the_hub_does_not_have_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    commands = [
        "init no-such/model O",
        "train no-such/model --data {rows} --out O",
        "inspect no-such/model",
        "export no-such/adapter O",
        "eval no-such/model --task gsm8k --data {rows}",
        "chat no-such/model",
        "chat {model} --compare no-such/model",
        "verify {model} --base no-such/model",
        "compare --out O --model no-such/model --data {rows}",
        "demo --model no-such/model",
        "demo --data no-such/rows",
        "train {model} --data no-such/rows --out O",
        "train {model} --data {rows} --eval-data no-such/rows --out O",
        "compare --out O --model {model} --data {rows} --test no-such/rows",
    ]
    answers = answers_to(commands, {"torch", "transformers", "peft", "datasets"}, tmp_path)
    missing = (
        r"2\|1\|pissa: (there is no (directory|file) no.such.\w+, and as a hub id it cannot be loaded|.* pissa.json).+"
    )
    assert [answer for answer in answers if not re.fullmatch(missing, answer)] == []
    assert len(answers) == len(commands)


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import pissa

    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"pissa {pissa.__version__}\n"


@pytest.mark.parametrize("name", [name for name in settings_of(Recipe) if "_" in name])
def test_a_refusal_that_names_a_setting_names_its_flag_once(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    flags = {each: f"--{each.replace('_', '-')}" for each in settings_of(Recipe)}
    said = naming_flags(f"cannot adapt x: set {name}=['y'], or lower rank", flags)
    assert said.endswith(f"(as flags: {flag})")
    for kept in (said, f"give {flag}, which is {name}", f"a/{name}/b", f"x{name}", f"x.{name}", "nothing"):
        assert naming_flags(kept, flags).count(flag) == kept.count(flag)


def test_advice_on_the_command_line_can_be_followed_there(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("init", model, str(tmp_path / "out"), "--rank", "33") == 2
    said = capsys.readouterr().err
    assert "rank_pattern" in said and "(as flags: --rank-pattern)" in said and said.count("\n") == 1
