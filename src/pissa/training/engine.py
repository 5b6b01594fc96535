"""A recipe as TRL's SFTConfig: processes, batches, precision.

A batch of the recipe is that of one optimizer step, whatever the number of processes:

    batch_size = micro_batch_size · processes · accumulation steps
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, MissingExtraError
from ..optimizers.names import SPECTRAL
from .passed_on import passed_on
from .recipe import Recipe
from .sampler import GROUPED

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


def training_arguments(recipe: Recipe, state: Path) -> SFTConfig:
    """Trainer's arguments for a recipe; joins the other processes where a launcher started several.

    Raises:
        ConfigError: a batch that cannot be shared evenly between the processes, or a setting that TRL does not take.
        MissingExtraError: TensorBoard is asked for and not installed, or TRL is not.
    """
    try:
        from trl.trainer.sft_config import SFTConfig
    except ImportError as error:
        raise MissingExtraError("training needs trl: pip install 'pissa[train]'") from error
    processes = process_count()
    per_step = recipe.micro_batch_size * processes
    if recipe.batch_size % per_step:
        raise ConfigError(
            f"batch_size {recipe.batch_size} is no multiple of micro_batch_size {recipe.micro_batch_size} times "
            f"{processes} processes; change either"
        )
    if recipe.log_to == "tensorboard" and find_spec("tensorboard") is None:
        raise MissingExtraError("log_to tensorboard needs that package: pip install tensorboard")
    cuda = torch.cuda.is_available()
    settings: dict[str, Any] = dict(
        output_dir=str(state),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // per_step,
        # the run puts what it estimates in the place of "auto"
        learning_rate=0.0 if isinstance(recipe.learning_rate, str) else recipe.learning_rate,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        warmup_steps=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        # the trainer makes ours itself
        optim=recipe.optimizer if recipe.optimizer != SPECTRAL else "adamw_torch",
        neftune_noise_alpha=recipe.neftune,
        packing=recipe.packing,
        max_length=recipe.max_length if recipe.packing else None,
        dataset_kwargs=None if recipe.packing else {"skip_prepare_dataset": True},
        train_sampling_strategy="random" if recipe.packing else GROUPED,
        # a run's own switch makes the layers recompute before they are adapted
        gradient_checkpointing=False,
        # the loss is the data's alone
        router_aux_loss_coef=0.0,
        bf16=autocasts(recipe),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        report_to=["tensorboard"] if recipe.log_to == "tensorboard" else [],
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not cuda,
        ddp_backend=None if cuda or processes == 1 else "gloo",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
    )
    try:
        arguments = SFTConfig(**{**settings, **passed_on(recipe.training)})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training: {' '.join(str(error).split())}") from error
    if arguments.n_gpu > 1:
        # one process drives one GPU; DataParallel would multiply the batch
        arguments._n_gpu = 1
    return arguments


def process_count() -> int:
    """How many processes a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one process that writes and shows."""
    return int(os.environ.get("RANK", "0")) == 0


def storage_dtype(recipe: Recipe) -> torch.dtype:
    """Of the frozen weights; weights that are trained are fp32."""
    return torch.bfloat16 if recipe.adapts and _wants_bf16(recipe) else torch.float32


def autocasts(recipe: Recipe) -> bool:
    """Whether fp32 weights compute in bf16."""
    return not recipe.adapts and _wants_bf16(recipe)


def bf16_in_hardware() -> bool:
    """Whether this machine multiplies bf16 natively: a CUDA GPU that does, or a CPU with AVX512-bf16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _wants_bf16(recipe: Recipe) -> bool:
    return recipe.dtype == "bf16" or (recipe.dtype == "auto" and bf16_in_hardware())
