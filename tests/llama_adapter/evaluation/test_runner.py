"""A run is scored right, survives being killed, and is never mixed up with another one."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.runner import Evaluation, Item, evaluate, mean_scores

ROOT = Path(__file__).parents[3]
ITEMS = [{"id": f"q{i}", "x": i * 7 % 11, "size": -i} for i in range(11)]
SETTINGS = {"model": "tiny", "temperature": 0.1}


def double(batch: list[Item]) -> list[Any]:
    return [item["x"] * 2 for item in batch]


def score(item: Item, prediction: Any) -> dict[str, float]:
    return {"right": prediction == item["x"] * 2, "value": prediction}


def run(folder: Path | None, items: Iterable[Item] = ITEMS, **changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {"predict": double, "score": score, "settings": SETTINGS}
    return evaluate(items, folder=folder, **{**arguments, **changes})


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Recorder:
    """A `predict` that keeps the ids of every batch, and stops at an item if told so."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.batches: list[list[str]] = []
        self.stop_at = stop_at

    def __call__(self, batch: list[Item]) -> list[Any]:
        ids = [item["id"] for item in batch]
        if self.stop_at in ids:
            raise KeyboardInterrupt
        self.batches.append(ids)
        return double(batch)


def test_the_folder_is_told_of_once_it_is_this_runs(tmp_path: Path) -> None:
    seen: list[str] = []

    def opened() -> None:
        seen.append("opened")
        assert (tmp_path / "run.json").exists()

    def predict(batch: list[Item]) -> list[Any]:
        seen.append("asked")
        return double(batch)

    run(tmp_path, predict=predict, opened=opened)
    assert seen == ["opened", "asked"]
    with pytest.raises(ValueError, match="holds another evaluation run"):
        run(tmp_path, settings={"model": "other"}, opened=opened)
    assert seen == ["opened", "asked"]


def test_scores_of_a_hand_computed_example(tmp_path: Path) -> None:
    items = [
        {"id": "a", "answer": "red", "subject": "nature"},
        {"id": "b", "answer": "blue", "subject": "nature"},
        {"id": "c", "answer": "green", "subject": "social"},
    ]
    answers = {"a": "red", "b": "green", "c": "green"}

    def right(item: Item, prediction: str) -> dict[str, float]:
        value = float(prediction == item["answer"])
        return {"accuracy": value, item["subject"]: value}

    got = evaluate(items, lambda batch: [answers[item["id"]] for item in batch], right, tmp_path)
    assert got.scores == {"accuracy": 2 / 3, "nature": 0.5, "social": 1.0}
    assert got.predictions == ["red", "green", "green"]
    assert got.item_scores[1] == {"accuracy": 0.0, "nature": 0.0}
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["scores"] == got.scores
    assert saved["items"]["c"] == {"accuracy": 1.0, "social": 1.0}
    assert lines_of(tmp_path)[1] == {"id": "b", "prediction": "green"}


def test_mean_is_over_the_items_that_have_a_score() -> None:
    assert mean_scores([{"a": 1.0, "b": 4.0}, {"a": 2.0}, {"c": -1.0, "a": 6.0}]) == {
        "a": 3.0,
        "b": 4.0,
        "c": -1.0,
    }


def test_aggregate_can_be_replaced() -> None:
    def worst(item_scores: list[dict[str, float]]) -> dict[str, float]:
        return {"worst": min(scores["value"] for scores in item_scores)}

    assert run(None, aggregate=worst).scores == {"worst": 0.0}
    assert run(None).scores == {"right": 1.0, "value": sum(i["x"] * 2 for i in ITEMS) / 11}


def test_predictions_come_in_the_order_of_the_items_whatever_the_batches() -> None:
    recorder = Recorder()
    got = run(None, predict=recorder, batch_size=4, batch_key=lambda item: item["size"])
    assert got.predictions == double(list(ITEMS))
    ascending = [f"q{i}" for i in range(10, -1, -1)]
    assert recorder.batches == [ascending[:4], ascending[4:8], ascending[8:]]


