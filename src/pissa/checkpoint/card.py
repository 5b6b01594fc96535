"""Model cards: the README.md of everything that is written, with front matter that the hub reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig

from ..decompose.certificate import Certificate
from ..outside.text import in_code, in_markdown, in_python
from .recorded import template_line

CARD = "README.md"
HERE = "PATH-OR-ID-OF-THIS"
BESIDE = f"""```python
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
from peft import PeftModel

place = snapshot_download("{HERE}")  # of a directory, its path
base = AutoModelForCausalLM.from_pretrained(place + "/residual")
model = PeftModel.from_pretrained(base, place)
```

or, with pissa, `pissa.load("{HERE}")`."""
ON_BASE = """```python
from transformers import AutoModelForCausalLM
from peft import PeftModel

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {adapter})
```"""


ADDING = (
    'To add several adapters, PEFT\'s `add_weighted_adapter` is exact with `combination_type="cat"` alone; its other '
    "combinations (linear, svd, ties, …) compute something else."
)
DORA = (
    "It is a DoRA: load it with PEFT, as above, or take `pissa export --merged`. transformers' own `load_adapter` "
    "leaves the trained magnitudes out, with a report of missing keys, and computes another function."
)


def cautions(config: LoraConfig) -> list[str]:
    """What the reader of a LoRA's card should know of other ways to load it.

    Args:
        config: PEFT's, as it is written.
    """
    return [*([DORA, ""] if config.use_dora else []), ADDING]


def front_matter(base: str | None, library: str, tags: Iterable[str]) -> list[str]:
    """The lines between which the hub looks for metadata. It refuses a base that is a directory of somebody's."""
    known = base is not None and _is_hub_id(base) and not Path(base).exists()
    data = ModelCardData(base_model=base if known else None, library_name=library, tags=list(dict.fromkeys(tags)))
    return ["---", *data.to_yaml().splitlines(), "---", ""]


def _is_hub_id(base: str) -> bool:
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def loading(base: str | None, options: str = "") -> str:
    """The lines of Python that load the adapter that lies beside a card.

    Args:
        base: directory or hub id of what it is for.
        options: more arguments for `PeftModel.from_pretrained`.
    """
    return ON_BASE.format(base=in_python(base or "BASE"), adapter=f'"{HERE}"{options}')


def lora_card(
    config: LoraConfig,
    base: str | None,
    method: str | None,
    rank: int | None,
    errors: Mapping[str, float],
    gaps: Mapping[str, float],
    template: str | None = None,
) -> str:
    """The card of a LoRA for the untouched base.

    Args:
        config: PEFT's, as it is written.
        base: directory or hub id.
        method: by which it was trained, where that is known.
        rank: of the adapter as it was trained.
        errors: module name -> relative error of its update.
        gaps: module name -> relative distance of the base from what was trained, where that was quantised.
        template: the prompt template that it was trained with, where that is known.
    """
    kind = f"{'DoRA' if config.use_dora else 'LoRA'} of {ranks_of(config)}"
    worst = max(errors.values(), default=0.0)
    facts = [
        f"- base: {in_code(base or 'not recorded')}",
        f"- method: {in_markdown(method or 'not recorded')}" + (f", rank {rank}" if rank else ""),
        "- error: none, this is exactly what training changed"
        if worst == 0
        else f"- error: the optimum of its rank; of a module's update {worst:.2e} at most, "
        f"{sum(errors.values()) / len(errors):.2e} on average (relative, Frobenius)",
    ]
    if gaps:
        facts.append(
            f"- trained on a quantised residual, from whose function this is off by the quantisation error of the "
            f"start: {100 * sum(gaps.values()) / len(gaps):.2f} % of a weight's norm on average, at most "
            f"{100 * max(gaps.values()):.2f} %"
        )
    facts += template_line(template)
    text = ["# LoRA for the untouched base", "", f"An ordinary {kind}, made with pissa.", "", *facts]
    if config.modules_to_save:
        text.append(f"- trained in full beside it: {', '.join(map(in_markdown, config.modules_to_save))}")
    lines = [*front_matter(base, "peft", ("pissa", "lora")), *text, "", loading(base), "", *cautions(config), ""]
    return "\n".join(lines)


