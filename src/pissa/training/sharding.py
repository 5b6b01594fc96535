"""What engines that shard a model can train and save, and what they cannot.

Every process splits the whole model; FSDP shards it afterwards, and gathers it again for what a run saves. DDP and
ZeRO-2 keep the model whole in every process, so they train whatever one process does.
"""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig

from ..errors import ConfigError
from ..live.offset import freeze_second_halves
from ..live.record import record_of
from ..live.state import TRAINABLE, is_offset
from .engine import DEEPSPEED, FSDP, is_launched_with


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
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ConfigError("DeepSpeed ZeRO-3 shards what pissa splits and saves; use ZeRO-2 (zero_stage: 2), or FSDP")
    if not trainer.is_fsdp_enabled:
        return
    if trainer.spectral and state.fsdp_plugin.fsdp_version == 1:
        raise ConfigError("optimizer spectral needs whole matrices, which FSDP1 flattens; set fsdp_version: 2")
    if "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise ConfigError("with FSDP a run is saved whole; set fsdp_state_dict_type: FULL_STATE_DICT")
    if trainer.keep_best:
        raise ConfigError("keep_best needs whole layers, and FSDP shards them; leave it out")
    if (why := _why_whole(trainer.accelerator.unwrap_model(trainer.model), state.fsdp_plugin)) is not None:
        raise ConfigError(f"{why}, and FSDP shards them; use ZeRO-2 or several processes without either (ddp.yaml)")


def _why_whole(model: Any, plugin: Any) -> str | None:
    """Why a model's layers must not be sharded; None where they may."""
    record = record_of(model)
    if record is not None and record.quantized:
        return "a quantised residual is made of whole layers"
    if isinstance(getattr(model, "peft_config", {}).get(TRAINABLE), AdaLoraConfig):
        return "AdaLoRA's penalty reads whole factors"
    if is_offset(model, TRAINABLE) and plugin.fsdp_version != 2:
        return 'placement "offset" keeps halves of whole factors (under fsdp_version: 2 too)'
    return None


def after_sharding(trainer: Any) -> None:
    """Put back what FSDP2 lost when it put its own parameters in the place of the model's."""
    if trainer.is_fsdp_enabled and is_offset(trainer.model, TRAINABLE):
        freeze_second_halves(trainer.model)
