"""The four tasks' own files become documents, or what is wrong is named; averages as printed."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.cli import main
from llama_adapter.evaluation.open_llm import aggregate, read_documents
from tests.llama_adapter.evaluation.open_llm_files import (
    arc_line,
    hellaswag_line,
    mmlu_row,
    truthful_entry,
    write_files,
    write_lines,
    write_table,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "data")


def test_documents_are_as_lm_evaluation_harness_wants_them(folder: Path) -> None:
    documents, problems = read_documents(folder)
    by_task = {one.task: one for one in documents}
    assert [(one.task, one.part, one.shots, len(one.examples)) for one in documents] == [
        ("arc_challenge", "arc_challenge", 25, 26),
        ("hellaswag", "hellaswag", 10, 11),
        ("truthfulqa_mc2", "truthfulqa_mc2", 0, 0),
        ("mmlu_anatomy", "mmlu", 5, 5),
        ("mmlu_virology", "mmlu", 5, 5),
    ]
    assert by_task["arc_challenge"].questions["Mercury_1"] == {
        "id": "Mercury_1",
        "question": "What is number 1?",
        "choices": {"text": ["cow 1", "a river stone and a lamp", "ash"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    assert by_task["hellaswag"].questions["3"]["label"] == "2"
    assert set(by_task["hellaswag"].questions["1"]) == {
        "activity_label", "ctx_a", "ctx_b", "endings", "label"
    }  # fmt: skip
    # a cell of two lines: rows begin on every other one
    assert by_task["mmlu_anatomy"].questions["3"] == {
        "question": " Which, 1?\nOr not?",
        "choices": ["a cow", "two", 'a "lamp"', "4"],
        "answer": 1,
        "subject": "anatomy",
    }
    assert by_task["truthfulqa_mc2"].questions["2"]["mc2_targets"] == {
        "choices": ["It is 2.", "Nobody knows.", "A lamp.", "It is a horse."],
        "labels": [1, 1, 0, 0],
    }
    (told,) = problems
    assert str(told) == f"{folder}: task 4: {folder}/mmlu/test: must have 57 subjects, got 2"


def test_the_data_sets_at_hugging_face_are_read_too(folder: Path) -> None:
    before, _ = read_documents(folder)
    rows = []
    for n in range(3):
        line = arc_line(n, "BAC"[n])
        choices = line["question"]["choices"]
        line["choices"] = {key: [one[key] for one in choices] for key in ("text", "label")}
        rows.append({**line, "question": line["question"]["stem"]})
    write_lines(folder / "arc" / "ARC-Challenge-Test.jsonl", rows)
    write_lines(
        folder / "hellaswag" / "hellaswag_val.jsonl", [hellaswag_line(n, str(n)) for n in range(3)]
    )
    entries = [truthful_entry(n) for n in range(3)]
    for entry in entries:
        for name in ("mc1_targets", "mc2_targets"):
            own = entry[name]
            entry[name] = {"choices": [*own], "labels": [*own.values()]}
    (folder / "truthfulqa" / "mc_task.json").write_text(json.dumps(entries))
    assert read_documents(folder)[0] == before


BAD: list[tuple[str, Any, str]] = [
    ("arc", {**arc_line(0), "answerKey": "D"}, "answerKey must be one of A, B, C, got 'D'"),
    ("arc", {**arc_line(0), "question": "Why?"}, "choices is missing"),
    ("arc", {**arc_line(0), "question": {"stem": "", "choices": []}}, "stem is empty"),
    ("arc", {**arc_line(0), "question": {"stem": "Why?", "choices": [{"text": "a"}]}},
     "choices must be texts with labels"),
    ("arc", {**arc_line(0), "question": {"stem": "Why?", "choices": []}},
     "choices must be texts with labels"),
    ("arc", arc_line(1), "id 'Mercury_1' is in the file already"),
    ("arc", [1], "must be an object, got a list"),
    ("hellaswag", {**hellaswag_line(0), "endings": ["a", "b", "c"]}, "endings must be 4 texts"),
    ("hellaswag", {**hellaswag_line(0), "endings": ["a", "b", "c", " "]}, "endings must be 4 tex"),
    ("hellaswag", hellaswag_line(0, ""), "label must be from 0 to 3, got ''"),
    ("hellaswag", hellaswag_line(0, 4), "label must be from 0 to 3, got 4"),
    ("hellaswag", hellaswag_line(0, True), "label must be from 0 to 3, got True"),
    ("truthfulqa", {**truthful_entry(0), "mc2_targets": {"a": 0, "b": 0}}, "mc2_targets must be"),
    ("truthfulqa", {**truthful_entry(0), "mc1_targets": {"a": 1, "b": 2}}, "mc1_targets must be"),
    ("truthfulqa", {**truthful_entry(0), "mc1_targets": {"choices": ["a"], "labels": [1, 0]}},
     "mc1_targets must be"),
    ("mmlu", ["q", "a", "b", "c", "d", "E"], "answer must be one of A, B, C, D, got 'E'"),
    ("mmlu", ["q", "a", "", "c", "d", "A"], "B is empty"),
    ("mmlu", ["q", "a", "b", "c", "A"], "must have 6 cells, got 5"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "entry", "reason"), BAD, ids=range(len(BAD)))
def test_an_entry_that_asks_nothing_is_named(
    part: str, entry: Any, reason: str, folder: Path
) -> None:
    writers: dict[str, tuple[str, Callable[[Path], None]]] = {
        "arc": ("arc/ARC-Challenge-Test.jsonl", lambda path: write_lines(
            path, [arc_line(1), entry])),
        "hellaswag": ("hellaswag/hellaswag_val.jsonl", lambda path: write_lines(
            path, [hellaswag_line(1), entry])),
        "truthfulqa": ("truthfulqa/mc_task.json", lambda path: (
            path.write_text(json.dumps([truthful_entry(1), entry])), None)[1]),
        "mmlu": ("mmlu/test/anatomy_test.csv", lambda path: write_table(
            path, [mmlu_row(1), entry])),
    }  # fmt: skip
    name, write = writers[part]
    write(folder / name)
    documents, problems = read_documents(folder)
    told = [str(one) for one in problems if "57 subjects" not in str(one)]
    place = {"truthfulqa": "entry 1", "mmlu": "line 3"}.get(part, "line 2")
    assert len(told) == 1
    assert told[0].startswith(f"{folder / name}: {place}: {reason}")
    (own,) = [one for one in documents if one.part.startswith(part) and "viro" not in one.task]
    assert len(own.questions) == 1


def test_a_task_without_files_is_left_out_and_said(folder: Path) -> None:
    shutil.rmtree(folder / "hellaswag")
    shutil.rmtree(folder / "mmlu")
    documents, problems = read_documents(folder)
    assert [one.task for one in documents] == ["arc_challenge", "truthfulqa_mc2"]
    told = [str(one) for one in problems]
    assert "hellaswag: no such folder, hellaswag is not asked" in told[0]
    assert "must have 57 subjects, got 0" in told[1]
    with pytest.raises(ValueError, match="must hold one of arc, hellaswag, mmlu, truthfulqa, got"):
        read_documents(folder / "arc")


@pytest.mark.parametrize(
    ("name", "kept", "error", "reason"),
    [
        ("arc/ARC-Challenge-Train.jsonl", None, FileNotFoundError, "no such file"),
        ("arc/ARC-Challenge-Train.jsonl", 24, ValueError, "at least 25 examples, got 24"),
        ("hellaswag/hellaswag_train.jsonl", 9, ValueError, "at least 10 examples, got 9"),
        ("mmlu/dev/anatomy_dev.csv", 8, ValueError, "at least 5 examples, got 4"),
        ("mmlu/dev/anatomy_dev.csv", None, FileNotFoundError, "no such file"),
        ("arc/ARC-Challenge-Test.jsonl", 0, ValueError, "nothing in it can be used"),
        ("mmlu/test/anatomy_test.csv", 0, ValueError, "nothing in it can be used"),
    ],
)
def test_files_that_are_missing_or_too_short(
    name: str, kept: int | None, error: type[Exception], reason: str, folder: Path
) -> None:
    path = folder / name
    lines = path.read_text().splitlines(keepends=True)
    if kept is None:
        path.unlink()
    else:
        path.write_text("".join(lines[:kept]))
    with pytest.raises(error, match=rf"{path.name}.*{reason}"):
        read_documents(folder)


def test_averages_are_of_subjects_and_of_the_four_tasks() -> None:
    rows = [
        {"arc_challenge/acc": 0.0, "arc_challenge/acc_norm": 1.0},
        {"arc_challenge/acc": 0.0, "arc_challenge/acc_norm": 0.0},
        {"hellaswag/acc": 1.0, "hellaswag/acc_norm": 0.0},
        {"mmlu_anatomy/acc": 1.0},
        {"mmlu_anatomy/acc": 0.0},
        {"mmlu_anatomy/acc": 0.0},
        {"mmlu_anatomy/acc": 0.0},
        {"mmlu_virology/acc": 1.0},
    ]
    # a quarter of one subject and the whole of the other
    expected = {"arc_challenge": 50.0, "hellaswag": 0.0, "mmlu": 62.5}
    assert aggregate(rows) == expected
    found = aggregate([*rows, {"truthfulqa_mc2/acc": 0.4}])
    assert found == {**expected, "truthfulqa_mc2": 40.0, "average": pytest.approx(152.5 / 4)}


def test_the_average_of_the_papers_row() -> None:
    """Supplement, section E.4: 54.7, 78.8, 34.9 and 40.4 have an average of 52.2."""
    names = ("arc_challenge/acc_norm", "hellaswag/acc_norm", "mmlu_x/acc", "truthfulqa_mc2/acc")
    values = (0.547, 0.788, 0.349, 0.404)
    found = aggregate([{name: value} for name, value in zip(names, values, strict=True)])
    assert round(found["average"], 1) == 52.2


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_remedy_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "open_llm", "--data", str(folder), "--output", str(tmp_path / "run")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "open_llm needs lm-evaluation-harness: pip install 'lm-eval[hf]>=0.4.13'" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert "lm_eval" not in sys.modules


def test_there_is_nothing_to_sample(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "open_llm", "--data", str(folder), "--output", str(tmp_path / "run")]
    assert main([*words, "--temperature", "0.5"]) == 2
    assert "--temperature is no option of open_llm" in capsys.readouterr().err
