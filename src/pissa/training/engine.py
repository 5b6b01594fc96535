"""A recipe as TRL's SFTConfig: processes, batches, precision.

A batch of the recipe is that of one optimizer step, whatever the number of processes:

    batch_size = micro_batch_size · processes · accumulation steps
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, extra
from ..optimizers.default_rates import SPECTRAL
from .packages import FLASH, check_packages
from .recipe import Recipe
from .sampler import GROUPED
from .usable import check_usable, refused

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

APART = ("bfd", "bfd_split")
"""Ways to pack under which attention stays inside each example."""
MICRO_BATCH = 4
"""Examples per forward pass where nothing is said."""
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
"""Set by accelerate's launcher."""


def training_arguments(recipe: Recipe, state: Path) -> SFTConfig:
    """Trainer's arguments for a recipe; joins the other processes where a launcher started several.

    Raises:
        ConfigError: a batch that cannot be shared evenly between the processes, or a setting that TRL does not take.
        MissingExtraError: TensorBoard is asked for and not installed, or TRL is not.
    """
    with extra("train", "training needs trl"):
        from trl.trainer.sft_config import SFTConfig
    processes = process_count()
    if recipe.quantize == "nvfp4":
        raise ConfigError("no layer trains on NVFP4: train with quantize nf4, int8 or gptq; pissa init writes nvfp4")
    if recipe.polish is not None and processes > 1:
        raise ConfigError(
            f"polish runs in one process and here are {processes}: polish in one (with max_steps 1), and train the "
            "RUN/residual that it leaves in all of them"
        )
    micro = micro_batch(recipe)
    per_step = micro * processes
    check_packages(recipe)
    _check_accelerator(recipe)
    cuda = torch.cuda.is_available()
    settings: dict[str, Any] = dict(
        output_dir=str(state),
        per_device_train_batch_size=micro,
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
        report_to=[*recipe.report_to],
        use_liger_kernel=recipe.liger,
        **_validation(recipe, micro),
        seed=recipe.seed,
        data_seed=recipe.seed,
        # accelerate would take a processor's word for it and leave DeepSpeed out
        use_cpu=not cuda and not is_launched_with(DEEPSPEED),
        ddp_backend=None if cuda or processes == 1 else "gloo",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
    )
    with refused():
        arguments = SFTConfig(**{**settings, **recipe.training})
    check_usable(arguments)
    if arguments.deepspeed_plugin is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # the model is loaded and split whole; the engine shards it afterwards
        unset_hf_deepspeed_config()
    if arguments.packing and arguments.packing_strategy not in APART:
        raise ConfigError(
            f"training: packing_strategy {arguments.packing_strategy} lets packed examples see each other; leave it "
            f"out, or give {' or '.join(APART)}"
        )
    if arguments.n_gpu > 1:
        # one process drives one GPU; DataParallel would multiply the batch
        arguments._n_gpu = 1
    return arguments


def _validation(recipe: Recipe, micro: int) -> dict[str, Any]:
    """Trainer's arguments for a validation loss; the trainer itself keeps the best step, see `measured.py`."""
    if not recipe.validates:
        return {}
    return dict(
        eval_strategy="steps",
        eval_steps=recipe.eval_every or recipe.save_every,
        per_device_eval_batch_size=micro,
        eval_packing=False,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
    )


def _check_accelerator(recipe: Recipe) -> None:
    """Refuse what only a GPU computes where there is none."""
    if (recipe.liger or recipe.attention in FLASH) and not torch.cuda.is_available():
        what = "liger" if recipe.liger else f"attention {recipe.attention}"
        raise ConfigError(f"{what} computes on GPUs alone, and there is none; leave it out")


def micro_batch(recipe: Recipe) -> int:
    """Examples per forward pass and process: what the recipe says, or as many as fit up to MICRO_BATCH.

    Raises:
        ConfigError: the batch cannot be shared evenly between the processes.
    """
    processes, given = process_count(), recipe.micro_batch_size
    if recipe.batch_size % ((given or 1) * processes):
        each = f"micro_batch_size {given} times {processes}" if given is not None else f"{processes}"
        raise ConfigError(f"batch_size {recipe.batch_size} is no multiple of {each} processes; change either")
    share = recipe.batch_size // processes
    return given or next(size for size in range(MICRO_BATCH, 0, -1) if share % size == 0)


def is_launched_with(engine: str) -> bool:
    """Whether accelerate's launcher asks for FSDP or DEEPSPEED."""
    return os.environ.get(engine, "false").lower() == "true"


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
