"""One process of some runs under an engine of accelerate's: `accelerate launch … engines.py BASE DATA OUT CASE …`.

What a CASE (a key of MORE) refuses is written down in its place. With FSDP_ON_CPU set, accelerate is told that the
processes drive GPUs, since it would run plain DDP on processors; everything else is its own.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from killed import signal_at_step
from small_runs import recipe

from pissa.errors import Interrupted, PissaError
from pissa.training.run import train

MORE: dict[str, dict[str, Any]] = {
    "residual": {},
    "resumed": {},
    "offset": {"placement": "offset"},
    "quantised": {"quantize": "nf4", "iterations": 1},
    "loraplus": {"loraplus_ratio": 4},
    "dora": {"method": "pissa+dora"},
    "adalora": {"method": "adalora"},
}


def settings(case: str) -> Any:
    """Five steps of four rows, two by two in either process."""
    return recipe(**{"batch_size": 4, "micro_batch_size": 1, "max_steps": 5, "save_every": 2, **MORE[case]})


def pretend_gpus() -> None:
    """Let accelerate's state take processors for GPUs, of which FSDP knows nothing."""
    original = PartialState.__init__

    def init(self: PartialState, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def main(base: str, data: str, out: Path, cases: list[str]) -> None:
    """Each case in turn."""
    torch.set_num_threads(1)
    if os.environ.get("FSDP_ON_CPU"):
        pretend_gpus()
    for case in cases:
        work = partial(train, base, data, out / case, settings(case), quiet=True)
        try:
            if case == "resumed":
                with suppress(Interrupted):
                    signal_at_step(3, work, number=signal.SIGTERM)
                AcceleratorState._reset_state()
            work()
        except PissaError as error:
            if PartialState().is_main_process:
                (out / f"{case}.txt").write_text(f"{error}\n", encoding="utf-8")
        PartialState().wait_for_everyone()
        AcceleratorState._reset_state()
        print(f"{case}: done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
