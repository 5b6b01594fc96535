"""A directory of `pissa init` against the base that it was made of: nothing is believed because the manifest says it.

The plan is made again from the base and the settings. From it follow all files, all tensors with their kinds and
shapes, all modules with their ranks and scales, the copies, and both configurations; each has to be there exactly once
and nothing else. Then the values: copies byte for byte, and for every split

    ‖W − (residual + s·B·A)‖ / ‖W‖  ≤  what the manifest states  ≤  what rounding to the storage can cost

The last bound is what keeps a manifest from stating an error that hides a weight of somebody's own.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from ...config import PissaConfig, Quantization
from ...errors import CheckpointError, PissaError, listed
from ...live.layers import KINDS
from ...live.runtime import taps
from ...outside.patterns import wrong_patterns
from ...provenance import sha256, sha256_of_file
from ...quantize.error import plain_error
from ...quantize.formats import Packed
from ...split import residual_error
from ..adapter_config import LONGEST_NAME, patterns_in
from ..disk.layout import INDEX, raw_bytes
from ..disk.resumable import as_recorded, differences
from ..factors import PREFIX
from ..manifest import MANIFEST
from ..saved_residual import RESIDUAL
from ..source.files import read_json
from ..source.reader import Source
from .contents import base_tensors, copies, file_names, module_entries, other_names
from .plan import StreamPlan, make_plan
from .sealed import Sealed, digest_of
from .work import read_weight

SLACK = 1e-3, 1e-6
"""How far a recomputed error may lie above the stated one, relative and absolute: fp32 sums differ between machines."""
QUANTIZED_SLACK = 1.25
"""How many times the error of plain rounding to the same format a quantised residual may have."""
OWN_FIELDS = ("base_model_name_or_path", "peft_version", "inference_mode")
"""Of an adapter's configuration: what does not change what it computes."""

NOT_OF_INIT = ("trained", "residual", "base_sample", "template")
"""Fields of the manifests of other directories: they say what else is loaded, and how it is used."""


def compare(manifest: Mapping[str, Any], sealed: Sealed, base: Source) -> tuple[dict[str, float], list[str]]:
    """Hold a directory, whose files are as sealed, against its base.

    Args:
        manifest: what its pissa.json holds.
        sealed: its files.
        base: the base.

    Returns:
        (module -> relative error, everything that is wrong).

    Raises:
        CheckpointError: `pissa init` did not write it, or its settings are none.
    """
    if not manifest.get("base_tensors"):
        raise CheckpointError(f"{MANIFEST} does not say what the base's tensors were; only what pissa init wrote does")
    manifest = {"modules": {}, "copies": {}, **manifest}
    problems = list(_foreign_tensors(manifest["base_tensors"], base))
    if problems:
        return {}, problems
    plan = _plan_of(manifest, sealed.path, base)
    problems = [
        *differences(
            {"layout": RESIDUAL, "method": _config_of(manifest, sealed.path).title},
            {key: manifest.get(key) for key in ("layout", "method")},
            MANIFEST,
        ),
        *(f"{MANIFEST} has {key!r}, which pissa init does not write" for key in NOT_OF_INIT if key in manifest),
        *_accounts(manifest, plan, base),
        *_configurations(plan, sealed.path),
        *_small_files(manifest, sealed.path, base),
    ]
    if problems:
        return {}, problems
    for name, source in copies(plan).items():
        if digest_of(sealed, name) != _copied(base, source, sealed.entries[name].kind, sealed.entries[name].dtype):
            problems.append(f"{name} is not a copy of the base's {source}")
    errors = {}
    quantization = _config_of(manifest, sealed.path).quantization
    for module, entry in module_entries(plan).items():
        error, possible = _split_error(entry, sealed, base, plan.model, quantization)
        errors[module] = error
        stated = manifest["modules"][module].get("rounding", 0.0)
        if not error <= stated * (1 + SLACK[0]) + SLACK[1]:
            problems.append(f"{module}: residual + adapter is off by {error:.3g} and not {stated:.3g}")
        if not stated <= possible * (1 + SLACK[0]) + SLACK[1]:
            problems.append(
                f"{module}: an error of {stated:.3g} is stated, and its storage costs {possible:.3g} at most"
            )
    return errors, problems


