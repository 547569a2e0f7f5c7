"""What each process does in a test of world.py: torchrun starts this.

torchrun -m tests.llama_adapter.world_worker DATA OTHER RESULTS
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from llama_adapter.assets import BASE
from llama_adapter.checkpoints import load_base
from llama_adapter.config import AdapterConfig
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.training import FinetuneResult, finetune
from llama_adapter.world import World, join


def main(data: Path, other: Path, results: Path) -> None:
    """Try runs whose processes were given different things, then two that are one."""
    torch.set_num_threads(1)
    with join() as world:
        found: dict[str, Any] = {"errors": refused(data, other, results, world)}
        sharded = load_base(BASE, shard=world)
        both = (run(data, results / name, base=base, shard=base is None)
                for name, base in (("given", sharded), ("loaded", None)))  # fmt: skip
        found["losses"] = [result.losses for result in both]
        (results / f"{world.rank}.json").write_text(json.dumps(found))


def run(data: Path, output: Path, base: Any = None, **options: Any) -> FinetuneResult:
    """Two steps of a small run."""
    fixed: dict[str, Any] = {"batch_size": 8, "max_steps": 2, "val_size": 2, "lr": 0.05}
    config = FinetuneConfig(data=data, output=output, **fixed | options)
    return finetune(config, base=base, progress=False)


def refused(data: Path, other: Path, results: Path, world: World) -> dict[str, str]:
    """What processes say whose options or data differ."""
    changes: dict[str, dict[str, Any]] = {
        "lr": {"lr": 0.05 * (1 + world.rank)},
        "seed": {"seed": 5 * world.rank},
        "prompt_length": {"adapter": AdapterConfig(prompt_length=10 - world.rank)},
        "shard": {"shard": world.rank == 0},
        "max_steps": {"max_steps": 2 + world.rank},
        "data": {"data": data if world.rank == 0 else other},
    }
    said = {}
    for name, change in changes.items():
        try:
            run(**{"data": data, "output": results / name, **change})
        except ValueError as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
