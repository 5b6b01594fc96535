"""A saved adapter merged into its base, weight by weight, from files to files.

    placement "residual"       round(W − s·B0·A0) + s·B·A        the residual is rounded to W's dtype, as it was trained
    placement "offset"         W + s·(B·A − B0·A0)
    a residual on the disk     Q + s·B·A                         Q dequantised where it is in few bits

The bits are those of merging the loaded model. In memory are the adapter and one weight at a time.
"""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import CheckpointError, listed
from ...live.factors import AdapterFactors, merged_weight
from ...live.layers import Place, combine_each, place_named
from ...live.marks import check_always_on, is_marked_offset
from ...stages import stage
from ..card import merged_card, write_card
from ..companions import copy_companions
from ..disk.layout import INDEX, KIND_OF, TensorKind, sharded
from ..disk.outputs import Outputs
from ..disk.write import output_directory, write_json
from ..factors import PREFIX
from ..read import SavedAdapter, base_place, fitted, read_adapter
from ..recorded import record_template
from ..saved_residual import SavedResidual
from ..source.gptq import gptq_layers
from ..source.reader import Source, open_source
from ..source.skeleton import Names, build, checkpoint_names
from ..vocabulary import rows_needed, rows_of
from .dequantized import Dequantized
from .dtypes import job_dtype, loading_dtype
from .jobs import Job, copy_jobs, is_tied, tensor_of
from .plan import in_order
from .work import converted


def merge_saved(path: str | os.PathLike[str], out: str | os.PathLike[str], base: str | os.PathLike[str] | None) -> bool:
    """Write the fine-tuned model of a saved adapter as a plain transformers checkpoint.

    Returns:
        Whether it could be done; not where a weight is several tensors in the base's checkpoint, as experts are: then
        nothing is written, and the model has to be loaded and merged as a whole.

    Args:
        path: a run or an adapter's directory.
        out: directory to write, new or empty.
        base: the base's directory or hub id; None for the one recorded.

    Raises:
        CheckpointError: adapter or base is missing, incomplete or quantised by something else than bitsandbytes, or
            they do not fit each other.
        OutputError: `out` cannot be written.
    """
    saved = read_adapter(path, base)
    check_always_on(saved.config, "a merged model")
    place, residual = base_place(path, saved, base)
    with open_source(place) as source:
        merge = _Merge(path, saved, source, residual)
        if not merge.is_possible:
            return False
        with stage(f"merging into {place}"):
            merge.write(out)
    return True


