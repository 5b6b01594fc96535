"""What a run is told to use, tried on one weight before a model is loaded: its optimizer, schedule and loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from ..errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


def check_usable(arguments: SFTConfig) -> None:
    """Make optimizer, schedule and loader as the arguments say, of one weight.

    Raises:
        MissingExtraError: the optimizer's package is not installed.
        ConfigError: one of them does not take what it is given.
    """
    from transformers import Trainer, get_scheduler

    model = torch.nn.Linear(1, 1, bias=False)
    # GaLore's and APOLLO's look for modules by name, which one weight does not have
    named = arguments.optim_target_modules is not None
    with refused(and_values=not named):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model=model)  # pyright: ignore[reportArgumentType]
        if not named and "model" not in options:
            kind(model.parameters(), **options)
    with refused():
        get_scheduler(
            arguments.lr_scheduler_type,
            torch.optim.SGD(model.parameters(), lr=1.0),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
        )
        DataLoader(
            [0],  # pyright: ignore[reportArgumentType]
            num_workers=arguments.dataloader_num_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            persistent_workers=arguments.dataloader_persistent_workers,
        )


@contextmanager
def refused(*, and_values: bool = True) -> Iterator[None]:
    """What libraries say to settings that were passed on to them, as our own error.

    Args:
        and_values: values that they do not take too, and not only packages that are not there.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"training: {_words(error)}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        if "nstall " in str(error):  # as some say of a package that is not there
            raise MissingExtraError(f"training: {_words(error)}") from error
        if and_values and not isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(f"training: {_words(error)}") from error
        if and_values:
            raise


def _words(error: Exception) -> str:
    return " ".join(str(error).split())
