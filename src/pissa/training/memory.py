"""How much memory a run will take at its peak, and how to lower that, from config.json and the rows alone.

One micro-batch of the longest rows goes forward and back through the model that the run would have, with tensors that
have shapes and no values (torch's FakeTensorMode), and what lives at each moment is added up. Gradients and the
optimizer's states, which live beside that from the second micro-batch on, are added.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ..checkpoint.source.load import without_values
from ..data.encode import Encoded
from ..live.offset import offset_config
from ..live.peft_config import peft_config
from ..live.targets import resolve_targets
from .engine import autocasts, micro_batch, process_count, storage_dtype
from .recipe import Recipe
from .text_part import for_text

GIB = 2**30
STATES = {"sgd": 0, "adafactor": 0, "lion": 4, "rmsprop": 4, "adagrad": 4, "schedule_free_sgd": 4}
"""Bytes of an optimizer's states for each trained value, by the beginning of its name; AdamW's are 8."""
SMALL = ("8bit", "4bit", "apollo", "galore", "lomo")
"""In the names of optimizers whose states are small."""
BITS = {"nf4": 4.127, "int8": 8.1}
"""Bits of a value in a format, its scales among them."""
GPTQ_SCALES = 0.4
"""Bits that scales and zeros of gptq's groups add to a value."""
WIDTH = 8
DEPTHS = (2, 4)
"""So many of a model's layers are followed where all are alike: what the others take follows from these."""


@dataclass(frozen=True)
class Memory:
    """An estimate, in bytes."""

    weights: int
    """The frozen weights, or all of them where all are trained."""
    adapter: int
    """Trained values beside the weights, and those that they started at."""
    gradients: int
    optimizer: int
    activations: int | None
    """What the backward pass needs of the forward pass, with whatever is computed on the way; None where the
    model's code cannot be followed without values."""
    program: int
    """What Python and its libraries hold already; nothing on a GPU."""
    on_gpu: bool
    remedy: str
    """How to lower it."""

    @property
    def peak(self) -> int:
        """All of it."""
        held = self.weights + self.adapter + self.gradients + self.optimizer + self.program
        return held + (self.activations or 0)

    @property
    def text(self) -> str:
        """One line."""
        trained = self.adapter + self.gradients + self.optimizer
        parts = [("weights", self.weights), ("what is trained", trained), ("Python", self.program)]
        parts.insert(2, ("activations", self.activations or 0))
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)
        if self.activations is None:
            return f"at least {self.peak / GIB:.1f} GiB ({listed}), and activations, which this model does not tell"
        return f"about {self.peak / GIB:.1f} GiB{' of the GPU' if self.on_gpu else ''} at its peak ({listed})"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, in bytes."""
        names = ("weights", "adapter", "gradients", "optimizer", "activations", "program", "peak", "remedy")
        return {name: getattr(self, name) for name in names}


def estimated(model: str, recipe: Recipe, encoded: Encoded) -> tuple[tuple[int, int], Memory]:
    """The size of a model and of what is trained of it, and the memory that a run takes.

    Args:
        model: the base's directory or hub id.
        recipe: of the run.
        encoded: its rows.

    Returns:
        Values of the base and values that are trained; the estimate.

    Raises:
        PissaError: the recipe does not fit the model.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = without_values(model, dtype=storage_dtype(recipe), attention=recipe.attention)
        parameters = list(base.parameters())
        count, stored = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
        if recipe.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        adapted, saved = _adapted(base, recipe)
    trained = _trained(adapted, recipe)
    try:
        activations = _activations(adapted, recipe, *_longest(encoded, recipe))
    except Exception:  # a model's code may ask for values in as many ways as there are models
        activations = None
    adapter = 0 if not recipe.adapts else 4 * trained * (1 if recipe.pissa_config().starts_at_zero else 2)
    optimizer = int(trained * _states(recipe.optimizer))
    on_gpu = torch.cuda.is_available()
    sizes: dict[str, Any] = {
        "weights": int(stored - saved),
        "adapter": adapter,
        "gradients": 4 * trained,
        "optimizer": optimizer,
        "activations": activations,
        "program": 0 if on_gpu else _program(),
    }
    return (count, trained), Memory(**sizes, on_gpu=on_gpu, remedy=_remedy(recipe, sizes))


def _adapted(base: Any, recipe: Recipe) -> tuple[Any, float]:
    """The model with its adapter, and how many bytes of its weights a quantisation saves."""
    if not recipe.adapts:
        return base.requires_grad_(True), 0.0
    recipe = for_text(base, recipe)
    config = recipe.pissa_config()
    targets = resolve_targets(base, config, loaded=False)
    saved = 0.0
    if recipe.quantization is not None:
        bits = BITS.get(recipe.quantization.format, (recipe.bits or 4) + GPTQ_SCALES)
        weights = [target.place.weight for target in targets]
        saved = sum(weight.numel() * (weight.element_size() - bits / 8) for weight in weights)
    given = peft_config(base, targets, config)
    given = offset_config(given) if _is_offset(recipe) else given
    return get_peft_model(base, given, low_cpu_mem_usage=True), saved


def _is_offset(recipe: Recipe) -> bool:
    """Whether half of an adapter stays as it is."""
    return recipe.placement == "offset" and not recipe.pissa_config().starts_at_zero


