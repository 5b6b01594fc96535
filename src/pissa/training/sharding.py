"""What engines that shard a model can train and save, and what they cannot.

Every process splits the whole model; FSDP and ZeRO-3 shard it afterwards, and gather it again for what a run saves. DDP
and ZeRO-2 keep the model whole in every process, so they train whatever one process does.
"""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from ..errors import ConfigError
from ..live.offset import freeze_second_halves
from ..live.record import record_of
from ..live.state import TRAINABLE, is_offset
from .engine import DEEPSPEED, FSDP, is_launched_with


def is_sharded(trainer: Any) -> bool:
    """Whether a trainer's engine keeps a part of each weight in each process."""
    return trainer.is_fsdp_enabled or _is_zero3(trainer)


def check_engine(trainer: Any) -> None:
    """Refuse an engine that cannot train the model, or gather what the run saves.

    Args:
        trainer: before its first step.

    Raises:
        ConfigError: with the reason and what to use instead.
    """
    state: Any = trainer.accelerator.state
    runs = {FSDP: trainer.is_fsdp_enabled, DEEPSPEED: trainer.is_deepspeed_enabled}
    for asked in (name for name, running in runs.items() if is_launched_with(name) and not running):
        name = "FSDP" if asked == FSDP else "DeepSpeed"
        raise ConfigError(f"accelerate runs no {name} on this hardware, but plain DDP in its place; use ddp.yaml")
    if trainer.spectral and trainer.is_deepspeed_enabled:
        raise ConfigError("optimizer spectral needs whole matrices, which DeepSpeed cuts up; use DDP or FSDP2")
    if not is_sharded(trainer):
        return
    engine = "FSDP" if trainer.is_fsdp_enabled else "ZeRO-3"
    if engine == "FSDP" and trainer.spectral and state.fsdp_plugin.fsdp_version == 1:
        raise ConfigError("optimizer spectral needs whole matrices, which FSDP1 flattens; set fsdp_version: 2")
    if engine == "FSDP" and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise ConfigError("with FSDP a run is saved whole; set fsdp_state_dict_type: FULL_STATE_DICT")
    if trainer.keep_best:
        raise ConfigError(f"keep_best needs whole layers, and {engine} shards them; leave it out")
    if (why := _why_whole(trainer.accelerator.unwrap_model(trainer.model), trainer)) is not None:
        raise ConfigError(f"{why}, and {engine} shards them; use ZeRO-2 or several processes without either (ddp.yaml)")
    if engine == "ZeRO-3":
        # what it keeps whole lies in one buffer, of one dtype
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero.setdefault("stage3_param_persistence_threshold", 0)


def _why_whole(model: Any, trainer: Any) -> str | None:
    """Why a model's layers must not be sharded; None where they may."""
    record = record_of(model)
    config = getattr(model, "peft_config", {}).get(TRAINABLE)
    if record is not None and record.quantized:
        return "a quantised residual is made of whole layers"
    if isinstance(config, AdaLoraConfig):
        return "AdaLoRA's penalty reads whole factors"
    if _is_zero3(trainer):
        if getattr(config, "use_dora", False):
            return "DoRA takes the norms of whole weights"
        if any(isinstance(module, ParamWrapper) for module in model.modules()):
            return "adapters of fused experts read whole weights"
    elif is_offset(model, TRAINABLE) and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        return 'placement "offset" keeps halves of whole factors (under fsdp_version: 2 too)'
    return None


def after_sharding(trainer: Any) -> None:
    """Put back what FSDP2 lost when it put its own parameters in the place of the model's."""
    if trainer.is_fsdp_enabled and is_offset(trainer.model, TRAINABLE):
        freeze_second_halves(trainer.model)


def whole_state(trainer: Any) -> dict[str, Tensor] | None:
    """The model's state dict, gathered; all processes must call it at once.

    Args:
        trainer: whose engine is at work.

    Returns:
        The state dict in the first process, and in the others nothing that counts; None where every process holds the
        model whole.
    """
    if trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if _is_zero3(trainer):
        # accelerate would ask for stage3_gather_16bit_weights_on_model_save, which rounds nothing either
        return trainer.model_wrapped._zero3_consolidated_16bit_state_dict() or {}
    return None


def _is_zero3(trainer: Any) -> bool:
    return trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
