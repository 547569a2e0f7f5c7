"""What each process does in the tests of sharding: torchrun starts this, and a failed assert shows.

torchrun -m tests.llama_adapter.sharded_worker compare|measure FOLDER RESULTS
"""

import gc
import json
import sys
import threading
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.config import AdapterConfig
from llama_adapter.data.examples import Batch, Example
from llama_adapter.data.packed import micro_batches
from llama_adapter.sharding import is_sharded
from llama_adapter.trainer import Trainer
from llama_adapter.world import World, join
from tests.llama_adapter.test_trainer import BOTH, examples

LAYERS = 2


def adapter_for(base: Base) -> Adapter:
    """A float32 adapter of the topmost layers, its gates random, some beyond 1."""
    generator = torch.Generator().manual_seed(13)
    config = AdapterConfig(prompt_length=5, n_layers=LAYERS)
    adapter = Adapter(config, base.model.config, generator=generator)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    return adapter


def compare(folder: Path, world: World) -> dict[str, Any]:
    """A sharded base holds and computes what the whole one does."""
    whole, sharded = load_base(folder), load_base(folder, shard=world)
    assert is_sharded(sharded.model)
    assert not is_sharded(whole.model)
    check_parts(whole, sharded, world)
    assert fingerprint(sharded.model, "") == fingerprint(whole.model, "")
    adapter, counts = adapter_for(whole), {}
    kinds = ((whole.model, World()), (whole.model, world), (sharded.model, world))
    # with one micro-batch each, then with several, of which one process has more than another
    for micro_batch_tokens, recompute in ((10**6, None), (20, "mlp"), (20, "block")):
        one, all_of_it, parts = (
            Trainer(
                model,
                deepcopy(adapter),
                micro_batch_tokens=micro_batch_tokens,
                recompute=recompute,
                world=given,
            )
            for model, given in kinds
        )
        # 5 examples are 3 and 2; of one example alone a process has none
        for batch in (examples(5), examples(1, seed=1), unlabelled(examples(3, seed=2))):
            alone, _ = one.step(Batch(batch, BOTH), 1e-3)
            together, norm = all_of_it.step(Batch(batch, BOTH), 1e-3)
            with Collectives() as sent:
                assert parts.step(Batch(batch, BOTH), 1e-3) == (together, norm)
            if micro_batch_tokens == 10**6:
                counts[len(batch)] = sent.counts
            if whole.model.output_weight.dtype == torch.float32:
                assert abs(alone - together) <= 1e-6 * abs(alone)
            for name, value in all_of_it.tensors().items():
                assert torch.equal(value, parts.tensors()[name]), name
        # between steps, all that is here are the parts again
        check_parts(whole, sharded, world)
    for given in (examples(5), examples(5, seed=3)):
        assert len({len(list(micro_batches(share, 20))) for share in shares(given, world)}) > 1
        assert parts.validate(given) == all_of_it.validate(given)
    assert parts.validate(given[:1]) == all_of_it.validate(given[:1])
    return {"collectives": counts, "first": adapter.layers[0]}


class Collectives(TorchDispatchMode):
    """Counts what processes say to each other, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; count it if it is one of torch.distributed's."""
        space, _, name = func.name().partition("::")
        if "c10d" in space:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def check_parts(whole: Base, sharded: Base, world: World) -> None:
    """Each process has the rows that torch.chunk gives it, and no more memory than they take."""
    for name, value in whole.model.named_parameters():
        part = sharded.model.get_parameter(name)
        chunks = [*value.chunk(world.size), *[value[:0]] * world.size]
        local: Tensor = part.to_local()  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(local, chunks[world.rank]), name
        assert local.dtype == value.dtype
        # FSDP pads to a number of rows that all have
        assert local.untyped_storage().nbytes() <= chunks[0].nbytes
        assert not part.requires_grad


def shares(batch: tuple[Example, ...], world: World) -> list[list[Example]]:
    """What each process has of a batch."""
    return [World(rank, world.size).share(batch) for rank in range(world.size)]


def unlabelled(batch: tuple[Example, ...]) -> tuple[Example, ...]:
    """Examples that carry no loss."""
    return tuple(Example(e.index, e.tokens, (-100,) * len(e.tokens)) for e in batch)


def measure(folder: Path, world: World) -> dict[str, Any]:
    """Bytes that the process has taken at most, beyond those before, to load and to train."""
    # what is imported and allocated once does not count
    load_base(Path(__file__).parents[2] / "llama_adapter/assets/base", shard=world)
    with Peak() as peak:
        base = load_base(folder, shard=world)
    found = {"load": peak.bytes}
    trainer = Trainer(base.model, adapter_for(base), micro_batch_tokens=64, world=world)
    with Peak(peak.before) as peak:
        trainer.step(Batch(examples(2), BOTH), 1e-3)
    found["step"] = peak.bytes
    del trainer, base
    gc.collect()
    with Peak(peak.before) as peak:
        load_base(folder)
    return found | {"whole": peak.bytes}


class Peak:
    """The largest memory of the process that no file backs, sampled while a block runs."""

    def __init__(self, before: int | None = None) -> None:
        self.before = self._now() if before is None else before
        self.most = 0
        self._running = True
        self._thread = threading.Thread(target=self._watch)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while self._running:
            self.most = max(self.most, self._now())
            time.sleep(1e-3)

    @property
    def bytes(self) -> int:
        """Most of it, less what was there before."""
        return self.most - self.before

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.most = max(self.most, self._now())


def main(what: str, folder: str, results: str) -> None:
    """Do one of the above, and leave what it found."""
    torch.set_num_threads(1)
    with join() as world:
        found = {"compare": compare, "measure": measure}[what](Path(folder), world)
        Path(results, f"{world.rank}.json").write_text(json.dumps(found))
        distributed.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
