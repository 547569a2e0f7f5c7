"""The training step's benchmark: every lever gives one loss, work is counted, targets judged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, train_step
from benchmarks.harness import SKIPPED, TIMED, check
from benchmarks.reporting import MET, MISSED, PENDING, cells_of, judge
from benchmarks.train_step import settings
from benchmarks.train_step_problem import (
    LONGEST,
    OTHERS,
    OURS,
    PREFIXES,
    Problem,
    Setting,
    absent,
    alpaca_like,
)
from benchmarks.train_step_report import TARGETS, figures, on_gpu, on_processor, tables

CPU = torch.device("cpu")
# litgpt is another environment's: tests/version_matrix.py
HERE = tuple(name for name in (*OURS, *OTHERS) if absent(name) is None)
QUICK = ["--quick", "--device", "cpu", "--output"]
TOY = settings("cpu", "quick")[0]
*GPU_TARGETS, PROCESSOR = TARGETS


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "train_step.json").read_text())


@pytest.fixture(scope="module")
def toy() -> Problem:
    return Problem(TOY, CPU)


def test_every_lever_and_peft_give_the_loss_and_gradients_of_the_truth(toy: Problem) -> None:
    expected = toy.expected()
    assert set(expected) == {"loss", "dprompts", "dgates"}
    assert all(float(x.truth.abs().max()) > 0 for x in expected.values())
    for name in filter(toy.comparable, HERE):
        assert check(toy.call(name)(), expected)[1] == "", name
    off = {key: 1.01 * x for key, x in toy.call("shared_prefix")().items()}
    assert check(off, expected)[1] != ""
    assert check(toy.call("lora_padded")(), {})[1] == ""


def test_records_are_as_long_as_alpacas() -> None:
    examples, starts = alpaca_like(4000, 32000)
    lengths = torch.tensor([len(example.tokens) for example in examples]).double()
    assert lengths.median() == pytest.approx(111, abs=4)
    assert lengths.mean() == pytest.approx(129, abs=5)
    assert lengths.quantile(0.95) == pytest.approx(250, abs=15)
    assert int(lengths.max()) <= LONGEST
    labels = sum(example.n_labels for example in examples)
    assert labels / float(lengths.sum()) == pytest.approx(0.5, abs=0.03)
    assert [len(start) for start in starts] == list(PREFIXES)
    paired = sum(example.tokens[:39] == starts[1] for example in examples)
    assert paired / 4000 == pytest.approx(0.4, abs=0.03)


def test_work_is_what_is_computed(toy: Problem) -> None:
    facts = {name: toy.facts(name) for name in (*OURS, *OTHERS)}
    assert {one["tokens"] for one in facts.values()} == {toy.tokens}
    computed = [facts[name]["computed_tokens"] for name in OURS]
    assert computed[0] == TOY.records * LONGEST
    assert computed == sorted(computed, reverse=True)
    assert computed[2] == toy.tokens
    assert "flop" not in facts["peft_512"]


def test_the_command_times_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main([*QUICK, str(tmp_path)]) == 0
    found, printed = held(tmp_path), capsys.readouterr().out
    assert {row["provider"] for row in found["rows"]} == {*OURS, *OTHERS}
    for row in found["rows"]:
        assert row["status"] == (TIMED if row["provider"] in HERE else SKIPPED), row
    assert [one["verdict"] for one in found["verdicts"]] == [PENDING] * len(TARGETS)
    assert (tmp_path / "train_step.md").read_text() in printed
    assert (tmp_path / "train_step_times.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "train_step.json").read_text()
    assert train_step.main([*QUICK, str(tmp_path)]) == 0
    assert held(tmp_path)["rows"] == json.loads(before)["rows"]


def test_without_peft_there_is_no_truth_and_every_row_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "absent", lambda *_: "peft")
    assert train_step.main([*QUICK, str(tmp_path)]) == 0
    for row in held(tmp_path)["rows"]:
        assert (row["status"], row["reason"]) == (SKIPPED, "peft is not installed")


def cells(setting: Setting, **ms: float) -> Any:
    rows = [
        {
            "cell": {"shape": vars(setting), "mode": "step"}, "provider": name, "status": TIMED,
            "ms": [x, x, x], "round_ms": [x] * 5, "tokens": 100, "flop": 1e9,
            "computed_tokens": 90,
        }
        for name, x in ms.items()
    ]  # fmt: skip
    return cells_of(rows, Setting)


@pytest.mark.parametrize(("fast", "verdict"), [(0.9, MET), (1.1, MISSED)])
def test_targets_are_judged_where_they_are_stated(fast: float, verdict: str) -> None:
    gpu, processor = settings("cuda", "core")[0], settings("cpu", "core")[0]
    assert on_gpu(gpu)
    assert on_processor(processor)
    found = cells(gpu, shared_prefix=fast, peft_512=6.0, peft_padded=2.5)
    for target in GPU_TARGETS:
        assert judge(target, found, "NVIDIA H200").verdict == verdict
        assert judge(target, found, "NVIDIA A100-SXM4-80GB").verdict == PENDING
    found = cells(processor, shared_prefix=fast, padded_batch=1.5)
    assert judge(PROCESSOR, found, "cpu").verdict == verdict
    shown = "\n".join(tables(cells(gpu, shared_prefix=2.0, padded_512=8.0), "NVIDIA H200"))
    assert "4.00" in shown
    assert "0.5 " in shown
    assert figures(found).keys() == {"times"}


def test_a_failure_of_the_truth_is_the_reason_of_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Problem) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Problem, "expected", fail)
    assert train_step.main([*QUICK, str(tmp_path)]) == 0
    rows = [row for row in held(tmp_path)["rows"] if row["provider"] in HERE]
    assert {row["status"] for row in rows} == {harness.FAILED}
    assert {row["reason"] for row in rows} == {"RuntimeError: out of memory"}