def _config_of(manifest: Mapping[str, Any], path: Path) -> PissaConfig:
    """The settings of the split.

    Raises:
        CheckpointError: what the manifest has is none.
    """
    settings = dict(manifest.get("config") or {})
    wrong = wrong_patterns(patterns_in(settings), LONGEST_NAME)
    if wrong:
        raise CheckpointError(f"{path / MANIFEST}: {listed(wrong, separator='; ')}; make {path} again")
    try:
        if settings.get("quantization") is not None:
            settings["quantization"] = Quantization(**settings["quantization"])
        return PissaConfig(**settings)
    except (PissaError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / MANIFEST}: its config is none that pissa init takes ({' '.join(str(error).split())[:200]}); make "
            f"{path} again"
        ) from error


def _plan_of(manifest: Mapping[str, Any], path: Path, base: Source) -> StreamPlan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were said when it was made
        return make_plan(base, _config_of(manifest, path), path, (manifest.get("run") or {}).get("dtype"))


def _accounts(manifest: Mapping[str, Any], plan: StreamPlan, base: Source) -> Iterator[str]:
    """What the manifest lists too much, too little or otherwise than the plan does."""
    yield from _names("file", set(manifest["files"]), file_names(plan, base))
    for file in plan.files:
        if manifest["files"].get(file.name, {}).get("header") not in (None, sha256(file.header)):
            yield f"{file.name} does not hold just the tensors that the base and the settings give"
    entries = module_entries(plan)
    yield from _names("module", set(manifest["modules"]), set(entries))
    for name, entry in entries.items():
        found = {key: value for key, value in manifest["modules"].get(name, {}).items() if key in entry}
        if name in manifest["modules"]:
            yield from differences(found, as_recorded(entry), f"{MANIFEST}, {name}")
    yield from _names("copy", set(manifest.get("copies", {}).items()), set(copies(plan).items()))
    yield from _names("tensor of the base", set(manifest["base_tensors"]), set(base_tensors(plan)))


def _names(what: str, found: set[Any], wanted: set[Any]) -> Iterator[str]:
    for name in sorted(map(str, wanted - found)):
        yield f"{MANIFEST} does not list the {what} {name}"
    for name in sorted(map(str, found - wanted)):
        yield f"{MANIFEST} lists the {what} {name}, which does not follow from the base and the settings"


def _configurations(plan: StreamPlan, path: Path) -> Iterator[str]:
    """What in the configurations is otherwise than the base and the settings give, as the loaders would read them."""
    for name, text in plan.documents.items():
        wanted = json.loads(text)
        try:
            found = read_json(path / name)
            if name == "config.json":
                found, wanted = _model_settings(found), _model_settings(wanted)
            elif name != INDEX:
                found, wanted = _adapter_settings(found), _adapter_settings(wanted)
        except Exception as error:  # a configuration's fields can be wrong in as many ways as there are models
            yield f"{name} is no configuration: {' '.join(str(error).split())[:200]}"
            continue
        yield from (f"{name}, {line}" for line in differences(wanted, found))


def _model_settings(document: dict[str, Any]) -> dict[str, Any]:
    """A config.json with all of its defaults, so that one that another version of transformers wrote is the same."""
    settings = CONFIG_MAPPING[document["model_type"]].from_dict(dict(document)).to_dict()
    return {
        key: value
        for key, value in as_recorded(settings).items()
        if key not in ("transformers_version", "_name_or_path")
    }


