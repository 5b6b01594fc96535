"""One process of a DeepSpeed run: `torchrun zero.py STAGE PLACEMENT WEIGHT_DECAY OUT`."""

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


def main(stage: int, placement: Any, weight_decay: float, out: Path) -> None:
    """Train on this process's half of each batch; rank 0 saves the model."""
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    model: Any = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=weight_decay
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
    norms = []
    for step in range(STEPS):
        part = token_batch(seed=100 + step)[rank : rank + 1]
        engine.backward(engine(input_ids=part, labels=part).loss)
        engine.step()
        norms.append(float(engine.get_global_grad_norm() or 0))
    state = whole_state(engine, stage)
    with torch.no_grad():
        trained = engine(input_ids=token_batch()).logits
    if rank == 0:
        model.save_pretrained(str(out / "lora"), state_dict=state if stage == 3 else None)
        torch.save({"trained": trained, "norms": norms}, out / "seen.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
