"""The small operations' benchmark: right before timed, bytes counted, continues, judges."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import command, decode, harness, small_ops, small_ops_problem, small_ops_report
from benchmarks.baselines import Provider
from benchmarks.decode_problem import memory_of
from benchmarks.decode_report import FLOOR, with_floor
from benchmarks.harness import FAILED, TIMED, WRONG, DeviceLost, ResultFile, Row, check
from benchmarks.reporting import MET, MISSED, PENDING, UNDECIDED, cells_of, judge
from benchmarks.roofline import GPUS
from benchmarks.small_ops import cells
from benchmarks.small_ops_formulas import norm_formula, pairs_formula
from benchmarks.small_ops_problem import (
    LOSSES,
    MODES,
    NORMS,
    OF_HEADS,
    PAGE,
    PRODUCTS,
    ROTARY,
    WRITES,
    Problem,
    SmallShape,
    bytes_of,
    expected,
    loss_floor,
    model_parts,
    problem,
    providers_of,
)
from benchmarks.small_ops_report import TARGETS, figures, large_on_gpu, tables

CPU = torch.device("cpu")
QUICK = ["--quick", "--device", "cpu", "--output"]
ROWS = SmallShape(7, 24, "float32")
HEADED = SmallShape(3, 8, "float32", 6, 2)
ALONE = SmallShape(1, 8, "float32", 3, 1)
PROMPTED = SmallShape(70, 8, "float32", 2, 2)
HEAD = SmallShape(7, 24, "float32", vocabulary=53)
HEADLINE = SmallShape(2048, 4096, "bfloat16")
READS = ("read_sum", "read_dot")
TIMED_HERE = {
    (mode, one.name) for mode in MODES for one in providers_of(mode) if "cpu" in one.devices
}
AT_BANDWIDTH, AGAINST_COMPILED = (one for one in TARGETS if one.mode == "rms_norm")
AT_PRODUCTS, _ = (one for one in TARGETS if one.mode == "linear_cross_entropy_dx")


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "small_ops.json").read_text())


def small(mode: str, shape: SmallShape | None = None) -> Problem:
    own = HEADED if mode in OF_HEADS else HEAD if mode in LOSSES else ROWS
    return problem(mode, shape or own, CPU, memory_of(4096, CPU))


def names_of(rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(row["cell"]["mode"], row["provider"]) for row in rows}


def test_quick_command_times_what_is_right_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_by_a_percent(given: Problem) -> small_ops_problem.Call:
        ours = next(one for one in providers_of(given.mode) if one.name == "ours").build(given)
        return lambda: {name: 1.01 * x for name, x in dict(ours()).items()}

    monkeypatch.setitem(small_ops_report.MARKS, "off", ("x", "C5"))
    monkeypatch.setattr(
        small_ops,
        "providers_of",
        lambda mode: (*providers_of(mode), Provider("off", mode, off_by_a_percent)),
    )
    assert small_ops.main([*QUICK, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = held(tmp_path)
    assert names_of(found["rows"]) == TIMED_HERE | {(mode, "off") for mode in MODES}
    for row in found["rows"]:
        assert (row["cell"]["mode"], SmallShape(**row["cell"]["shape"])) in cells("cpu", "quick")
        if row["provider"] == "off":
            assert row["status"] == WRONG
            assert "is off by" in row["reason"]
            assert "ms" not in row
            continue
        assert row["status"] == TIMED
        middle, low, high = row["ms"]
        assert 0 < low <= middle <= high
        assert len(row["round_ms"]) == 5
        assert row["bytes"] > 0
    assert found["read_bandwidth"]["rounds"] == 5 * (len(MODES) - len(LOSSES))
    assert found["environment"]["threads"] == 1
    assert {"commit", "sources", "protocol", "packages"} <= set(found["environment"])
    assert [one["verdict"] for one in found["verdicts"]] == [PENDING] * 2 * len(MODES)
    assert (tmp_path / "small_ops.md").read_text() in printed
    assert "its numbers mean nothing" in printed
    assert (tmp_path / "small_ops_bandwidth.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_keeps_its_rows_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness_measure, seen = harness.measure, []

    def logged(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        seen.append({one.name for one in candidates})
        return harness_measure(candidates, *rest)

    def interrupted(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        return logged(candidates, *rest)

    monkeypatch.setattr(harness, "measure", interrupted)
    assert small_ops.main([*QUICK, str(tmp_path)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    before = held(tmp_path)["rows"]
    assert names_of(before) == {(mode, name) for mode, name in TIMED_HERE if mode in NORMS}

    monkeypatch.setattr(harness, "measure", logged)
    assert small_ops.main([*QUICK, str(tmp_path)]) == 0
    assert held(tmp_path)["rows"][: len(before)] == before
    assert names_of(held(tmp_path)["rows"]) == TIMED_HERE
    assert len(seen) == len(MODES)
    # nothing is missing: nothing is drawn or measured
    monkeypatch.setattr(small_ops, "problem", lambda *_: pytest.fail("drawn again"))
    assert small_ops.main([*QUICK, str(tmp_path)]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(harness, "measure", logged)
    assert small_ops.main([*QUICK, str(tmp_path), "--fresh"]) == 0
    assert len(seen) == 2 * len(MODES)


def test_a_broken_context_is_not_met_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness_measure, seen = harness.measure, []
    row = {"status": FAILED, "reason": "RuntimeError: illegal access"}

    def lost(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        seen.append({one.name for one in candidates})
        if len(seen) == 1:
            raise DeviceLost("torch", row)
        return harness_measure(candidates, *rest)

    monkeypatch.setattr(harness, "measure", lost)
    assert small_ops.main([*QUICK, str(tmp_path)]) == 2
    assert "small_ops: error: torch broke the GPU's context" in capsys.readouterr().err
    assert small_ops.main([*QUICK, str(tmp_path)]) == 0
    assert seen[1] == {"ours", "eager", *READS}
    assert "failed: RuntimeError: illegal access" in (tmp_path / "small_ops.md").read_text()


def test_requests_that_cannot_be_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert small_ops.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "small_ops: error: --device cuda: torch sees no GPU here" in capsys.readouterr().err


def test_cells_hold_the_targets() -> None:
    core, full = cells("cuda", "core"), cells("cuda", "full")
    # five modes of one width, five of two numbers of heads, two of one head
    assert len(core) == 4 * (5 + 5 * 2 + 2)
    assert set(core) <= set(full)
    assert len(full) == len(set(full))
    for mode in MODES:
        own = [shape for of, shape in core if of == mode]
        assert {shape.tokens for shape in own} == {1, 32, 2048, 16384}
        assert sum(large_on_gpu(shape) for shape in own) == len(own) / 2
    assert ("rms_norm", HEADLINE) in core
    assert ("swiglu", SmallShape(16384, 11008, "bfloat16")) in core
    assert ("write_cache", SmallShape(32, 128, "bfloat16", 32, 8)) in core
    for mode in LOSSES:
        assert (mode, SmallShape(2048, 4096, "bfloat16", vocabulary=32000)) in core
        assert (mode, SmallShape(2048, 4096, "bfloat16", vocabulary=128256)) in full
    processor = cells("cpu", "full")
    assert set(cells("cpu", "core")) <= set(processor)
    assert not any(large_on_gpu(shape) for _, shape in processor)


@pytest.mark.parametrize(
    ("tokens", "batch"), [(1, 1), (32, 32), (33, 1), (512, 1), (2048, 1), (16384, 8)]
)
def test_tokens_are_a_step_or_whole_prompts(tokens: int, batch: int) -> None:
    shape = SmallShape(tokens, 128, "bfloat16", 32, 8)
    assert shape.batch == batch
    assert shape.describe() == f"B={batch} T={tokens // batch} H=32 G=8 D=128 bfloat16"
    head = SmallShape(tokens, 64, "float32", vocabulary=97)
    assert head.describe() == f"N={tokens} C=64 V=97 float32"
    plain = f"B={batch} T={tokens // batch} width=64 float32"
    assert SmallShape(tokens, 64, "float32").describe() == plain


@pytest.mark.parametrize("mode", MODES)
def test_problem_is_random_and_the_same_again(mode: str) -> None:
    given, again = small(mode), small(mode)
    for name, x in given.parts.items():
        assert torch.equal(x, again.parts[name]), name
        assert x.numel() == 1 or x.unique().numel() > 1, name
    if mode == "write_cache_paged":
        parts = given.parts
        table, positions = parts["page_table"].long(), parts["positions"].long()
        assert torch.equal(table.gather(1, positions // PAGE), parts["row"])
        assert torch.equal(positions % PAGE, parts["column"])
        assert torch.equal(table.flatten().sort().values, torch.arange(table.numel()))


@pytest.mark.parametrize("name", ["ours", "eager", "compiled", "torch", "two_calls", PRODUCTS])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("headed", [HEADED, ALONE, PROMPTED], ids=lambda s: f"B{s.batch}")
def test_providers_meet_the_truth(
    headed: SmallShape, mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence and several, a step and a prompt over more than one page."""
    # what is compiled is the same function
    monkeypatch.setattr(small_ops_problem, "compiled", lambda function: function)
    provider = next((one for one in providers_of(mode) if one.name == name), None)
    if provider is None:
        assert name in ("torch", "two_calls", PRODUCTS)
        return
    rows = replace(HEAD if mode in LOSSES else ROWS, tokens=headed.tokens)
    given = small(mode, headed if mode in OF_HEADS else rows)
    before = {key: x.clone() for key, x in given.parts.items()}
    tried = decode.work(provider, given, None)
    wanted = expected(given, provider.kind)
    errors, wrong = check(tried.run(tried.before()), wanted)
    assert not wrong
    assert max(errors.values()) < 1e-5
    # nobody finds what another wrote
    for key, x in given.parts.items():
        assert torch.equal(x, before[key]), key
    results = {"write": {"q", "k_cache", "v_cache"}, "rotary": {"q", "k"}, "swiglu": {"out"}}
    more = {
        "rms_norm_residual": {"out", "h"},
        "rms_norm_backward": {"dx"},
        "swiglu_backward": {"dgate", "dup"},
        "linear_cross_entropy": {"logits"} if name == PRODUCTS else {"loss"},
        "linear_cross_entropy_dx": {"dx"} if name == PRODUCTS else {"loss", "dx"},
    }
    assert set(wanted) == more.get(mode, results.get(mode.split("_")[0], {"out"}))


