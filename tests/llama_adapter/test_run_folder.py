"""The run folder holds whole lines, refuses what is not its run, and continues where it was cut."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_adapter.run_folder import RunFolder, describe_environment

CONFIG: dict[str, Any] = {
    "data": Path("a.json"),
    "output": Path("run"),
    "epochs": 5,
    "lr": None,
    "betas": (0.9, 0.95),
    "save_every": 50,
    "adapter": {"prompt_length": 10},
}


def opened(path: Path, resume: bool = False, step: int = 0) -> RunFolder:
    folder = RunFolder(path, CONFIG, resume)
    folder.open(step, {"threads": 1})
    return folder


def log_steps(folder: RunFolder, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1):
        folder.log({"step": step, "loss": 1 / step + offset})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_config_and_environment_are_plain_json(tmp_path: Path) -> None:
    opened(tmp_path / "new" / "run").close()
    folder = tmp_path / "new" / "run"
    config = json.loads((folder / "config.json").read_text())
    assert config == CONFIG | {"data": "a.json", "output": "run", "betas": [0.9, 0.95]}
    assert json.loads((folder / "environment.json").read_text()) == {"threads": 1}
    assert (folder / "checkpoints").is_dir()


def test_the_environment_names_versions_and_no_paths_or_hosts() -> None:
    found = describe_environment(torch.device("cpu"))
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    text = json.dumps(found)
    assert str(Path(__file__).resolve().parents[2]) not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert platform.node() not in found.values()
    assert found["commit"] is None or len(found["commit"]) == 40


def test_every_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in range(1, 4):
        folder.log({"step": step, "loss": 0.1 * step})
        assert [row["loss"] for row in lines(tmp_path)] == [0.1 * s for s in range(1, step + 1)]
    folder.close()
    assert folder.rows == lines(tmp_path)


def test_logging_needs_an_open_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, CONFIG, False)
    with pytest.raises(RuntimeError, match="the run folder must be open"):
        folder.log({"step": 1})


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(ValueError, match="is not empty: give another one, or resume") as caught:
        RunFolder(tmp_path, CONFIG, False)
    assert str(tmp_path) in str(caught.value)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        RunFolder(file, CONFIG, False)


def test_resume_wants_a_run_or_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG, True)
    RunFolder(tmp_path / "absent", CONFIG, True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"it holds no run \(config.json is missing\)"):
        RunFolder(tmp_path, CONFIG, True)
    (tmp_path / "config.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"config.json is not readable"):
        RunFolder(tmp_path, CONFIG, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 6}, "epochs was 5, is now 6"),
        ({"lr": 0.1}, "lr was None, is now 0.1"),
        ({"data": Path("b.json")}, "data was 'a.json', is now 'b.json'"),
        ({"betas": (0.9, 0.99)}, r"betas was \[0.9, 0.95\], is now \[0.9, 0.99\]"),
        ({"adapter": {"prompt_length": 9}}, "adapter.prompt_length was 10, is now 9"),
    ],
)
def test_resume_names_the_field_that_changed(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    opened(tmp_path).close()
    with pytest.raises(ValueError, match=f"cannot resume .*: {message}"):
        RunFolder(tmp_path, CONFIG | changed, True)


def test_fields_that_change_no_number_may_differ(tmp_path: Path) -> None:
    opened(tmp_path).close()
    RunFolder(tmp_path, CONFIG | {"output": Path("moved"), "save_every": 7, "max_steps": 3}, True)


def test_an_option_younger_than_the_run_had_its_default(tmp_path: Path) -> None:
    """A run of an earlier version, whose config.json lacks some, goes on as it began."""
    opened(tmp_path).close()
    younger = {"joint": "off", "scales": {"vision_layers": (2, 4, 6, 8, 10, 12)}}
    RunFolder(tmp_path, CONFIG | younger, True)
    with pytest.raises(ValueError, match=r"cannot resume .*: joint was 'off', is now 'concat'"):
        RunFolder(tmp_path, CONFIG | {"joint": "concat"}, True)


def test_resume_cuts_the_metrics_back_to_its_step(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    log_steps(folder, 1, 5)
    folder.close()
    folder = opened(tmp_path, resume=True, step=3)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    log_steps(folder, 4, 7, offset=10)
    folder.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in folder.rows][2:4] == [1 / 3, 10.25]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "\x00\x00\x00", '"text"', "{}"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    folder = opened(tmp_path)
    log_steps(folder, 1, 3)
    folder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    folder = opened(tmp_path, resume=True, step=3)
    log_steps(folder, 4, 4)
    folder.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]


def test_resume_from_the_start_begins_the_metrics_anew(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    log_steps(folder, 1, 3)
    folder.close()
    opened(tmp_path, resume=True, step=0).close()
    assert lines(tmp_path) == []


def test_remains_of_a_torn_write_do_not_count_and_are_removed(tmp_path: Path) -> None:
    remains = tmp_path / ".config.json.0a1b2c3d.tmp"
    remains.write_text("{")
    folder = opened(tmp_path)
    assert not remains.exists()
    torn = folder.checkpoints / ".step-00000001.safetensors.0a1b2c3d.tmp"
    torn.write_bytes(b"x")
    folder.close()
    opened(tmp_path, resume=True).close()
    assert not torn.exists()


def test_tensorboard_reads_the_events_of_a_resumed_run(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    log_steps(folder, 1, 6)
    folder.close()
    folder = opened(tmp_path, resume=True, step=4)
    log_steps(folder, 5, 7, offset=10)
    folder.log({"step": 7, "val_loss": 2.5})
    folder.sync()
    folder.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(s, 1 / s + (10 if s > 4 else 0)) for s in range(1, 8)]
    assert [step for step, _ in points] == [step for step, _ in expected]
    for (_, got), (_, wanted) in zip(points, expected, strict=True):
        assert math.isclose(got, wanted, rel_tol=1e-6)
    assert [event.value for event in events.Scalars("val_loss")] == [2.5]


def test_the_curve_is_a_png_and_needs_no_held_out_points(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.draw_curve()
    empty = folder.curve.read_bytes()
    log_steps(folder, 1, 9)
    folder.draw_curve()
    folder.close()
    drawn = folder.curve.read_bytes()
    assert empty[:8] == drawn[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(drawn[16:20], "big") == 840
    assert len(drawn) > len(empty)


def test_skipped_records_are_listed(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    listed = [{"file": "a.json", "record": 3, "reason": "output is empty"}]
    folder.write_skipped(listed)
    folder.close()
    text = (tmp_path / "skipped.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == listed
