"""The one place in the project that calls `from_pretrained` and `from_config`, so that no code of a stranger runs.

What lies on a disk or a hub may be a stranger's, and transformers would run a stranger's code in three ways: code that
comes with a model or its tokenizer (`auto_map`), for which it asks on the terminal; attention kernels of the hub that a
config.json names; pickles. The first is never run and never asked for, the second is refused, the third are read by
torch's loader that runs no code. Nothing here can be told to trust a model: whoever wants to run its code loads it with
transformers and gives the loaded model to `pissa.adapt`.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, MissingExtraError, PissaError
from ...outside.hub import at_the_hub, not_found
from ...stages import stage
from .hub import first_line


def through_transformers(kind: str, source: str | os.PathLike[str], what: str, **options: Any) -> Any:
    """Call a class's `from_pretrained` such that no code of a stranger is run and nobody is asked to run it.

    Args:
        kind: name of a class of transformers.
        source: a directory or a hub id.
        what: what is loaded, for messages: "a tokenizer".
        options: passed on.

    Raises:
        CheckpointError: transformers cannot load it, or only by running code that comes with it.
        MissingExtraError: it is quantised, and bitsandbytes is not installed.
    """
    with nullcontext() if Path(source).exists() else at_the_hub():
        _check_kernels(source)
        return _called(kind, "from_pretrained", source, source, what, options)


def model_from(config: Any, kind: str, source: str | os.PathLike[str], what: str, **options: Any) -> Any:
    """Call a class's `from_config` in the same way.

    Args:
        config: that `through_transformers` loaded.
        kind: name of an Auto class of transformers.
        source: where the configuration is from, for messages.
        what: as in `through_transformers`.
        options: passed on.

    Raises:
        CheckpointError: as `through_transformers`.
    """
    return _called(kind, "from_config", config, source, what, options)


def _called(
    kind: str, method: str, given: Any, source: str | os.PathLike[str], what: str, options: dict[str, Any]
) -> Any:
    import transformers

    try:
        with stage(f"loading {what} from {source}"):
            return getattr(getattr(transformers, kind), method)(given, **options, trust_remote_code=False)
    except PissaError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"cannot load {what} from {source}: there is not enough memory for it") from error
    except ImportError as error:
        if "bitsandbytes" in str(error):
            raise MissingExtraError(f"{source} is quantised with bitsandbytes: pip install 'pissa[quant]'") from error
        raise CheckpointError(_cannot_load(what, source, error)) from error
    except Exception as error:  # a stranger's files can be wrong in as many ways as there are models
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"cannot load {what} from {source}: it needs code that comes with it, which pissa never runs, and "
                f"transformers {transformers.__version__} has none of its own for it; give a model without such code"
            ) from None
        raise CheckpointError(_cannot_load(what, source, error)) from error


def check_kernels(settings: Any, where: str) -> None:
    """Refuse a configuration that names a kernel of the hub, by `org/name`: transformers would fetch it and run it.

    Args:
        settings: what a config.json holds, with the configurations of parts in it.
        where: whose, for the message.

    Raises:
        CheckpointError: naming the field.
    """
    parts = [settings]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            for name, value in part.items():
                if name.endswith(("attn_implementation", "attn_implementation_internal", "experts_implementation")):
                    named = value.values() if isinstance(value, dict) else [value]
                    if any(isinstance(each, str) and "/" in each for each in named):
                        raise CheckpointError(
                            f"{where}: {name} names {str(value)[:80]!r}, a kernel from the hub, which pissa does not "
                            "fetch; take that field out"
                        )
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _check_kernels(source: str | os.PathLike[str]) -> None:
    """Refuse a config.json that names a kernel of the hub: transformers would fetch it and run it."""
    from transformers import PretrainedConfig

    try:
        settings, _ = PretrainedConfig.get_config_dict(source, _from_auto=True)
    except Exception:  # there is none, or none that can be read: whoever loads the model says so
        return
    check_kernels(settings, f"the config.json of {source}")


def _cannot_load(what: str, source: str | os.PathLike[str], error: Exception) -> str:
    if Path(source).exists():
        return f"cannot load {what} from {source}: {first_line(error)}"
    return not_found(source, error)