def test_the_truth_turns_pairs_number_by_number() -> None:
    for mode, step, stride in (("rotary_pairs", 2, 1), ("rotary_halves", 1, 4)):
        given = small(mode)
        truth = expected(given, mode)["q"].truth
        for b, h, i in ((0, 0, 0), (2, 5, 3)):
            x, cos, sin = given.parts["q"][b, 0, h].double(), *(
                given.parts[name][b, 0, i].double() for name in ("cos", "sin")
            )  # fmt: skip
            first, second = x[i * step], x[i * step + stride]
            want = first * cos - second * sin, second * cos + first * sin
            got = truth[b, 0, h, i * step], truth[b, 0, h, i * step + stride]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_truth_of_a_backward_is_autograds() -> None:
    """The formulas of the gradients against autograd of the formulas themselves, in float64."""
    for mode, names, leaves in (
        ("rms_norm", ("dx",), ("x",)),
        ("swiglu", ("dgate", "dup"), ("gate", "up")),
        ("rotary", ("q", "k"), ("q", "k")),
    ):
        given = small(f"{mode}_backward")
        parts = model_parts(given, torch.float64)
        douts = [parts[name] for name in (("q", "k") if mode == "rotary" else ("dout",))]
        used = {name: parts[name].clone().requires_grad_() for name in leaves}
        forward = "rotary_pairs" if mode == "rotary" else mode
        outs = small_ops_problem.FORMULAS[forward]({**parts, **used}).values()
        grads = torch.autograd.grad(list(outs), list(used.values()), douts)
        truth = expected(given, given.mode)
        for name, grad in zip(names, grads, strict=True):
            # rstd is given in float32
            wanted = grad + parts["dh"] if mode == "rms_norm" else grad
            torch.testing.assert_close(truth[name].truth, wanted, rtol=1e-6, atol=1e-6)


