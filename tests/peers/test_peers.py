"""Every failure is there in the peer, absent in pissa, and on the page as it was seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from page import FAILURES, Failure, row, without_numbers, written_rows

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
WRITE = "; write docs/peers.md again with: python tests/peers/page.py"


@pytest.mark.parametrize("failure", FAILURES, ids=[failure.run.__name__ for failure in FAILURES])
def test_the_peer_fails_and_pissa_does_not(failure: Failure, tmp_path: Path) -> None:
    seen = row(failure, failure.run(tmp_path))
    assert without_numbers(written_rows().get(failure.title, "")) == without_numbers(seen), seen + WRITE


def test_the_page_has_these_rows_and_no_others() -> None:
    assert list(written_rows()) == [failure.title for failure in FAILURES], WRITE
