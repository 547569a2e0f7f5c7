"""The paper's run: real steps, counted work, both factors of the extrapolation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import command, paper_run
from benchmarks.harness import Protocol, ResultFile
from benchmarks.paper_run import BATCH, report, setting_of, timed_steps
from benchmarks.train_step_problem import Setting

QUICK = ["--quick", "--device", "cpu", "--output"]
SEVEN = Setting("llama-7b", BATCH, 10_000, 1, "bfloat16")
ENVIRONMENT: dict[str, Any] = {
    "device": "NVIDIA H200",
    "threads": 1,
    "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    "protocol": {"rounds": 500},
}
ROW: dict[str, Any] = {
    "ms": [400.0, 390.0, 420.0], "steps": 500, "seconds": 200.0, "tokens": 4_000_000,
    "computed_tokens": 3_000_000, "flop": 7e16, "peak_bytes": 3e10,
}  # fmt: skip


def test_the_command_takes_steps_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper_run.main([*QUICK, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "paper_run.md").read_text() in printed
    assert "its numbers mean nothing" in printed
    assert "extrapolated" not in printed
    held = json.loads((tmp_path / "paper_run.json").read_text())
    (row,) = held["rows"]
    assert row["steps"] == paper_run.QUICK_PROTOCOL.rounds
    assert 0 < row["computed_tokens"] < row["tokens"]
    assert row["flop"] > 0
    assert paper_run.main([*QUICK, str(tmp_path)]) == 0
    assert json.loads((tmp_path / "paper_run.json").read_text())["rows"] == [row]


def test_a_processor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_run.main(["--device", "cpu", "--output", str(tmp_path)]) == 2
    assert "the paper's run is a GPU's" in capsys.readouterr().err


def test_the_time_ends_the_run_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultFile(tmp_path / "x.json", "x", {}, fresh=True)
    monkeypatch.setattr(command, "time_is_up", lambda _: True)
    setting = Setting("toy", 2, 300, 1, "float32")
    row = timed_steps(setting, torch.device("cpu"), Protocol(50, 1, 0.0), results)
    assert row["steps"] == paper_run.FEWEST


def test_both_factors_are_told() -> None:
    text = report(SEVEN, ROW, ENVIRONMENT, trial=False)
    # 813 batches an epoch, five epochs, 0.4 s each
    assert "5 epochs of 52,002 records, 4,065 steps" in text
    assert "27.1: 8.13 times the timed" in text
    assert "30 minutes on one H200: met" in text
    assert "35.4%" in text
    assert "75.0%" in text
    slower = report(SEVEN, ROW | {"seconds": 260.0}, ENVIRONMENT, trial=False)
    assert "30 minutes on one H200: MISSED" in slower
    other = report(SEVEN, ROW, ENVIRONMENT | {"device": "NVIDIA H100 80GB HBM3"}, trial=False)
    assert "30 minutes on one H200: pending" in other


def test_the_papers_batch_is_what_is_run() -> None:
    class Options:
        quick, device = False, "cuda"

    assert setting_of(Options()) == SEVEN  # pyright: ignore[reportArgumentType]
