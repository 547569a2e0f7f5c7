"""A run folder of every task, and runs that stop and go on bitwise."""

import json
from pathlib import Path
from typing import Any

import pytest
from host_runs import options_of
from safetensors.torch import load_file

from llama_adapter.host_training.host_config import METRICS, TASKS, HostRunConfig
from llama_adapter.host_training.run import train_host
from llama_adapter.options import build
from llama_adapter.run_folder import RunFolder

VARYING = ("time", "items_per_second")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss curve takes longer to draw than these runs take."""
    monkeypatch.setattr(RunFolder, "draw_curve", lambda self: None)


def config_of(task: str, made: Path, output: Path, **more: Any) -> HostRunConfig:
    return build(HostRunConfig, {**options_of(task, made), "output": output, **more})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_trains(task: str, made: Path, tmp_path: Path) -> None:
    result = train_host(config_of(task, made, tmp_path / "run"), progress=False)
    folder = tmp_path / "run"
    assert result.task.metric == METRICS[task]
    rows = rows_of(folder)
    per_epoch = -(-len(result.task.train) // 6)
    assert len(rows) == 3 * per_epoch
    losses = [row["loss"] for row in rows]
    assert len({*losses}) == len(losses)
    assert [n for n, row in enumerate(rows, 1) if f"val_{METRICS[task]}" in row] == [
        per_epoch,
        2 * per_epoch,
        3 * per_epoch,
    ]
    written = load_file(folder / "adapter.safetensors")
    assert written["gates"].abs().min() > 0
    described = json.loads((folder / "task.json").read_text())
    assert described["labels"] == list(result.task.labels)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["transformers"] is not None
    assert result.attached.model.training is False
