"""A profiled run takes the same steps, and says where their time went."""

import json
from pathlib import Path

import pytest
import torch

from llama_adapter import assets
from llama_adapter.config import AdapterConfig
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.step_profile import TABLE, TRACE, phase, profiled
from llama_adapter.training import FinetuneResult, finetune


def run(output: Path, profile: bool) -> FinetuneResult:
    config = FinetuneConfig(
        data=assets.FOLLOW_TRAIN,
        output=output,
        batch_size=4,
        max_steps=6,
        val_size=2,
        adapter=AdapterConfig(n_layers=2),
        profile=profile,
    )
    return finetune(config, progress=False)


def test_a_profiled_run_takes_the_same_steps_and_leaves_a_trace_and_a_table(tmp_path: Path) -> None:
    plain, profiled_run = run(tmp_path / "a", False), run(tmp_path / "b", True)
    assert profiled_run.losses == plain.losses
    assert not (tmp_path / "a" / TRACE).exists()
    assert json.loads((tmp_path / "b" / TRACE).read_text())["traceEvents"]
    text = (tmp_path / "b" / TABLE).read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    shares = {row[0]: float(row[2].rstrip("%")) for row in rows if len(row) == 3 and "%" in row[2]}
    assert set(shares) == {"pack", "forward", "backward", "reduce", "optimiser"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert shares["forward"] > 10
    assert shares["backward"] > 10
    assert "aten::" in text


def test_without_a_folder_nothing_is_measured() -> None:
    with profiled(None, torch.device("cpu")) as advance:
        for _ in range(9):
            with phase("forward"):
                advance()