def residual_adapter_card(config: LoraConfig, base: str | None, method: str | None, residual: str | None) -> str:
    """The card of an adapter that fits a quantised residual and nothing else.

    Args:
        config: PEFT's, as it is written.
        base: directory or hub id of what was split.
        method: by which it was split.
        residual: its directory; None where it lies in the subfolder `residual`.
    """
    text = [
        "# Adapter for a quantised residual",
        "",
        f"A LoRA of {ranks_of(config)}, made with pissa, for the residual in {in_code(residual or 'residual/')}. "
        f"On {in_code(base or 'the base')} itself it would compute something else; `pissa export` makes an adapter for "
        "that.",
        "",
        f"- base: {in_code(base or 'not recorded')}",
        f"- method: {in_markdown(method or 'not recorded')}, {ranks_of(config)}",
        "- error: none, residual and adapter together are what was trained",
        "",
        loading(residual) if residual is not None else BESIDE,
        "",
    ]
    return "\n".join([*front_matter(base, "peft", ("pissa", "lora", "quantized")), *text])


def residual_card(
    base: str | None, method: str | None, rank: int | None, certificates: Mapping[str, Certificate], initial: str | None
) -> str:
    """The card of a residual with its initial adapter.

    Args:
        base: directory or hub id of what was split.
        method, rank: of the split, where they are known.
        certificates: module name -> certificate of its split.
        initial: the directory of the initial adapter in it; None where it has none.
    """
    found = list(certificates.values())
    quantized = any(certificate.quantization_error is not None for certificate in found)
    lost = [certificate.rounding for certificate in found]
    text = [
        "# Residual" + (" and initial adapter" if initial else ""),
        "",
        "Made with pissa: the frozen part of a model whose "
        + (f"components are in the trainable adapter `{initial}/`." if initial else "adapter starts at zero."),
        "By itself it does not compute what the base computes.",
        "",
        f"- base: {in_code(base or 'not recorded')}",
        f"- method: {in_markdown(method or 'not recorded')}" + (f", rank {rank}" if rank else ""),
    ]
    if lost:
        text.append(
            f"- {'quantisation' if quantized else 'rounding'}: residual and adapter together differ from the base by "
            f"{sum(lost) / len(lost):.2e} of a weight's norm on average, at most {max(lost):.2e}"
        )
    if initial:
        text += ["", loading(HERE, f', subfolder="{initial}", is_trainable=True')]
    tags = ("pissa", "residual", *(["quantized"] if quantized else []))
    return "\n".join([*front_matter(base, "transformers", tags), *text, ""])


def merged_card(base: str | None, method: str | None, template: str | None = None) -> str:
    """The card of a merged model."""
    text = [
        "# Fine-tuned model",
        "",
        "Made with pissa: an ordinary transformers model, with what training changed merged into its weights.",
        "",
        f"- base: {in_code(base or 'not recorded')}",
        f"- method: {in_markdown(method or 'not recorded')}",
        "- error: that of rounding to the stored dtype",
        *template_line(template),
        "",
        f'```python\nmodel = AutoModelForCausalLM.from_pretrained("{HERE}")\n```',
        "",
    ]
    return "\n".join([*front_matter(base, "transformers", ("pissa",)), *text])


def ranks_of(config: LoraConfig) -> str:
    """ "rank 8", or "ranks up to 8"."""
    highest = max([config.r, *(config.rank_pattern or {}).values()])
    return f"ranks up to {highest}" if config.rank_pattern else f"rank {highest}"


def write_card(directory: Path, text: str) -> None:
    """Write a card beside what it is the card of."""
    (directory / CARD).write_text(text, encoding="utf-8")


def with_tags(text: str, tags: Iterable[str]) -> str:
    """A card of ours with more tags before its own."""
    card: Any = ModelCard(text)
    card.data.tags = list(dict.fromkeys([*tags, *(card.data.tags or [])]))
    return str(card)
