"""The drop-in benchmark: right before timed, the same as PEFT, continues, and judges."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dropin, harness
from benchmarks.dropin import MODES, PROVIDERS, settings
from benchmarks.dropin_problem import Problem
from benchmarks.dropin_report import TARGETS, TITLES, Setting, figures, on_gpu, on_processor, tables
from benchmarks.harness import SKIPPED, TIMED, WRONG, Row, check
from benchmarks.reporting import MET, MISSED, PENDING, cells_of, judge

CPU = torch.device("cpu")
QUICK = ["--quick", "--device", "cpu", "--output"]
TOY = settings("cpu", "quick")[0]
BLOCK, *PROCESSOR = TARGETS


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dropin.json").read_text())


@pytest.fixture(scope="module")
def toy() -> Problem:
    return Problem(TOY, CPU)


@pytest.mark.parametrize("mode", MODES)
def test_peft_and_patched_pass_and_a_wrong_result_does_not(toy: Problem, mode: str) -> None:
    expected = toy.expected(mode)
    for name in ("peft", "patched"):
        errors, wrong = check(toy.call(name, mode)(), expected)
        assert wrong == ""
        assert set(errors) == set(expected)
    plain = toy.call("transformers", mode)()
    assert check(plain, expected)[1] != ""
    off = {name: 1.01 * x for name, x in toy.call("patched", mode)().items()}
    assert check(off, expected)[1] != ""


def test_gradients_are_among_what_is_checked(toy: Problem) -> None:
    assert set(toy.expected("step")) == {"loss", "dadaption_prompt", "dadaption_gate"}
    assert set(toy.expected("block_training")) >= {"out", "dhidden", "adaption_gate"}
    for name, x in toy.expected("step").items():
        # transformers' loss is float32 whatever its logits are
        assert x.truth.dtype == (torch.float32 if name == "loss" else torch.float64)
        assert x.truth.abs().max() > 0


def test_only_one_of_the_models_is_patched(toy: Problem) -> None:
    used = {name: model.config._attn_implementation for name, model in toy.models.items()}
    assert used == {"patched": "llama_adapter", "peft": "sdpa", "transformers": "sdpa"}
    weights = [model.lm_head.weight.data_ptr() for model in toy.models.values()]
    assert len(set(weights)) == 1


def test_quick_command_times_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dropin.main([*QUICK, str(tmp_path)]) == 0
    printed, found = capsys.readouterr().out, held(tmp_path)
    names = {(row["cell"]["mode"], row["provider"]) for row in found["rows"]}
    assert names == {(mode, name) for mode in MODES for name in PROVIDERS}
    for row in found["rows"]:
        assert row["status"] == TIMED
        assert Setting(**row["cell"]["shape"]) == TOY
        low, high = sorted(row["ms"])[0], sorted(row["ms"])[-1]
        assert 0 < low <= row["ms"][0] <= high
    assert [one["verdict"] for one in found["verdicts"]] == [PENDING] * len(TARGETS)
    assert found["environment"]["packages"]["peft"]
    assert (tmp_path / "dropin.md").read_text() in printed
    assert "its numbers mean nothing" in printed
    assert (tmp_path / "dropin_times.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, seen = harness.measure, []

    def measure(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        if len(seen) == 2:
            seen.append(())
            raise KeyboardInterrupt
        seen.append(tuple(one.name for one in candidates))
        return theirs(candidates, *rest)

    monkeypatch.setattr(harness, "measure", measure)
    assert dropin.main([*QUICK, str(tmp_path)]) == 130
    before = held(tmp_path)["rows"]
    assert len(before) == 2 * len(PROVIDERS)
    assert dropin.main([*QUICK, str(tmp_path)]) == 0
    assert len(seen) == 1 + len(MODES)
    assert held(tmp_path)["rows"][: len(before)] == before
    assert dropin.main([*QUICK, str(tmp_path)]) == 0
    assert len(seen) == 1 + len(MODES)


def test_what_differs_from_peft_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unpatched(Problem):
        def __init__(self, setting: Setting, device: torch.device) -> None:
            super().__init__(setting, device)
            with torch.no_grad():
                self.models["patched"].model.layers[-1].self_attn.adaption_gate.mul_(1.5)

    monkeypatch.setattr("benchmarks.dropin_problem.Problem", Unpatched)
    assert dropin.main([*QUICK, str(tmp_path)]) == 0
    for row in held(tmp_path)["rows"]:
        assert (row["status"] == WRONG) == (row["provider"] == "patched")


def test_without_peft_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropin, "find_spec", lambda name: None if name == "peft" else object())
    assert dropin.main([*QUICK, str(tmp_path)]) == 0
    rows = held(tmp_path)["rows"]
    assert {(row["status"], row["reason"]) for row in rows} == {(SKIPPED, "peft is not installed")}


def row(ms: float) -> Row:
    return {"status": TIMED, "ms": [ms] * 3, "round_ms": [ms] * 5, "tokens": 8, "errors": {}}


def test_targets_are_judged_where_they_hold() -> None:
    (gpu,) = settings("cuda", "core")
    assert on_gpu(gpu)
    cells = {(gpu, "block"): {"patched": row(1.0), "peft": row(1.8)}}
    assert judge(BLOCK, cells, "NVIDIA H200").verdict == MET
    assert judge(BLOCK, cells, "cpu").verdict == PENDING
    cells[gpu, "block"]["peft"] = row(1.6)
    assert judge(BLOCK, cells, "NVIDIA H200").verdict == MISSED
    here = settings("cpu", "core")
    assert all(map(on_processor, here))
    assert not on_processor(TOY)
    for target in PROCESSOR:
        times = {(one, target.mode): {"patched": row(1.0), "peft": row(1.1)} for one in here}
        assert judge(target, times, "cpu").verdict == MET
        times[here[0], target.mode]["patched"] = row(1.2)
        assert judge(target, times, "cpu").verdict == MISSED


def test_tables_and_figures_show_every_row() -> None:
    failed = {"status": "failed", "reason": "it broke", "tokens": 1}
    cells = {(TOY, mode): {"patched": row(1.0), "peft": row(2.0), "transformers": failed}
             for mode in TITLES}  # fmt: skip
    text = "\n".join(tables(cells))
    assert text.count("| 2.00 ") == len(MODES)
    assert text.count("failed: it broke") == len(MODES)
    assert figures(cells)["times"].startswith(b"\x89PNG")


def test_full_holds_core_and_settings_can_be_written() -> None:
    for device in ("cpu", "cuda"):
        core, full = settings(device, "core"), settings(device, "full")
        assert full[: len(core)] == core
    text = {"cell": {"shape": {**TOY.__dict__}, "mode": "block"}, "provider": "peft", **row(1.0)}
    assert list(cells_of([json.loads(json.dumps(text))], Setting)) == [(TOY, "block")]
