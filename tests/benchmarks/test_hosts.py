"""benchmarks.hosts: a run chooses, trains and scores as it says; the command resumes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import hosts, hosts_vision_clip, hosts_vision_vit
from benchmarks.ablation_claims import NOT, PARTLY, REPRODUCED
from benchmarks.hosts_plan import Entry, Run, mean_of, scores_of
from benchmarks.hosts_runs import measure_method
from benchmarks.hosts_vision_models import HEADS, LAYERS, WIDTH
from llama_adapter.host_training.fit import FitConfig, evaluate, fit
from llama_adapter.hosts.methods import MethodOptions, attach

ROOT = Path(__file__).parents[2]
CONFIG = FitConfig(epochs=2, batch_size=16, keep="last")
UNTIMED = {"seconds": 0, "processor_seconds": 0, "train_seconds": 0}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worlds of the vision hosts in the reduced form."""
    path = tmp_path_factory.mktemp("work")
    hosts.make_world(path, True, "vit")
    hosts.make_world(path, True, "clip")
    return path


def measured(work: Path, entry: Entry, seeds: tuple[int, ...] = (0, 1), **more: Any) -> Any:
    folder = work / "vit"
    task = hosts_vision_vit.task_at(folder, "scans")
    return measure_method(
        lambda seed: hosts_vision_vit.host_at(folder, len(task.labels), seed),
        lambda seed: task,
        entry,
        CONFIG,
        (1e-3, 1e-2),
        seeds,
        **more,
    )


def test_a_run_is_the_chosen_rates_fit_of_every_seed(work: Path) -> None:
    entry = Entry("", "zero_init", {"prompt_length": 5, "layers": 3})
    row = measured(work, entry, kept=(3, 1, 999))
    task = hosts_vision_vit.task_at(work / "vit", "scans")
    by_rate = {}
    for rate in (1e-3, 1e-2):
        host = hosts_vision_vit.host_at(work / "vit", len(task.labels), 0)
        generator = torch.Generator().manual_seed(0)
        attached = attach(host, "zero_init", MethodOptions(5, 3), generator=generator)
        by_rate[rate] = fit(attached, task, replace(CONFIG, lr=rate)).scores[2]["accuracy"]
    assert row["grid"] == {f"{rate:g}": score for rate, score in by_rate.items()}
    assert row["lr"] == max(by_rate, key=lambda rate: (by_rate[rate], -rate))
    for seed, scores, losses in zip((0, 1), row["scores"], row["losses"], strict=True):
        host = hosts_vision_vit.host_at(work / "vit", len(task.labels), seed)
        generator = torch.Generator().manual_seed(seed)
        attached = attach(host, "zero_init", MethodOptions(5, 3), generator=generator)
        found = fit(attached, task, replace(CONFIG, lr=row["lr"], seed=seed)).losses
        predictions, expected = evaluate(host, task)
        assert scores == {name: round(value, 3) for name, value in expected.items()}
        assert losses == [round((found[i] + found[i + 1]) / 2, 4) for i in (0, 2)]
        if seed == 0:
            assert row["predictions"] == [predictions[3], predictions[1]]
    assert row["parameters"] - row["head_parameters"] == 3 * (5 * WIDTH + HEADS)
    assert row["head_parameters"] == (WIDTH + 1) * len(task.labels)
    assert {**row, **UNTIMED} == {**measured(work, entry, kept=(3, 1, 999)), **UNTIMED}


def test_the_final_task_is_what_seeds_train_on(work: Path) -> None:
    entry = Entry("", "linear")
    task = hosts_vision_vit.task_at(work / "vit", "scans")
    final = measured(work, entry, (0,), final_of=lambda one: one.final())
    plain = measured(work, entry, (0,))
    assert final["grid"] == plain["grid"]
    assert final["losses"] != plain["losses"]
    assert len(task.final().train) == len(task.train) + len(task.validation)


def test_what_trains_nothing_is_scored_as_it_is(work: Path) -> None:
    folder = work / "clip"
    run = Run("clip", "fence", "frozen")
    row = hosts_vision_clip.measure(folder, True, run)
    task = hosts_vision_clip.task_at(folder, True, "fence", 0)
    _, expected = evaluate(hosts_vision_clip.pretrained(folder), task)
    assert row["scores"] == [{name: round(value, 3) for name, value in expected.items()}]
    assert row["parameters"] == 0
    assert "lr" not in row
    assert row["train_seconds"] == []


