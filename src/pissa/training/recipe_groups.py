"""The groups that a `Recipe` is made of; each is a panel of `pissa train --help`.

A field's name is its name in Python and in YAML, and with dashes its flag; its type says what is allowed, and the text
below it is its help. A new setting is a new field here, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

from ..config import AdapterSettings, Method
from ..config.kinds import (
    AtLeastOne,
    Count,
    CountFromTwo,
    File,
    Name,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    listed,
)  # fmt: skip
from ..config.quantization import BlockSize, Rounding, ScaleSearch
from ..config.settings import Rule
from ..data.prompts import Template
from .passed_on import named_values

TrainingMethod = Literal[
    Method, "lora", "dora", "adalora", "pissa+dora", "pissa+adalora", "qlora", "loftq", "qpissa", "full"
]
Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
TRACKERS = ("trackio", "wandb", "tensorboard", "mlflow")
Trackers = Annotated[
    tuple[str, ...] | list[str],
    Rule(f"allowed: {', '.join(TRACKERS)}", lambda value: set(value) <= set(TRACKERS), listed, "NAMES"),
]
OpenShare = Annotated[float, Rule("give a number between 0 and 1", lambda value: 0 < value < 1)]
PassedOn = Annotated[
    Mapping[str, Any],
    Rule(
        "give lines of the form `name: value`, or NAME=VALUE",
        lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
        read=named_values,
        form="NAME=VALUE",
    ),
]
TRAINING_METHODS: tuple[TrainingMethod, ...] = get_args(TrainingMethod)


@dataclass(frozen=True)
class AdapterGroup(AdapterSettings):
    """What is trained, and how it starts."""

    rank: Count = 16
    method: TrainingMethod = "pissa"  # pyright: ignore[reportIncompatibleVariableOverride] -- names for combinations
    """How the model is trained: pissa, random-pissa, cura, robust-pissa, lora (the same as lora-kaiming),
    lora-gaussian, dora, adalora (whose ranks stay as they are), pissa+dora, pissa+adalora, or full, which trains every
    weight. qlora, loftq and qpissa are lora and pissa with that quantize_method, in nf4 unless quantize says
    otherwise."""
    scored_examples: Count = 64
    """How many examples, evenly spread over the data, the components are scored by. Used only when component is
    scored."""
    export_rank: Count | None = None
    """Rank of the run's LoRA. Left out, the export is lossless: twice the rank for PiSSA."""


@dataclass(frozen=True)
class QuantizationGroup:
    """Frozen weights in few bits."""

    panel: ClassVar[str] = "Quantisation"

    quantize: Literal["nf4", "int8", "gptq", "nvfp4"] | None = None
    """Format of the frozen residual. Left out, it is kept in dtype. A start in nf4 takes two CPU cores about 40
    seconds for each 100 million weights. Only pissa init writes nvfp4."""
    bits: Literal[2, 3, 4] | None = None
    """How many bits a code of gptq has. Left out, 4."""
    symmetric: bool | None = None
    """Whether gptq's zero points are the middle code, as vLLM's kernels take them. Left out, with 4 bits."""
    quantize_method: Name | None = None
    """How residual and adapter are fitted to each other: qlora; loftq, as published; qpissa, with this library's scale
    search, refit and momentum; or a preset such as qpissa-5, the published one with 5 iterations. Left out, it is
    qpissa for pissa and qlora for lora."""
    iterations: Count | None = None
    """How often residual and adapter are fitted to each other. Left out, at most 10 times with qpissa,
    until nothing is gained, and 5 times with loftq."""
    calibration: File | None = None
    """Text that the quantised residual is fitted to: a .txt file, or rows as .jsonl, .json or .parquet; data for the
    training rows as the model is given them; none for no text. Left out, it is data where nf4 is chosen by this
    library's own method, and none for the published ones."""
    calibration_windows: Count = 16
    """How many windows of the calibration text are used; of data, as many tokens. Time grows with it."""
    calibration_length: Count = 256
    """How many tokens a window has."""
    rounding: Rounding = "nearest"
    """"gptq" carries each rounding error on to the columns that are not yet rounded; it is fitted to text."""
    polish: Count | None = None
    """Steps in which, before the training, the factors learn the full model's last hidden states, each on about 1,000
    tokens of the calibration text, or else of the training rows. On two CPU cores a step takes about 5 seconds for
    each 100 million weights. Left out, there is none."""
    refit: bool | None = None
    """End on an SVD of what the quantised residual leaves over. Left out, the method's own."""
    scale_search: ScaleSearch | None = None
    """How the scale of a block is found: "absmax", as bitsandbytes does, or the "unsigned" or "signed" one of least
    error. Left out, the method's own."""
    momentum: ShareBelowOne | None = None
    """How far each iteration is extrapolated beyond the last one. Left out, the method's own."""
    double_quant: bool | None = None
    """Store NF4's block scales in 8 bits themselves. Left out, they are."""
    block_size: BlockSize | None = None
    """How many values share a scale: of NF4, or of a group of GPTQ's. Left out, 64."""