def test_the_truth_of_a_loss_is_that_of_its_definition() -> None:
    """log sum exp minus the label's logit, and its gradient by hand, in float64."""
    given = small("linear_cross_entropy_dx")
    x, weight, labels = (given.parts[name] for name in ("x", "weight", "labels"))
    z = x.double() @ weight.double().t()
    truth, (rows,) = expected(given, given.mode), labels.shape
    loss = z.exp().sum(1).log() - z[torch.arange(rows), labels]
    torch.testing.assert_close(truth["loss"].truth, loss.mean(), rtol=1e-12, atol=0)
    p = z.softmax(1)
    p[torch.arange(rows), labels] -= 1
    dx = p @ weight.double() / rows
    torch.testing.assert_close(truth["dx"].truth, dx, rtol=1e-10, atol=1e-12)
    products = expected(given, PRODUCTS)["dx"].truth
    torch.testing.assert_close(products, z @ weight.double(), rtol=1e-12, atol=1e-12)


def test_what_is_left_out_is_wrong() -> None:
    given = small("rms_norm_residual")
    parts = {name: x for name, x in given.parts.items() if name != "residual"}
    out = norm_formula(parts)["out"]
    _, wrong = check({"out": out, "h": parts["x"]}, expected(given, given.mode))
    assert "out is off by" in wrong
    assert "h is off by" in wrong
    for mode in WRITES:
        given = small(mode)
        q = pairs_formula(model_parts(given))["q"]
        caches = {name: given.parts[name] for name in ("k_cache", "v_cache")}
        _, wrong = check({"q": q, **caches}, expected(given, mode))
        assert wrong.startswith("k_cache is off by")
        assert "v_cache is off by" in wrong


