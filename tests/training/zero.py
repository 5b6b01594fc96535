"""One process of some DeepSpeed runs: `torchrun zero.py OUT "STAGE PLACEMENT WEIGHT_DECAY" …`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed  # pyright: ignore[reportMissingImports]
import torch
import torch.distributed as dist

from pissa import PissaConfig, adapt
from pissa.errors import PissaError
from tiny import tiny_llama, token_batch

STEPS = 3


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
    }


def whole_state(engine: Any, stage: int) -> dict[str, torch.Tensor]:
    """The gathered state dict, as DeepSpeed gives it; of ZeRO-3 with the frozen parameters."""
    return engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()


def train(stage: int, placement: Any, weight_decay: float, out: Path) -> None:
    """Train on this process's half of each batch; rank 0 saves the model."""
    rank = dist.get_rank()
    model: Any = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
    norms = []
    for step in range(STEPS):
        part = token_batch(seed=100 + step)[rank : rank + 1]
        engine.backward(engine(input_ids=part, labels=part).loss)
        engine.step()
        norms.append(float(engine.get_global_grad_norm() or 0))
    state = whole_state(engine, stage)
    with torch.no_grad():
        logits = engine(input_ids=token_batch()).logits
    if rank == 0:
        model.save_pretrained(str(out / "lora"), state_dict=state if stage == 3 else None)
        torch.save({"trained": logits, "norms": norms}, out / "seen.pt")
    dist.barrier()
    engine.destroy()


def main(out: Path, cases: list[str]) -> None:
    """Each case in turn, "STAGE PLACEMENT WEIGHT_DECAY"; what a case raises is written down in its place."""
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for case in cases:
        stage, placement, weight_decay = case.split()
        place = out / case
        place.mkdir(parents=True, exist_ok=True)
        try:
            train(int(stage), placement, float(weight_decay), place)
        except PissaError as error:
            (place / "error.txt").write_text(str(error), encoding="utf-8")
        print(f"{case}: done", file=sys.stderr, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
