"""The ablations: each run trains what it says, nothing is measured twice, verdicts are honest."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation_runs, ablations
from benchmarks.ablation_claims import (
    NOT,
    PARTLY,
    REPRODUCED,
    Fit,
    InitResult,
    Method,
    Spread,
    layers_claims,
    longer_claims,
    method_claims,
    spearman,
    zero_init_claims,
)
from benchmarks.ablation_plan import FULL, QUICK, Plan, cells
from benchmarks.ablation_report import best_rate
from benchmarks.ablation_runs import (
    Laboratory,
    Run,
    attention_input_rms,
    joint_attention,
    joint_softmax,
    laboratory,
    make_trainer,
    measure,
    prompts_of,
    score,
    train,
)
from llama_adapter import assets
from llama_adapter.adapter import Prompts
from llama_adapter.data.packed import pack
from llama_adapter.data.records import load_records
from llama_adapter.evaluation.exact_match import evaluate_instructions, exact_match

ROOT = Path(__file__).parents[2]
HELD_OUT = 8
UNTIMED = {"seconds": 0, "processor_seconds": 0}
TINY = Plan(
    seeds=(0,),
    records=8,
    epochs=2,
    held_out=HELD_OUT,
    layers=(1, 2),
    sigmas=(4.0,),
    rates=(1.0,),
    small_records=8,
    small_epochs=(1, 2),
    lora_lrs=(3e-3,),
    full_lrs=(1e-3,),
    timed_steps=0,
)
FIGURES = {"layers", "zero_init", "loss_curves", "longer", "methods"}


@pytest.fixture(autouse=True)
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quick` in a yet smaller form."""
    monkeypatch.setattr(ablations, "QUICK", TINY)


@pytest.fixture
def lab() -> Laboratory:
    """The bundled base with a few held-out records."""
    return laboratory(assets.BASE, HELD_OUT)


def run_of(lab: Laboratory, method: str, **changes: Any) -> Run:
    """Two steps on eight records, adapting every layer."""
    lr = {"lora": 3e-3, "full": 1e-3}.get(method, lab.recipe.peak_lr)
    return replace(Run(method, lab.base.model.config.n_layers, 1.0, lr, 2, 8, 3), **changes)


def same(*values: float) -> Spread:
    return Spread.of(values)


def literal_joint(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor
) -> torch.Tensor:
    """softmax over [prompt; tokens] by concatenating keys and values."""
    group = q.shape[2] // k.shape[2]
    keys = torch.cat([pk.expand(q.shape[0], *pk.shape), k], 1).repeat_interleave(group, 2)
    values = torch.cat([pv.expand(q.shape[0], *pv.shape), v], 1).repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / math.sqrt(q.shape[-1])
    rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(keys.shape[1])[None]
    seen = columns <= rows + pk.shape[0]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, values)


def test_joint_attention_is_one_softmax_over_prompt_and_tokens() -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 13, 6, 16), (2, 13, 3, 16), (2, 13, 3, 16), (7, 3, 16), (7, 3, 16))
    inputs = [(1.7 * torch.randn(s, generator=generator)).requires_grad_() for s in shapes]
    cu = torch.tensor([0, 13, 26], dtype=torch.int32)
    bounds = {f"cu_seqlens_{x}": cu for x in "qk"} | {f"max_seqlen_{x}": 13 for x in "qk"}
    ours = joint_attention(*(x.flatten(0, 1) for x in inputs[:3]), *inputs[3:], **bounds)
    ours, theirs = ours.unflatten(0, (2, 13)), literal_joint(*inputs)
    assert float((ours - theirs).detach().abs().max()) <= 1e-5
    dout = torch.randn(ours.shape, generator=generator)
    pairs = zip(
        torch.autograd.grad(ours, inputs, dout),
        torch.autograd.grad(theirs, inputs, dout),
        strict=True,
    )
    for a, b in pairs:
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def test_joint_softmax_replaces_attention_while_entered_only(lab: Laboratory) -> None:
    model = lab.base.model
    batch = pack(lab.data.train[:2])
    trainer = make_trainer(lab, run_of(lab, "joint"))

    def logits(prompts: Prompts | None = None) -> torch.Tensor:
        return model.logits(model.hidden_packed(batch.tokens, batch.packing, prompts))

    with torch.no_grad():
        prompts = prompts_of(trainer)
        separate, plain = logits(prompts), logits()
        with joint_softmax():
            joint = logits(prompts)
            assert torch.equal(logits(), plain)
        assert torch.equal(logits(prompts), separate)
    assert float((joint - separate).abs().max()) > 0.1


