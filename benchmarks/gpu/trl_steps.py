"""Training steps by TRL's SFTTrainer, timed between its callbacks."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

from transformers import PreTrainedTokenizerFast, TrainerCallback

from .context import Context, Skipped
from .measure import synchronize
from .models import tokens


def trl_step_seconds(context: Context, model: Any, lora: Any) -> float:
    """The median of the seconds between two steps' ends, after a first one.

    Args:
        model: a bare model.
        lora: PEFT's configuration; TRL does the wrapping.

    Raises:
        Skipped: TRL or datasets are not installed.
    """
    try:
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer
    except ImportError as error:
        raise Skipped(f"needs trl and datasets ({error})") from error
    sizes = context.sizes
    rows = [tokens(sizes.trained, 1, sizes.length, context.device, seed)[0].tolist() for seed in range(sizes.rows)]
    steps = sizes.steps + 2
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=sizes.rows,
            max_length=sizes.length,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=context.device.type == "cuda",
            use_cpu=context.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        clock = _Clock(context)
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": rows * steps}),
            processing_class=_tokenizer(sizes.trained.vocabulary),
            peft_config=lora,
            callbacks=[clock],
        )
        trainer.train()
    between = [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)]
    return statistics.median(between[1:] or between)


class _Clock(TrainerCallback):
    """Notes when each step is done on the device."""

    def __init__(self, context: Context) -> None:
        self.device, self.ends = context.device, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of numbered words, which the trainer asks for and does not use."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
