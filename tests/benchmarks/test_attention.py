"""The attention benchmark: runs end to end, continues, gates, and judges as its targets say."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, attention_report, command, harness
from benchmarks.attention import PROVIDERS, gpu_shape, shapes
from benchmarks.attention_report import TARGETS, on_gpu, on_processor
from benchmarks.baselines import Provider
from benchmarks.harness import FAILED, TIMED, WRONG, DeviceLost, Row
from benchmarks.reporting import MET, MISSED, PENDING, UNDECIDED, Target, judge, standings
from benchmarks.roofline import MODES, Shape

QUICK = ["--quick", "--device", "cpu", "--output"]
HEADLINE = gpu_shape(2048, 128, True, False)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
# what a quick run on a processor times
TIMED_HERE = {
    *("ours", "hybrid", "reference", "ours_plain", "ours_block"),
    *("official", "two_sdpa", "sdpa", "peft_block"),
}


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "attention.json").read_text())


def test_quick_command_times_what_is_right_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = BY_NAME["hybrid"]
    off = Provider("off", "prompt", lambda given: lambda: ours.build(given)() * 1.01)
    monkeypatch.setattr(attention, "PROVIDERS", (*PROVIDERS, off))
    assert attention.main([*QUICK, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = held(tmp_path)
    rows = {(row["provider"], row["cell"]["mode"]): row for row in found["rows"]}
    assert set(rows) == {(name, mode) for name in (*TIMED_HERE, "off") for mode in MODES}
    for (name, mode), row in rows.items():
        assert Shape(**row["cell"]["shape"]) == shapes("cpu", "quick")[0]
        if name == "off":
            assert row["status"] == WRONG
            assert "ms" not in row
            assert f"| {mode:8} | off " in printed
            assert "is off by" in row["reason"]
            continue
        assert row["status"] == TIMED
        middle, low, high = row["ms"]
        assert 0 < low <= middle <= high
        assert len(row["round_ms"]) == 5
        shown = {"forward": "out", "backward": "d", "both": "out"}[mode]
        assert all(error >= 0 for error in row["errors"].values())
        assert any(result.startswith(shown) for result in row["errors"])
    assert {"dq", "dprompt_k", "dgate"} <= set(rows["ours", "backward"]["errors"])
    assert set(rows["peft_block", "both"]["errors"]) == {"out", "dx", "dprompt", "dgate"}
    assert found["environment"]["threads"] == 1
    assert {"commit", "sources", "protocol", "packages"} <= set(found["environment"])
    assert len(found["verdicts"]) == len(TARGETS)
    assert {one["verdict"] for one in found["verdicts"]} == {PENDING}
    assert (tmp_path / "attention.md").read_text() in printed
    assert "its numbers mean nothing" in printed
    assert (tmp_path / "attention_times.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_keeps_its_rows_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[set[str]] = []

    def interrupted(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append({one.name for one in candidates})
        return harness_measure(candidates, *rest)

    harness_measure = harness.measure
    monkeypatch.setattr(harness, "measure", interrupted)
    assert attention.main([*QUICK, str(tmp_path)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    before = held(tmp_path)["rows"]
    assert {row["cell"]["mode"] for row in before} == {"forward"}
    assert {row["provider"] for row in before} == TIMED_HERE == measured[0]

    modes: list[set[str]] = []

    def logged(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        modes.append(set(candidates[0].expected))
        return harness_measure(candidates, *rest)

    monkeypatch.setattr(harness, "measure", logged)
    assert attention.main([*QUICK, str(tmp_path)]) == 0
    assert held(tmp_path)["rows"][: len(before)] == before
    assert len(modes) == 2
    assert [("out" in names) for names in modes] == [False, True]
    assert attention.main([*QUICK, str(tmp_path)]) == 0
    assert len(modes) == 2
    assert attention.main([*QUICK, str(tmp_path), "--fresh"]) == 0
    assert len(modes) == 5


def test_a_broken_context_is_not_met_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness_measure = harness.measure
    row = {"status": FAILED, "reason": "RuntimeError: illegal access"}
    seen: list[set[str]] = []

    def lost(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        seen.append({one.name for one in candidates})
        if "official" in seen[-1] and len(seen) == 1:
            raise DeviceLost("official", row)
        return harness_measure(candidates, *rest)

    monkeypatch.setattr(harness, "measure", lost)
    assert attention.main([*QUICK, str(tmp_path)]) == 2
    assert "official broke the GPU's context" in capsys.readouterr().err
    assert attention.main([*QUICK, str(tmp_path)]) == 0
    assert seen[1] == TIMED_HERE - {"official"}
    rows = [r for r in held(tmp_path)["rows"] if r["provider"] == "official"]
    assert [r["status"] for r in rows] == [FAILED, TIMED, TIMED]


def test_a_gpu_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    (tmp_path / "attention.json").write_text("{}")
    assert attention.main([*QUICK, str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_shapes_keep_the_tokens_and_hold_the_targets() -> None:
    core, full = shapes("cuda", "core"), shapes("cuda", "full")
    assert (len(core), len(full)) == (12, 48)
    assert set(core) <= set(full)
    assert {s.batch * s.tokens for s in full} == {16384}
    assert {s.tokens for s in core} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {s.heads * s.head_dim for s in full} == {4096}
    assert {s.heads // s.kv_heads for s in full} == {1, 4}
    assert [s for s in core if on_gpu(s)] == [core[0]]
    processor = shapes("cpu", "core")
    assert all(on_processor(s) for s in processor)
    assert [s.head_dim for s in processor] == [64, 128]
    assert len(shapes("cpu", "full")) == 8


def timed(middle: float) -> Row:
    return {"status": TIMED, "ms": [middle, middle, middle], "round_ms": [middle] * 5}


def verdict(where: Any = on_gpu, device: str = "NVIDIA H200", **times: float | Row) -> Any:
    target = Target("t", "ours", ("two_cudnn", "two_flash"), "forward", 1.15, True, where)
    rows = {n: timed(t) if isinstance(t, int | float) else t for n, t in times.items()}
    return judge(target, {(HEADLINE, "forward"): rows}, device)


def test_verdicts_follow_the_limits() -> None:
    assert verdict(ours=1.0, two_cudnn=1.15).verdict == MET
    missed = verdict(ours=1.0, two_cudnn=1.14)
    assert missed.verdict == MISSED
    assert missed.evidence.startswith("1.14 against two_cudnn at S=2048 D=128")
    # the fastest of the others counts
    assert verdict(ours=1.0, two_cudnn=2.0, two_flash=1.1).verdict == MISSED
    wrong = {"status": WRONG, "reason": "out is off by 1"}
    undecided = verdict(ours=wrong, two_cudnn=1.0)
    assert undecided.verdict == UNDECIDED
    assert "ours: out is off by 1" in undecided.evidence
    assert verdict(where=on_processor, ours=1.0, two_cudnn=2.0).verdict == PENDING


def test_costs_are_limited_from_above_and_one_gpu_may_decide() -> None:
    cost = Target("t", "ours", ("cudnn",), "forward", 1.2, False, on_gpu, gpu="H200")
    for time, expected in ((1.2, MET), (1.21, MISSED)):
        cells = {(HEADLINE, "forward"): {"ours": timed(time), "cudnn": timed(1.0)}}
        assert judge(cost, cells, "NVIDIA H200").verdict == expected
        other = judge(cost, cells, "NVIDIA H100 80GB HBM3")
        assert other.verdict == PENDING
        assert f"on H200; {time:.2f} at another shape" in other.evidence
    long = replace(HEADLINE, tokens=8192, keys=8192)
    cells |= {(long, "forward"): {"ours": timed(1.1), "cudnn": timed(1.0)}}
    assert judge(cost, cells, "NVIDIA H200").evidence.endswith("1.10 at another shape")


def test_a_target_at_two_shapes_needs_both() -> None:
    (target, _) = (t for t in TARGETS if t.where is on_processor)
    first, second = shapes("cpu", "core")
    for other, expected in ((2.0, MET), (1.9, MISSED)):
        cells = {
            (first, "forward"): {"hybrid": timed(1.0), "official": timed(3.0)},
            (second, "forward"): {"hybrid": timed(1.0), "official": timed(other)},
        }
        assert judge(target, cells, "cpu").verdict == expected


def test_many_shapes_are_told_as_a_range_with_the_worst() -> None:
    target = Target("t", "ours", ("cudnn",), "forward", 1.02, False, lambda shape: True)
    times = {512: 1.05, 1024: 1.01, 2048: 1.0, 4096: 1.03}
    cells = {
        (replace(HEADLINE, tokens=s, keys=s), "forward"): {"ours": timed(t), "cudnn": timed(1.0)}
        for s, t in times.items()
    }
    found = judge(target, cells, "NVIDIA H200")
    assert found.verdict == MISSED
    assert found.evidence == (
        "1.00 to 1.05 at 4 shapes, 2 of them within the limit; worst: 1.05 against cudnn at "
        f"{replace(HEADLINE, tokens=512, keys=512).describe()}"
    )


def test_losses_are_listed_like_wins() -> None:
    long = replace(HEADLINE, tokens=8192, keys=8192)
    cells = {
        (HEADLINE, "forward"): {"ours": timed(1.0), "two_cudnn": timed(1.5)},
        (long, "forward"): {"ours": timed(1.0), "two_cudnn": timed(0.5)},
    }
    *_, line = standings(cells, MODES, {"two_cudnn": "ours"}, ())
    assert "1 of 2" in line
    assert "0.50, 1.00, 1.50" in line
    assert f"{long.describe()} (0.50)" in line


def test_tables_and_figures_of_a_gpu() -> None:
    cells = {
        (replace(HEADLINE, tokens=s, keys=s), mode): {"ours": {**timed(1.0), "peak_bytes": 5e6}}
        for s in (512, 2048)
        for mode in MODES
    }
    rate = 4 * 8 * 32 * 2048**2 * 128 / 2 / 1e9
    text = "\n".join(attention_report.tables(cells, "NVIDIA H200"))
    assert f"| {rate:.3g} " in text
    assert f"{rate / 989:.0%}" in text
    assert "| 1.00    | 5 " in text
    drawn = attention_report.figures(cells)
    assert set(drawn) == {"times", "lengths"}
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())


def test_work_separates_what_is_timed() -> None:
    shape = shapes("cpu", "quick")[0]
    given = attention.baselines.problem("prompt", shape, torch.device("cpu"))
    calls: list[bool] = []

    def call() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return given["q"] * sum(leaf.sum() for leaf in given.leaves.values())

    provider = Provider("p", "prompt", lambda given: call)
    make = partial(attention.work, provider, given)
    forward, backward = make("forward"), make("backward")
    assert set(forward.run(forward.before())) == {"out"}
    assert calls == [False]
    state = backward.before()
    assert calls == [False, True]
    assert set(backward.run(state)) == {f"d{name}" for name in given.leaves}
    assert calls == [False, True]
    both = make("both")
    assert set(both.run(both.before())) == {"out", *(f"d{name}" for name in given.leaves)}


@pytest.mark.gpu
def test_quick_command_on_a_gpu(tmp_path: Path) -> None:
    assert attention.main(["--quick", "--device", "cuda", "--output", str(tmp_path)]) == 0
    rows = held(tmp_path)["rows"]
    status = {(row["provider"], row["cell"]["mode"]): row["status"] for row in rows}
    for name in ("ours", "fused", "ours_plain", "fused_plain", "ours_block"):
        assert all(status[name, mode] == TIMED for mode in MODES), name
    assert WRONG not in status.values()


def test_what_has_no_result_is_compiled_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each pass runs for real; the one that cannot run says so and stops nothing."""
    shape, device = shapes("cpu", "quick")[0], torch.device("cpu")
    results = harness.ResultFile(tmp_path / "a.json", "attention", {}, fresh=True)
    hybrid = BY_NAME["hybrid"]
    monkeypatch.setattr(attention, "COMPILED", ("hybrid", "fused"))
    fused = replace(BY_NAME["fused"], devices=("cpu",))
    attention.compile_ahead([shape], [hybrid, fused, BY_NAME["official"]], device, results)
    said = capfd.readouterr().err
    assert said.startswith("fused S=64")
    assert said.count("backend 'triton' is not available") == said.count("\n") == 1
    for mode in MODES:
        results.add(attention.cell_of(shape, mode), {"hybrid": {"status": TIMED}})
    monkeypatch.setattr(command, "side_by_side", lambda *_: pytest.fail("compiled again"))
    attention.compile_ahead([shape], [hybrid], device, results)
