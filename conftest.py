"""Settings of all tests, made before torch is imported, and the fixtures that the package and the studies share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Read once, when torch, transformers and matplotlib are imported; child processes inherit them.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# How long an example takes says something of the machine and nothing of the code. `make test` tries the same examples
# everywhere, so that it fails for the change at hand alone; `make test-all` looks for new ones (--hypothesis-profile).
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """Let the garbage collector pass over everything that is imported by now.

    transformers' Trainer collects garbage at the end of every training, which takes 0.4 s among the objects of the
    imported modules and a hundredth of that among those of a test.
    """
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(scope="session")
def pissa_data() -> Path:
    """The folder of real data sets (`gsm8k/` and others), or a skip where there is none."""
    given = os.environ.get("PISSA_DATA")
    if not given:
        pytest.skip("needs real data: set PISSA_DATA to the folder that holds gsm8k/ and the other data sets")
    if not Path(given).is_dir():
        pytest.skip(f"needs real data: PISSA_DATA names {given}, which is not a folder")
    return Path(given)
