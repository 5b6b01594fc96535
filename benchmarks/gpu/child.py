"""One stage in this process: `python -m benchmarks.gpu.child MODULE SIZES DEVICE RESULTS`.

Figures go to the file RESULTS, how it ended to RESULTS with the ending `.end`, all else to stdout and stderr.
"""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path

from .context import Context, Skipped, first_line, out_of_memory, write_json
from .sizes import SIZES


def main(module: str, sizes: str, device: str, results: str) -> int:
    """Run the stage; its exit code is 0 where it was done or skipped."""
    path = Path(results)
    context = Context(SIZES[sizes], device, path)
    context.record()
    status, message = "done", None
    try:
        import_module(module).run(context)
    except Skipped as reason:
        status, message = "skipped", str(reason)
    except out_of_memory() as error:
        status, message = "out of memory", first_line(error)
        traceback.print_exc()
    except Exception as error:
        status, message = "failed", first_line(error)
        traceback.print_exc()
    write_json(path.with_suffix(".end"), {"status": status, "message": message})
    return 0 if status in ("done", "skipped") else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