def test_items_may_be_any_iterable(tmp_path: Path) -> None:
    assert run(tmp_path, (dict(item) for item in ITEMS)).predictions == run(None).predictions


def test_interrupted_run_predicts_only_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, predict=Recorder(stop_at="q7"), batch_size=3)
    assert [line["id"] for line in lines_of(tmp_path)] == [f"q{i}" for i in range(6)]
    assert not (tmp_path / "scores.json").exists()
    recorder = Recorder()
    got = run(tmp_path, predict=recorder, batch_size=3)
    assert recorder.batches == [["q6", "q7", "q8"], ["q9", "q10"]]
    assert got == run(None)
    again = Recorder()
    assert run(tmp_path, predict=again) == got
    assert again.batches == []


CHILD = """
import sys, time
sys.path[:0] = [{root!r}, {kernels!r}]
from llama_adapter.evaluation.runner import evaluate

def predict(batch):
    time.sleep(0.01)
    return [item["x"] * 3 for item in batch]

items = [{{"id": str(i), "x": i}} for i in range(600)]
evaluate(items, predict, lambda item, p: {{"value": p}}, {folder!r}, batch_size=2)
"""


@pytest.mark.parametrize("lines", [1, 60])
def test_run_killed_at_any_moment_is_resumed(tmp_path: Path, lines: int) -> None:
    code = CHILD.format(root=str(ROOT), kernels=str(ROOT / "kernels"), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code])
    path = tmp_path / "predictions.jsonl"
    limit = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert child.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    kept = [row["id"] for row in lines_of(tmp_path)]
    assert lines <= len(kept) < 600
    items = [{"id": str(i), "x": i} for i in range(600)]
    asked: list[str] = []

    def predict(batch: list[Item]) -> list[int]:
        asked.extend(item["id"] for item in batch)
        return [item["x"] * 3 for item in batch]

    got = evaluate(items, predict, lambda item, p: {"value": p}, tmp_path)
    assert asked == [str(i) for i in range(len(kept), 600)]
    assert got.predictions == [i * 3 for i in range(600)]
    assert got.scores == {"value": 599 * 3 / 2}
    assert [row["id"] for row in lines_of(tmp_path)] == [str(i) for i in range(600)]


def test_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    whole = run(tmp_path, batch_size=3)
    path = tmp_path / "predictions.jsonl"
    text = path.read_bytes()
    start = text.rindex(b"\n", 0, -1) + 1
    for size in range(start, len(text)):
        path.write_bytes(text[:size])
        recorder = Recorder()
        assert run(tmp_path, predict=recorder) == whole
        assert recorder.batches == [["q10"]]
        assert path.read_bytes() == text
    # a page of zeros in place of the line, as a power failure leaves it
    path.write_bytes(text[:start] + bytes(20))
    assert run(tmp_path) == whole
    assert path.read_bytes() == text


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for bad in (
        b"{}\n",
        b'{"id": "q1"}\n',
        b'{"id": "other", "prediction": 1}\n',
        b"[1]\n",
        b"{\n",
    ):
        path.write_bytes(b"".join([lines[0], bad, *lines[2:]]))
        message = f"{path} line 2 is no prediction of this run's items"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            run(tmp_path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {**SETTINGS, "temperature": 0}}, "temperature is 0.1 there and 0 now"),
        ({"settings": {"temperature": 0.1}}, 'model is "tiny" there and absent now'),
        ({"settings": {**SETTINGS, "top_p": 1}}, "top_p is absent there and 1 now"),
        ({"items": [*ITEMS[:-1], {**ITEMS[-1], "x": 5}]}, "items changed: 1, the first is 'q10'"),
        ({"items": ITEMS[3:]}, "items missing now: 3, the first is 'q0'"),
        ({"items": [*ITEMS, {"id": "new", "x": 1}]}, "items new: 1, the first is 'new'"),
    ],
)
def test_folder_of_another_run_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = f"{tmp_path} holds another evaluation run: {difference} (choose another folder)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_order_of_items_and_settings_is_no_change(tmp_path: Path) -> None:
    whole = run(tmp_path)
    items = [dict(reversed(item.items())) for item in reversed(ITEMS)]
    recorder = Recorder()
    settings = dict(reversed(SETTINGS.items()))
    got = run(tmp_path, items, predict=recorder, settings=settings)
    assert recorder.batches == []
    assert got.predictions == whole.predictions[::-1]


