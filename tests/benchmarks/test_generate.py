"""The generation benchmark: right before timed, the same as PEFT, continues, and judges."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import command, generate, generate_problem, generate_report, harness
from benchmarks.decode_problem import READS, memory_of
from benchmarks.generate import PROVIDERS, claims, cpu_setting, gpu_setting, settings
from benchmarks.generate_models import Models, random_model, read_bytes, stored_bytes
from benchmarks.generate_problem import (
    ADAPTERS,
    DECODE,
    MODES,
    PREFILL,
    Problem,
    Provider,
    Setting,
    adapters_of,
    facts_of,
    our_work,
    problem,
    their_work,
)
from benchmarks.generate_report import GOAL_NAME, TARGETS, figures, tables, with_goal
from benchmarks.generate_truth import Truths, greedy, own_truth
from benchmarks.harness import FAILED, SKIPPED, TIMED, WRONG, DeviceLost, ResultFile, Row, check
from benchmarks.reporting import MET, MISSED, PENDING, UNDECIDED, cells_of, judge
from llama_adapter.adapter import Adapter
from llama_adapter.adapter_bank import AdapterBank
from llama_adapter.config import LlamaConfig

CPU = torch.device("cpu")
QUICK = ["--quick", "--device", "cpu", "--output"]
TOY = settings("cpu", "quick")[0]
HEADLINE = gpu_setting("llama-7b", 1)
BY_NAME = {provider.name: provider for provider in PROVIDERS}
HERE = [one for one in PROVIDERS if claims(one, TOY, CPU)]
NAMES = {one.name for one in HERE}
RATE, AGAINST_PEFT, COSTS, MANY_ADAPTERS, PROCESSOR, PROCESSOR_COSTS = TARGETS


def held(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "generate.json").read_text())


@pytest.fixture(scope="module")
def toy() -> Problem:
    return problem(TOY, Models(TOY.model, TOY.dtype, CPU), memory_of(4096, CPU))


@pytest.fixture(autouse=True)
def small_banks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand adapters take a second, and eleven are as good here."""
    monkeypatch.setitem(ADAPTERS, "bank_1000", 11)
    monkeypatch.setitem(ADAPTERS, "bank_32", 3)


