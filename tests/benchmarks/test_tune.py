"""The tuner: compiling finds what fits, what is wrong is not timed, noise proposes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention.configs import (
    DIRECTIONS,
    UNMEASURED,
    TileConfig,
    tile,
)
from tests.adapter_kernels.zero_init_attention.kernel_runs import DEVICE, needs_kernels

pytest.importorskip("triton")

from benchmarks import harness, specialisations, tune  # need triton
from benchmarks.harness import TIMED, WRONG, Protocol, Row
from benchmarks.specialisations import forms

SMALL, SMALLER = TileConfig(32, 16, 4, 1), TileConfig(16, 16, 4, 1)
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_candidates_begin_with_the_shipped_row_and_hold_each_tile_once(direction: str) -> None:
    shipped = tile(90, direction, 128, torch.bfloat16)
    found = tune.candidates(direction, shipped)
    assert found[0] == replace(shipped, speed=UNMEASURED)
    assert len(set(found)) == len(found) > 30
    assert any(config.reload_q for config in found) == (direction == "forward")


@compiled
def test_what_does_not_fit_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = tile(80, "forward", 128, torch.bfloat16)
    assert tune.fits("forward", 80, 128, shipped)
    assert tune.fits("forward", 80, 128, TileConfig(128, 64, 4, 3)), "spills are timed"
    for wrong in (TileConfig(128, 128, 8, 4), TileConfig(24, 16, 4, 1)):
        assert not tune.fits("forward", 80, 128, wrong)


@compiled
def test_a_chip_that_is_not_here_is_only_compiled_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "candidates", lambda *_: [TileConfig(128, 64, 4, 3), SMALL, SMALLER])
    arguments = ["--fit", "80", "--direction", "prompt_forward", "--head-dim", "16"]
    assert tune.main([*arguments, "--processes", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    # tiles so small that no thread loads 16 bytes are none
    assert printed == [
        "prompt_forward, D = 16, sm_80: 1 of 3 tiles fit, of " + tune.FIELDS,
        "  TileConfig(128, 64, 4, 3)",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "torch sees no GPU here; --fit 80 compiles for one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "80", "--output", "x"], "--fit measures nothing that --output could keep"),
        (["--fit", "80", "--processes", "0"], "must be a number of at least 1, got '0'"),
    ],
)
def test_requests_that_cannot_be_carried_out(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = tune.main(arguments)
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCH", 2), ("TOKENS", 41), ("HEADS", 4)):
        monkeypatch.setattr(specialisations, name, value)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiles_take_turns_over_the_same_tensors(direction: str) -> None:
    spec = forms(80, direction, 16, torch.float16)[0]
    device, protocol = torch.device(DEVICE), Protocol(rounds=5, warmup=1, round_ms=0.1)
    rows = tune.measure(spec, [SMALL, SMALLER], device, protocol)
    assert list(rows) == ["TileConfig(32, 16, 4, 1)", "TileConfig(16, 16, 4, 1)"]
    for row in rows.values():
        assert row["status"] == TIMED
        names = {name.removesuffix("_ptr") for name in tune.RESULTS[direction]}
        assert set(row["errors"]) == names


@pytest.mark.kernel
@needs_kernels
@pytest.mark.usefixtures("few_tokens")
def test_a_tile_that_leaves_rows_out_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tune.launch_of

    def short(*arguments: object) -> object:
        launch = real(*arguments)
        return launch._replace(grid=launch.grid - 1) if arguments[1] == SMALLER else launch

    monkeypatch.setattr(tune, "launch_of", short)
    spec = forms(80, "forward", 16, torch.float16)[0]
    protocol = Protocol(rounds=5, warmup=1, round_ms=0.1)
    rows = tune.measure(spec, [SMALL, SMALLER], torch.device(DEVICE), protocol)
    assert [row["status"] for row in rows.values()] == [TIMED, WRONG]


@pytest.mark.kernel
@needs_kernels
@pytest.mark.usefixtures("few_tokens")
def test_a_shipped_tile_that_cannot_launch_is_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> object:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tune, "launch_of", refuse)
    spec = forms(80, "forward", 16, torch.float16)[0]
    rows = tune.measure(spec, [SMALL, SMALLER], torch.device(DEVICE), Protocol())
    assert list(rows) == [tune.label(SMALL)]
    said = tune.proposal(rows, tune.label(SMALL), "H200", spec)
    assert said.endswith("is failed: RuntimeError: out of resource: shared memory")


def timed(ms: float) -> Row:
    return {"status": TIMED, "ms": [ms, ms, ms], "round_ms": [ms] * 5}


def test_proposals() -> None:
    spec = forms(90, "backward_dq", 64, torch.bfloat16)[0]
    old, new = "TileConfig(128, 64, 8, 3)", "TileConfig(64, 64, 4, 2)"
    wrong = {"status": WRONG, "reason": "dq is off"}
    said = tune.proposal({old: timed(2.0), new: timed(1.6), "x": wrong}, old, "H200", spec)
    row = 'TileConfig(64, 64, 4, 2, speed="1.6 ms on H200, 1.25x (128, 64, 8, 3)")'
    assert said == f"backward_dq, D = 64: {row}"
    for rows in ({old: timed(2.0), new: timed(1.99)}, {old: timed(2.0), new: wrong}):
        assert tune.proposal(rows, old, "H200", spec).endswith(f"{old} stays, 2 ms on H200")
    said = tune.proposal({old: wrong, new: timed(1.0)}, old, "H200", spec)
    assert said.endswith(f"the shipped {old} is wrong: dq is off")


@pytest.mark.gpu
def test_a_gpu_is_tuned_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "candidates", lambda _, shipped: [shipped, SMALL])
    monkeypatch.setattr(tune, "PROTOCOL", Protocol(rounds=5, warmup=1, round_ms=0.1))
    arguments = ["--direction", "prompt_forward", "--head-dim", "64", "--output", str(tmp_path)]
    assert tune.main(arguments) == 0
    first = capsys.readouterr().out
    held = json.loads((tmp_path / "tune.json").read_text())
    assert len(held["rows"]) == 2
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("measured again"))
    assert tune.main(arguments) == 0
    assert capsys.readouterr().out == first
