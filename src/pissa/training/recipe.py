"""How a model is trained: the paper's recipe (section 5) as defaults, every value a field.

Every field is a command-line flag and a line of YAML; those in YAML_ONLY are mappings and have no flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import (
    METHODS,
    PLACEMENTS,
    Component,
    CurCore,
    Method,
    PissaConfig,
    Placement,
    Quantization,
    quantization_preset,
)
from ..data.prompts import TEMPLATES, Template
from ..errors import ConfigError

TrainingMethod = Literal[
    Method, "lora", "dora", "adalora", "pissa+dora", "pissa+adalora", "qlora", "loftq", "qpissa", "full"
]
TRAINING_METHODS: tuple[TrainingMethod, ...] = get_args(TrainingMethod)
TokenIds = str | Sequence[int] | Mapping[str, Sequence[int]]
DTYPES = ("auto", "fp32", "bf16")
ALIASES = {"lora": "lora-kaiming", "qlora": "lora-kaiming", "loftq": "pissa", "qpissa": "pissa"}
ALIASES |= {"dora": "lora-kaiming", "adalora": "lora-kaiming", "pissa+dora": "pissa", "pissa+adalora": "pissa"}
QUANTIZED_METHODS = ("qlora", "loftq", "qpissa")
ITERATIONS = {"loftq": 5, "qpissa": 10}
"""Where nothing else is said."""
YAML_ONLY = ("rank_pattern", "alpha_pattern")
ADAPTER_ONLY = ("alpha", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
ADAPTER_ONLY += ("use_rslora", "dropout", "allow_dropout", "export_rank", "quantize", "placement")
ADAPTER_ONLY += ("component", "scored_examples", "random_fraction", "cur_core", "cur_rcond")
ADAPTER_ONLY += ("orthogonality", "loraplus_ratio", "rank_budget", "trainable_token_indices")
"""Settings that full fine-tuning would ignore, and therefore refuses."""
PLAIN_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
ALL_LINEAR = "all-linear"
AUTO = "auto"
"""In the place of a learning rate: it is estimated."""


@dataclass(frozen=True)
class Recipe:
    """One training run's settings.

    Raises:
        ConfigError: a value out of its range, with the field's name and what is allowed.
    """

    method: TrainingMethod = "pissa"
    """pissa, random-pissa, cura, robust-pissa, lora (= lora-kaiming), lora-gaussian, dora, adalora (whose ranks stay),
    pissa+dora, pissa+adalora, or full: every weight of the model is trained. qlora, loftq and qpissa are lora and pissa
    with that quantize_method, in nf4 unless `quantize` says otherwise."""
    rank: int = 16
    """Components per adapter."""
    alpha: float | None = None
    """LoRA's numerator; None for alpha = rank."""
    component: Component = "principal"
    """Of method pissa: principal, medium, minor, or scored by the data that is trained on, see `PissaConfig`."""
    scored_examples: int = 64
    """How many examples component scored looks at, evenly spread over the data."""
    random_fraction: float = 1.0
    """Of method random-pissa: share of the components that are drawn."""
    cur_core: CurCore = "optimal"
    """Of method cura: optimal or intersection."""
    cur_rcond: float | None = None
    """Of method cura: cut-off of its inverses."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules to adapt: all-linear, names or name endings, or one regular expression, see `module_names`."""
    exclude_modules: str | tuple[str, ...] = ()
    """Modules to leave alone, given in the same way."""
    modules_to_save: str | tuple[str, ...] = ()
    """Modules trained in full beside the adapters: name endings."""
    trainable_token_indices: TokenIds = ()
    """Tokens whose embeddings are trained in full: ids; or, in YAML, the name of an embedding -> ids."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Name ending or regular expression -> rank, where it differs from `rank`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Name ending or regular expression -> alpha, where it differs from `alpha`."""
    rank_budget: int | None = None
    """Parameters of all adapters together, shared out so that they capture most; each module gets at most `rank`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    quantize: Literal["nf4", "int8"] | None = None
    """Format of the frozen residual; None keeps it in `dtype`."""
    quantize_method: str | None = None
    """qlora; loftq, as published; qpissa, with this library's scale search, refit and momentum; or a preset such as
    qpissa-5, the published one with 5 iterations. None: qpissa for pissa, qlora for lora."""
    iterations: int | None = None
    """Of the alternation between residual and adapter; None for 10 with qpissa, 5 with loftq."""
    calibration: str | None = None
    """Text, .txt or .jsonl, each also as .gz: the quantised residual is fitted to what the layers see on it."""
    calibration_windows: int = 80
    """Windows of the calibration text."""
    calibration_length: int = 256
    """Tokens per window."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """gptq carries each rounding error on to the columns not yet rounded; it needs calibration text."""
    placement: Placement = "residual"
    """offset leaves the base as it is, also one that is in 4 or 8 bits already, see `PissaConfig`."""
    orthogonality: float = 0.5
    """Of methods adalora and pissa+adalora: weight of the penalty on factors that are not orthonormal."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    allow_dropout: bool = False
    """Accept that dropout changes the pretrained function under PiSSA."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the frozen weights; auto: bf16 where the hardware computes in it, else fp32. Adapters are always fp32.
    With method full the weights are fp32 and bf16 means autocast."""
    learning_rate: float | Literal["auto"] = 2e-5
    """Peak learning rate; auto: estimated on a few batches before the first step, see `adviser.py`."""
    loraplus_ratio: float | None = None
    """LoRA+: B is trained at this many times the learning rate; None for the same rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 for no clipping."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = 128
    """Examples per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int = 4
    """Examples per forward pass and process; batch_size is made of these by gradient accumulation."""
    data_split: str = "train"
    """Split of data on the hub."""
    data_subset: str | None = None
    """Subset of data on the hub that has several ("main" of "openai/gsm8k")."""
    max_length: int = 512
    """Tokens per example; what is longer is cut and counted."""
    template: Template = "alpaca"
    """Prompt template: alpaca, chat (the tokenizer's own) or none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_every: int = 50
    """Steps between checkpoints."""
    export_rank: int | None = None
    """Rank of the run's LoRA; None for the lossless export."""
    log_to: Literal["jsonl", "tensorboard"] = "jsonl"
    """Beside the JSON lines in state/log.jsonl, which are always written."""
    seed: int = 0
    """Of the initial factors and of the order of the data."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, module_names(getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", _listed(self.modules_to_save))
        object.__setattr__(self, "trainable_token_indices", _token_ids(self.trainable_token_indices))
        _check_choices(self)
        _check_ranges(self)
        _check_quantization(self)
        if self.adapts and self.component != "scored" and self.scored_examples != Recipe.scored_examples:
            raise ConfigError('scored_examples is for component "scored"; leave it out')
        if self.adapts:
            self.pissa_config()
        else:
            _check_unused(self)

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained; False for full fine-tuning."""
        return self.method != "full"

    @property
    def quantization(self) -> Quantization | None:
        """How the residual is quantised; None where it is not."""
        short = self.method if self.method in QUANTIZED_METHODS else None
        form = self.quantize or ("nf4" if short else None)
        if form is None:
            return None
        kind = self.quantize_method or short or _quantize_method(self.method)
        if kind in ITERATIONS:
            name = {"loftq": "loftq", "qpissa": "ours"}[kind]
            kind = f"{name}-{self.iterations or ITERATIONS[kind]}"
        return quantization_preset(kind, format=form, calibration=self.calibration, rounding=self.rounding)

    def pissa_config(self) -> PissaConfig:
        """The adapter's configuration."""
        method = ALIASES.get(self.method, self.method)
        assert method in METHODS
        return PissaConfig(
            rank=self.rank,
            alpha=self.alpha,
            method=method,
            component=self.component,
            random_fraction=self.random_fraction,
            cur_core=self.cur_core,
            cur_rcond=self.cur_rcond,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            modules_to_save=tuple(self.modules_to_save),
            trainable_token_indices=self.trainable_token_indices,  # pyright: ignore[reportArgumentType] -- no text now
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            rank_budget=self.rank_budget,
            use_rslora=self.use_rslora,
            use_dora=self.method in ("dora", "pissa+dora"),
            use_adalora=self.method in ("adalora", "pissa+adalora"),
            orthogonality=self.orthogonality,
            dropout=self.dropout,
            allow_dropout=self.allow_dropout,
            quantization=self.quantization,
            placement=self.placement,
            seed=self.seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and JSON."""
        return asdict(self)


def module_names(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Modules as they are named in flags, YAML and Python alike.

    Args:
        given: "all-linear"; a plain name (`q_proj`, `self_attn.q_proj`), which means every module whose name ends so;
            several, separated by commas; anything else is one regular expression, which matches whole names. A list
            holds plain names.

    Returns:
        A tuple of name endings; or "all-linear", or the regular expression.
    """
    if not isinstance(given, str) or given.strip() == ALL_LINEAR:
        return given.strip() if isinstance(given, str) else given
    names = _listed(given)
    return names if names and all(PLAIN_NAME.fullmatch(name) for name in names) else given


def _listed(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _token_ids(given: Any) -> Any:
    """Token ids as they are named in flags, YAML and Python alike: a tuple of ids, or module -> tuple of ids.

    Raises:
        ConfigError: something else than ids, or lists of ids by module.
    """
    if isinstance(given, Mapping):
        if all(isinstance(name, str) and isinstance(ids, list | tuple) for name, ids in given.items()):
            return {name: tuple(ids) for name, ids in given.items()}
    elif isinstance(given, list | tuple):
        return tuple(given)
    elif isinstance(given, str) and all(part.isdecimal() for part in _listed(given)):
        return tuple(int(part) for part in _listed(given))
    raise ConfigError(
        f"trainable_token_indices is {given!r}; give token ids separated by commas, a list of them, or in YAML "
        "lines of the form `module: [ids]`"
    )


def read_recipe(path: str | Path, **flags: Any) -> Recipe:
    """A recipe from a YAML file of field: value pairs; flags that are not None win.

    Raises:
        ConfigError: the file is missing, is not YAML, or names a field that does not exist.
    """
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document or {}, dict):
        raise ConfigError(f"{path} holds {type(document).__name__}; give lines of the form `learning_rate: 2e-4`")
    return recipe_from(
        {**(document or {}), **{name: value for name, value in flags.items() if value is not None}}, path
    )


def recipe_from(values: dict[str, Any], source: str | Path = "the recipe") -> Recipe:
    """A recipe from plain values, with dashes allowed for underscores and numbers as text (YAML reads `2e-4` so).

    Raises:
        ConfigError: unknown names, or values of another type.
    """
    known = {field.name: field for field in fields(Recipe)}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{source} names {', '.join(unknown)}; known: {', '.join(known)}")
    converted = {name: _converted(name, value, str(known[name].type)) for name, value in values.items()}
    return Recipe(**converted)


def _converted(name: str, value: Any, annotation: str) -> Any:
    if isinstance(value, list):
        return tuple(value if annotation == "TokenIds" else map(str, value))
    if isinstance(value, bool) or value is None or not annotation.startswith(("int", "float")):
        return value
    if value == AUTO and AUTO in annotation:
        return value
    try:
        number = float(value)
        return int(number) if annotation.startswith("int") and number == int(number) else number
    except (TypeError, ValueError, OverflowError) as error:
        allowed = "a number, or auto" if AUTO in annotation else "a number"
        raise ConfigError(f"{name} is {value!r}; give {allowed}") from error


def _check_types(recipe: Recipe) -> None:
    for setting in fields(recipe):
        value, annotation = getattr(recipe, setting.name), str(setting.type)
        if value is None and annotation.endswith("| None"):
            continue
        if annotation == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{setting.name} is {value!r}; give true or false")
        if value == AUTO and AUTO in annotation:
            continue
        if annotation.startswith("float") and (isinstance(value, bool) or not isinstance(value, int | float)):
            allowed = "a number, or auto" if AUTO in annotation else "a number"
            raise ConfigError(f"{setting.name} is {value!r}; give {allowed}")
        if annotation.startswith("Mapping"):
            _check_pattern(setting.name, value)
        if annotation.startswith("str | tuple"):
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
                or_else = "" if setting.name == "modules_to_save" else " or a regular expression"
                raise ConfigError(f"{setting.name} is {value!r}; give a name, a list of names{or_else}")
    for name in ("data_split", "data_subset"):
        value = getattr(recipe, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{name} is {value!r}; give a name")


def _check_pattern(name: str, value: Any) -> None:
    numbers = value.values() if isinstance(value, Mapping) else [None]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise ConfigError(f"{name} is {value!r}; give lines of the form `module: number`")


def _check_unused(recipe: Recipe) -> None:
    """Refuse what full fine-tuning would ignore."""
    only = [f for f in fields(recipe) if f.name in ADAPTER_ONLY]
    given = [f.name for f in only if getattr(recipe, f.name) not in (f.default, {})]
    if given:
        raise ConfigError(f"method full has no adapter: leave out {', '.join(given)}, or choose another method")


def _check_quantization(recipe: Recipe) -> None:
    """Refuse settings of a quantisation that nothing would use."""
    short = recipe.method if recipe.method in QUANTIZED_METHODS else None
    given = [name for name in ("quantize_method", "iterations") if getattr(recipe, name) is not None]
    if given and recipe.quantize is None and short is None:
        raise ConfigError(f"{' and '.join(given)} without a format; add quantize (--quantize nf4)")
    if recipe.quantize_method is not None and short is not None:
        raise ConfigError(
            f"method {short} says how to quantise already; leave out quantize_method, or use method pissa"
        )
    kind = recipe.quantize_method or short or _quantize_method(recipe.method)
    _check_calibration(recipe)
    if recipe.iterations is not None and kind not in ITERATIONS:
        raise ConfigError(f"quantize_method {kind} takes no iterations; leave them out")
    if recipe.export_rank is not None and (recipe.quantize is not None or short is not None):
        raise ConfigError(
            "export_rank with a quantised residual: the run is an adapter for that residual; leave export_rank out and "
            "use pissa export --rank for a LoRA of the base"
        )


def _quantize_method(method: str) -> str:
    """How a residual is quantised where nothing else is said."""
    return "qlora" if ALIASES.get(method, method).startswith("lora-") else "qpissa"


def _check_calibration(recipe: Recipe) -> None:
    quantization = recipe.quantization
    if recipe.calibration is not None and recipe.rank_budget is not None:
        raise ConfigError(
            "rank_budget and calibration each go through all the calibration's moments; leave one out, or pass moments "
            "as a mapping to pissa.adapt"
        )
    if recipe.calibration is None:
        if recipe.rounding == "gptq":
            raise ConfigError('rounding "gptq" needs text to see what the layers see; add calibration (--calibration)')
        return
    if quantization is None:
        raise ConfigError("calibration is for a quantised residual; add quantize (--quantize nf4), or leave it out")
    if quantization.method == "qlora" and quantization.rounding == "nearest":
        raise ConfigError("rounding to the nearest value fits nothing to calibration text; leave calibration out")


def _check_choices(recipe: Recipe) -> None:
    choices = {
        "method": TRAINING_METHODS,
        "dtype": DTYPES,
        "quantize": (None, "nf4", "int8"),
        "rounding": ("nearest", "gptq"),
        "placement": PLACEMENTS,
        "schedule": ("cosine", "linear", "constant"),
        "template": TEMPLATES,
        "log_to": ("jsonl", "tensorboard"),
    }
    for name, allowed in choices.items():
        value = getattr(recipe, name)
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(filter(None, allowed))}")


def _check_ranges(recipe: Recipe) -> None:
    counts = ("batch_size", "micro_batch_size", "save_every", "max_steps", "export_rank", "iterations")
    counts += ("calibration_windows", "calibration_length", "scored_examples", "rank_budget")
    for name in (*counts, "max_length"):
        value, least = getattr(recipe, name), 2 if name == "max_length" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
    rates = {} if recipe.learning_rate == AUTO else {"learning_rate": recipe.learning_rate}
    for name, value in {**rates, "epochs": recipe.epochs}.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value!r}; give a positive number")
    if recipe.loraplus_ratio is not None and not 1 <= recipe.loraplus_ratio < float("inf"):
        raise ConfigError(f"loraplus_ratio is {recipe.loraplus_ratio!r}; give a number of at least 1")
    for name in ("weight_decay", "max_grad_norm"):
        if not 0 <= getattr(recipe, name) < float("inf"):
            raise ConfigError(f"{name} is {getattr(recipe, name)!r}; give 0 or a positive number")
    if not 0 <= recipe.warmup_ratio < 1:
        raise ConfigError(f"warmup_ratio is {recipe.warmup_ratio!r}; allowed: 0 up to, not including, 1")
    if isinstance(recipe.seed, bool) or not isinstance(recipe.seed, int) or not 0 <= recipe.seed < 2**32:
        raise ConfigError(f"seed is {recipe.seed!r}; give a whole number from 0 to 2^32 − 1")
    if recipe.batch_size % recipe.micro_batch_size:
        raise ConfigError(
            f"batch_size {recipe.batch_size} is no multiple of micro_batch_size {recipe.micro_batch_size}; change one"
        )
