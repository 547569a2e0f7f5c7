"""The benchmarks' common options: a limited time begins nothing new, reports, and continues."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention, command, decode, dropin, generate, harness, small_ops
from benchmarks.harness import ResultFile

QUICK = ["--quick", "--device", "cpu", "--output"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves: its reading is the last number."""
    readings = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: readings[-1])
    return readings


def test_nothing_new_begins_after_the_time_and_the_same_command_continues(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = harness.measure

    def a_minute(*args: Any) -> dict[str, harness.Row]:
        clock.append(clock[-1] + 60)
        return measure(*args)

    monkeypatch.setattr(command.harness, "measure", a_minute)
    wanted = small_ops.cells("cpu", "quick")
    assert small_ops.main([*QUICK, str(tmp_path), "--minutes", "1.5"]) == 0
    cells = {json.dumps(row["cell"]) for row in held(tmp_path)}
    assert len(cells) == 2 < len(wanted)
    assert (tmp_path / "small_ops.md").exists()
    first = held(tmp_path)
    assert small_ops.main([*QUICK, str(tmp_path)]) == 0
    assert held(tmp_path)[: len(first)] == first
    assert {json.dumps(row["cell"]) for row in held(tmp_path)} > cells


@pytest.mark.parametrize("benchmark", [attention, decode, dropin, generate, small_ops])
def test_a_report_of_nothing_is_one(
    benchmark: Any, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "time_is_up", lambda _: True)
    assert benchmark.main([*QUICK, str(tmp_path), "--minutes", "1"]) == 0
    name = benchmark.__name__.removeprefix("benchmarks.")
    assert (tmp_path / f"{name}.md").read_text().startswith("# ")


def held(folder: Path) -> list[harness.Row]:
    return json.loads((folder / "small_ops.json").read_text())["rows"]


def test_portions_are_whole_and_end_with_the_time(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    results = ResultFile(tmp_path / "x.json", "x", {}, fresh=True)
    assert list(command.in_time("abcde", results, 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(command.in_time("", results)) == []
    results.deadline = 130.0
    portions = command.in_time("abcde", results, 2)
    assert next(portions) == ["a", "b"]
    clock.append(131.0)
    assert list(portions) == []
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "five", ""])
def test_a_time_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        small_ops.main(["--minutes", text])
    assert ended.value.code == 2
    assert "minutes" in capsys.readouterr().err