def test_bytes_are_those_of_every_input_and_result_once() -> None:
    x, angles = 7 * 24 * 4, 3 * 8 * 4
    assert bytes_of(small("rms_norm"), "rms_norm") == 2 * x + 24 * 4
    assert bytes_of(small("rms_norm_residual"), "rms_norm_residual") == 4 * x + 24 * 4
    backward = "rms_norm_backward"
    assert bytes_of(small(backward), backward) == 4 * x + 24 * 4 + 7 * 4
    assert bytes_of(small("swiglu"), "swiglu") == 3 * x
    assert bytes_of(small("swiglu_backward"), "swiglu_backward") == 5 * x
    q, k = 3 * 6 * 8 * 4, 3 * 2 * 8 * 4
    for mode in (*ROTARY, "rotary_backward"):
        assert bytes_of(small(mode), mode) == 2 * (q + k) + angles
    for mode in WRITES:
        # keys and values, and the place of each token
        assert bytes_of(small(mode), mode) == 2 * (q + 2 * k) + angles + 3 * 4
    assert [bytes_of(small("swiglu"), read) for read in READS] == [4096, 4096]
    # a head's weight, the labels, and one number
    head = 53 * 24 * 4 + 7 * 8 + 4
    for mode, rows in zip(LOSSES, (x, 2 * x), strict=True):
        assert bytes_of(small(mode), mode) == bytes_of(small(mode), PRODUCTS) == rows + head


def test_the_floor_of_a_loss_is_that_of_its_products() -> None:
    """At LLaMA's head compute takes the time, of one row memory."""
    large = SmallShape(2048, 4096, "bfloat16", vocabulary=32000)
    for products, mode in enumerate(LOSSES, 1):
        floor = loss_floor(large, mode)
        assert floor.flops == products * 2 * 2048 * 4096 * 32000
        h200 = GPUS["H200"]
        assert floor.ms(h200, "bfloat16") == pytest.approx(floor.flops / 989e9)
        one = loss_floor(replace(large, tokens=1), mode)
        assert one.ms(h200, "bfloat16") == pytest.approx(one.bytes / 4.8e9)


