"""The quickstart, cut short: it tells what it does, and its departures from the papers' recipe."""

import json
from pathlib import Path

import pytest

from llama_adapter.options import build
from llama_adapter.quickstart import bundled_config, departures, quickstart, unused
from llama_adapter.recipe import FinetuneConfig


def test_a_few_steps_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quick"
    assert quickstart(out, steps=2, items=12) == 0
    shown = capsys.readouterr().out
    for label in ("base model", "839,904 parameters", "of 12 held-out", "recipe", "loss curve"):
        assert label in shown
    assert shown.count("  expected     ") >= 5
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    for name in ("answers_base", "answers_adapter"):
        assert len((out / name / "predictions.jsonl").read_text().splitlines()) == 12
    assert (out / "run" / "loss.png").stat().st_size > 1000


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    for _ in range(2):
        run = unused(tmp_path / "quick") / "run"
        run.mkdir(parents=True)
        (run / "adapter.safetensors").touch()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["quick", "quick-2"]
    assert unused(tmp_path / "quick") == tmp_path / "quick-3"


def test_an_interrupted_one_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It used to be left behind, and the commands that follow looked for its adapter."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "quick"
    with monkeypatch.context() as interrupted:
        interrupted.setattr("llama_adapter.trainer.Trainer.step", stop)
        with pytest.raises(KeyboardInterrupt, match=f"--output {out / 'run'} --resume"):
            quickstart(out, steps=1, items=2)
    assert quickstart(out, steps=1, items=2) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]
    assert (out / "run" / "adapter.safetensors").is_file()
    assert "held-out instructions answered" in capsys.readouterr().out


def test_departures_are_told_in_effective_values(tmp_path: Path) -> None:
    papers = build(FinetuneConfig, {}, data=Path("data.json"), output=tmp_path)
    assert departures(papers, papers, 32) == []
    told = departures(bundled_config(tmp_path), papers, 6)
    assert told == [
        "epochs 3 (papers: 5)",
        "warmup_epochs 1 (papers: 2)",
        "batch_size 32 (papers: 64)",
        "lr 0.05 (papers: 0.00225)",
        "n_layers 6 (papers: 4)",
    ]