def test_teacher_forced_exact_match_is_that_of_generated_answers() -> None:
    lab = laboratory(assets.BASE, 24)
    records = load_records(assets.FOLLOW_HELDOUT)[0][:24]
    adapter = make_trainer(lab, run_of(lab, "zero_init")).adapter
    torch.nn.init.normal_(adapter.gates, std=0.3, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for prompts in (None, lab.base.model.project(adapter.requires_grad_(False))):
        forced = score(lab.base.model, prompts, lab.data.held_out)[1]
        answers = evaluate_instructions(
            lab.base.model, lab.base.tokenizer, records, prompts
        ).predictions
        generated = [exact_match(a, r.output) for a, r in zip(answers, records, strict=True)]
        assert forced == generated
        outcomes += forced
    assert 0 < sum(outcomes) < len(outcomes)


def test_score_is_the_loss_that_the_trainer_validates_with(lab: Laboratory) -> None:
    trainer = make_trainer(lab, run_of(lab, "gate_one"))
    with torch.no_grad():
        loss = score(trainer.model, prompts_of(trainer), lab.data.held_out)[0]
    assert math.isclose(loss, trainer.validate(lab.data.held_out), rel_tol=1e-5)


def test_attention_input_rms_is_over_all_tokens(lab: Laboratory) -> None:
    model, examples = lab.base.model, lab.data.train[: ablation_runs.SCORE_BATCH]
    inputs: list[torch.Tensor] = []
    norm = model.layers[0].get_submodule("attention_norm")
    with torch.no_grad():
        for example in examples:
            inputs.append(norm(model.tok_embeddings(torch.tensor(example.tokens))))
    expected = float(torch.cat(inputs).double().square().mean().sqrt())
    found = attention_input_rms(lab)
    assert len(found) == model.config.n_layers
    assert math.isclose(found[0], expected, rel_tol=1e-5)


@pytest.mark.parametrize("method", ["gate_one", "joint"])
def test_without_a_zero_gate_the_gate_is_one_and_stays_one(lab: Laboratory, method: str) -> None:
    run = run_of(lab, method)
    trainer = make_trainer(lab, run)
    before = trainer.adapter.prompts.detach().clone()
    assert list(trainer.groups) == ["prompts"]
    train(lab, run, trainer)
    assert torch.equal(trainer.adapter.multipliers(), torch.ones_like(trainer.adapter.gates))
    assert not torch.equal(trainer.adapter.prompts, before)


def test_weight_methods_train_their_weights_and_leave_the_base_alone(lab: Laboratory) -> None:
    config, model = lab.base.model.config, lab.base.model
    before = {name: p.clone() for name, p in model.state_dict().items()}
    untouched = score(model, None, lab.data.held_out)[0]
    kv = config.kv_heads * config.head_dim
    wanted = {
        "lora": config.n_layers * 8 * (2 * config.dim + config.dim + kv),
        "full": sum(p.numel() for p in model.parameters()),
    }
    for method, count in wanted.items():
        row = measure(lab, run_of(lab, method))
        assert row["parameters"] == count
        assert 4 * count < row["file_bytes"] < 4 * count + 10_000
        assert row["step0_loss"] == pytest.approx(untouched, rel=1e-6)
        assert row["held_out_loss"] != row["step0_loss"]
        assert len(row["losses"]) == 2
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_zero_init_starts_from_the_base_exactly_and_a_run_repeats_bitwise(lab: Laboratory) -> None:
    untouched = score(lab.base.model, None, lab.data.held_out)[0]
    rows = [measure(lab, run_of(lab, "zero_init", prompt_std=4.0)) for _ in range(2)]
    assert rows[0]["step0_loss"] == untouched
    assert [{**row, **UNTIMED} for row in rows] == [{**rows[0], **UNTIMED}] * 2


def test_a_run_that_diverges_is_a_row_that_says_so(lab: Laboratory) -> None:
    row = measure(lab, run_of(lab, "full", lr=1e30, epochs=5))
    assert "the loss is nan" in row["failure"] or "not finite" in row["failure"]
    assert 1 <= len(row["losses"]) < 5
    assert row["accuracy"] == 0.0


def test_a_loss_that_is_not_finite_is_none(
    lab: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation_runs, "score", lambda *_: (math.nan, [False, True]))
    row = measure(lab, run_of(lab, "zero_init", epochs=1))
    assert (row["step0_loss"], row["held_out_loss"], row["train_loss"]) == (None, None, None)
    assert row["accuracy"] == 0.5


def test_every_cell_of_an_experiment_has_its_own_run_and_seeds_come_in_order(
    lab: Laboratory,
) -> None:
    table = cells(FULL, lab.recipe, 6, 1.25)
    seeds = [cell.run.seed for cell in table]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2}
    for name in ("layers", "zero_init", "longer", "methods"):
        runs = [cell.run for cell in table if cell.experiment == name]
        assert len(set(runs)) == len(runs)
    stds = {c.setting[1]: c.run.prompt_std for c in table if c.experiment == "zero_init"}
    assert stds == {1.0: 1.25, 2.0: 2.5, 4.0: 5.0, 8.0: 10.0}
    rates = {(c.setting[0], c.run.lr) for c in table if c.experiment == "zero_init"}
    lr = lab.recipe.peak_lr
    kinds = ("zero_init", "gate_one", "joint")
    assert rates == {(kind, rate) for kind in kinds for rate in (lr, 4 * lr)}
    assert {c.setting[0] for c in table if c.experiment == "layers"} == {1, 2, 3, 4, 5, 6}
    assert {c.experiment for c in cells(QUICK, lab.recipe, 6, 1.0)} == set(ablations.SECTIONS)


