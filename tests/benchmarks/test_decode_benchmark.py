"""The decode benchmark: right before timed, bytes counted, continues, and judges as it says."""

import gc
import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks import command, decode, decode_problem, decode_report, harness
from benchmarks.baselines import Provider
from benchmarks.decode import PROVIDERS, cpu_shape, gpu_shape, shapes
from benchmarks.decode_problem import BANKS, KINDS, OTHERS, PAGE, bytes_of, expected, formula
from benchmarks.decode_report import (
    BACKENDS,
    FLOOR,
    OURS,
    READS,
    TARGETS,
    at_bandwidth,
    figures,
    many_on_gpu,
    on_gpu,
    reached,
    read_bandwidth,
    with_floor,
)
from benchmarks.harness import FAILED, TIMED, WRONG, DeviceLost, ResultFile, Row, check
from benchmarks.reporting import MET, MISSED, PENDING, UNDECIDED, judge
from benchmarks.roofline import Shape

CPU = torch.device("cpu")
QUICK = ["--quick", "--device", "cpu", "--output"]
HEADLINE = gpu_shape(32, 2048, False)
SMALL = Shape(3, 1, 2 * PAGE, 6, 2, 16, 5, True, "float32")
BY_NAME = {provider.name: provider for provider in PROVIDERS}
TIMED_HERE = {name for name, one in BY_NAME.items() if "cpu" in one.devices}
AT_BANDWIDTH, COSTS, MANY_ADAPTERS = TARGETS


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "decode.json").read_text())


def small(shape: Shape = SMALL) -> decode_problem.Problem:
    return decode_problem.problem(shape, CPU, decode_problem.memory_of(4096, CPU))


