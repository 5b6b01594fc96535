"""What the numbers were measured with and on."""

from __future__ import annotations

import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from pissa.provenance import hardware, package_versions, processor

OPTIONAL = ("bitsandbytes", "triton", "trl", "datasets")


def provenance(device: str) -> dict[str, Any]:
    """Versions, hardware, when it was, and which of the optional packages are missing."""
    versions = package_versions()
    for package in OPTIONAL:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return {
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "missing": [package for package in OPTIONAL if package not in versions],
        "hardware": {**hardware(), "processor": processor(), "gpu": gpu() if device.startswith("cuda") else None},
    }


def gpu() -> dict[str, Any]:
    """Name, memory, multiprocessors, compute capability and driver of the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver(),
    }


def driver() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer[0] if answer else None
