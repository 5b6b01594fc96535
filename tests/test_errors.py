"""How offenders are named in messages."""

from __future__ import annotations

import pytest

from pissa.errors import listed


@pytest.mark.parametrize("separator", [", ", "; "])
@pytest.mark.parametrize("most", [1, 3, 20])
@pytest.mark.parametrize("count", range(30))
def test_every_offender_is_named_or_counted(count: int, most: int, separator: str) -> None:
    line = listed(range(count), most, separator)
    names, _, more = line.partition(" and ")
    shown = names.split(separator) if names else []
    hidden = int(more.removesuffix(" more")) if more else 0
    assert shown == [str(number) for number in range(len(shown))] and len(shown) + hidden == count
    assert hidden == 0 if count <= most + 2 else len(shown) == most