def test_quick_command_times_what_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([*QUICK, str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = held(tmp_path)
    rows = {(row["cell"]["mode"], row["provider"]): row for row in found["rows"]}
    reads = {(DECODE, one.name) for one in READS}
    assert set(rows) == {(mode, name) for mode in MODES for name in NAMES} | reads
    for (mode, name), row in rows.items():
        assert row["status"] == TIMED, row
        assert Setting(**row["cell"]["shape"]) == TOY
        middle, low, high = row["ms"]
        assert 0 < low <= middle <= high
        assert len(row["round_ms"]) == 5
        if (mode, name) not in reads:
            assert row["steps"] == (TOY.new - 1 if mode == DECODE else 1)
            assert row["tokens"] == TOY.batch * (row["steps"] if mode == DECODE else TOY.prompt)
            assert row["errors"]["tokens"] <= 1e-3
            assert row["errors"]["logits"] <= 1e-5
    assert 1e-3 < rows[DECODE, "ours_int8"]["errors"]["moved"] < 0.1
    assert found["read_bandwidth"]["rounds"] == 5
    assert found["environment"]["threads"] == 1
    assert {"transformers", "peft", "torchao"} <= set(found["environment"]["packages"])
    assert [one["verdict"] for one in found["verdicts"]] == [PENDING] * len(TARGETS)
    text = (tmp_path / "generate.md").read_text()
    assert text in captured.out
    assert "its numbers mean nothing" in text
    assert "The truth is that of PEFT and transformers" in text
    for name in MODES:
        assert (tmp_path / f"generate_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gate_is_a_row_without_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AdapterBank.load

    def off(self: AdapterBank, name: int, adapter: Adapter) -> None:
        with torch.no_grad():
            adapter.gates += 0.25
        load(self, name, adapter)

    monkeypatch.setattr(AdapterBank, "load", off)
    chosen = tuple(BY_NAME[name] for name in ("ours", "ours_plain", "ours_bank_32", "peft"))
    monkeypatch.setattr(generate, "PROVIDERS", chosen)
    assert generate.main([*QUICK, str(tmp_path)]) == 0
    for row in held(tmp_path)["rows"]:
        if row["provider"] in ("ours", "ours_bank_32"):
            assert row["status"] == WRONG
            assert "logits is off by" in row["reason"]
            assert "ms" not in row
        else:
            assert row["status"] == TIMED
    assert "wrong: logits is off by" in (tmp_path / "generate.md").read_text()


def test_a_killed_run_keeps_its_rows_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = tuple(BY_NAME[name] for name in ("ours", "ours_plain"))
    monkeypatch.setattr(generate, "PROVIDERS", chosen)
    harness_measure, seen = harness.measure, []

    def logged(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        seen.append({one.name for one in candidates})
        return harness_measure(candidates, *rest)

    def interrupted(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        if seen:
            raise KeyboardInterrupt
        return logged(candidates, *rest)

    monkeypatch.setattr(harness, "measure", interrupted)
    assert generate.main([*QUICK, str(tmp_path)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    before = held(tmp_path)["rows"]
    assert {row["cell"]["mode"] for row in before} == {DECODE}

    monkeypatch.setattr(harness, "measure", logged)
    assert generate.main([*QUICK, str(tmp_path)]) == 0
    assert held(tmp_path)["rows"][: len(before)] == before
    ours, reads = {"ours", "ours_plain"}, {one.name for one in READS}
    assert seen == [ours | reads, ours]
    # nothing is missing: no model is made
    monkeypatch.setattr(generate, "Models", lambda *_: pytest.fail("made again"))
    assert generate.main([*QUICK, str(tmp_path)]) == 0


def test_a_broken_context_is_not_met_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "PROVIDERS", (BY_NAME["ours"], BY_NAME["ours_plain"]))
    harness_measure, seen = harness.measure, []

    def lost(candidates: Sequence[Any], *rest: Any) -> dict[str, Row]:
        seen.append({one.name for one in candidates})
        if len(seen) == 1:
            raise DeviceLost("ours", {"status": FAILED, "reason": "RuntimeError: illegal access"})
        return harness_measure(candidates, *rest)

    monkeypatch.setattr(harness, "measure", lost)
    assert generate.main([*QUICK, str(tmp_path)]) == 2
    assert "generate: error: ours broke the GPU's context" in capsys.readouterr().err
    assert generate.main([*QUICK, str(tmp_path)]) == 0
    assert seen[1] == {"ours_plain", *(one.name for one in READS)}
    assert "failed: RuntimeError: illegal access" in (tmp_path / "generate.md").read_text()


def test_requests_that_cannot_be_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert generate.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "generate: error: --device cuda: torch sees no GPU here" in capsys.readouterr().err
    (tmp_path / "generate.json").write_text(
        '{"benchmark": "decode", "environment": {}, "rows": []}'
    )
    assert generate.main([*QUICK, str(tmp_path)]) == 2
    assert "holds results of decode, not of generate" in capsys.readouterr().err


def test_what_is_not_installed_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "installed", lambda package: package not in ("torchao", "peft"))
    monkeypatch.setattr("benchmarks.generate_models.installed", lambda package: package != "peft")
    assert generate.main([*QUICK, str(tmp_path)]) == 0
    status = {row["provider"]: row["status"] for row in held(tmp_path)["rows"]}
    assert {name for name, one in status.items() if one == SKIPPED} == {
        "ours_int8",
        "peft",
        "transformers",
    }
    # held against our own pass without a cache then
    assert status["ours_bank_32"] == TIMED
    text = (tmp_path / "generate.md").read_text()
    assert "| skipped: torchao is not installed" in text
    assert "The truth is our own pass in a wider dtype, without a cache" in text
    assert held(tmp_path)["environment"]["packages"]["peft"] is None


def test_a_format_that_does_not_fit_is_a_failed_row(tmp_path: Path, toy: Problem) -> None:
    provider = Provider("ours_int4", "adapter", weights="int4")
    row = generate._candidate(toy, Truths(toy), provider, DECODE)
    assert isinstance(row, dict)
    assert row["status"] == FAILED
    assert "NVIDIA GPU" in row["reason"]


def test_settings_hold_the_targets_and_what_the_machine_can_do() -> None:
    core, full = settings("cuda", "core"), settings("cuda", "full")
    assert len(core) == 6
    assert set(core) < set(full)
    assert {(s.model, s.batch) for s in full} == {
        (model, batch) for model in ("llama-7b", "llama-3-8b") for batch in (1, 8, 32, 128)
    }
    assert HEADLINE in core
    assert all(generate_report.on_gpu(s) for s in full)
    assert not any(generate_report.on_processor(s) for s in full)
    processor = settings("cpu", "core")
    assert [(s.model, s.batch) for s in processor] == [("tiny", 1), ("tiny", 4), ("110m", 1)]
    assert all(generate_report.on_processor(s) for s in processor)
    # the settings of a model are side by side: it is made once
    assert [s.model for s in full] == sorted((s.model for s in full), reverse=True)
    gpu = torch.device("cuda")
    assert all(claims(one, HEADLINE, gpu) for one in PROVIDERS)
    assert {one.name for one in PROVIDERS if not claims(one, cpu_setting("110m", 1), CPU)} == {
        "ours_bank_32",
        "ours_bank_1000",
        "ours_int4",
    }
    assert claims(BY_NAME["ours_bank_1000"], cpu_setting("tiny", 4), CPU)


def test_every_sequence_has_an_adapter_of_its_own() -> None:
    assert adapters_of("plain", 2) == [None, None]
    assert adapters_of("adapter", 3) == [0, 0, 0]
    for kind in ("bank_32", "bank_1000"):
        assert len(set(adapters_of(kind, ADAPTERS[kind]))) == ADAPTERS[kind]


def wrong_of(given: Problem, provider: Provider, mode: str) -> tuple[dict[str, float], str]:
    work = (our_work if provider.ours else their_work)(given, provider, mode)
    return check(work.run(work.before()), Truths(given).expected(provider, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_providers_meet_the_truth(toy: Problem, name: str, mode: str) -> None:
    errors, wrong = wrong_of(toy, BY_NAME[name], mode)
    assert not wrong
    assert errors["differing"] == 0
    assert errors["logits"] < 1e-5
    assert errors.get("moved", 0.0) < 0.1


def test_adapters_matter_and_are_told_apart(toy: Problem) -> None:
    """Else a wrong adapter would pass as the truth."""
    truths = Truths(toy)
    logits = {
        kind: truths.expected(Provider("", kind), DECODE)["logits"].truth for kind in ADAPTERS
    }
    for one in logits:
        for other in logits:
            if one != other:
                assert (logits[one] - logits[other]).abs().max() > 0.05 * logits[one].abs().max()
    plain = replace(BY_NAME["ours"], kind="plain")
    work = our_work(toy, plain, DECODE)
    _, wrong = check(work.run(work.before()), truths.expected(BY_NAME["ours"], DECODE))
    assert "logits is off by" in wrong


def test_a_near_tie_is_accepted_and_counted_a_clear_difference_is_not(toy: Problem) -> None:
    ours = BY_NAME["ours"]
    truths = Truths(toy)
    expected = truths.expected(ours, DECODE)
    work = our_work(toy, ours, DECODE)
    found = work.run(work.before())
    tokens = found["tokens"].clone()
    # another token in one sequence, the fourth, and all that follow
    tokens[1, 3:] = (tokens[1, 3:] + 1) % 128
    moved = {**found, "tokens": tokens, "differing": tokens}
    _, wrong = check(moved, expected)
    assert "tokens is off by" in wrong
    with torch.inference_mode():
        truths._truth("adapter", None).gaps[1, 3] = 1e-6
    errors, wrong = check(moved, expected)
    assert not wrong
    assert errors["differing"] == 1
    assert errors["tokens"] == pytest.approx(1e-6)


def test_half_precision_may_be_off_as_far_as_theirs_is_and_not_much_further() -> None:
    setting = replace(TOY, dtype="bfloat16")
    given = problem(setting, Models(TOY.model, "bfloat16", CPU), memory_of(4096, CPU))
    peft, ours = BY_NAME["peft"], BY_NAME["ours"]
    rounding, wrong = wrong_of(given, peft, PREFILL)
    assert not wrong
    assert rounding["logits"] > 1e-3
    errors, wrong = wrong_of(given, ours, PREFILL)
    assert not wrong
    assert errors["logits"] < 3 * rounding["logits"]
    expected = Truths(given).expected(ours, PREFILL)["logits"]
    assert rounding["logits"] < expected.bound < 5 * rounding["logits"] + 0.05


def test_greedy_is_the_argmax_step_by_step() -> None:
    def last(tokens: Tensor) -> Tensor:
        """The likeliest follows the last token; the second lies as far behind as tokens are."""
        logits = torch.zeros(len(tokens), 7)
        rows = torch.arange(len(tokens))
        logits[rows, (tokens[:, -1] + 1) % 7] = float(tokens.shape[1])
        return logits

    truth = greedy(last, torch.tensor([[3, 4], [0, 6]]), 3)
    assert truth.tokens.tolist() == [[5, 6, 0], [0, 1, 2]]
    assert truth.gaps.tolist() == [[2.0, 3.0, 4.0]] * 2
    assert truth.logits[0].tolist() == [0, 0, 0, 0, 0, 2, 0]


def test_own_truth_is_peft(toy: Problem) -> None:
    for kind in ADAPTERS:
        theirs = Truths(toy)._truth(kind, None)
        ours = own_truth(toy, kind, None, 6)
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.logits.double(), theirs.logits, rtol=0, atol=1e-5)


def test_a_failed_pass_gives_its_pages_back(toy: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    work = our_work(toy, BY_NAME["ours"], DECODE)
    pages = toy.pool.free
    state = work.before()
    assert toy.pool.free < pages
    monkeypatch.setattr(
        generate_problem.Decoder, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("memory"))
    )
    with pytest.raises(RuntimeError, match="memory"):
        work.run(state)
    assert toy.pool.free == pages


def test_random_weights_are_the_same_again_and_as_wide_as_said() -> None:
    config = LlamaConfig(dim=64, n_layers=1, n_heads=4, vocab_size=97, multiple_of=16)
    model, again = (random_model(config, torch.bfloat16, CPU) for _ in range(2))
    assert model.output_weight.dtype == torch.bfloat16
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.state_dict()[name])
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert weight.float().std().item() == pytest.approx(0.02, rel=0.1)


def test_bytes_are_those_of_weights_cache_and_prompts(toy: Problem) -> None:
    config = toy.models.base.config
    matrices = 2 * 64 * 64 + 2 * 32 * 64 + 3 * config.hidden_dim * 64
    weights = 4 * (3 * (matrices + 2 * 64) + 64 + 128 * 64)
    assert read_bytes(toy.models.base) == weights
    token = 2 * 2 * 16 * 4
    cached = 2 * (17 + 18 + 19 + 20 + 21) * token * 3
    plain = facts_of(toy, BY_NAME["ours_plain"], DECODE)
    assert plain == {"steps": 5, "tokens": 10, "bytes": 5 * weights + cached}
    # one adapted layer of three
    prompt = 10 * token
    assert facts_of(toy, BY_NAME["ours"], DECODE)["bytes"] == plain["bytes"] + 5 * prompt
    banked = facts_of(toy, BY_NAME["ours_bank_32"], DECODE)["bytes"]
    assert banked == plain["bytes"] + 5 * 2 * prompt
    assert facts_of(toy, BY_NAME["ours"], PREFILL) == {"steps": 1, "tokens": 32}


def test_quantised_weights_count_as_they_are_packed(toy: Problem) -> None:
    pytest.importorskip("torchao.quantization")
    model = toy.models.model("int8")
    weight = model.layers[0].feed_forward.w1.weight
    rows, columns = weight.shape
    # a byte each, and for a row a float32 scale and a byte of zero point
    assert stored_bytes(weight) == rows * columns + 5 * rows
    assert read_bytes(model) < 0.3 * read_bytes(toy.models.base)
    # what the format leaves alone is the base's very tensor
    ours, base = model.tok_embeddings.weight, toy.models.base.tok_embeddings.weight
    assert ours.data_ptr() == base.data_ptr()


def test_transformers_holds_our_tensors(toy: Problem) -> None:
    theirs = toy.models.theirs
    assert theirs is not None
    layer = toy.models.base.layers[1]
    for model in (theirs.plain.model, theirs.adapted.model):
        assert model.config._attn_implementation == "sdpa"
        held_there = model.model.layers[1]
        assert held_there.mlp.up_proj.weight.data_ptr() == layer.feed_forward.w3.weight.data_ptr()
    # only the adapted layer is wrapped
    wrapped = [hasattr(one.self_attn, "adaption_gate") for one in theirs.adapted.model.model.layers]
    assert wrapped == [False, False, True]


def timed(ms: float, steps: int = 10, tokens: int = 10, size: int = 1000) -> Row:
    row = {"status": TIMED, "ms": [ms] * 3, "round_ms": [ms] * 5, "bytes": size}
    return {**row, "steps": steps, "tokens": tokens, "errors": {"logits": 2e-4, "differing": 1}}


def cell(setting: Setting = HEADLINE, mode: str = DECODE, **times: float | Row) -> Any:
    rows = {name: one if isinstance(one, dict) else timed(one) for name, one in times.items()}
    return {(setting, mode): rows}


def verdict(target: Any, cells: Any, device: str = "NVIDIA H200") -> Any:
    return judge(target, with_goal(cells), device)


def test_the_rate_is_a_target_of_one_setting_on_one_gpu() -> None:
    # 10 tokens in 39.2 ms are 255 a second
    assert verdict(RATE, cell(ours=39.2)).verdict == MET
    missed = verdict(RATE, cell(ours=39.3))
    assert missed.verdict == MISSED
    assert missed.evidence == f"1.00 against {GOAL_NAME} at {HEADLINE.describe()}"
    assert verdict(RATE, cell(ours=10.0), "NVIDIA H100 80GB HBM3").verdict == PENDING
    for other in (gpu_setting("llama-7b", 8), gpu_setting("llama-3-8b", 1), TOY):
        assert verdict(RATE, cell(other, ours=10.0)).verdict == PENDING
    assert verdict(RATE, cell(mode=PREFILL, ours=10.0)).verdict == PENDING
    wrong = {"status": WRONG, "reason": "logits is off by 1"}
    undecided = verdict(RATE, cell(ours=wrong))
    assert undecided.verdict == UNDECIDED
    assert "ours: logits is off by 1" in undecided.evidence


def test_costs_and_speed_against_peft_are_limited() -> None:
    for peft, wanted in ((5.0, MET), (4.9, MISSED)):
        assert verdict(AGAINST_PEFT, cell(ours=1.0, peft=peft)).verdict == wanted
    grouped = gpu_setting("llama-3-8b", 128)
    for ours, wanted in ((1.02, MET), (1.03, MISSED)):
        cells = cell(ours=1.0, ours_plain=1.0) | cell(grouped, ours=ours, ours_plain=1.0)
        assert verdict(COSTS, cells).verdict == wanted
    for many, wanted in ((1.03, MET), (1.04, MISSED)):
        assert verdict(MANY_ADAPTERS, cell(ours=1.0, ours_bank_1000=many)).verdict == wanted


def test_the_processors_targets_need_both_models_and_every_batch() -> None:
    tiny, large = cpu_setting("tiny", 1), cpu_setting("110m", 1)
    for peft, wanted in ((1.5, MET), (1.4, MISSED)):
        cells = cell(tiny, ours=1.0, peft=2.0) | cell(large, ours=1.0, peft=peft)
        assert verdict(PROCESSOR, cells, "cpu").verdict == wanted
    many = cpu_setting("tiny", 4)
    told = verdict(
        PROCESSOR, cell(tiny, ours=1.0, peft=2.0) | cell(many, ours=1.0, peft=0.5), "cpu"
    )
    assert told.verdict == MET
    assert "0.50 at another shape" in told.evidence
    for ours, wanted in ((1.1, MET), (1.2, MISSED)):
        cells = cell(tiny, ours=1.0, ours_plain=1.0) | cell(many, ours=ours, ours_plain=1.0)
        assert verdict(PROCESSOR_COSTS, cells, "cpu").verdict == wanted
    assert verdict(PROCESSOR, cell(ours=1.0, peft=9.0), "cpu").verdict == PENDING


def test_tables_tell_rates_ratios_and_deviations() -> None:
    reads = {name: timed(1.0, 1, 0, 200) for name in ("read_sum", "read_dot")}
    cells = cell(ours=20.0, ours_plain=10.0, peft=40.0, **reads)
    cells[HEADLINE, DECODE]["ours_int4"] = {"status": FAILED, "reason": "RuntimeError: none"}
    text = "\n".join(tables(cells, DECODE))
    # 1,000 bytes at the reads' rate take 5 ms
    assert (
        "| ours       | 2.000 (2.000, 2.000)       | 500   | 5e-05   | 25.0%             "
        "| 2.00            | 2.00          | 2.0e-04    | 1    |"
    ) in text
    assert "| ours_int4  | failed: RuntimeError: none |" in text
    assert tables(cells, PREFILL) == []
    assert "of read bandwidth" not in "\n".join(tables(cell(mode=PREFILL, ours=1.0), PREFILL))
    assert set(figures(cells)) == {DECODE, PREFILL}


def test_rows_come_back_as_settings(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "g.json", "generate", {}, fresh=True)
    results.add(generate.cell_of(HEADLINE, DECODE), {"ours": timed(1.0)})
    cells = cells_of(results.rows.values(), Setting)
    assert list(cells) == [(HEADLINE, DECODE)]
    assert HEADLINE.describe() == "llama-7b B=1 512+128 tokens bfloat16"


def test_every_provider_is_told_of() -> None:
    for name in BY_NAME:
        assert name.startswith("ours_bank") or name in generate_report.LEGEND, name


@pytest.mark.gpu
def test_quick_command_on_a_gpu(tmp_path: Path) -> None:
    assert generate.main(["--quick", "--device", "cuda", "--output", str(tmp_path)]) == 0
    for row in held(tmp_path)["rows"]:
        assert row["status"] in (TIMED, SKIPPED), row