def test_quick_writes_tables_figures_and_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablations.main(["--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    held = json.loads((tmp_path / "ablations.json").read_text())
    assert held["runs_planned"] == len(held["rows"]) == 10
    assert set(held["verdicts"]) == {"layers", "zero_init", "longer", "methods"}
    environment = held["environments"][held["rows"][0]["environment"]]
    assert environment["threads"] == 1
    assert {"torch", "peft"} <= set(environment["packages"])
    assert "commit" in environment
    assert held["identity"]["recipe"]["batch_size"] >= 1
    assert (
        0 < held["processor_seconds"] <= sum(row["processor_seconds"] for row in held["rows"]) + 1
    )
    for claims in held["verdicts"].values():
        for claim in claims:
            assert claim["verdict"] in (REPRODUCED, PARTLY, NOT)
            assert f"- **{claim['verdict']}**: {claim['paper']}" in printed
            assert claim["evidence"] in printed
    assert "its verdicts mean nothing" in printed
    assert len(re.findall(r"^\| -", printed, re.MULTILINE)) == 4
    for name in FIGURES:
        assert (tmp_path / f"ablations_{name}.png").read_bytes().startswith(b"\x89PNG")
    tables = (tmp_path / "ablations.md").read_text()
    assert all(line in printed for line in tables.splitlines())


def test_an_interrupted_run_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--quick", "--experiment", "layers", "--output"]
    assert ablations.main([*command, str(tmp_path / "whole")]) == 0
    measured: list[Run] = []

    def interrupted(lab: Laboratory, run: Run) -> dict[str, Any]:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(run)
        return measure(lab, run)

    monkeypatch.setattr(ablations, "measure", interrupted)
    assert ablations.main([*command, str(tmp_path / "cut")]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "cut/ablations.json").read_text())["rows"]) == 1
    later: list[Run] = []
    monkeypatch.setattr(
        ablations, "measure", lambda lab, run: later.append(run) or measure(lab, run)
    )
    assert ablations.main([*command, str(tmp_path / "cut")]) == 0
    assert len(later) == 1
    assert later[0] not in measured
    rows = [
        [{**row, **UNTIMED} for row in json.loads((tmp_path / folder).read_text())["rows"]]
        for folder in ("whole/ablations.json", "cut/ablations.json")
    ]
    assert rows[0] == rows[1]
    assert "runs are not measured yet" in (tmp_path / "cut/ablations.md").read_text()


