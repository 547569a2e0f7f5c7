"""A profiled run takes the same steps, and says where their time went."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter import assets
from llama_adapter.config import AdapterConfig
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.step_profile import TABLE, TRACE, phase, profiled
from llama_adapter.training import FinetuneResult, finetune


def run(output: Path, profile: bool, **options: Any) -> FinetuneResult:
    config = FinetuneConfig(
        data=options.pop("data", assets.FOLLOW_TRAIN),
        output=output,
        adapter=AdapterConfig(n_layers=2),
        profile=profile,
        **{"batch_size": 4, "max_steps": 6, "val_size": 2} | options,
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


def columns(output: Path) -> dict[str, tuple[int, float]]:
    """Calls and milliseconds a step by operation; of phases milliseconds alone."""
    found = {}
    for line in (output / TABLE).read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if cells[-1].endswith("%"):
            found[cells[0]] = (int(cells[1]) if len(cells) == 4 else 0, float(cells[-2]))
    return found


def test_a_validation_is_no_part_of_a_step(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    records = json.loads(assets.FOLLOW_TRAIN.read_text())[:264]
    data.write_text(json.dumps(records))
    # epochs of four steps, so that a validation of 256 records falls among those measured
    options = {"data": data, "batch_size": 2, "epochs": 9, "max_steps": 9}
    run(tmp_path / "without", True, val_size=0, **options)
    run(tmp_path / "with", True, val_size=256, **options)
    without, with_it = columns(tmp_path / "without"), columns(tmp_path / "with")
    assert with_it["aten::mm"][0] == without["aten::mm"][0]
    # it takes some twenty times as long as a step
    assert with_it["forward"][1] < 4 * without["forward"][1]


@pytest.mark.parametrize(("steps", "measured"), [(3, "one step"), (4, "mean of 2 steps")])
def test_a_short_run_is_the_mean_of_the_steps_that_it_took(
    tmp_path: Path, steps: int, measured: str
) -> None:
    run(tmp_path / "short", True, max_steps=steps)
    run(tmp_path / "long", True, max_steps=5)
    assert (tmp_path / "short" / TABLE).read_text().splitlines()[0].endswith(measured)
    assert (tmp_path / "long" / TABLE).read_text().splitlines()[0].endswith("mean of 3 steps")
    short, long = columns(tmp_path / "short"), columns(tmp_path / "long")
    assert short["aten::mm"][0] == long["aten::mm"][0]


def test_a_run_that_is_too_short_says_that_nothing_was_profiled(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing was profiled: the first 2 steps are not, and th"):
        run(tmp_path / "run", True, max_steps=2)
    assert not (tmp_path / "run" / TABLE).exists()
    assert not (tmp_path / "run" / TRACE).exists()


def test_without_a_folder_nothing_is_measured() -> None:
    with profiled(None, torch.device("cpu")) as advance:
        for _ in range(9):
            with phase("forward"):
                advance()
