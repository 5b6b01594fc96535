"""All studies, in the order of the paper and then of the report."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from pissa.errors import ConfigError

from .study import Study

NAMES = (
    "odd-even",
    "spectra",
    "quantisation",
    "fast-svd",
    "components",
    "gradients",
    "ranks",
    "long-run",
    "precision",
    "combinations",
    "glue",
    "vision",
    "robust-solvers",
    "scaling",
    "direction-or-scale",
    "nlg",
    "families",
    "one-rate",
)


def study_names() -> list[str]:
    """The names that `python -m studies` takes."""
    return [name for name in NAMES if find_spec(_module(name)) is not None]


def find_study(name: str) -> Study:
    """The study of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in study_names():
        raise ConfigError(f"no study is called {name!r}; there are {', '.join(study_names())}")
    return import_module(_module(name)).STUDY


def _module(name: str) -> str:
    return f"{__package__}.{name.replace('-', '_')}"
