"""The harness: what is wrong is never timed, turns alternate, and rows outlive a kill."""

import json
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import (
    FAILED,
    TIMED,
    WRONG,
    Candidate,
    DeviceLost,
    Expected,
    Protocol,
    ResultFile,
    Work,
    check,
    expect,
    measure,
    ratio,
)

CPU = torch.device("cpu")
TRUTH = torch.linspace(-1, 1, 9, dtype=torch.float64)
SHORT = Protocol(rounds=5, warmup=1, round_ms=0.0)
ENVIRONMENT = {"device": "cpu", "commit": "a", "sources": "1"}


def candidate(name: str, results: Any, calls: list[str] | None = None) -> Candidate:
    """One that returns `results`, or raises it, and logs its calls."""

    def run(_: Any) -> dict[str, Tensor]:
        if calls is not None:
            calls.append(name)
        if isinstance(results, Exception):
            raise results
        return {"out": results}

    expected = {"out": Expected(TRUTH, 1e-6)}
    return Candidate(name, lambda: Work(lambda: None, run), expected)


def test_what_is_wrong_is_reported_and_never_timed() -> None:
    calls: list[str] = []
    given = [candidate("right", TRUTH.float(), calls), candidate("wrong", 1.001 * TRUTH, calls)]
    rows = measure(given, CPU, SHORT)
    assert rows["right"]["status"] == TIMED
    assert rows["right"]["errors"]["out"] < 1e-6
    assert rows["wrong"]["status"] == WRONG
    assert rows["wrong"]["reason"] == "out is off by 0.001, more than 1e-06"
    assert "ms" not in rows["wrong"]
    assert calls.count("wrong") == 1
    # the check, the warm-up, and the rounds
    assert calls.count("right") == 1 + 1 + 5


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ({}, "out is missing"),
        ({"out": TRUTH[:4]}, r"out must be \(9,\), got \(4,\)"),
        ({"out": TRUTH * torch.nan}, "out is off by nan"),
        ({"out": TRUTH + 1}, "out is off by 1, more than"),
    ],
)
def test_the_gate_finds(results: dict[str, Tensor], reason: str) -> None:
    errors, wrong = check(results, {"out": Expected(TRUTH, 1e-6)})
    assert re.match(reason, wrong), wrong
    json.dumps(errors, allow_nan=False)


def test_a_distance_of_its_own_counts_as_the_error() -> None:
    def differing(got: Tensor, truth: Tensor) -> Tensor:
        return (got != truth).sum()[None]

    expected = {"out": Expected(TRUTH, 2.0, differing)}
    far = TRUTH + torch.tensor([9.0, 9.0, *[0.0] * 7])
    assert check({"out": far}, expected) == ({"out": 2.0}, "")
    errors, wrong = check({"out": TRUTH + 1}, expected)
    assert errors["out"] == 9
    assert wrong == "out is off by 9, more than 2"


def test_only_what_is_observed_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness._Device, "observe", lambda *given: {"kernels": given[2]})
    given = [candidate("short", TRUTH), replace(candidate("long", TRUTH), observed=False)]
    rows = measure(given, CPU, SHORT)
    assert rows["short"]["kernels"]
    assert not rows["long"]["kernels"]


def test_the_bound_follows_the_plain_formula_in_the_same_dtype() -> None:
    truth, eager = torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.0]).bfloat16()
    exact = expect({"out": truth}, {"out": eager})["out"]
    assert exact.bound == 4 * 2**-7 * 4.0 + 2**-23 * 4.0
    off = expect({"out": truth}, {"out": eager + 0.5})["out"]
    assert off.bound == pytest.approx(3 * 0.5 + exact.bound)


def test_the_bound_allows_a_sum_its_roundings() -> None:
    truth = {"out": torch.full((64, 4), 0.5).double(), "dgate": torch.tensor([8.0]).double()}
    bounds = expect(truth, {name: exact.float() for name, exact in truth.items()})
    assert bounds["out"].bound == 5 * 2**-23 * 0.5
    assert bounds["dgate"].bound == (4 + 16) * 2**-23 * 8.0


def test_what_raises_is_a_row_with_its_reason() -> None:
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 9 GiB")
    rows = measure([candidate("big", out_of_memory), candidate("right", TRUTH)], CPU, SHORT)
    assert rows["big"] == {
        "status": FAILED,
        "reason": "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB",
    }
    assert rows["right"]["status"] == TIMED


def test_what_raises_later_loses_its_turns_and_no_other() -> None:
    count = 0

    def run(_: None) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("too hot")
        return {"out": TRUTH}

    failing = Candidate("failing", lambda: Work(lambda: None, run), {"out": Expected(TRUTH, 0)})
    rows = measure([failing, candidate("right", TRUTH)], CPU, SHORT)
    assert (rows["failing"]["status"], rows["failing"]["reason"]) == (
        FAILED,
        "RuntimeError: too hot",
    )
    assert len(rows["right"]["round_ms"]) == 5


def test_a_broken_context_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness._Device, "alive", lambda self: False)
    given = [candidate("right", TRUTH), candidate("bad", RuntimeError("illegal access"))]
    with pytest.raises(DeviceLost, match=r"bad broke the GPU's context: .*illegal access") as lost:
        measure(given, CPU, SHORT)
    assert lost.value.row["status"] == FAILED