def _adapter_settings(document: dict[str, Any]) -> dict[str, Any]:
    """An adapter_config.json with all of its defaults."""
    settings = LoraConfig(**{key: value for key, value in document.items() if key not in OWN_FIELDS}).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    found = {key: value for key, value in as_recorded(plain).items() if key not in OWN_FIELDS}
    return {**found, "peft_type": document.get("peft_type")}  # LoraConfig writes its own


def _small_files(manifest: Mapping[str, Any], path: Path, base: Source) -> Iterator[str]:
    """What was taken along with the base and is not the base's."""
    for name in other_names(base):
        if name in manifest["files"] and sha256_of_file(path / name) != sha256_of_file(base.path / name):
            yield f"{name} is not the base's"


def _foreign_tensors(described: Mapping[str, Any], base: Source) -> Iterator[str]:
    for name, tensor in described.items():
        entry = base.entries.get(name)
        if entry is None:
            yield f"the base {base.path} has no {name}"
        elif [entry.kind, list(entry.shape)] != [tensor["dtype"], tensor["shape"]]:
            yield f"{name} of the base {base.path} is {entry.kind} {entry.shape}, which is not what was split"
        elif digest_of(base, name) != tensor["sha256"]:
            yield f"{name} of the base {base.path} is not what was split"


def _copied(base: Source, name: str, kind: str, wanted: torch.dtype | None) -> str:
    """sha256 of a base's tensor in the dtype of its copy."""
    stored = base.entries[name]
    if stored.kind == kind or stored.dtype is None or wanted is None:
        return sha256(base.chunks(name))
    values = (torch.frombuffer(chunk, dtype=stored.dtype) for chunk in base.chunks(name))
    return sha256(raw_bytes(piece.to(wanted)) for piece in values)


def _split_error(
    entry: Mapping[str, Any], sealed: Sealed, base: Source, model: PreTrainedModel, quantization: Quantization | None
) -> tuple[float, float]:
    """(`‖W − (residual + s·B·A)‖ / ‖W‖`, what it can be at most for a residual in this storage); of experts, the
    largest of each."""
    kind = next(kind for kind in KINDS if kind.title == entry["kind"])
    dtype = getattr(torch, entry["dtype"])
    weight = kind.matrices(read_weight(entry["tensors"], dtype, model, base)[0])
    residual, packed = sealed.residual(entry["weight"], dtype, kind)
    if "factors" in entry:
        A, B = (sealed.read(f"{PREFIX}{key}") for key in entry["factors"])
        A = A[taps(tuple(entry["dilation"]))] if "dilation" in entry else A
        A, B = kind.unpack(A, B, entry["rank"])
    else:
        A, B = torch.zeros(*weight.shape[:-2], 1, weight.shape[-1]), torch.zeros(*weight.shape[:-1], 1)
    every = [(weight, residual, A, B)] if weight.ndim == 2 else list(zip(weight, residual, A, B, strict=True))
    errors = [residual_error(*each, entry["scale"]) for each in every]
    return max(errors), max(_possible(*each, entry["scale"], packed) for each in every)


def _possible(W: Tensor, residual: Tensor, A: Tensor, B: Tensor, scale: float, packed: Packed | None) -> float:
    """How far storing the residual can put it from `W − s·B·A`, relative to ‖W‖.

    Rounding to a floating-point dtype costs half a unit in the last place of every element, and half of the smallest
    number; a quantised residual is compared with plain rounding of the same matrix to the same format.
    """
    norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    if norm == 0:
        return 0.0
    if packed is not None:
        target = torch.addmm(W.float(), B.float(), A.float(), alpha=-scale)
        return QUANTIZED_SLACK * float(torch.linalg.vector_norm(plain_error(target, packed))) / norm
    info = torch.finfo(residual.dtype)
    smallest = info.smallest_normal * info.eps
    size = float(torch.linalg.vector_norm(residual, dtype=torch.float64))
    return (info.eps / 2 * size + smallest / 2 * math.sqrt(residual.numel())) / norm