def timed(middle: float, size: int = 1000) -> Row:
    return {"status": TIMED, "ms": [middle] * 3, "round_ms": [middle] * 5, "bytes": size}


def cell(
    shape: SmallShape = HEADLINE, mode: str = "rms_norm", /, **times: float | Row
) -> dict[Any, dict[str, Row]]:
    """A cell whose reads move ten times what the others move."""
    rows = {
        name: timed(time, 10_000 if name in READS else 1000) if isinstance(time, int | float)
        else time
        for name, time in times.items()
    }  # fmt: skip
    return {(shape, mode): rows}


def verdict(target: Any, found: dict[Any, dict[str, Row]], device: str = "NVIDIA H200") -> Any:
    return judge(target, with_floor(found), device)


def test_the_bandwidth_target_compares_rates() -> None:
    # 1,000 bytes take 0.8 ms at the rate of the faster read
    met = verdict(AT_BANDWIDTH, cell(ours=1.0, read_sum=8.0, read_dot=9.0))
    assert met.verdict == MET
    assert met.evidence == f"0.80 against {FLOOR} at {HEADLINE.describe()}"
    assert verdict(AT_BANDWIDTH, cell(ours=1.0, read_sum=8.0, read_dot=7.9)).verdict == MISSED
    wrong = {"status": WRONG, "reason": "out is off by 1"}
    undecided = verdict(AT_BANDWIDTH, cell(ours=wrong, read_sum=8.0))
    assert undecided.verdict == UNDECIDED
    assert "ours: out is off by 1" in undecided.evidence
    pending = verdict(AT_BANDWIDTH, cell(replace(HEADLINE, tokens=32), ours=1.0, read_sum=9.0))
    assert pending.verdict == PENDING
    assert pending.evidence.endswith("on H200; 0.90 at another shape")
    for device in ("NVIDIA H100 80GB HBM3", "cpu"):
        assert verdict(AT_BANDWIDTH, cell(ours=1.0, read_sum=9.0), device).verdict == PENDING


def test_a_loss_is_held_against_its_products() -> None:
    shape = SmallShape(2048, 4096, "bfloat16", vocabulary=32000)
    for time, wanted in ((1.1, MET), (1.2, MISSED)):
        found = cell(shape, AT_PRODUCTS.mode, ours=time, products=1.0, compiled=1.5)
        assert verdict(AT_PRODUCTS, found).verdict == wanted
    found = cell(shape, AT_PRODUCTS.mode, ours=1.25, products=1.0, eager=2.5)
    text = "\n".join(tables(found, "NVIDIA H200"))
    # 2 products of 2 x 2,048 x 4,096 x 32,000, beside the peak of 989 TFLOP/s
    assert f"### {AT_PRODUCTS.mode} N=2048 C=4096 V=32000 bfloat16" in text
    assert "At least 1085.7 us at the peak rates of H200: 1074 GFLOP, 295.7 MB." in text
    assert "| provider | us (20 %, 80 %)         | TFLOP/s | of the products | to ours |" in text
    assert "| ours     | 1250.0 (1250.0, 1250.0) | 859     | 80.0%           | 1.00    |" in text
    assert "| products | 1000.0 (1000.0, 1000.0) | 1074    | 100.0%          | -       |" in text
    assert "At least" not in "\n".join(tables(found, "cpu"))
    assert figures(found)["bandwidth"].startswith(b"\x89PNG")


