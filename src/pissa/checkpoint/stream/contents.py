"""What a finished directory of `pissa init` holds and says, as it follows from the plan alone.

`pissa init` writes it into the manifest; `pissa verify --base` makes the plan again from the base and holds the
manifest and the files against it, so that nothing counts because a manifest says so.
"""

from __future__ import annotations

from typing import Any

from ..card import CARD
from ..source.reader import Source
from .jobs import Job
from .plan import StreamPlan


def module_entries(plan: StreamPlan) -> dict[str, dict[str, Any]]:
    """Module that is split -> where its parts lie and by what its adapter is scaled; by name."""
    return {job.name: _module_entry(job) for job in _by_name(plan) if job.config is not None}


def copies(plan: StreamPlan) -> dict[str, str]:
    """Tensor that is copied -> the base's; by the names of jobs."""
    return {name: job.sources[0] for job in _by_name(plan) if job.config is None for name in job.outputs}


def base_tensors(plan: StreamPlan) -> list[str]:
    """The base's tensors that something is made of."""
    return [name for job in _by_name(plan) for name in job.sources]


def file_names(plan: StreamPlan, source: Source) -> set[str]:
    """All files beside the manifest."""
    weights = {file.name for file in plan.files}
    return weights | plan.documents.keys() | {CARD} | set(other_names(source))


def other_names(source: Source) -> list[str]:
    """What is taken along as it lies with the base: tokenizer, generation settings, licence."""
    return [file.relative_to(source.path).as_posix() for file in source.others]


def _by_name(plan: StreamPlan) -> list[Job]:
    return sorted(plan.jobs, key=lambda job: job.name)


def _module_entry(job: Job) -> dict[str, Any]:
    assert job.target is not None and job.layout is not None and job.config is not None
    entry: dict[str, Any] = {
        "tensors": [*job.sources],
        "dtype": str(job.dtype).removeprefix("torch."),
        "rank": job.target.rank,
        "scale": job.config.scale(job.target.rank, job.target.alpha),
        "kind": job.target.kind.title,
        "weight": job.target.weight_key,
    }
    if not job.config.starts_at_zero:
        entry["factors"] = list(job.layout.keys())
        if job.layout.dilation:
            entry["dilation"] = list(job.layout.dilation)
    return entry