@pytest.mark.parametrize("method", list(hosts_vision_vit.ENTRIES))
def test_no_method_changes_what_the_next_one_starts_from(work: Path, method: str) -> None:
    folder = work / "vit"
    before = {
        name: value.clone()
        for name, value in hosts_vision_vit.pretrained(folder).state_dict().items()
    }
    row = measured(work, hosts_vision_vit.ENTRIES[method], (0,))
    assert row["parameters"] >= row["head_parameters"] > 0
    after = hosts_vision_vit.pretrained(folder).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    total = sum(value.numel() for value in before.values())
    if method == "full":
        assert row["parameters"] - row["head_parameters"] == total
    elif method == "linear":
        assert row["parameters"] == row["head_parameters"]
    else:
        assert 0 < row["parameters"] - row["head_parameters"] < total
    if method in ("zero_init", "vpt_deep"):
        gates = LAYERS * HEADS if method == "zero_init" else 0
        prompts = LAYERS * hosts_vision_vit.PROMPTS * WIDTH
        assert row["parameters"] - row["head_parameters"] == prompts + gates


def test_means_are_of_the_data_sets_by_seed() -> None:
    rows = [{"scores": [{"a": 10.0}, {"a": 40.0}]}, {"scores": [{"a": 30.0}, {"a": 20.0}]}]
    assert scores_of(rows[0], "a").high == 40
    found = mean_of(rows, "a")
    assert (found.low, found.median, found.high) == (20, 25, 30)


def run_command(work: Path, output: Path, *more: str) -> int:
    return hosts.main(["--quick", "--work", str(work), "--output", str(output), *more])


@pytest.fixture
def only_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "WORLDS", {"clip": hosts_vision_clip.WORLD})


@pytest.mark.usefixtures("only_clip")
def test_the_command_reports_shows_pictures_and_continues(
    work: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run_command(work, tmp_path) == 0
    printed = capsys.readouterr().out
    held = json.loads((tmp_path / "hosts.json").read_text())
    assert len(held["rows"]) == held["runs_planned"] == len(hosts_vision_clip.ENTRIES)
    claims = [one for some in held["verdicts"]["clip"].values() for one in some]
    assert len(claims) == 9
    for claim in claims:
        assert claim["verdict"] in (REPRODUCED, PARTLY, NOT)
        assert f"- **{claim['verdict']}**: {claim['paper']}" in printed
    text = (tmp_path / "hosts.md").read_text()
    assert "its verdicts mean nothing" in text
    for name in ("clip_average", "clip_examples"):
        assert f"(hosts/{name}.png)" in text
        assert (tmp_path / "hosts" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # without one row the same command measures that one alone, with the same result
    lost = held["rows"].pop()
    (tmp_path / "hosts.json").write_text(json.dumps(held))
    assert run_command(work, tmp_path) == 0
    assert "1 of 10 runs to go" in capsys.readouterr().out
    again = json.loads((tmp_path / "hosts.json").read_text())["rows"]
    assert [{**row, **UNTIMED} for row in again] == [
        {**row, **UNTIMED} for row in [*held["rows"], lost]
    ]


@pytest.mark.usefixtures("only_clip")
def test_results_of_other_code_are_not_continued(work: Path, tmp_path: Path, capsys: Any) -> None:
    old = {"clip": {"code": "0", "quick": True}}
    content = {"environments": [], "rows": [], "identity": old}
    (tmp_path / "hosts.json").write_text(json.dumps(content))
    assert run_command(work, tmp_path) == 2
    assert "was measured with another clip: start over with --fresh" in capsys.readouterr().err


def test_a_world_is_made_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, quick: bool) -> Any:
        raise AssertionError("made again")

    world = replace(hosts_vision_vit.WORLD, make=refuse)
    monkeypatch.setitem(hosts.WORLDS, "vit", world)
    held = json.loads((work / "vit" / "made.json").read_text())
    assert hosts.make_world(work, True, "vit") == held["facts"]
    with pytest.raises(AssertionError, match="made again"):
        hosts.make_world(work / "elsewhere", True, "vit")


def test_every_worlds_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in hosts.WORLDS.values():
        for name in world.code:
            assert (ROOT / "benchmarks" / name).is_file()
    digests = [world.digest() for world in hosts.WORLDS.values()]
    assert len(set(digests)) == len(digests)


@pytest.mark.slow
def test_quick_command_takes_under_three_minutes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.hosts", "--quick", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "out" / "hosts.json").read_text())
    assert len(held["rows"]) == held["runs_planned"]
    spent = sum(facts["processor_seconds"] for facts in held["facts"].values())
    assert held["processor_seconds"] + spent < 180
