"""The data of a comparison as three disjoint parts: training, validation, test.

Parts that are not given as files are drawn from the training data with a seed. A row of a held-out part that also
stands in the training data, word for word, is taken out of the training data, and counted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.conversation import Example
from ...data.read import read_examples
from ...errors import DataError
from ...evaluation.tasks.gsm8k_answers import extract_answer
from ...provenance import sha256, sha256_of_file
from .plan import ComparisonPlan


@dataclass(frozen=True)
class Task:
    """What is learned, by what learning rates are chosen, and what is reported."""

    name: str
    """What reports call it: the name of the data."""
    train: list[Example]
    """What to learn from, in the order of the file."""
    validation: list[Example]
    test: list[Example]
    removed: int
    """Training rows that stood in a held-out part too."""

    @property
    def has_answers(self) -> bool:
        """Whether every test problem states its answer."""
        return all(extract_answer(problem.response) is not None for problem in self.test)

    def as_dict(self) -> dict[str, object]:
        """Counts and a fingerprint, for the record."""
        return {
            "name": self.name,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "test_rows": len(self.test),
            "removed_from_train": self.removed,
            "sha256": [_digest(part) for part in (self.train, self.validation, self.test)],
        }


def make_task(data: str, plan: ComparisonPlan, *, validation: str | None = None, test: str | None = None) -> Task:
    """Read the data and part it.

    Args:
        data: file or hub id to learn from, see `read_examples`; with the recipe's data_split and data_subset.
        plan: how many rows are held out at most; from a file with fewer, all. Out of `data` itself at most a tenth
            becomes validation and a fifth test.
        validation: file or hub id of the rows by which learning rates are chosen; of a hub id, split "validation".
        test: file or hub id of the rows that are reported; of a hub id, split "test". Where either is the id of `data`,
            it is the same subset.

    Raises:
        DataError: a file that cannot be read, or too few rows.
    """
    draw = random.Random(plan.seed)
    subset = plan.recipe.data_subset
    rows = read_examples(data, split=plan.recipe.data_split, subset=subset)

    def held_out(source: str | None, split: str, count: int) -> list[Example]:
        if source is None:
            return []
        return _drawn(read_examples(source, split=split, subset=subset if source == data else None), count, draw)

    kept_for_test = held_out(test, "test", plan.test_rows)
    kept_for_validation = held_out(validation, "validation", plan.validation_rows)
    rows, repeated = _without(rows, [*kept_for_test, *kept_for_validation])
    total = len(rows)
    if test is None:
        kept_for_test = _drawn(rows, min(plan.test_rows, total // 5), draw)
        rows, again = _without(rows, kept_for_test)
        repeated += again - len(kept_for_test)
    if validation is None:
        kept_for_validation = _drawn(rows, min(plan.validation_rows, total // 10), draw)
        rows, again = _without(rows, kept_for_validation)
        repeated += again - len(kept_for_validation)
    kept_for_validation = _without(kept_for_validation, kept_for_test)[0]
    if len(rows) < plan.recipe.batch_size or not kept_for_validation or len(kept_for_test) < 2:
        raise DataError(
            f"{data} leaves {len(rows)} rows for training, {len(kept_for_validation)} for validation and "
            f"{len(kept_for_test)} for the test; a comparison needs at least {plan.recipe.batch_size} (one batch), 1 "
            "and 2: give more data, or a smaller batch size"
        )
    return Task(Path(data).name, rows, kept_for_validation, kept_for_test, repeated)


def digests(plan: ComparisonPlan) -> dict[str, str]:
    """Fingerprints of the other files that a plan names."""
    files = {"evaluation_data": plan.evaluation_data, "forgetting": plan.forgetting}
    return {f"{name}_sha256": sha256_of_file(Path(path))[:16] for name, path in files.items() if path is not None}


def _drawn(rows: Sequence[Example], count: int, draw: random.Random) -> list[Example]:
    """At most that many different rows, in their order."""
    distinct = list({_key(row): row for row in reversed(rows)}.values())[::-1]
    chosen = sorted(draw.sample(range(len(distinct)), min(count, len(distinct))))
    return [distinct[i] for i in chosen]


def _without(rows: Sequence[Example], others: Sequence[Example]) -> tuple[list[Example], int]:
    """The rows that are none of the others, and how many were."""
    taken = {_key(row) for row in others}
    left = [row for row in rows if _key(row) not in taken]
    return left, len(rows) - len(left)


def _key(row: Example) -> str:
    return json.dumps(row.content(), sort_keys=True)


def _digest(rows: Sequence[Example]) -> str:
    return sha256("\n".join(map(_key, rows)).encode())[:16]