def _trained(model: Any, recipe: Recipe) -> int:
    """How many values are trained."""
    if recipe.rank_budget is not None:
        return recipe.rank_budget
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    halved = ("lora_A", "lora_B", "lora_embedding") if recipe.adapts and _is_offset(recipe) else ()
    return sum(size // (2 if any(mark in name for mark in halved) else 1) for name, size in named)


def _longest(encoded: Encoded, recipe: Recipe) -> tuple[int, int, int]:
    """Rows, width and learned tokens of the largest micro-batch."""
    size = micro_batch(recipe)
    if recipe.packing:
        share = encoded.learned / max(sum(encoded.lengths), 1)
        return 1, size * recipe.max_length, int(size * recipe.max_length * share)
    longest = sorted(range(len(encoded)), key=lambda index: -len(encoded.input_ids[index]))[:size]
    width = -(-len(encoded.input_ids[longest[0]]) // WIDTH) * WIDTH
    learned = sum(label >= 0 for index in longest for label in encoded.labels[index])
    return len(longest), width, max(learned, 1)


def _activations(model: Any, recipe: Recipe, rows: int, width: int, learned: int) -> int:
    """Bytes at the peak of a forward and a backward pass, beside the weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocasts(recipe)):
        _give_shapes(model)
        ids, chosen = torch.zeros(rows, width, dtype=torch.long), torch.zeros(learned, dtype=torch.long)
        model.train()
        layers = _alike(model)
        whole = len(layers) if layers is not None else 0
        few = [_measured(model, ids, chosen, layers, depth) for depth in (DEPTHS if layers is not None else (0,))]
    # each further layer takes as much as any other
    slopes = [(more - less) / (DEPTHS[1] - DEPTHS[0]) for less, more in zip(few[0], few[-1], strict=True)]
    peak, gradients = (int(less + slope * (whole - DEPTHS[0])) for less, slope in zip(few[0], slopes, strict=True))
    if recipe.batch_size > process_count() * micro_batch(recipe):
        return peak
    # of a single micro-batch gradients take the place of activations
    return max(peak - gradients, 0)


def _alike(model: nn.Module) -> nn.ModuleList | None:
    """A model's list of layers, where they are many and all of one shape."""

    def shape(layer: nn.Module) -> list[Any]:
        return [(name, parameter.shape, parameter.requires_grad) for name, parameter in layer.named_parameters()]

    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) > 2 * DEPTHS[1]]
    first = lists[0] if len(lists) == 1 else None
    return first if first is not None and all(shape(layer) == shape(first[0]) for layer in first) else None


def _measured(model: Any, ids: Tensor, chosen: Tensor, layers: nn.ModuleList | None, depth: int) -> tuple[int, int]:
    """Bytes at the peak of a forward and a backward pass, and of its gradients, with the first layers alone."""
    kept = list(layers) if layers is not None else []
    if layers is not None:
        del layers[depth:]
    try:
        with _Living() as living:
            _loss(model, ids, chosen).backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    finally:
        model.zero_grad()
        if layers is not None:
            layers.extend(kept[depth:])
    return living.peak, gradients


def _give_shapes(model: nn.Module) -> None:
    """Put tensors of FakeTensorMode, which know on what device they are, in the place of those of the meta device."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                if tensor is not None:
                    held[name] = made[id(tensor)]


class _Living(TorchDispatchMode):
    """Adds up the bytes of what is computed inside and still lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, storage.nbytes())

    def _end(self, size: int) -> None:
        self.now -= size


def _loss(model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    """The loss at as many tokens as are learned, computed as `fused.py` does."""
    from trl.trainer.utils import add_fused_lm_head

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = model.get_output_embeddings()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def at_learned(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, chosen)[None]
        return output

    if type(head) is nn.Linear and base.base_model is not base:
        if "forward" not in vars(base):
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        handle = base.base_model.register_forward_hook(at_learned)
        try:
            return -model(**inputs, shift_labels=chosen[None], fused_lm_head=True).log_probs.sum()
        finally:
            handle.remove()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1).index_select(0, chosen), *args[1:]))
    try:
        return cross_entropy(model(**inputs).logits.float(), chosen, reduction="sum")
    finally:
        handle.remove()


def _states(optimizer: str) -> float:
    if any(mark in optimizer for mark in SMALL):
        return 2.0
    return next((size for name, size in STATES.items() if optimizer.startswith(name)), 8)


def _program() -> int:
    """Bytes that this process holds already."""
    return psutil.Process().memory_info().rss


def _remedy(recipe: Recipe, sizes: dict[str, Any]) -> str:
    """How to lower the largest parts, the largest first."""
    ways: list[tuple[int, str]] = []
    activations = sizes["activations"] or sizes["weights"]
    if not recipe.gradient_checkpointing:
        ways.append((activations, "--gradient-checkpointing"))
    if (micro := micro_batch(recipe)) > 1:
        smaller = next(size for size in range(micro // 2, 0, -1) if recipe.batch_size % size == 0)
        ways.append((activations // 2, f"--micro-batch-size {smaller}"))
    ways.append((activations // 4, "a smaller --max-length"))
    if storage_dtype(recipe) == torch.float32 and recipe.adapts and recipe.quantization is None:
        ways.append((sizes["weights"] // 2, "--dtype bf16"))
    if recipe.adapts and recipe.quantization is None:
        ways.append((sizes["weights"] * 3 // 4, "--quantize nf4"))
    if not recipe.adapts:
        ways.append((sizes["weights"], "an adapter in the place of --method full"))
    if _states(recipe.optimizer) >= 8:
        ways.append((sizes["optimizer"] * 3 // 4, "--optimizer adamw_8bit"))
    return "to lower it: " + ", ".join(way for _, way in sorted(ways, key=lambda way: -way[0])[:3])
