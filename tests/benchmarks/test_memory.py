"""Is what a step keeps what the formula says, and is the largest pass found?"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.generate_models import CONFIGS
from benchmarks.harness import FAILED, TIMED
from benchmarks.memory import GB, Problem, Setting, computed_tokens, first_pass, report, settings
from llama_adapter.data.packed import pack

CPU = torch.device("cpu")
SEVEN = Setting("llama-7b", "bfloat16", 24)
ENVIRONMENT: dict[str, Any] = {
    "device": "NVIDIA H200", "packages": {"torch": "2.11.0", "triton": "3.6.0"},
}  # fmt: skip


@pytest.mark.parametrize("recompute", [None, "mlp", "block"])
@pytest.mark.parametrize("base", ["float32", "int8"])
def test_a_step_keeps_what_is_computed(base: str, recompute: str | None) -> None:
    if base == "int8":
        pytest.importorskip("torchao.quantization")
    given = Problem(Setting("toy", base, 0, recompute), CPU)
    computed = 4 * given.adapted * memory.kept_numbers(given.config, recompute)
    # a width of 64 has more statistics of rows a number than a width of 4,096
    once = 4 * given.config.dim * (recompute is not None)
    assert computed <= given.kept_bytes(900) <= 1.1 * computed + once


def test_seven_billion_parameters_in_24_gb() -> None:
    config = CONFIGS["llama-7b"]
    # throughput.md, section 4: 2.8 MB a token without what passes, 13.48 GB of weights
    assert 2 * 30 * memory.kept_numbers(config) == pytest.approx(2.80e6, rel=0.01)
    tokens = computed_tokens(config, 30, 24 * GB, int(13.48 * GB))
    assert 2900 <= tokens <= 3700
    assert computed_tokens(config, 30, 12 * GB, int(13.48 * GB)) == 0


def test_a_pass_is_as_large_as_asked() -> None:
    for tokens in (700, 2900):
        examples, starts = first_pass(tokens, 128)
        computed = len(pack(examples, prefixes=starts).tokens)
        assert tokens - 520 < computed <= tokens


@pytest.mark.parametrize("limit", [257, 517, 2903, 30_011])
@pytest.mark.parametrize("first", [100, 2000, 40_000])
def test_the_largest_pass_is_found(limit: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fits(self: Problem, tokens: int) -> int:
        asked.append(tokens)
        # records do not fill a pass whole
        return tokens - 41 if tokens <= limit else 0

    monkeypatch.setattr(Problem, "fits", fits)
    given = Problem(Setting("toy", "float32", 0), CPU)
    found = given.largest(first)
    assert limit / 1.04 - 41 <= found <= limit
    assert len(asked) < 40


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "fits", lambda *_: 0)
    assert Problem(Setting("toy", "float32", 0), CPU).largest(5000) == 0


def test_the_command_counts_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert memory.main(quick) == 0
    assert (tmp_path / "memory.md").read_text() in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert row["status"] == TIMED
    assert row["counted_bytes"] >= row["kept_bytes"] > 0
    assert memory.main(quick) == 0
    assert json.loads((tmp_path / "memory.json").read_text())["rows"] == [row]


def test_the_report_judges_what_was_measured() -> None:
    row = {
        "status": TIMED, "weights": 13_480_000_000, "kept_bytes": 2_800_000,
        "computed_tokens": 3300, "measured_tokens": 3011,
    }  # fmt: skip
    nf4 = Setting("llama-7b", "nf4", 12)
    rows = {SEVEN: row, nf4: {"status": FAILED, "reason": "torchao is not there"}}
    text = report(rows, ENVIRONMENT, trial=False)
    assert "2900: met" in text
    assert "torchao is not there" in text
    assert "2900: pending" in text
    missed = report({SEVEN: {**row, "measured_tokens": 2899}}, ENVIRONMENT, trial=False)
    assert "2900: MISSED" in missed


def test_the_goals_are_among_what_is_measured() -> None:
    wanted = {(one.model, one.base, one.cap) for one in settings("cuda", "core")}
    assert set(memory.TARGETS) <= wanted


@pytest.mark.gpu
def test_a_cap_holds_on_a_gpu(tmp_path: Path) -> None:
    given = Problem(Setting("toy", "bfloat16", 0), torch.device("cuda"))
    total = torch.cuda.get_device_properties(0).total_memory
    # what is there already, and room for some passes
    share = (torch.cuda.memory_reserved() + 6e8) / total
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        found = given.largest(2000)
        assert found >= 2000
        assert given.fits(int(1.3 * found)) == 0
        assert torch.cuda.max_memory_reserved() <= share * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()