def test_results_of_another_base_are_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ablations.json"
    old = {"data": {}, "base": {"sha256": "0"}}
    file.write_text(json.dumps({"environments": [], "rows": [], "identity": old}))
    assert ablations.main(["--quick", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "was measured with another base and data and held_out and recipe: start over" in error
    file.write_text("[")
    assert ablations.main(["--quick", "--output", str(tmp_path)]) == 2
    assert "holds no ablations" in capsys.readouterr().err
    assert file.read_text() == "["


@pytest.mark.slow
def test_quick_command_with_two_processes_takes_under_a_minute(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.ablations", "--quick", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "ablations.json").read_text())
    assert len(held["rows"]) == held["runs_planned"]
    assert held["processor_seconds"] < 60


def test_spread_and_rank_correlation() -> None:
    low, high = Spread.of([0.3, 0.1, 0.2]), Spread.of([0.9, 0.2, 0.4])
    assert (low.median, low.low, low.high) == (0.2, 0.1, 0.3)
    assert not high.above(low)
    assert Spread.of([0.31]).above(low)
    assert low.show(".0%") == "20% (10% to 30%)"
    assert spearman([1, 2, 3, 4], [0.1, 0.4, 0.5, 0.9]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [7, 7, 7]) == 0
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([(0.1, 0.2), (0.15, 0.3), (0.6, 0.8)], REPRODUCED),
        ([(0.1, 0.2), (0.7, 0.8), (0.4, 0.6)], PARTLY),
        ([(0.1, 0.5), (0.3, 0.4), (0.4, 0.8)], NOT),
    ],
)
def test_verdict_on_inserted_layers(accuracies: list[tuple[float, float]], expected: str) -> None:
    (claim,) = layers_claims({n: same(*a) for n, a in enumerate(accuracies, 1)})
    assert claim.verdict == expected
    assert ("falls: 2 to 3" in claim.evidence) == (expected == PARTLY)


def init_result(step0: float, halfway: float, final: float, accuracy: float) -> InitResult:
    return InitResult(
        same(step0), same(halfway), same(final), same(accuracy - 0.01, accuracy + 0.01)
    )


def test_verdicts_on_zero_init_by_prompt_scale() -> None:
    good, bad = init_result(2.5, 1.0, 0.1, 0.95), init_result(3.5, 2.0, 1.9, 0.15)
    started = init_result(3.0, 0.9, 0.1, 0.95)

    def verdicts(zero: list[InitResult], one: list[InitResult], joint: list[InitResult]) -> list:
        results = {"zero_init": zero, "gate_one": one, "joint": joint}
        by_scale = {kind: dict(zip((1.0, 4.0), r, strict=True)) for kind, r in results.items()}
        return zero_init_claims(by_scale, 2.5, 0.12)

    whole = verdicts([good, good], [bad, bad], [bad, bad])
    assert [c.verdict for c in whole] == [REPRODUCED] * 5 + [NOT]
    some = verdicts([good, good], [started, started], [started, bad])
    assert [c.verdict for c in some] == [REPRODUCED, PARTLY, PARTLY, PARTLY, NOT, PARTLY]
    assert "holds at sigma 4, not at 1. sigma 1:" in some[1].evidence
    moved = init_result(2.6, 1.0, 0.1, 0.95)
    none = verdicts([moved, moved], [started, started], [started, started])
    assert [c.verdict for c in none] == [NOT] * 6
    undisturbed = verdicts([good, good], [good, bad], [bad, bad])
    assert undisturbed[0].verdict == PARTLY


@pytest.mark.parametrize(
    ("train_loss", "held_out", "accuracy", "expected"),
    [
        ((0.5, 0.01), (0.4, 0.9), (0.80, 0.82), [REPRODUCED, REPRODUCED]),
        ((0.5, 0.01), (0.4, 0.9), (0.805, 0.80), [REPRODUCED, PARTLY]),
        ((0.5, 0.01), (0.4, 0.9), (0.80, 0.60), [REPRODUCED, NOT]),
        ((0.5, 0.01), (0.4, 0.3), (0.80, 0.95), [PARTLY, PARTLY]),
        ((0.5, 0.50), (0.4, 0.9), (0.80, 0.60), [NOT, NOT]),
    ],
)
def test_verdicts_on_longer_training(
    train_loss: tuple[float, float],
    held_out: tuple[float, float],
    accuracy: tuple[float, float],
    expected: list[str],
) -> None:
    fits = {
        epochs: Fit(same(train_loss[i]), same(held_out[i]), same(accuracy[i] - 0.02, accuracy[i]))
        for i, epochs in enumerate((10, 40))
    }
    assert [claim.verdict for claim in longer_claims(fits)] == expected


def test_verdicts_on_other_methods() -> None:
    small, large = Method(9, 9, same(1, 2), same(0.9)), Method(99, 99, same(3, 4), same(0.8))

    def verdicts(ours: Method, lora: Method, full: Method) -> list[str]:
        claims = method_claims({"zero_init": ours, "lora": lora, "full": full})
        return [claim.verdict for claim in claims]

    assert verdicts(small, large, large) == [REPRODUCED] * 3
    assert verdicts(replace(small, file_bytes=100), small, large) == [NOT, PARTLY, REPRODUCED]
    assert verdicts(replace(small, file_bytes=100), large, large)[0] == PARTLY
    better, far = (replace(large, accuracy=same(*a)) for a in ((0.91, 0.95), (0.96, 0.97)))
    assert verdicts(small, better, large)[2] == PARTLY
    assert verdicts(replace(small, accuracy=same(0.95, 0.91)), better, large)[2] == REPRODUCED
    assert verdicts(replace(small, step_time=same(3, 5)), far, better) == [REPRODUCED, NOT, NOT]


def test_a_method_is_reported_at_its_best_learning_rate() -> None:
    def rows(*accuracies: float, loss: float | None = 1.0) -> list[dict[str, float | None]]:
        return [{"accuracy": value, "held_out_loss": loss} for value in accuracies]

    table = {
        ("lora", 0.1): rows(0.9, 0.1, 0.1),
        ("lora", 0.2): rows(0.5, 0.5, 0.4),
        ("lora", 0.3): rows(0.5, 0.6, 0.4, loss=0.9),
        ("lora", 0.4): rows(0.5, 0.5, 0.4, loss=None),
        ("full", 0.5): rows(1.0, 1.0, 1.0),
    }
    assert best_rate(table, ("lora",)) == 0.3


def test_figures_are_drawn_for_failed_runs_too(lab: Laboratory) -> None:
    row = measure(lab, run_of(lab, "full", lr=1e30, epochs=5))
    settings = [(kind, 4.0, 0.1) for kind in ("zero_init", "gate_one", "joint")]
    base = {"held_out_loss": 2.0, "accuracy": 0.1, "rms": 1.0}
    section = ablations.SECTIONS["zero_init"]({key: [row] for key in settings}, base)
    assert section.claims[0].verdict == NOT
    assert "inf" in section.text()
    assert ablations.picture(section.figures["loss_curves"]).startswith(b"\x89PNG")
