"""PEFT's adapter files as factors, told apart by their names and shapes: the base is not needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, listed
from ..live.conversion import nesting
from ..live.factors import MAGNITUDE, AdapterFactors, Layout
from ..live.layers import ATTENTION, CONVOLUTION, EMBEDDING, EXPERTS, LINEAR
from ..live.runtime import OUT_PROJ, TWICE
from ..live.state import module_path
from .scales import rank_of, scale_of
from .source.hub import first_line
from .source.names import ADAPTER_CONFIG as CONFIG
from .source.names import ADAPTER_WEIGHTS as WEIGHTS
from .source.names import OLD_ADAPTER_WEIGHTS as OLD_WEIGHTS
from .source.pickled import load_weights

REMEDY = "nothing can be computed with it; take an earlier checkpoint, or train again at a lower learning rate"
PREFIX = "base_model.model."


def read_factors(
    directory: Path, config: LoraConfig
) -> tuple[dict[str, AdapterFactors], dict[str, Layout], dict[str, Tensor]]:
    """The factors of a saved LoRA, DoRA or AdaLoRA.

    Args:
        directory: holds adapter_model.safetensors.
        config: of the same adapter.

    Returns:
        Module -> its factors, module -> how PEFT lays them out, and the tensors of modules trained in full.

    Raises:
        CheckpointError: the file is missing, damaged, incomplete, or of another kind of adapter.
    """
    file, tensors = _tensors_in(directory)
    wrong = [key.removeprefix(PREFIX) for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise CheckpointError(f"{file} holds NaN or Inf in {listed(wrong)}: {REMEDY}")
    sides: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    foreign: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        path, _, side = name.removesuffix(".weight").rpartition(".")
        embedding = side in EMBEDDING.sides and not name.endswith(".weight")
        adalora = isinstance(config, AdaLoraConfig) and side in (*LINEAR.sides, "lora_E") and tensor.ndim == 2
        if side == MAGNITUDE:
            sides.setdefault(path, {})["magnitude"] = tensor
        elif embedding or adalora or (side in LINEAR.sides and name.endswith(".weight") and tensor.ndim >= 2):
            sides.setdefault(path, {})[side[-1]] = tensor
            sides[path] |= {"embedding": tensor} if embedding else {}
        elif ".lora_" in name:
            foreign.append(name)
        elif ".base_layer." not in name:  # PEFT stores targeted embeddings' base weights beside their adapter
            others[key] = tensor
    if foreign:
        raise CheckpointError(f"{file} is no plain LoRA: it holds {listed(foreign, 20)}")
    needed = {"A", "B"} | ({"magnitude"} if config.use_dora else set())
    needed |= {"E"} if isinstance(config, AdaLoraConfig) else set()
    broken = sorted(path for path, found in sides.items() if not needed <= found.keys())
    if broken or not sides:
        raise CheckpointError(
            f"{file} has no complete lora_A/lora_B pair"
            + (f", with {MAGNITUDE}" if config.use_dora else "")
            + (", with lora_E" if "E" in needed else "")
            + (f" for {listed(broken)}" if broken else "")
        )
    return *_told_apart(file, sides, config), others


def _tensors_in(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter's file, a safetensors or, from older PEFTs, a pickle, and all its tensors; no code of it is run."""
    file, pickled = directory / WEIGHTS, directory / OLD_WEIGHTS
    if file.is_file():
        try:
            return file, load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {first_line(error)}") from error
    if not pickled.is_file():
        raise CheckpointError(f"{directory} has no {WEIGHTS}; the adapter is incomplete")
    try:
        with open(pickled, "rb") as stream:
            return pickled, load_weights(stream, pickled)
    except OSError as error:
        raise CheckpointError(f"{pickled} cannot be read: {first_line(error)}") from error


def _told_apart(
    file: Path, sides: dict[str, dict[str, Tensor]], config: LoraConfig
) -> tuple[dict[str, AdapterFactors], dict[str, Layout]]:
    """Factors and layouts by the name of what is adapted, from PEFT's tensors by the path of its layer."""
    attentions = {path.removesuffix(OUT_PROJ) for path in sides if path.endswith(OUT_PROJ)} & sides.keys()
    names = _names(sides, config)
    factors: dict[str, AdapterFactors] = {}
    layouts: dict[str, Layout] = {}
    misfits = []
    for path in sorted(sides, key=lambda path: (module_path(path), -len(path))):
        A, B = sides[path]["A"], sides[path]["B"]
        if path.endswith(OUT_PROJ) and path.removesuffix(OUT_PROJ) in attentions:
            if A.any() and B.any():
                raise CheckpointError(f"{file}: {path.removesuffix(OUT_PROJ)} {TWICE}")
            continue
        name, pattern = names[path]
        rank = rank_of(config, pattern)
        kind = EMBEDDING if "embedding" in sides[path] else CONVOLUTION if A.ndim > 2 else LINEAR
        kind = ATTENTION if path in attentions else kind
        if kind is LINEAR and pattern != path and A.shape[0] > rank:
            kind = EXPERTS
        stacks = kind.stacks(A, rank)
        if not A.shape[0] == B.shape[1] == stacks * rank:
            misfits.append(f"{name} {tuple(B.shape)} x {tuple(A.shape)}")
            continue
        magnitude, E = sides[path].get("magnitude"), sides[path].get("E")
        if magnitude is not None and (kind is not LINEAR or magnitude.shape != B.shape[:1]):
            raise CheckpointError(f"{file} holds a DoRA adapter of a {kind.title} ({name}); pissa handles linear ones")
        layouts[name] = Layout(path, kind, kind.shape_of(A, B, rank))
        factors[name] = AdapterFactors(
            *kind.unpack(A, B, rank),
            scale_of(config, pattern),
            magnitude=magnitude,
            E=E.flatten() if E is not None else None,
        )
    if misfits:
        raise CheckpointError(f"{file}: the ranks do not fit each other or {CONFIG}: {listed(misfits, 20)}")
    order = [name for path in sides if (name := names[path][0]) in factors]
    return {name: factors[name] for name in order}, {name: layouts[name] for name in order}


def _names(paths: Iterable[str], config: LoraConfig) -> dict[str, tuple[str, str]]:
    """Path of PEFT's layer -> the name of what it adapts, and the name that PEFT matches patterns with.

    Bare parameters lie at the path of their module, several of them in wrappers of wrappers, the first innermost.
    """
    parameters = nesting(config)
    modules: dict[str, list[str]] = {}
    for path in paths:
        modules.setdefault(module_path(path), []).append(path)
    names = {}
    for module, around in modules.items():
        found = [parameter.rpartition(".") for parameter in parameters]
        own = [key for owner, _, key in found if f".{module}".endswith(f".{owner}" if owner else "")]
        if len(own) != len(around) or check_target_module_exists(config, module):
            own = []
        for path, key in zip(sorted(around, key=len, reverse=True), own or [None] * len(around), strict=True):
            whole = f"{module}.{key}"
            names[path] = (path, path) if key is None else (module if key == "weight" else whole, whole)
    return names
