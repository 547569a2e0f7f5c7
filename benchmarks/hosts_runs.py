"""One run of `benchmarks.hosts`: the learning rate from a grid, then a training per seed.

Everything is the library's own: methods through `attach`, the choice of a rate through `Search`,
trainings through `fit`, scores through the task.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.hosts_plan import Entry, Row
from llama_adapter.host_training.fit import Fit, FitConfig, evaluate
from llama_adapter.host_training.search import Search
from llama_adapter.hosts.methods import Attached, MethodOptions, attach
from llama_adapter.seeded import seeded
from llama_adapter.tasks.task import Task

# places of the test's items whose predictions are kept in a row
KEPT = range(8)


def measure_method(
    make_host: Callable[[int], nn.Module],
    task_of: Callable[[int], Any],
    entry: Entry,
    config: FitConfig,
    grid: Sequence[float],
    seeds: Sequence[int],
    final_of: Callable[[Any], Task] | None = None,
    kept: Sequence[int] = KEPT,
) -> Row:
    """Choose a method's learning rate, train it once per seed, and score it on the test.

    Args:
        make_host: from a seed, the pre-trained host afresh; the seed is that of a new head.
        task_of: from a seed, the task, where it draws.
        entry: the method.
        config: of every training but for lr and seed.
        grid: the learning rates, the same for every method; chosen with the first seed.
        seeds: of initial values, of the items' order, and of the task.
        final_of: from a task what the chosen rate is trained on; None is the task itself.
        kept: places of the test's items whose predictions are kept; those beyond its end are not.

    Returns:
        Plain data: lr, grid (validation score by rate, None where the loss was not finite), scores
        (of the test, a mapping per seed), losses (the first and the last epoch's mean, per seed),
        parameters (trained) and head_parameters among them, predictions (the first seed's of
        `kept`), train_seconds (of a processor, per seed), processor_seconds and seconds of
        all.
    """
    start, busy = time.perf_counter(), time.process_time()
    row: Row = {"scores": [], "losses": [], "train_seconds": []}

    def attached(seed: int) -> Attached:
        generator = torch.Generator().manual_seed(seed)
        return attach(
            make_host(seed), entry.name, MethodOptions(**entry.options), generator=generator
        )

    groups = attached(seeds[0]).groups()
    row["head_parameters"] = sum(p.numel() for p in groups.get("head", {}).values())
    row["parameters"] = sum(p.numel() for some in groups.values() for p in some.values())
    if row["parameters"]:
        first = replace(config, seed=seeds[0])
        search = Search(lambda: attached(seeds[0]), task_of(seeds[0]), first, grid)
        with seeded(first.seed, torch.device("cpu")):
            for _ in search.rows():
                pass
        row["lr"] = search.rate
        row["grid"] = {f"{rate:g}": score for rate, score in search.results.items()}
    for seed in seeds:
        method, task = attached(seed), task_of(seed)
        if row["parameters"]:
            final = task if final_of is None else final_of(task)
            _train(row, method, final, replace(config, lr=row["lr"], seed=seed))
        predictions, scores = evaluate(method.model, task)
        row["scores"].append({name: round(value, 3) for name, value in scores.items()})
        row.setdefault("predictions", [predictions[i] for i in kept if i < len(predictions)])
    return {
        **row,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
    }


def _train(row: Row, method: Attached, task: Task, config: FitConfig) -> None:
    """Train to the end, and note losses and time."""
    busy = time.process_time()
    run = Fit(method, task, config)
    with seeded(config.seed, torch.device("cpu")):
        for _ in run.rows():
            pass
    losses = run.finish().losses
    row["train_seconds"].append(round(time.process_time() - busy, 2))
    epochs = losses[: run.per_epoch], losses[-run.per_epoch :]
    row["losses"].append([round(sum(some) / len(some), 4) for some in epochs])