def test_quick_command_times_what_is_right_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = BY_NAME["ours"]
    off = Provider("off", "prompt", lambda given: lambda: ours.build(given)() * 1.01)
    monkeypatch.setattr(decode, "PROVIDERS", (*PROVIDERS, off))
    assert decode.main([*QUICK, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = held(tmp_path)
    rows = {row["provider"]: row for row in found["rows"]}
    assert set(rows) == {*TIMED_HERE, "off"}
    wrong = rows.pop("off")
    assert wrong["status"] == WRONG
    assert "is off by" in wrong["reason"]
    assert "ms" not in wrong
    assert "| off " in printed
    for row in rows.values():
        assert Shape(**row["cell"]["shape"]) == shapes("cpu", "quick")[0]
        assert row["status"] == TIMED
        middle, low, high = row["ms"]
        assert 0 < low <= middle <= high
        assert len(row["round_ms"]) == 5
        assert row["errors"]["out"] >= 0
    assert rows["ours"]["bytes"] > rows["ours_plain"]["bytes"]
    assert found["read_bandwidth"]["rounds"] == 5
    middle, low, high = found["read_bandwidth"]["gb_per_s"]
    assert 0 < low <= middle <= high
    assert found["environment"]["threads"] == 1
    assert {"commit", "sources", "protocol", "packages"} <= set(found["environment"])
    assert [one["verdict"] for one in found["verdicts"]] == [PENDING] * 3
    assert (tmp_path / "decode.md").read_text() in printed
    assert "its numbers mean nothing" in printed
    for name in ("times", "bandwidth"):
        assert (tmp_path / f"decode_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_keeps_its_rows_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shapes("cpu", "quick")[0]
    monkeypatch.setattr(decode, "shapes", lambda *_: [first, replace(first, batch=1)])
    harness_measure, seen = harness.measure, []

    def logged(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        seen.append({one.name for one in candidates})
        return harness_measure(candidates, *rest)

    def interrupted(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        if seen:
            raise KeyboardInterrupt
        return logged(candidates, *rest)

    monkeypatch.setattr(harness, "measure", interrupted)
    assert decode.main([*QUICK, str(tmp_path)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    before = held(tmp_path)["rows"]
    assert {row["cell"]["shape"]["batch"] for row in before} == {2}
    assert {row["provider"] for row in before} == TIMED_HERE

    monkeypatch.setattr(harness, "measure", logged)
    assert decode.main([*QUICK, str(tmp_path)]) == 0
    assert held(tmp_path)["rows"][: len(before)] == before
    assert seen == [TIMED_HERE] * 2
    # nothing is missing: nothing is drawn or measured
    monkeypatch.setattr(decode, "problem", lambda *_: pytest.fail("drawn again"))
    assert decode.main([*QUICK, str(tmp_path)]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(harness, "measure", logged)
    assert decode.main([*QUICK, str(tmp_path), "--fresh"]) == 0
    assert len(seen) == 3
    assert len(held(tmp_path)["rows"]) == len(TIMED_HERE)


def test_a_broken_context_is_not_met_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness_measure, seen = harness.measure, []
    row = {"status": FAILED, "reason": "RuntimeError: illegal access"}

    def lost(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        seen.append({one.name for one in candidates})
        if len(seen) == 1:
            raise DeviceLost("two_sdpa", row)
        return harness_measure(candidates, *rest)

    monkeypatch.setattr(harness, "measure", lost)
    assert decode.main([*QUICK, str(tmp_path)]) == 2
    assert "decode: error: two_sdpa broke the GPU's context" in capsys.readouterr().err
    assert decode.main([*QUICK, str(tmp_path)]) == 0
    assert seen[1] == TIMED_HERE - {"two_sdpa"}
    assert "failed: RuntimeError: illegal access" in (tmp_path / "decode.md").read_text()


def test_requests_that_cannot_be_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "decode: error: --device cuda: torch sees no GPU here" in capsys.readouterr().err
    (tmp_path / "decode.json").write_text(
        '{"benchmark": "attention", "environment": {}, "rows": []}'
    )
    assert decode.main([*QUICK, str(tmp_path)]) == 2
    assert "holds results of attention, not of decode" in capsys.readouterr().err


def test_shapes_fit_and_hold_the_targets() -> None:
    core, full = shapes("cuda", "core"), shapes("cuda", "full")
    assert (len(core), len(full)) == (12, 54)
    assert set(core) <= set(full)
    assert core[0] == HEADLINE
    assert {s.batch for s in full} == {1, 8, 32, 128}
    assert {s.keys for s in full} == {2**n for n in range(9, 16)}
    assert {s.heads // s.kv_heads for s in core} == {1, 4}
    assert max(2 * s.key_bytes for s in full) == 2**34
    # 32 full heads at 32k tokens and 32 sequences are the most that fits
    assert gpu_shape(32, 32768, False) in full
    assert gpu_shape(128, 16384, False) not in full
    assert all(on_gpu(s) for s in full)
    assert sum(many_on_gpu(s) for s in core) == 6
    processor = shapes("cpu", "full")
    assert len(processor) == 12
    assert set(shapes("cpu", "core")) <= set(processor)
    assert not any(on_gpu(s) for s in processor)
    assert all(s.keys % PAGE == 0 for s in (*full, *processor, shapes("cpu", "quick")[0]))


def test_problem_is_random_and_the_same_again() -> None:
    given, again = small(), small()
    lengths = given.lengths.tolist()
    assert lengths[0] == SMALL.keys
    assert all(SMALL.keys // 2 <= length <= SMALL.keys for length in lengths)
    assert given.q.shape == (3, 1, 6, 16)
    for name in ("q", "k", "v", "lengths", "page_table", "k_pages"):
        assert torch.equal(getattr(given, name), getattr(again, name))
        assert getattr(given, name).unique().numel() > 1
    # pages hold the same cache in another order
    at = given.page_table.long()
    assert torch.equal(given.v_pages[at].flatten(1, 2), given.v)
    assert not torch.equal(given.v_pages.flatten(0, 1), given.v.flatten(0, 1))
    for kind, adapters in BANKS.items():
        prompt_k, _, gate, index = given.prompts[kind]
        assert prompt_k is not None
        assert gate is not None
        assert index is not None
        assert prompt_k.shape == (adapters, 5, 2, 16)
        assert gate.shape == (adapters, 6)
        assert gate.max() > 1 > gate.min()
        assert int(index.max()) < adapters
    for bad, message in (
        (replace(SMALL, tokens=2), "tokens must be 1, got 2"),
        (replace(SMALL, keys=100), "keys must be a multiple of 64, got 100"),
    ):
        with pytest.raises(ValueError, match=message):
            small(bad)


def test_formula_is_the_split_softmax_number_by_number() -> None:
    given = small()
    for kind in KINDS:
        got = formula(given, kind, torch.float64)
        pk, pv, gate, index = given.prompts[kind]
        for b, h in ((0, 0), (1, 3), (2, 5)):
            q, g = given.q[b, 0, h].double(), h // 3
            weights = [
                math.exp(float(q @ given.k[b, j, g].double()) / 4) for j in range(given.lengths[b])
            ]
            values = given.v[b, : len(weights), g].double()
            want = torch.tensor(weights, dtype=torch.float64) @ values / sum(weights)
            if pk is not None and pv is not None and gate is not None:
                k, v, m = (x if index is None else x[index[b]] for x in (pk, pv, gate))
                own = [math.exp(float(q @ k[p, g].double()) / 4) for p in range(5)]
                part = torch.tensor(own, dtype=torch.float64) @ v[:, g].double() / sum(own)
                want = want + float(m[h]) * part
            torch.testing.assert_close(got[b, 0, h], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(BY_NAME))
@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, batch=1, kv_heads=6)], ids=["gqa", "one"])
def test_providers_meet_the_truth(name: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that differ, and one full cache, where the libraries get no mask."""
    # what is compiled is the same function
    monkeypatch.setattr(decode_problem, "compiled", lambda function: function)
    given, provider = small(shape), BY_NAME[name]
    tried = decode.work(provider, given, None)
    errors, wrong = check(tried.run(tried.before()), expected(given, provider.kind))
    assert not wrong
    assert errors["out"] < 1e-4


def test_a_dropped_prompt_or_a_neighbours_prompt_is_wrong() -> None:
    given = small()
    for kind in ("prompt", *BANKS):
        _, wrong = check({"out": formula(given, "plain", torch.float32)}, expected(given, kind))
        assert "out is off by" in wrong
    prompt_k, prompt_v, gate, index = given.prompts["bank_32"]
    assert index is not None
    other = decode_problem.Prompts(prompt_k, prompt_v, gate, (index + 1) % 32)
    moved = replace(given, prompts={"bank_32": other})
    _, wrong = check({"out": formula(moved, "bank_32", torch.float32)}, expected(given, "bank_32"))
    assert "out is off by" in wrong


def test_bytes_are_those_of_the_tokens_the_prompts_in_use_and_the_queries() -> None:
    given = replace(small(), lengths=torch.tensor([128, 64, 100], dtype=torch.int32))
    tokens = 292 * 2 * 2 * 16 * 4
    queries = 2 * 3 * 6 * 16 * 4
    prompt = 2 * 5 * 2 * 16 * 4
    assert bytes_of(given, "plain") == tokens + queries
    assert bytes_of(given, "prompt") == tokens + queries + prompt
    bank = given.prompts["bank_32"]._replace(index=torch.tensor([7, 3, 7], dtype=torch.int32))
    given = replace(given, prompts={"bank_32": bank})
    assert bytes_of(given, "bank_32") == tokens + queries + 2 * prompt
    assert [bytes_of(given, read) for read in READS] == [4096, 4096]


def test_caches_are_cold_before_a_pass() -> None:
    given = small()
    read: list[int] = []

    class Words(torch.Tensor):
        def sum(self, *_: Any, **__: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            read.append(self.numel())
            return torch.zeros(())

    memory = replace(given.memory, words=given.memory.words.as_subclass(Words))
    tried = decode.work(BY_NAME["ours"], replace(given, memory=memory), None)
    tried.run(None)
    assert read == []
    tried.before()
    assert read == [1024]


def timed(middle: float, size: int = 1000) -> Row:
    return {"status": TIMED, "ms": [middle] * 3, "round_ms": [middle] * 5, "bytes": size}


def cell(shape: Shape = HEADLINE, **times: float | Row) -> dict[Any, dict[str, Row]]:
    """A cell whose reads move ten times what the others move."""
    rows = {
        name: timed(time, 10_000 if name in READS else 1000) if isinstance(time, int | float)
        else time
        for name, time in times.items()
    }  # fmt: skip
    return {(shape, "decode"): rows}


def verdict(target: Any, cells: dict[Any, dict[str, Row]], device: str = "NVIDIA H200") -> Any:
    return judge(target, with_floor(cells), device)


def test_the_bandwidth_target_compares_rates_with_the_faster_read() -> None:
    # 1,000 bytes take 0.85 ms at the rate of the faster read
    met = verdict(AT_BANDWIDTH, cell(ours=1.0, read_sum=8.5, read_dot=9.0))
    assert met.verdict == MET
    assert met.evidence == f"0.85 against {FLOOR} at {HEADLINE.describe()}"
    assert verdict(AT_BANDWIDTH, cell(ours=1.0, read_sum=8.5, read_dot=8.4)).verdict == MISSED
    slow = {**timed(8.5, 10_000), "bytes": 20_000}
    assert verdict(AT_BANDWIDTH, cell(ours=1.0, read_sum=slow)).verdict == MISSED
    wrong = {"status": WRONG, "reason": "out is off by 1"}
    undecided = verdict(AT_BANDWIDTH, cell(ours=wrong, read_sum=8.5))
    assert undecided.verdict == UNDECIDED
    assert "ours: out is off by 1" in undecided.evidence
    few = cell(gpu_shape(8, 2048, False), ours=1.0, read_sum=9.0)
    pending = verdict(AT_BANDWIDTH, few)
    assert pending.verdict == PENDING
    assert pending.evidence.endswith("on H200; 0.90 at another shape")
    for device in ("NVIDIA H100 80GB HBM3", "cpu"):
        assert verdict(AT_BANDWIDTH, cell(ours=1.0, read_sum=9.0), device).verdict == PENDING


def test_costs_of_the_prompt_and_of_many_adapters_are_limited() -> None:
    grouped = gpu_shape(1, 32768, True)
    for time, expected_verdict in ((1.02, MET), (1.021, MISSED)):
        cells = cell(ours=1.0, ours_plain=1.0) | cell(grouped, ours=time, ours_plain=1.0)
        assert verdict(COSTS, cells).verdict == expected_verdict
    for time, expected_verdict in ((1.03, MET), (1.031, MISSED)):
        cells = cell(ours=2.0, ours_bank_1000=2.0 * time)
        assert verdict(MANY_ADAPTERS, cells).verdict == expected_verdict
    cells = cell(cpu_shape(4, 1024, False), ours=1.5, ours_plain=1.0)
    told = verdict(COSTS, cells, "cpu")
    assert told.verdict == PENDING
    assert "nothing yet at the target's shapes on H200; 1.50 at another shape" in told.evidence


def test_rates_and_parts_of_the_read_bandwidth() -> None:
    cells = cell(ours=2.0, sdpa=4.0, read_sum=10.0, read_dot=16.0)
    (rows,) = cells.values()
    floor = at_bandwidth(rows, "sdpa")
    assert floor is not None
    assert floor["ms"] == [1.0] * 3
    assert reached(rows, "ours") == 0.5
    assert reached(rows, "sdpa") == 0.25
    assert reached({"ours": rows["ours"]}, "ours") is None
    text = "\n".join(decode_report.tables(cells))
    assert (
        "| ours     | 2.0000 (2.0000, 2.0000)    | 0.0005   | 50.0%             | 1.00    |" in text
    )
    assert "| 0.00025  | 25.0%             | 2.00    |" in text
    assert (
        "| read_sum | 10.0000 (10.0000, 10.0000) | 0.001    | 100.0%            | -       |" in text
    )
    assert set(figures(cells)) == {"times", "bandwidth"}


def test_read_bandwidth_is_the_faster_read_of_every_cell() -> None:
    rounds = {**timed(3.0, 6_000_000), "round_ms": [1.0, 2.0, 3.0, 4.0, 6.0]}
    slower = timed(3.5, 6_000_000)
    found = read_bandwidth(cell(read_sum=rounds, read_dot=slower))
    assert found == {"gb_per_s": [2.0, 1.4, 3.6], "rounds": 5, "reads": ["read_sum"]}
    more = cell(gpu_shape(1, 2048, False), read_sum=timed(7.0, 6_000_000), read_dot=slower)
    found = read_bandwidth(cell(read_sum=rounds) | more)
    assert found is not None
    assert (found["rounds"], found["reads"]) == (10, ["read_dot", "read_sum"])
    assert read_bandwidth(cell(ours=1.0)) is None


def test_only_what_fits_many_times_is_compiled_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(command, "side_by_side", lambda _, given, __: jobs.extend(given) or [])
    results = ResultFile(tmp_path / "d.json", "decode", {}, fresh=True)
    results.add(decode.cell_of(HEADLINE), {"ours": {"status": TIMED}})
    large = gpu_shape(32, 8192, False)
    decode.compile_ahead([HEADLINE, large], PROVIDERS, torch.device("cuda"), results)
    assert {shape for shape, _, _ in jobs} == {HEADLINE}
    ours = set(OURS) - {"ours", *BACKENDS}
    assert {name for _, name, _ in jobs} == {*ours, "flex", "two_flex"}


def test_one_pass_compiles_and_says_what_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "QUICK_READ_BYTES", 4096)
    decode.compile_one((SMALL, "ours", CPU))
    assert capsys.readouterr().err == ""
    decode.compile_one((replace(SMALL, tokens=2), "ours", CPU))
    assert "tokens must be 1, got 2" in capsys.readouterr().err


def test_a_captured_call_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, where CUDA's calls do nothing: a graph holds no tensor that it reads."""
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    own = torch.ones(3)
    kept = weakref.ref(own)
    replay = decode.captured(partial(torch.add, own, 1), None)
    del own
    gc.collect()
    assert kept() is not None
    assert replay().tolist() == [2.0, 2.0, 2.0]
    del replay
    gc.collect()
    assert kept() is None


def test_every_provider_is_told_of() -> None:
    for name in BY_NAME:
        known = name.startswith(("ours_bank", "two_")) or name in decode_report.LEGEND
        assert known or name in READS, name
    assert [one.name for one in OTHERS if one.compiled] == ["flex", "two_flex"]


@pytest.mark.gpu
def test_a_captured_call_keeps_what_it_reads() -> None:
    """A graph does not, and torch gives a tensor's memory back once nothing holds it."""
    words = torch.randn(1 << 22, device="cuda")
    wanted = words + 1

    def build() -> torch.Tensor:
        # memory of its own, which empty_cache would give back
        own = words.clone()
        kept.append(weakref.ref(own))
        return own

    kept: list[weakref.ref[torch.Tensor]] = []
    replay = decode.captured(partial(torch.add, build(), 1), None)
    gc.collect()
    torch.cuda.empty_cache()
    assert kept[0]() is not None
    assert torch.equal(replay(), wanted)
    del replay
    gc.collect()
    assert kept[0]() is None


@pytest.mark.gpu
def test_quick_command_on_a_gpu(tmp_path: Path) -> None:
    assert decode.main(["--quick", "--device", "cuda", "--output", str(tmp_path)]) == 0
    status = {row["provider"]: row["status"] for row in held(tmp_path)["rows"]}
    own = [name for name in OURS if name in BY_NAME and "cuda" in BY_NAME[name].devices]
    assert "ours" in own
    for name in (*own, "sdpa", "two_sdpa", *READS):
        assert status[name] == TIMED, name
    assert WRONG not in status.values()
