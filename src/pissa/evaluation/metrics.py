"""GLUE's metrics (arXiv 1804.07461), as scikit-learn and scipy compute them.

    accuracy           share of right classes                SST-2, MRPC, QNLI, RTE, MNLI, QQP
    F1                 of the positive class                 MRPC, QQP
    Matthews           correlation of two classes            CoLA
    Pearson, Spearman  correlation of values, of their ranks STS-B

A correlation with something constant is 0 here, as in GLUE's own scores, and not undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..errors import MissingExtraError

Metric = Callable[[Sequence[float], Sequence[float]], float]
"""(predictions, labels) -> figure."""


def accuracy(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Share of the predictions that are right."""
    return float(_library("sklearn.metrics").accuracy_score(labels, predictions))


def f1(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor there."""
    return float(_library("sklearn.metrics").f1_score(labels, predictions, zero_division=0))


def matthews(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Matthews correlation of two classes; 0 where one side is constant."""
    return float(_library("sklearn.metrics").matthews_corrcoef(labels, predictions))


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Linear correlation; 0 where one side is constant."""
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, where equal values share the mean of theirs; 0 where one side is constant."""
    return _correlation("spearmanr", predictions, labels)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def check_metrics() -> None:
    """Refuse a machine without the packages that compute them.

    Raises:
        MissingExtraError: scikit-learn or scipy is not installed.
    """
    for name in ("sklearn.metrics", "scipy.stats"):
        _library(name)


def _correlation(name: str, predictions: Sequence[float], labels: Sequence[float]) -> float:
    if len(set(predictions)) < 2 or len(set(labels)) < 2:
        return 0.0
    return float(getattr(_library("scipy.stats"), name)(predictions, labels).statistic)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = "scikit-learn" if name.startswith("sklearn") else "scipy"
        raise MissingExtraError(f"GLUE's metrics need {package}: pip install 'pissa[eval]'") from error
