"""Options that do not go together are refused in one line that names them."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.host_training.host_config import (
    METRICS,
    TASKS,
    HostRunConfig,
    TaskOptions,
    defaults,
)
from llama_adapter.options import UsageError, build

BASE = {"model": Path("m"), "output": Path("o"), "data": Path("d")}
VTAB = {**BASE, "host": "vit", "task": "vtab"}
SQUAD = {**BASE, "host": "roberta", "task": "squad", "test_data": (Path("dev.json"),)}
NOVEL = {**BASE, "host": "clip", "task": "base_to_novel", "dataset": "EuroSAT"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**VTAB, "host": "roberta"}, "host must be vit or clip for vtab, got roberta"),
        ({**SQUAD, "host": "clip"}, "host must be roberta or bert for squad, got clip"),
        ({**VTAB, "host": "gpt2"}, "host must be one of vit, roberta, bert, clip, got 'gpt2'"),
        ({**VTAB, "method": "coop"}, "method coop is for clip, got the host vit"),
        ({**VTAB, "method": "magic"}, "method must be one of zero_init, "),
        ({**VTAB, "stride": 64}, "stride is no option of vtab, got 64"),
        ({**SQUAD, "shots": 4}, "shots is no option of squad, got 4"),
        ({**VTAB, "dataset": "mnist"}, "dataset must be one of cifar100, "),
        ({**SQUAD, "test_data": ()}, "test_data is required for squad"),
        ({**SQUAD, "test_data": (Path("a"), Path("b"))}, "test_data must be one file for squad"),
        ({**NOVEL, "images": Path("i")}, "dataset or images must be given for base_to_novel"),
        ({**NOVEL, "dataset": None}, "dataset or images must be given for base_to_novel"),
        ({**NOVEL, "template": "a {}"}, "template must be left out where dataset is given"),
        ({**NOVEL, "final": "train+val"}, "final must be train for base_to_novel"),
        ({**NOVEL, "hidden_dropout": 0.1}, "hidden_dropout must be left out: a clip has none"),
        ({**VTAB, "hidden_dropout": 1.0}, "hidden_dropout must be from 0 to below 1, got 1.0"),
        ({**VTAB, "lr_grid": (0.1, 0.0)}, "lr_grid must hold positive learning rates, got 0.0"),
        ({**VTAB, "save_every": 0}, "save_every must be at least 1, got 0"),
        ({**VTAB, "threads": 0}, "threads must be from 1 to 1024, got 0"),
        ({**VTAB, "rank": 0}, "rank must be at least 1, got 0"),
        ({**VTAB, "epochs": 0}, "epochs must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        build(HostRunConfig, given)


def test_every_task_has_hosts_and_a_metric_and_no_option_has_two_meanings() -> None:
    assert TASKS.keys() == METRICS.keys()
    flat = defaults(HostRunConfig)
    nested = [name for value in flat.values() if isinstance(value, dict) for name in value]
    names = [*flat, *nested, *TaskOptions.__dataclass_fields__]
    assert len(names) == len(set(names))


def test_a_run_can_be_continued_from_anywhere() -> None:
    config = build(HostRunConfig, {**SQUAD, "val_data": Path("v")}).absolute()
    whole = [config.model, *config.task_options.test_data, config.task_options.val_data]
    assert all(path is not None and path.is_absolute() for path in whole)
    assert config.task_options.images is None
    assert str(config.output) == "o"
    assert config.absolute() == config
    assert asdict(config)["task_options"]["task"] == "squad"
