"""What the layers of a model on disk see on a text, without ever holding the model.

The model is built without weights; each layer fetches its own from the checkpoint when it is called and gives them up
afterwards. So the text goes through the model block by block (`calibrate/blocks.py`) with one layer's weights and one
block's moments in memory, beside the hidden states between two blocks. Everything is computed in fp32, whatever dtype
the weights are stored in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor, nn

from ...calibrate.moments import Moment, second_moments
from ..source.reader import Source
from ..source.skeleton import build, checkpoint_names
from .dtypes import job_dtype
from .jobs import Job, tensor_of
from .work import read_weight


class Moments:
    """The second moment of each job's input, for jobs that are asked for in the order of the plan.

    Args:
        source: the base.
        batches: keyword arguments of the model's forward.
        jobs: of the plan, in its order; those that split a weight have a moment.
        dtype: that weights are converted to before they are split.
        stopping: ends the pass when it is set.
    """

    def __init__(
        self,
        source: Source,
        batches: Sequence[Mapping[str, Any]],
        jobs: Sequence[Job],
        dtype: torch.dtype,
        stopping: threading.Event,
    ) -> None:
        self._numbers = {job.name: number for number, job in enumerate(jobs) if job.target is not None}
        self._arguments = source, batches, dtype, stopping
        self._coming: Iterator[Moment] | None = None
        self._here: dict[str, Tensor] = {}

    def of(self, job: Job) -> Tensor | None:
        """The moment (in, in) of a job's input, None for a copy; earlier jobs cannot be asked for any more.

        Raises:
            KeyboardInterrupt: it was asked to stop.
            DataError: no token reaches the layer.
        """
        if job.name not in self._numbers:
            return None
        if self._coming is None:
            source, batches, dtype, stopping = self._arguments
            self._coming = second_moments(assembled(source, dtype, stopping), batches, self._numbers)
        number = self._numbers[job.name]
        self._here = {name: moment for name, moment in self._here.items() if self._numbers[name] >= number}
        while job.name not in self._here:
            moment = next(self._coming)
            self._here |= {name: moment.matrix for name in moment.names if self._numbers[name] >= number}
        return self._here.pop(job.name)


def assembled(source: Source, dtype: torch.dtype, stopping: threading.Event) -> nn.Module:
    """The model of a checkpoint, whose layers fetch their weights when they are called."""
    model = build(source, buffers=True)
    weights = _Weights(model, source, dtype, stopping)
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
    attach_align_device_hook(model, torch.device("cpu"), offload=True, weights_map=weights)
    return model


class _Weights(Mapping[str, Tensor]):
    """Name in the model -> its values, read anew each time, as the model would be loaded with them, in fp32."""

    def __init__(self, model: Any, source: Source, dtype: torch.dtype, stopping: threading.Event) -> None:
        self._model, self._source, self._dtype, self._stopping = model, source, dtype, stopping
        names = checkpoint_names(model, source)
        plain = {key: tensor_of(model, names, key) for key in model.state_dict()}
        self._tensors = {key: (name,) for key, name in plain.items() if name is not None} | names.fused

    def __getitem__(self, key: str) -> Tensor:
        if self._stopping.is_set():
            raise KeyboardInterrupt("interrupted")
        dtype = job_dtype(self._model, key.removesuffix(".weight"), self._dtype)
        return read_weight(self._tensors[key], dtype, self._model, self._source)[0].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
