"""Where the command line begins: with nothing imported that takes time, so that an interruption is heard from the first
moment on."""

from __future__ import annotations

import signal
import sys
import threading


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; `exits.py` says what its codes mean."""
    before = None
    try:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        from .app import app
        from .exits import run_app
    except KeyboardInterrupt:
        print("pissa: interrupted before anything began: the same command starts again", file=sys.stderr)
        sys.exit(130)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    run_app(app, arguments)
