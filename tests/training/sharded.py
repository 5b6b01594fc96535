"""One process of a sharded or replicated training run: `torchrun sharded.py ENGINE PLACEMENT OPTIMIZER OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pissa import PissaConfig, SpectralProduct, adapt, export_lora, reference
from pissa.live.offset import freeze_second_halves
from tiny import tiny_llama, token_batch

STEPS = 3


def replicated(model: Any) -> Any:
    return DistributedDataParallel(model)


def sharded(model: Any) -> Any:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    if model.pissa.config.placement == "offset":
        freeze_second_halves(model)
    return model


def optimizer_of(model: Any, name: str) -> torch.optim.Optimizer:
    """The optimizer of all these steps, in one process or several."""
    if name == "spectral":
        return SpectralProduct(model, weight_decay=0.1)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def main(engine: str, placement: Any, name: str, out: Path) -> None:
    """Train on this process's half of each batch; rank 0 writes the export and what was seen."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model: Any = adapt(tiny_llama(), PissaConfig(4, placement=placement))
    wrapped = {"ddp": replicated, "fsdp2": sharded}[engine](model)
    optimizer = optimizer_of(wrapped, name)
    for step in range(STEPS):
        part = token_batch(seed=100 + step)[rank : rank + 1]
        loss = wrapped(input_ids=part, labels=part).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = token_batch()
    with torch.no_grad():
        trained = wrapped(input_ids=tokens).logits
        with reference(model):
            base = wrapped(input_ids=tokens).logits
    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    export = export_lora(model, out / "lora" if rank == 0 else None, state=whole) if rank == 0 else None
    if export is not None:
        torch.save({"trained": trained, "reference": base, "state": whole}, out / "seen.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