def test_candidates_take_turns_in_orders_of_their_own() -> None:
    calls: list[str] = []
    given = [candidate(name, TRUTH, calls) for name in "abcdef"]
    measure(given, CPU, SHORT)
    assert "".join(calls[:12]) == "aabbccddeeff"
    rounds = ["".join(calls[at : at + 6]) for at in range(12, len(calls), 6)]
    assert len(set(rounds)) == len(rounds) == SHORT.rounds
    assert all(sorted(one) == list("abcdef") for one in rounds)


def test_medians_and_quantiles_are_over_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([[9.0], [5.0, 1.0], [2.0, 4.0], [3.0, 6.0], [7.0, 8.0], [10.0, 11.0]])
    monkeypatch.setattr(harness._Device, "passes", lambda self, work, count: next(turns))
    row = measure([candidate("right", TRUTH)], CPU, SHORT)["right"]
    assert row["ms"] == pytest.approx([5.5, 2.8, 8.4])
    assert row["round_ms"] == [3.0, 3.0, 4.5, 7.5, 10.5]
    assert row["passes"] == 10
    assert "warm_ms" not in row


def test_what_comes_before_is_not_timed() -> None:
    slow = Candidate(
        "slow",
        lambda: Work(lambda: time.sleep(0.01), lambda _: {"out": TRUTH}),
        {"out": Expected(TRUTH, 0)},
    )
    assert measure([slow], CPU, SHORT)["slow"]["ms"][0] < 5


def test_a_turn_takes_as_many_passes_as_fit() -> None:
    row = measure([candidate("quick", TRUTH)], CPU, Protocol(5, 1, 1e9))["quick"]
    assert row["passes"] == 5 * harness.MAX_REPEATS


def test_ratios_are_taken_within_rounds() -> None:
    slow, fast = {"round_ms": [2.0, 40.0, 6.0]}, {"round_ms": [1.0, 10.0, 3.0]}
    assert ratio(slow, fast) == 2.0
    assert ratio(fast, slow) == 0.5


def test_rows_are_kept_and_continued(tmp_path: Path) -> None:
    path, cell = tmp_path / "x.json", {"shape": [1, 2], "mode": "forward"}
    first = ResultFile(path, "x", ENVIRONMENT, fresh=False)
    first.add(cell, {"a": {"status": TIMED, "ms": [1.0, 0.9, 1.1]}})
    first.write({"verdicts": []})
    # the sources are what counts, not the commit they became
    second = ResultFile(path, "x", ENVIRONMENT | {"commit": "b"}, fresh=False)
    assert second.of(cell)["a"]["ms"] == [1.0, 0.9, 1.1]
    assert second.of({**cell, "mode": "backward"}) == {}
    second.write({})
    assert json.loads(path.read_text())["environment"]["commit"] == ENVIRONMENT["commit"]
    second.add({**cell, "mode": "backward"}, {"a": {"status": FAILED, "reason": "r"}})
    second.write({})
    held = json.loads(path.read_text())
    assert [row["cell"]["mode"] for row in held["rows"]] == ["forward", "backward"]
    assert held["environment"]["commit"] == "b"
    assert ResultFile(path, "x", ENVIRONMENT, fresh=True).rows == {}
    other = ResultFile(path, "x", ENVIRONMENT | {"sources": "2"}, fresh=False)
    assert (other.rows, other.dropped) == ({}, 2)


def test_files_of_something_else_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    ResultFile(path, "x", ENVIRONMENT, fresh=False).write({})
    with pytest.raises(ValueError, match="holds results of x, not of y: give another --output"):
        ResultFile(path, "y", ENVIRONMENT, fresh=False)
    path.write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"holds no results .*--fresh overwrites it"):
        ResultFile(path, "x", ENVIRONMENT, fresh=False)


def test_the_environment_names_the_code_that_is_timed(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("1")
    before = harness.describe(CPU, [tmp_path])
    assert before["threads"] == torch.get_num_threads()
    assert before["packages"]["torch"] == torch.__version__
    assert before == harness.describe(CPU, [tmp_path / "code.py"])
    (tmp_path / "code.py").write_text("2")
    assert harness.describe(CPU, [tmp_path])["sources"] != before["sources"]


def test_clocks_are_read_where_the_tool_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert harness.nvidia_smi(CPU, harness.CLOCKS) is None
    cuda, uuid = torch.device("cuda"), type("Properties", (), {"uuid": "1-2"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuid)

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "--id=GPU-1-2"
        assert command[1] == "--query-gpu=clocks.sm,power.draw"
        return subprocess.CompletedProcess(command, 0, stdout="1980 MHz, 310.20 W\n")

    monkeypatch.setattr(subprocess, "run", answer)
    found = harness.nvidia_smi(cuda, ["clocks.sm", "power.draw"])
    assert found == {"clocks.sm": "1980 MHz", "power.draw": "310.20 W"}

    def absent(command: list[str], **_: Any) -> None:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", absent)
    assert harness.nvidia_smi(cuda, harness.CLOCKS) is None


@pytest.mark.gpu
def test_a_gpu_is_timed_with_its_kernels_and_memory() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    truth = x.double() @ x.double()
    work = Work(lambda: None, lambda _: {"out": x @ x})
    given = Candidate("product", lambda: work, {"out": Expected(truth, 1.0)})
    row = measure([given], x.device, Protocol(rounds=5, warmup=1, round_ms=1.0))["product"]
    assert row["status"] == TIMED
    assert 0 < row["ms"][1] <= row["ms"][0] <= row["ms"][2] < 100
    assert row["peak_bytes"] >= x.nbytes
    assert row["kernels"]
