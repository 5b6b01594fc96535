"""`init_checkpoint`: a model on disk becomes residual and adapter on disk, a few weights in memory at a time.

Every weight is split by `split_weight` on one thread, from a seed of its own; so the bytes depend neither on the order
nor on how many processes (`process.py`) there are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config import PissaConfig
from ...errors import ConfigError
from ..disk.distribute import assemble
from ..manifest import read_manifest
from ..saved_residual import check_is_base
from ..source.reader import open_source
from .dtypes import DTYPES
from .plan import make_plan
from .process import Process, Progress
from .run_identity import identity
from .unfinished import Workspace

MATRICES = 4
"""How many times the memory of the largest job all together may take."""


@dataclass(frozen=True)
class InitResult:
    """A finished `init_checkpoint`."""

    path: Path
    """The directory."""
    manifest: dict[str, Any]
    """What its pissa.json holds."""
    seconds: float
    """How long this run took; 0 where an earlier one had finished."""
    continued: int
    """How many tensors of the base earlier runs had done."""
    processes: int
    threads: int
    """Of this process; each weight is split on one."""


def init_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PissaConfig,
    *,
    dtype: str | None = None,
    memory: int | None = None,
    batches: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> InitResult:
    """Split a model on disk into a residual and an initial adapter on disk, without ever holding it.

    `out` becomes a directory that `AutoModelForCausalLM.from_pretrained(out)` loads, with the initial adapter in
    `out/pissa_init` and the manifest `out/pissa.json`: the bits that `adapt` and `save_residual` give. Called again, it
    continues what was stopped. Under `torchrun` the processes share the work.

    Args:
        source: the base: a directory or a hub id.
        out: new, empty, or that of the same run.
        config: rank, method, targets, quantisation.
        dtype: "fp32", "bf16" or "fp16" for the weights; None for what transformers would load them in.
        memory: bytes that the weights in work may take together; at least one is worked on. None for four times what
            the largest takes.
        batches: keyword arguments of the model's forward, tensors by name: text that a quantisation is fitted to. It
            goes through the model block by block, each layer's weights read when it is called.
        progress: called after each tensor.

    Returns:
        The directory, its manifest, and what the run took.

    Raises:
        CheckpointError: the base cannot be read, is not whole, or was changed since the run began.
        TargetError, ConfigError, WeightError: as `adapt`.
        OutputError: `out` holds something else, another run, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM, or another process ended; what was done is saved.

    Example:
        >>> from pissa import PissaConfig, init_checkpoint
        >>> made = init_checkpoint("base", "split", PissaConfig(rank=8))
        >>> max(module["rounding"] for module in made.manifest["modules"].values()) < 1e-6  # in fp32
        True
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    _check_fitted(config, batches)
    start = time.perf_counter()
    out = Path(os.path.realpath(out))
    threads = max(1, torch.get_num_threads())
    check_is_base(source)
    with open_source(source) as base:
        workspace = Workspace(out, identity(source, base, config, dtype, batches))
        finished = workspace.finished()
        if finished is not None:
            return InitResult(out, finished, 0.0, len(finished["base_tensors"]), 1, threads)
        plan = make_plan(base, config, out, dtype, as_it_runs=batches is not None)
        team = assemble(workspace.path)
        memory = memory or MATRICES * max(t.memory for t in plan.jobs)
        run = Process(base, workspace, plan, team, memory, progress, batches)
        run.complete()
    seconds = time.perf_counter() - start
    return InitResult(out, read_manifest(out) or {}, seconds, run.continued, team.size, threads)


def _check_fitted(config: PissaConfig, batches: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuse text that nothing is fitted to, and a configuration that asks for text where there is none."""
    quantization = config.quantization
    if batches is None:
        if quantization is not None and (quantization.calibration is not None or quantization.rounding == "gptq"):
            raise ConfigError(
                "the quantisation is fitted to text: pass it as batches (--calibration FILE), or leave calibration out"
            )
    elif quantization is None or not quantization.is_fitted:
        raise ConfigError("batches are for a quantisation that is fitted to them; leave them out")
