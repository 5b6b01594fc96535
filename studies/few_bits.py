"""A base in few bits with its adapter, in every format by one path: what table 9 compares.

    y = x (Q + s·B·A)ᵀ        LoRA: Q = format(W), B = 0        QPiSSA: Q and B·A fitted to W by turns, five times

`split_weight` rounds to the format; what that dequantises to is the frozen fp32 weight, and the adapter is attached
around it. So NF4, INT8 and GPTQ are compared by the same arithmetic. It is the function of the live NF4 and GPTQ
layers up to the rounding of fp32; live INT8 layers round their inputs to 8 bits as well, which is left out here. GPTQ
means both its format and its rounding, which training text calibrates; QPiSSA's factors are then fitted to the same
inputs, so under GPTQ they are not the weight's own principal components.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import Tensor

from pissa.adapted.adapt import attach, peft_config
from pissa.calibrate.moments import second_moments
from pissa.data.encode import Collator
from pissa.lab.inspection.variants import variant
from pissa.live.record import Record
from pissa.live.targets import resolve_targets
from pissa.split import split_weight

from .lm import InMemory

FORMATS = ("nf4", "int8", "gptq")
PRESETS = {"lora": "qlora", "pissa": "qpissa-5"}
"""What becomes of the weight under a method: rounded as it is, or published QPiSSA with five iterations."""
CALIBRATED_ON = 128
"""Training examples; as many as GPTQ's own experiments take."""


def build(
    model: Any,
    form: str,
    method: str,
    *,
    rank: int,
    seed: int = 0,
    batches: Iterable[Mapping[str, Any]] = (),
) -> PeftModel:
    """A model whose linear layers' weights were rounded to a format, with the adapter of a method.

    Args:
        model: in fp32; it is changed, and a failure leaves it half changed.
        form: one of FORMATS.
        method: "lora" (QLoRA: the weights as they are, in few bits) or "pissa" (QPiSSA-5).
        rank: of the adapters.
        seed: of LoRA's A.
        batches: keyword arguments of the model's forward, which GPTQ's rounding is calibrated on.

    Returns:
        The model wrapped by PEFT, its adapter trainable.

    Raises:
        PissaError: a layer cannot be quantised, or GPTQ is given no batches.
    """
    chosen = variant(PRESETS[method] + ("+gptq" if form == "gptq" else ""), format=form)
    config = chosen.config(rank, seed)
    targets = resolve_targets(model, config)
    named = {target.name: target for target in targets}
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def put_split(name: str, moment: Tensor | None) -> None:
        target = named[name]
        split = split_weight(target.place.matrices(), config, moment=moment, name=target.weight_key)
        target.place.put(split.residual)
        factors[name] = split.A, split.B

    if chosen.aware:
        for moment in second_moments(model, batches, named):
            for name in moment.names:
                put_split(name, moment.matrix)
    else:
        for name in named:
            put_split(name, None)
    wrap = peft_config(model, targets, replace(config, quantization=None))
    return attach(model, wrap, factors, Record(config), subtract=not config.starts_at_zero, ready=True)


def calibration(memory: InMemory) -> list[dict[str, Tensor]]:
    """The first training examples, prompts and responses, as batches for `build`."""
    collate = Collator(memory.tokenizer.pad_token_id or 0)
    chosen = [memory.encoded[place] for place in range(min(CALIBRATED_ON, len(memory.encoded)))]
    batches = [dict(collate(chosen[start : start + 8])) for start in range(0, len(chosen), 8)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