def test_folders_that_hold_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("")
    message = f"{tmp_path} holds predictions.jsonl but no run.json"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(tmp_path)
    for text in ("", "[]", "{}", '{"format": 1}'):
        (tmp_path / "run.json").write_text(text)
        message = f"{tmp_path / 'run.json'} is damaged: it describes no evaluation run"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            run(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 2, "settings": {}, "items": {}}')
    message = f"{tmp_path / 'run.json'} has format 2, this version reads 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(tmp_path)


def test_predictions_are_scored_as_the_file_keeps_them(tmp_path: Path) -> None:
    text = 'line\u2028break \r "quote" 漢字 😀'
    seen: list[Any] = []

    def keep(item: Item, prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"n": 1}

    for _ in range(2):
        got = run(tmp_path, ITEMS[:1], predict=lambda batch: [(text, {1: None})], score=keep)
        assert got.predictions == [[text, {"1": None}]]
    assert seen == [[text, {"1": None}]] * 2
    assert "漢字 😀" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "items must hold at least one item, got none"),
        ({"items": [{"x": 1}]}, "item 0 must have a string as id, got None"),
        ({"items": [{"id": 3}]}, "item 0 must have a string as id, got 3"),
        ({"items": [ITEMS[0], ITEMS[0]]}, "item ids must differ, got 'q0' more than once"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"predict": lambda b: [0] * 5}, "predict must return 11 predictions, got 5"),
        (
            {"score": lambda i, p: {"a": math.nan}},
            "score of item 'q0' must hold finite numbers, got a = nan",
        ),
        (
            {"score": lambda i, p: {"a": "1"}},
            "score of item 'q0' must hold finite numbers, got a = '1'",
        ),
        (
            {"aggregate": lambda s: {"f1": math.inf}},
            "aggregate must hold finite numbers, got f1 = inf",
        ),
        (
            {"predict": lambda b: [math.nan] * 11},
            "prediction of item 'q0' must hold JSON values only: "
            "Out of range float values are not JSON compliant",
        ),
        (
            {"items": [{"id": "q", "x": {1, 2}}]},
            "item 'q' must hold JSON values only: Object of type set is not JSON serializable",
        ),
        (
            {"settings": {"key": b"a"}},
            "settings must hold JSON values only: Object of type bytes is not JSON serializable",
        ),
    ],
)
def test_wrong_input_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        run(tmp_path, **change)


def test_progress_bar_starts_where_the_run_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    assert capsys.readouterr().err == ""
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
    run(tmp_path, progress="held-out")
    shown = capsys.readouterr().err
    assert "held-out" in shown
    assert " 7/11 " in shown
    assert " 11/11 " in shown


def test_random_interruptions_give_the_uninterrupted_result(tmp_path: Path) -> None:
    rng = random.Random(2)
    for trial in range(10):
        folder = tmp_path / str(trial)
        while True:
            stop_at = rng.choice([None, *(item["id"] for item in ITEMS)])
            try:
                got = run(folder, predict=Recorder(stop_at), batch_size=rng.randint(1, 4))
            except KeyboardInterrupt:
                # some of what was written last is lost
                path = folder / "predictions.jsonl"
                if path.exists():
                    text = path.read_bytes()
                    last = text[:-1].rfind(b"\n") + 1
                    path.write_bytes(text[: rng.randint(last, len(text))])
                continue
            break
        assert got == run(None)
        assert sorted(row["id"] for row in lines_of(folder)) == sorted(i["id"] for i in ITEMS)
