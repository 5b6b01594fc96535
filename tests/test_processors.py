"""The numerics on other processors: their instruction sets, on this one, in processes of their own.

Libraries choose their kernels by what the processor can do, and each kernel adds up in another order. A machine can
be told to do as a lesser one does, so that the same tests run with the rounding of each. `make test` takes a sample
under each lesser set, `make test-all` every test of the rooms that compute, under this machine's own set as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent
LADDER = ("DEFAULT", "AVX2", "AVX512")
"""torch's names of what it compiles kernels for, each including the ones before."""
HERE = torch.backends.cpu.get_cpu_capability()
LESSER = LADDER[: LADDER.index(HERE)] if HERE in LADDER else ()
SETTINGS: dict[str, dict[str, str]] = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}
"""Of torch's kernels, of MKL's (by its second name on processors that are not Intel's) and of oneDNN's."""
ROOMS = ("decompose", "quantize", "test_split.py", "test_split_hostile.py")
SAMPLE = (
    "failed_elsewhere or stale_or_useless or rank_deficient or every_warm_start or (every_matrix and ones) "
    "or single_deficient or equal_singular or same_bits or half_precision"
)
"""What rounding decides most about, a few seconds of it."""
CHILD = (
    "import sys, pytest, torch; "
    "print('capability', torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()); "
    "sys.exit(pytest.main(sys.argv[1:]))"
)


def run_under(setting: str, threads: int, *arguments: str) -> None:
    """Run tests in a process that is told to be another processor."""
    if setting.upper() not in (*LESSER, HERE):
        pytest.skip(f"this machine runs {HERE}, not {setting}")
    environment = os.environ | SETTINGS[setting] | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    paths = [str(ROOT / room) for room in ROOMS]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "-q", "-x", "-p", "no:cacheprovider", *arguments, *paths],
        env=environment,
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    told = f"capability {setting.upper()} {threads}"
    assert done.stdout.startswith(told), f"{done.stdout[:200]!r} where {told!r} was asked for; {done.stderr[-500:]}"
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting.upper() in LESSER])
def test_a_sample_passes_under_lesser_instruction_sets(setting: str) -> None:
    run_under(setting, 1, "-k", SAMPLE)


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_numerical_test_passes_under_other_instruction_sets(setting: str, threads: int) -> None:
    run_under(setting, threads, "-m", "")