class _Merge:
    """One merged model."""

    def __init__(
        self, path: str | os.PathLike[str], saved: SavedAdapter, source: Source, residual: SavedResidual | None
    ) -> None:
        self.path = path
        self.model: PreTrainedModel = build(source)
        self.source = _readable(source, self.model)
        self.names: Names = checkpoint_names(self.model, self.source)
        self.dtype = loading_dtype(self.source)
        self.saved, self.residual = saved, residual
        self.is_possible = not saved.config.trainable_token_indices  # rows of a weight
        self.is_possible &= rows_needed(saved, self.model) <= (rows_of(self.model) or 0)
        if not self.is_possible:
            return
        self.factors = {name: factors.folded() for name, factors in fitted(path, saved, self.model).items()}
        self.keys = {self._place(name).key(name): name for name in self.factors}
        self.trained_in_full = self._others(path)
        self.is_possible = all(tensor_of(self.model, self.names, key) is not None for key in self.keys)
        if not self.is_possible:
            return
        packed: set[str] = self.source.packed if isinstance(self.source, Dequantized) else set()
        in_few_bits = any(self._tensor(key) in packed for key in self.keys)
        self.offset = is_marked_offset(saved.config) or in_few_bits

    def write(self, out: str | os.PathLike[str]) -> None:
        """StreamPlan the files, and fill them."""
        changed = {*self.keys, *self.trained_in_full}
        copies = copy_jobs(self.model, self.names, changed, self.source, self.dtype)
        kinds = {key: self._kind(key) for key in changed}
        kinds |= {key: kind for job in copies for key, kind in job.outputs.items()}
        files, index = sharded(in_order(kinds, self.model))
        with output_directory(out) as partial, torch.no_grad():
            for file in files:
                file.allocate(partial)
            with Outputs(partial, files) as outputs:
                for key in sorted(changed, key=self._position):
                    tensor = self._merged(key) if key in self.keys else self._in_full(key)
                    outputs.write(key, tensor)
                for job in copies:
                    _copy(job, self.source, outputs)
            if index is not None:
                write_json(partial / INDEX, index)
            self._write_small(partial, untied=any(is_tied(self.model, key) for key in changed))

    def _position(self, key: str) -> tuple[Path, int]:
        """File and offset: a disk is read fastest from front to back."""
        entry = self.source.entries[self._tensor(key)]
        return entry.file, entry.offset

    def _merged(self, key: str) -> Tensor:
        """A weight with its adapter, as its layer stores it."""
        name = self.keys[key]
        kind, factors = self._place(name).kind, self.factors[name]
        stored = self.source.read(self._tensor(key)).to(job_dtype(self.model, name, self.dtype))
        merged = trained_weight(kind.matrices(stored), factors, offset=self.offset, ready=self.residual is not None)
        if not bool(torch.isfinite(merged).all()):
            raise CheckpointError(
                f"{name} merged with its adapter is beyond the range of {merged.dtype}, or the base holds NaN or Inf "
                "there; export the adapter without merging it"
            )
        return kind.stored(merged, stored.shape)

    def _place(self, name: str) -> Place:
        place = place_named(self.model, name)
        assert place is not None
        return place

    def _in_full(self, key: str) -> Tensor:
        kind = self._kind(key)
        tensor = self.trained_in_full[key].to(job_dtype(self.model, key.removesuffix(".weight"), self.dtype))
        assert tuple(tensor.shape) == kind.shape
        return tensor

    def _kind(self, key: str) -> TensorKind:
        dtype = job_dtype(self.model, key.removesuffix(".weight"), self.dtype)
        return TensorKind(KIND_OF[dtype], self.source.entries[self._tensor(key)].shape)

    def _tensor(self, key: str) -> str:
        """The checkpoint's tensor for a parameter."""
        found = tensor_of(self.model, self.names, key)
        if found is None:
            raise CheckpointError(
                f"{self.source.path} holds no tensor for {key}: transformers makes it from others while it loads; "
                "merge the loaded model with export_merged(pissa.load(…), out)"
            )
        return found

    def _others(self, path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """What was trained in full, under the model's names."""
        state = self.model.state_dict()
        found = {key.removeprefix(PREFIX): tensor for key, tensor in self.saved.others.items()}
        foreign = [k for k, t in found.items() if k not in state or state[k].shape != t.shape]
        if foreign:
            raise CheckpointError(
                f"{path} was made for another base: {listed(foreign, 20)} missing there or of another shape"
            )
        return found

    def _write_small(self, directory: Path, *, untied: bool) -> None:
        """Configuration, card, and what lies with the base and the run: tokenizer, generation settings, licence."""
        write_card(directory, merged_card(self.saved.base, self.saved.method, self.saved.template))
        record_template(directory, self.saved.base, self.saved.template)
        settings: Any = deepcopy(self.model.config)
        settings.dtype, settings.architectures = self.dtype, [type(self.model).__name__]
        if untied:
            settings.tie_word_embeddings = False
        (directory / "config.json").write_text(settings.to_json_string(), encoding="utf-8")
        copy_companions(self.source.path, self.source.others, self.path, directory)


def trained_weight(W: Tensor, factors: AdapterFactors, *, offset: bool, ready: bool) -> Tensor:
    """What a weight became in training, (…, out, in) in W's dtype.

    Args:
        W: (…, out, in), the base's weight; where `ready`, the residual.
        factors: trained, and the initial ones where there are.
        offset: whether the base's weight was left in place, and the initial adapter's negative trained beside it.
        ready: whether W is the residual already.
    """
    if factors.A0 is not None and factors.B0 is not None and not ready:
        if offset:
            return merged_weight(W, factors.change())
        W = combine_each(W, factors.A0, factors.B0, -factors.scale)
    return merged_weight(W, factors)


def _readable(source: Source, model: nn.Module) -> Source:
    """The source itself, or one that dequantises what is in few bits."""
    quantization = source.config.get("quantization_config")
    if not quantization:
        return source
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "bitsandbytes" and not (method == "gptq" and gptq_layers(source)):
        raise CheckpointError(
            f"{source.path} is quantised ({str(method)[:50]}): nothing can be merged into it; give the base in 16 bits"
        )
    return Dequantized(source, model, loading_dtype(source))


def _copy(job: Job, source: Source, outputs: Outputs) -> None:
    """Piece by piece, so that no embedding is ever whole in memory."""
    ((name, _),), (kept,) = job.outputs.items(), job.sources
    stored, done = source.entries[kept].dtype, 0
    for chunk in source.chunks(kept):
        data = chunk
        if job.dtype is not None:
            assert stored is not None
            data = converted(chunk, stored, job, name)
        outputs.put(name, done, data)
        done += len(data)