def test_ours_may_be_no_slower_than_what_is_compiled() -> None:
    for time, wanted in ((0.95, MET), (0.949, MISSED)):
        assert verdict(AGAINST_COMPILED, cell(ours=1.0, compiled=time)).verdict == wanted
    longer = replace(HEADLINE, tokens=16384)
    found = cell(ours=1.0, compiled=2.0) | cell(longer, ours=1.0, compiled=0.5)
    assert verdict(AGAINST_COMPILED, found).verdict == MISSED
    few = cell(ours=1.0, compiled=2.0) | cell(replace(HEADLINE, tokens=1), ours=1.0, compiled=0.5)
    assert verdict(AGAINST_COMPILED, few).verdict == MET
    failed = {"status": FAILED, "reason": "Unsupported"}
    undecided = verdict(AGAINST_COMPILED, cell(ours=1.0, compiled=failed))
    assert undecided.verdict == UNDECIDED
    assert "compiled: Unsupported" in undecided.evidence


def test_tables_are_in_microseconds_with_the_part_of_the_bandwidth() -> None:
    failed = {"status": FAILED, "reason": "Unsupported"}
    found = cell(ours=0.002, eager=0.004, compiled=failed, read_sum=0.01, read_dot=0.016)
    text = "\n".join(tables(found, "NVIDIA H200"))
    assert "### rms_norm B=1 T=2048 width=4096 bfloat16" in text
    assert "| ours     | 2.0 (2.0, 2.0)      | 0.5   | 50.0%             | 1.00    |" in text
    assert "| eager    | 4.0 (4.0, 4.0)      | 0.25  | 25.0%             | 2.00    |" in text
    assert "| compiled | failed: Unsupported |" in text
    assert "| read_sum | 10.0 (10.0, 10.0)   | 1     | 100.0%            | -       |" in text
    assert figures(found)["bandwidth"].startswith(b"\x89PNG")
    shape = {"cell": {"shape": asdict(HEADLINE), "mode": "rms_norm"}, "provider": "ours"}
    assert list(cells_of([shape], SmallShape)) == [(HEADLINE, "rms_norm")]


def test_what_compiles_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(command, "side_by_side", lambda _, given, __: jobs.extend(given) or [])
    results = ResultFile(tmp_path / "s.json", "small_ops", {}, fresh=True)
    results.add(small_ops.cell_of("swiglu", HEADLINE), {"ours": {"status": TIMED}})
    wanted = [("swiglu", HEADLINE), ("rms_norm", HEADLINE)]
    small_ops.compile_ahead(wanted, torch.device("cuda"), results, quick=False)
    names = [(mode, name) for mode, _, name, _ in jobs]
    assert names == [("swiglu", "compiled"), ("rms_norm", "ours"), ("rms_norm", "compiled")]
    jobs.clear()
    small_ops.compile_ahead(wanted, torch.device("cuda"), results, quick=True)
    assert [(mode, name) for mode, _, name, _ in jobs] == [("rms_norm", "ours")]


def test_one_pass_compiles_and_says_what_it_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "QUICK_READ_BYTES", 4096)
    small_ops.compile_one(("write_cache", HEADED, "ours", CPU))
    assert capsys.readouterr().err == ""

    def refuse(_: Tensor, *__: Any, **___: Any) -> Tensor:
        raise ValueError("gate must not be")

    monkeypatch.setattr(small_ops_problem, "swiglu", refuse)
    small_ops.compile_one(("swiglu", ROWS, "ours", CPU))
    assert "ours swiglu B=7 T=1 width=24 float32: ValueError: gate" in capsys.readouterr().err


def test_every_provider_is_told_of() -> None:
    for mode in MODES:
        for one in providers_of(mode):
            if one.name == PRODUCTS:
                assert f"{one.name}:" in small_ops_report.LEGEND
            elif one.name not in READS:
                assert f"{one.name}:" in small_ops_report.LEGEND, one.name
                assert one.name in small_ops_report.MARKS


@pytest.mark.gpu
def test_quick_command_on_a_gpu(tmp_path: Path) -> None:
    assert small_ops.main(["--quick", "--device", "cuda", "--output", str(tmp_path)]) == 0
    rows = held(tmp_path)["rows"]
    assert names_of(rows) == TIMED_HERE
    assert {row["status"] for row in rows} == {TIMED}
