"""The command line, run in the test's own process."""

from __future__ import annotations

import pytest

from pissa.cli.main import run


def exit_code(*arguments: object) -> int:
    """Run the command line; arguments are taken as text."""
    with pytest.raises(SystemExit) as stopped:
        run([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code
