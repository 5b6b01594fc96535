"""A setting is declared once: its flag, its help, its check and its YAML name come from the declaration."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import typer
import yaml
from commands import exit_code

from pissa import PissaConfig, Quantization, Recipe
from pissa.cli.flags import with_settings
from pissa.cli.parser import COMMANDS, Command, load_command
from pissa.config.kinds import Count, Share
from pissa.config.settings import MISSING, settings_of
from pissa.evaluation.options import EvaluationOptions
from pissa.lab.comparison.plan import ComparisonPlan
from pissa.lab.inspection.settings import InspectionSettings
from pissa.training.recipe import read_recipe, recipe_from

GROUPS = ("Adapter", "Quantisation", "Training", "Data")
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
        help = re.sub(r"--([\w-]+)", lambda found: found[1].replace("-", "_"), option.help)
        assert help.startswith(setting.doc), name
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


HOSTILE = [
    ["trian"],
    ["--frobnicate"],
    ["train", "M", "--data", "D", "--out", "O", "--rnak", "3"],
    ["train", "M", "--data", "D", "--out", "O", "--rank"],
    ["train", "M", "--data", "D", "--out", "O", "--rank", "-3"],
    ["train", "M", "--data", "D", "--out", "O", "--method", "PiSSA"],
    ["train", "M", "--data", "D", "--out", "O", "--rank-pattern", "q_proj:8"],
    ["train", "M", "--data", "D", "--out", "O", "--rank-pattern", "q_proj=0"],
    ["train", "M", "--data", "D", "--out", "O", "--lr", "fast"],
    ["train", "M", "--data", "D", "--out", "O", "--dropout", "0.1"],
    ["train", "M", "--data", "D", "--out", "O", "--config", "none.yaml"],
    ["train", "M", "--data", "D", "--out", "O", "--config", "{here}"],
    ["train", "{here}/none", "--data", "D", "--out", "O"],
    ["train", "{file}", "--data", "D", "--out", "O"],
    ["train", "", "--data", "D", "--out", "O"],
    ["train", "M", "--data", "{here}", "--out", "O"],
    ["train", "M", "--data", "none.jsonl", "--out", "O"],
    ["train", "M", "--data", "D", "--out", "{file}"],
    ["train", "M", "--data", "D", "--out", "{file}/below"],
    ["train", "M", "--data", "D", "--out", "O", "--quantize", "nf4", "--calibration", "none.txt"],
    ["init", "M", "O", "--method", "pisa"],
    ["init", "M", "O", "--dtype", "fp8"],
    ["init", "M", "O", "--memory", "much"],
    ["init", "{here}/none", "O"],
    ["init", "M", "{file}"],
    ["init", "M"],
    ["inspect", "M", "--rank", "4,x"],
    ["inspect", "M", "--norm", "max"],
    ["inspect", "M", "--windows", "0", "--quantize", "nf4"],
    ["inspect", "{here}/none"],
    ["inspect", "M", "--quantize", "nf4", "--calibration", "{here}"],
    ["eval", "M", "--task", "gsm9k", "--data", "D"],
    ["eval", "M", "--task", "gsm8k", "--data", "D", "--batch-size", "0"],
    ["compare", "--out", "O"],
    ["compare", "--out", "O", "--model", "M", "--data", "D", "--methods", "lora,pisa"],
    ["compare", "--out", "O", "--model", "M", "--data", "D", "--seeds", "0"],
    ["compare", "--out", "O", "--model", "{here}/none", "--data", "D"],
    ["compare", "--out", "O", "--model", "M", "--data", "none.jsonl"],
    ["export", "{here}/none", "O"],
    ["export", "{here}", "{file}"],
    ["export", "{here}", "O", "--to", "onnx"],
    ["export", "{here}", "O", "--rank", "-1"],
    ["export", "{here}", "O", "--tolerance", "2"],
    ["verify", "{here}/none"],
    ["verify", "{here}", "--base", "{file}"],
    ["demo", "--data", "none.jsonl"],
    ["demo", "--out", "{file}"],
    ["demo", "surplus"],
]


def test_what_is_wrong_is_said_in_one_line_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """All in one fresh process: none of these needs torch, and none leaves anything behind."""
    (tmp_path / "file").write_text("a file")
    known = {"here": str(tmp_path), "file": str(tmp_path / "file")}
    hostile = [[word.format(**known) for word in words] for words in HOSTILE]
    code = f"""
import contextlib, io, sys
from pissa.cli.main import run
for words in {hostile!r}:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            run(words)
    except SystemExit as stopped:
        print(stopped.code, said.getvalue().count(chr(10)), said.getvalue().strip(), sep="|")
    heavy = {{"torch", "transformers", "peft", "datasets", "huggingface_hub"}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == len(HOSTILE)
    wrong = [
        (words, answer)
        for words, answer in zip(HOSTILE, answers, strict=True)
        if not re.fullmatch(r"2\|1\|pissa: .{10,}", answer)
    ]
    assert wrong == []
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import pissa

    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"pissa {pissa.__version__}\n"
