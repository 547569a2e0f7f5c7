"""One run of `benchmarks.hosts`: the learning rate from a grid, then a training per seed."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from benchmarks.hosts_plan import Entry, Row
from llama_adapter.host_training.fit import FitConfig, choose_lr, evaluate, fit
from llama_adapter.hosts.methods import Attached, MethodOptions, attach
from llama_adapter.tasks.task import Task

# of the first seed's predictions, so many are kept in a row
KEPT = 60


def measure_method(
    make_host: Callable[[], nn.Module],
    task_of: Callable[[int], Task],
    entry: Entry,
    config: FitConfig,
    grid: Sequence[float],
    seeds: Sequence[int],
    splits: Mapping[str, str] | None = None,
) -> Row:
    """Choose a method's learning rate, train it once per seed, and score it on the test.

    Args:
        make_host: gives the pre-trained host afresh.
        task_of: from a seed, the task; its head's outputs are those of the host.
        entry: the method.
        config: of every training but for lr and seed.
        grid: the learning rates, the same for every method; chosen with the first seed.
        seeds: of initial values, order, and of the task where it draws.

    Returns:
        Plain data: lr, grid (validation score by rate), scores (of the test, a mapping per seed),
        losses (first and last epoch's mean, per seed), parameters (trained), head_parameters,
        predictions (of the first seed's KEPT first items), train_seconds (of a processor, per
        seed), processor_seconds and seconds of all.
    """
    raise NotImplementedError