@dataclass(frozen=True)
class TrainingGroup:
    """How the weights are moved."""

    panel: ClassVar[str] = "Training"

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """In what the frozen weights are stored; "auto" is bf16 where the hardware computes in it, else fp32. Adapters are
    always fp32. With method full the weights are fp32, and bf16 means autocast."""
    learning_rate: Positive | Literal["auto"] | None = None
    """Peak learning rate; "auto" estimates it on a few batches before the first step. Left out, the optimizer's own:
    0.05 of spectral, 2e-5 of any other."""
    loraplus_ratio: AtLeastOne | None = None
    """LoRA+: B is trained at this many times the learning rate. Left out, A and B have the same rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_ratio: ShareBelowOne = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm; 0 clips nothing."""
    epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever epochs says."""
    batch_size: Count = 128
    """Examples per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: Count | None = None
    """Examples per forward pass and process; batch_size is made of these by gradient accumulation. Left out, 4, or
    fewer where batch_size is no multiple of that."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    optimizer: Name = "adamw_torch"
    """spectral, which moves the products of the factors and has one learning rate for every start, rank and alpha; or
    any optimizer of transformers, such as adamw_torch_fused, adamw_8bit, paged_adamw_8bit or adafactor."""
    neftune: Positive | None = None
    """NEFTune: noise of this size on the embeddings while it trains (arXiv 2310.05914)."""
    training: PassedOn = field(default_factory=dict)
    """Any other field of TRL's SFTConfig or transformers' TrainingArguments, by name."""
    attention: Attention | None = None
    """How attention is computed. Left out, sdpa where the model has it. The flash_attention_ ones need their packages
    and a GPU."""
    liger: bool = False
    """Liger's Triton kernels for norms, rotary embeddings and gated activations, on GPUs, for the families that it
    knows."""
    save_every: Count = 50
    """Steps between checkpoints."""
    resume_from: Name | None = None
    """A checkpoint, or a run's directory for its last one, to continue from. Left out, a run continues from its own
    last checkpoint. Where it is one of the run itself, later ones are removed; one of another run is copied, and that
    run stays as it is."""
    report_to: Trackers = ()
    """Where losses go beside the lines in state/log.jsonl, which are always written: trackio, wandb, tensorboard or
    mlflow, several separated by commas."""
    seed: Seed = 0
    """Seed of the initial factors and of the order of the data."""


@dataclass(frozen=True)
class ValidationGroup:
    """What is measured on the way, and what follows from it."""

    panel: ClassVar[str] = "Validation"

    eval_data: Name | None = None
    """Rows that are not learned, on which the validation loss is measured: as --data takes them."""
    eval_split: Name = "test"
    """Split of eval_data on the hub."""
    eval_fraction: OpenShare | None = None
    """Share of the data that is kept apart for that, drawn with the seed."""
    eval_every: Count | None = None
    """Steps between measurements of the validation loss; the last step is always one. Left out, save_every."""
    early_stopping: Count | None = None
    """Stop after this many measurements in a row without a lower validation loss. Left out, a run goes to its end."""
    keep_best: bool = False
    """The result is the model at the step of lowest validation loss, which gets a checkpoint, and not at the last."""


@dataclass(frozen=True)
class DataGroup:
    """What is learned."""

    panel: ClassVar[str] = "Data"

    data_split: Name = "train"
    """Split of data on the hub."""
    data_subset: Name | None = None
    """Subset of data on the hub that has several ("main" of "openai/gsm8k")."""
    max_length: CountFromTwo = 512
    """Tokens per example; what is longer is cut and counted."""
    max_cut_share: Share = 0.5
    """Share of the examples that may be cut at max_length, or dropped since nothing of their response is left; a run
    with more is refused."""
    resize_embeddings: bool = False
    """Give the model rows for tokens that only its tokenizer has, each the mean of its other rows. The adapter notes
    how many, so that the base is enlarged alike wherever pissa loads it. trainable_token_indices trains such rows."""
    packing: bool = False
    """Put several short examples into each row of max_length tokens; attention stays inside each of them."""
    template: Template = "auto"
    """Prompt template: chat (the tokenizer's own), alpaca or none; "auto" is chat where the tokenizer has a chat
    template, else alpaca."""
