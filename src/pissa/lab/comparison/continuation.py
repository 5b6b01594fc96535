"""Whether a directory may be gone on with: the same comparison, or the same with more seeds or more methods.

Runs of other methods and seeds do not depend on each other, so that what is there stays as it is when more is asked
for. Everything else must be as it was: runs under other settings, or on other rows, cannot be compared.
"""

from __future__ import annotations

from typing import Any

from ...checkpoint.disk.resumable import as_recorded
from ...errors import OutputError
from .plan import ComparisonPlan, null_method_of
from .record import ComparisonDirectory

FREE = ("keep_runs", "null")
"""Settings that change no run; the null arm can be left out now and made later, or the other way round."""


def record_to_keep(directory: ComparisonDirectory, record: dict[str, Any]) -> dict[str, Any]:
    """What compare.json is to hold from now on. Nothing is written.

    Args:
        directory: new, empty, or with a comparison, finished or not.
        record: of the comparison that is asked for.

    Returns:
        The record itself in a new directory; the one that is there for the same comparison; and for one that is
        extended the record with the earlier commands under "earlier".

    Raises:
        OutputError: the directory holds something other than this comparison.
    """
    before = directory.resumable.read()
    if before is None:
        return record
    # what was started before a setting existed had its default
    usual = as_recorded({"plan": ComparisonPlan().as_dict()})
    now, then = _flat(record["settings"]), {**_flat(usual), **_flat(before.get("settings", {}))}
    changed = [key for key in {**then, **now} if _differs(key, now, then)]
    directory.resumable.check_same(
        {key: then.get(key) for key in changed},
        {key: now.get(key) for key in changed},
        "the same settings, or more seeds or methods,",
    )
    # a fingerprint that was not taken then is not missed now
    rows = before.get("task") or {}
    if not rows or any(rows[key] != record["task"].get(key) for key in rows):
        raise OutputError(
            f"the rows of {record['settings']['data']}, or of the other files, are not those that {directory.path} was "
            "started with; continue with those, or name another directory"
        )
    if now == then:
        return before
    _check_null(directory, now, then)
    earlier = {key: before[key] for key in ("command", "versions", "hardware") if key in before}
    made = {"methods": then["methods"], "seeds": then["seeds"]}
    return {**record, "earlier": [*before.get("earlier", []), {**earlier, **made}]}


def _differs(key: str, now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Whether a setting is neither the same nor one that may grow."""
    if key in FREE or now.get(key) == then.get(key):
        return False
    if key == "methods":
        return not set(then.get(key, ())) <= set(now[key])
    return key != "seeds" or now[key] < then.get(key, 0)


def _check_null(directory: ComparisonDirectory, now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuse to go on with the null arm of another method."""
    method, before = null_method_of(now["methods"]), null_method_of(then["methods"])
    if now["null"] and method != before and directory.null_runs():
        raise OutputError(
            f"{directory.path} has a null arm of {before}, and with these methods it would be of {method}; leave the "
            "null arm out (--no-null), or name another directory"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and name in ("plan", "recipe")
        flat |= _flat(value, prefix) if nested else {f"{prefix}{name}": value}
    return flat
