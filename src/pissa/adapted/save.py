"""Saving an adapted model by PEFT's own methods: what is written is for the base, wherever it is loaded.

PEFT would write the rank-r adapter by itself. On the base that is silently another function, for it fits the residual
alone. So `adapt` puts these methods on the model, which Trainer, TRL and users call:

    save_pretrained(out)        the lossless LoRA of rank 2r for the base, from which both adapters are read back; with
                                a quantised residual the rank-r adapter, and the residual in out/residual, unless
                                `save_residual` has put that somewhere already
    push_to_hub(repo)           the same, always with all that it needs
    load_adapter(path, name)    what was saved, back into the model it was saved from: Trainer resumes with it

A saved directory is whole or has no configuration, without which nobody loads it.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor

from ..checkpoint.card import CARD, with_tags, write_card
from ..checkpoint.disk.write import explained, output_files
from ..checkpoint.factors import CONFIG
from ..checkpoint.read import SavedAdapter, fitted, read_adapter
from ..checkpoint.residual import RESIDUAL, write_residual, write_trained
from ..errors import CheckpointError, PissaError, listed
from ..export.files import write_lora
from ..export.lora import export_state
from ..live.adalora import singular_values
from ..live.factors import MAGNITUDE, AdapterFactors
from ..live.offset import freeze_ahead
from ..live.record import record_of
from ..live.state import (
    INITIAL,
    TRAINABLE,
    adapter_factors,
    adapter_layers,
    has_initial_adapter,
    is_offset,
    parameters_of,
    place_at,
)

CLOSE = 1e-5
"""Relative distance of two starting products that are the same."""


if TYPE_CHECKING:
    _Mixed = PeftModel
else:
    _Mixed = object


class AdaptedSaving(_Mixed):
    """Mixed into the class of a PeftModel, before it: the methods above."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """PEFT's `save_pretrained`: a directory that `PeftModel.from_pretrained(base, …)` and `pissa.load` read.

        Args:
            save_directory: made if need be; what an earlier call wrote there is replaced.
            safe_serialization: files are safetensors.
            selected_adapters: names; None for all but the frozen initial one. "default" goes into the directory itself,
                any other into a subdirectory of its name.
            save_embedding_layers: embeddings that are trained are saved (`modules_to_save`), others never.
            is_main_process: whether this process writes.
            path_initial_model_for_weight_conversion: not needed: a LoRA for the base is what is written anyway.
            state_dict: of a model whose parameters are shards: the whole one.

        Raises:
            PissaError: an adapter is no plain LoRA, merged, or not there; an option asks for what is never written.
            OutputError: the directory cannot be written.
        """
        if not safe_serialization or save_embedding_layers is True:
            raise PissaError(
                "safe_serialization=False and save_embedding_layers=True are not supported: files are safetensors, and "
                "an embedding is saved where it is trained, by modules_to_save; leave both out"
            )
        names = selected_adapters if selected_adapters is not None else [n for n in self.peft_config if n != INITIAL]
        unknown = [name for name in names if name not in self.peft_config or name == INITIAL]
        if unknown:
            raise PissaError(f"there is no adapter {', '.join(unknown)} to save; there are {_own_adapters(self)}")
        if is_main_process:
            _save(self, Path(save_directory), names, state_dict)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Iterable[str] | None = None,
    ) -> Any:
        """Upload the adapter as `save_pretrained` writes it, with its model card, to a repository of the hub.

        Args:
            repo_id: NAME or ORGANISATION/NAME; made if need be.
            commit_message, commit_description, private, token, revision, create_pr: as transformers has them.
            tags: more tags for the card.

        Returns:
            huggingface_hub's `CommitInfo`.
        """
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            _save(self, Path(folder), _own_adapters(self), named=repo)
            card = (Path(folder) / CARD).read_text(encoding="utf-8")
            write_card(Path(folder), with_tags(card, tags or ()))
            return api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def load_adapter(
        self, model_id: Any, adapter_name: str, is_trainable: bool = False, *arguments: Any, **options: Any
    ) -> Any:
        """PEFT's `load_adapter`, for adapters of this model.

        Raises:
            PissaError: another adapter, which is for the base, on weights that are residuals.
            CheckpointError: what is loaded started elsewhere than this model's adapter.
        """
        record = record_of(self)
        if not has_initial_adapter(self) and not (record is not None and record.quantized):
            result = super().load_adapter(model_id, adapter_name, is_trainable, *arguments, **options)
            if is_offset(self, adapter_name):
                freeze_ahead(self, adapter_name)
            return result
        if adapter_name not in self.peft_config:
            raise PissaError(
                f"{model_id} cannot be loaded beside an adapter whose weights are residuals: what it was trained on is "
                'the base. Load it with pissa.load, or by PEFT on the base, or adapt with placement="offset"'
            )
        _take_over(self, model_id, read_adapter(model_id), adapter_name)
        return None if is_trainable else self.eval()


def _own_adapters(model: PeftModel) -> list[str]:
    return [name for name in model.peft_config if name != INITIAL]


def _save(
    model: PeftModel,
    directory: Path,
    adapters: list[str],
    state: Mapping[str, Tensor] | None = None,
    named: str | None = None,
) -> None:
    """Write adapters with all that they need.

    Args:
        named: the repository that the directory will be; None for the directory itself, whose adapters may need a
            residual that lies elsewhere.
    """
    record = record_of(model)
    residual = None
    if record is not None and record.quantized:
        residual = record.residual if named is None else None
        if residual is None:
            with explained(directory):
                (directory / CONFIG).unlink(missing_ok=True)
                shutil.rmtree(directory / RESIDUAL, ignore_errors=True)
            write_residual(model, directory / RESIDUAL, named=named)
            residual = str((directory / RESIDUAL).absolute())
    for adapter in adapters:
        final = directory if adapter == TRAINABLE else directory / adapter
        if not isinstance(model.peft_config[adapter], LoraConfig):
            PeftModel.save_pretrained(model, str(directory), selected_adapters=[adapter])
            continue
        with output_files(final, last=CONFIG) as partial:
            if residual is not None:
                write_trained(model, partial, final=final, residual=residual, named=named, adapter=adapter)
                continue
            export = export_state(model, state=state, adapter=adapter)
            export.residual = record.residual if record is not None and named is None else None
            write_lora(export, partial, final=final)


@torch.no_grad()
def _take_over(model: PeftModel, path: Any, saved: SavedAdapter, adapter: str) -> None:
    """Copy a saved adapter into a model's own, whose parameters stay the ones that an optimizer may hold."""
    layers, initial = adapter_layers(model), adapter_factors(model, adapter)
    found = fitted(path, saved, model, {name: place_at(layer) for name, layer in layers.items()})
    if found.keys() != initial.keys():
        raise CheckpointError(f"{path} adapts other modules: {listed(sorted(found.keys() ^ initial.keys()), 20)}")
    other = [name for name, f in found.items() if not _is_same_start(f, initial[name])]
    if other:
        raise CheckpointError(
            f"{path} started from other components than this model at {listed(other)}"
            f"{' and others' if len(other) > 5 else ''}, so its adapter does not fit these weights; load it with "
            "pissa.load"
        )
    for name, f in found.items():
        layer: Any = layers[name]
        place = place_at(layer)
        packed = place.kind.pack(f.A, f.B, place.shape)
        for parameter, tensor in zip(parameters_of(layer, adapter), packed, strict=True):
            parameter.copy_(tensor)
        if f.magnitude is not None:
            getattr(layer, MAGNITUDE)[adapter].weight.copy_(f.magnitude)
        values = singular_values(layer, adapter)
        if f.E is not None and values is not None:
            values.copy_(f.E)
    if saved.others:
        set_peft_model_state_dict(model, dict(saved.others), adapter_name=adapter)


def _is_same_start(saved: AdapterFactors, own: AdapterFactors) -> bool:
    """Whether two adapters of one shape started at the same product, up to the rounding of another machine."""
    if (saved.A.shape, saved.B.shape) != (own.A.shape, own.B.shape) or (saved.A0 is None) != (own.A0 is None):
        return False
    if not math.isclose(saved.scale, own.scale):  # rsLoRA's root loses a last bit when the rank is doubled and halved
        return False
    starts = [
        (f.A0.double(), f.B0.double()) for f in (saved.folded(), own.folded()) if f.A0 is not None and f.B0 is not None
    ]
    if not starts:
        return True
    (A, B), (A_own, B_own) = starts
    A_own, B_own = A_own.to(A), B_own.to(B)
    apart = _square_norm(torch.cat([A, A_own], dim=-2), torch.cat([B, -B_own], dim=-1))
    return bool(apart <= CLOSE**2 * _square_norm(A, B))


def _square_norm(A: Tensor, B: Tensor) -> Tensor:
    """‖B·A‖², of all matrices together, without the product."""
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0)
