"""Run folders of every task; runs that stop or are killed go on bitwise.

The kills are real: this file is also a program, which forks runs and ends them by SIGKILL.
"""

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_adapter.checkpoints.train_state import list_checkpoints
from llama_adapter.host_training.host_config import METRICS, TASKS, HostRunConfig
from llama_adapter.host_training.run import train_host
from llama_adapter.options import build
from llama_adapter.run_folder import RunFolder
from tests.llama_adapter.host_runs import options_of
from tests.llama_adapter.test_resume import kill_in_write, start, wait

ROOT = Path(__file__).resolve().parents[3]
VARYING = ("time", "items_per_second")
# dropout, two learning rates and a last fit: all that has a state
GRID = {"lr_grid": (0.02, 0.05), "final": "train+val", "hidden_dropout": 0.3}
KILLS = ("time", "time", "time", "time", "half", "synced", "renamed", "half")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss curve takes longer to draw than these runs take."""
    monkeypatch.setattr(RunFolder, "draw_curve", lambda self: None)


def config_of(task: str, made: Path, output: Path, **more: Any) -> HostRunConfig:
    return build(HostRunConfig, {**options_of(task, made), "output": output, **more})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on where a run stopped: every number but the speed, and the weights."""
    (written,) = folder.glob("*.safetensors")
    return {"rows": rows_of(folder), "weights": zlib.crc32(written.read_bytes())}


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_trains(task: str, made: Path, tmp_path: Path) -> None:
    result = train_host(config_of(task, made, tmp_path / "run"), progress=False)
    folder = tmp_path / "run"
    assert result.task.metric == METRICS[task]
    rows = rows_of(folder)
    per_epoch = -(-len(result.task.train) // 6)
    assert len(rows) == 3 * per_epoch
    losses = [row["loss"] for row in rows]
    assert len({*losses}) == len(losses)
    assert [n for n, row in enumerate(rows, 1) if f"val_{METRICS[task]}" in row] == [
        per_epoch,
        2 * per_epoch,
        3 * per_epoch,
    ]
    written = load_file(folder / "adapter.safetensors")
    assert written["gates"].abs().min() > 0
    described = json.loads((folder / "task.json").read_text())
    assert described["labels"] == list(result.task.labels)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["transformers"] is not None
    assert result.attached.model.training is False


def test_a_clip_takes_vtab_with_a_head(made: Path, tmp_path: Path) -> None:
    clip = {"host": "clip", "model": options_of("base_to_novel", made)["model"]}
    result = train_host(config_of("vtab", made, tmp_path / "run", **clip), progress=False)
    assert type(result.attached.model).__name__ == "CLIPForImageClassification"
    assert set(result.attached.groups()) == {"method", "head"}
    assert len(rows_of(tmp_path / "run")) == 9


def test_a_grid_is_one_run_and_its_choice_is_trained_on_everything(
    made: Path, tmp_path: Path
) -> None:
    config = config_of("vtab", made, tmp_path / "grid", **GRID)
    result = train_host(config, progress=False)
    rows = rows_of(tmp_path / "grid")
    assert [row["step"] for row in rows] == list(range(1, 3 * 3 + 3 * 3 + 3 * 4 + 1))
    assert [row["fit"] for row in rows] == [0] * 9 + [1] * 9 + [2] * 12
    assert {row["peak_lr"] for row in rows[18:]} == {result.rate}
    assert not any("val_accuracy" in row for row in rows[18:])
    scores = dict.fromkeys((0.02, 0.05), -1.0)
    for row in rows[:18]:
        if "val_accuracy" in row:
            scores[row["peak_lr"]] = max(scores[row["peak_lr"]], row["val_accuracy"])
    assert result.results == scores
    assert result.rate == max(scores, key=lambda rate: (scores[rate], -rate))
    labels = [*result.folder.training_losses()]
    last = f"learning rate {result.rate:g}, all data"
    assert labels == ["learning rate 0.02", "learning rate 0.05", last]


class Stop(Exception):
    """Ends a run where a test says."""


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    def look(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Stop

    return look


@pytest.mark.parametrize(
    ("task", "method", "more"),
    [
        ("vtab", "zero_init", GRID),
        ("vtab", "full", {"optimizer": "sgd", "lr_grid": (0.01, 0.02)}),
        ("squad", "p_tuning_v2", {"hidden_dropout": 0.2}),
        ("conll05", "lora", {}),
        ("base_to_novel", "vpt_deep", {"batch_size": 2}),
    ],
)
def test_a_stopped_run_goes_on_bitwise(
    task: str, method: str, more: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    """In every fit, and with augmentation, dropout and both optimisers."""
    more = {"method": method, **more}
    train_host(config_of(task, made, tmp_path / "whole", **more), progress=False)
    expected = results(tmp_path / "whole")
    config = config_of(task, made, tmp_path / "run", **more)
    total = len(expected["rows"])
    for stop in (2, total // 2 - 1, total // 2 + 2, total - 1):
        with pytest.raises(Stop):
            train_host(config, resume=True, progress=False, on_step=stop_at(stop))
    train_host(config, resume=True, progress=False)
    assert results(tmp_path / "run") == expected
    # and once more, which has nothing left to do
    train_host(config, resume=True, progress=False)
    assert results(tmp_path / "run") == expected


def test_an_interrupt_says_how_to_go_on(made: Path, tmp_path: Path) -> None:
    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    config = config_of("conll03", made, tmp_path / "run")
    said = (
        rf"stopped at step 6 of 9; llama-adapter finetune --output {tmp_path / 'run'} --resume "
        "continues from step 4"
    )
    with pytest.raises(KeyboardInterrupt, match=re.escape(said)):
        train_host(config, progress=False, on_step=interrupt)
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [4]


def test_a_run_goes_on_with_what_it_began_with_alone(made: Path, tmp_path: Path) -> None:
    config = config_of("conll03", made, tmp_path / "run")
    with pytest.raises(Stop):
        train_host(config, progress=False, on_step=stop_at(5))
    with pytest.raises(ValueError, match="is not empty: give another one, or resume the run in it"):
        train_host(config, progress=False)
    for other, said in (
        (replace(config, fit=replace(config.fit, lr=0.5)), "fit.lr was 0.02, is now 0.5"),
        (replace(config, method="bias"), "method was 'zero_init', is now 'bias'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            train_host(other, resume=True, progress=False)
    options = config.task_options
    text = options.data.read_text()
    options.data.write_text(text.replace("B-LOC", "B-ORG", 1))
    try:
        with pytest.raises(ValueError, match="of the data, or how the host reads it, has"):
            train_host(config, resume=True, progress=False)
    finally:
        options.data.write_text(text)
    # rounding aside, how often a run is saved changes nothing
    train_host(replace(config, save_every=2), resume=True, progress=False)
    assert len(rows_of(tmp_path / "run")) == 9


def test_another_model_is_refused(made: Path, tmp_path: Path) -> None:
    config = config_of("conll03", made, tmp_path / "run")
    with pytest.raises(Stop):
        train_host(config, progress=False, on_step=stop_at(5))
    weights = config.model / "model.safetensors"
    before = weights.read_bytes()
    from safetensors.torch import save_file

    moved = {name: value + 0.01 for name, value in load_file(weights).items()}
    save_file(moved, weights, {"format": "pt"})
    try:
        with pytest.raises(ValueError, match="it began with another model"):
            train_host(config, resume=True, progress=False)
    finally:
        weights.write_bytes(before)


def test_what_cannot_be_used_is_listed_or_refused(made: Path, tmp_path: Path) -> None:
    options = options_of("vtab", made)
    folder = Path(options["data"])
    lines = (folder / "train800.txt").read_text()
    (folder / "train800.txt").write_text(f"{lines}images/none\n")
    try:
        config = config_of("vtab", made, tmp_path / "run")
        with pytest.warns(UserWarning, match=r"1 entries of the data cannot be used: .*line 15"):
            train_host(config, progress=False)
        skipped = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
        assert [json.loads(line)["line"] for line in skipped] == [15]
        strict = replace(config, strict=True, output=tmp_path / "strict")
        with pytest.raises(ValueError, match="1 entries of the data cannot be used"):
            train_host(strict, progress=False)
    finally:
        (folder / "train800.txt").write_text(lines)


def test_a_loss_that_is_not_finite_names_its_step(made: Path, tmp_path: Path) -> None:
    config = config_of("vtab", made, tmp_path / "run", optimizer="sgd", lr=1e30, method="full")
    with pytest.raises(FloatingPointError, match=r"step \d, learning rate .*: the .* is .*"):
        train_host(config, progress=False)


@pytest.mark.slow
def test_killed_runs_resume_bitwise(tmp_path: Path) -> None:
    """By SIGKILL, at random times and inside the writing of files."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout.splitlines()[-1])
    expected = results(tmp_path / "whole")
    assert len(expected["rows"]) == 30
    assert len(kills) == len(KILLS)
    for kill in kills:
        assert kill["signal"] == signal.SIGKILL, kill
        assert kill["resumed"] == 0, kill
        assert results(tmp_path / kill["run"]) == expected, kill
    assert len({kill["logged"] for kill in kills}) >= 4


# from here on: the program that kills


def resumed(config: HostRunConfig) -> Callable[[], object]:
    """A run to carry out, from what is there."""
    return partial(train_host, config, resume=True, progress=False)


def main(folder: Path) -> None:
    """Carry out the whole run and the killed ones in `folder`; prints what happened as JSON."""
    torch.set_num_threads(1)
    RunFolder.draw_curve = lambda self: None
    rng = random.Random(20)
    # what is imported on first use must not count as running time
    for name in ("torch._dynamo", "torch.utils.tensorboard", "transformers"):
        importlib.import_module(name)
    config = config_of("vtab", folder / "made", folder / "warm", **GRID)
    train_host(config, progress=False)
    begun = time.monotonic()
    wait(start(resumed(replace(config, output=folder / "whole"))))
    seconds = time.monotonic() - begun
    kills = []
    for number, moment in enumerate(KILLS):
        found, attempt = {"signal": 0}, 0
        # a run can outpace its killer; that is no kill, and another one is tried
        while found["signal"] == 0 and attempt < 5:
            run = replace(config, output=folder / f"run-{number}-{attempt}")
            if moment == "time":
                process = start(resumed(run))
                time.sleep(rng.uniform(0.3, 0.95) * seconds)
                os.kill(process, signal.SIGKILL)
            else:
                place, output = rng.randint(1, 8), run.output
                process = start(
                    resumed(run), lambda o=output, n=place, m=moment: kill_in_write(o, n, m, True)
                )
            ended = wait(process)[1]
            metrics = run.output / "metrics.jsonl"
            logged = len(metrics.read_bytes().split(b"\n")) if metrics.exists() else 0
            code = wait(start(resumed(run)))[0]
            found = {"signal": ended, "logged": logged, "resumed": code, "run": run.output.name}
            attempt += 1
        kills.append(found)
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
