"""Every unusable record and file has its message, and nothing held out is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data.records import (
    Problem,
    Record,
    load_records,
    remove_held_out,
    split_records,
    summarise,
)

GOOD = {"instruction": "Name it.", "input": "", "output": "stone"}


def write(path: Path, items: Any) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def records_of(questions: list[tuple[str, str]]) -> list[Record]:
    return [Record(i, *question, f"answer {i}") for i, question in enumerate(questions)]


def test_records_keep_their_text_and_their_place_in_the_file(tmp_path: Path) -> None:
    second = {"instruction": " Reverse:\n", "input": "a b", "output": "b a ", "id": 7}
    records, problems = load_records(write(tmp_path / "a.json", [GOOD, None, second]))
    assert records == [Record(0, "Name it.", "", "stone"), Record(2, " Reverse:\n", "a b", "b a ")]
    assert problems == [Problem(1, "must be an object, got null")]


def test_a_missing_input_means_none(tmp_path: Path) -> None:
    records, problems = load_records(
        write(tmp_path / "a.json", [{"instruction": "Sing.", "output": "la"}])
    )
    assert (records, problems) == ([Record(0, "Sing.", "", "la")], [])


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "must be an object, got a string"),
        (["a", "b"], "must be an object, got a list"),
        (3.5, "must be an object, got a number"),
        (True, "must be an object, got a boolean"),
        ({"input": "", "output": "x"}, "instruction is missing"),
        ({"instruction": "x", "input": ""}, "output is missing"),
        (GOOD | {"output": None}, "output must be a string, got null"),
        (GOOD | {"output": 12}, "output must be a string, got a number"),
        (GOOD | {"instruction": ["x"]}, "instruction must be a string, got a list"),
        (GOOD | {"input": {"a": 1}}, "input must be a string, got an object"),
        (GOOD | {"output": ""}, "output is empty"),
        (GOOD | {"output": " \n\t"}, "output is empty"),
        (GOOD | {"instruction": ""}, "instruction is empty"),
        (GOOD | {"output": "\ud83d"}, "output holds half of a surrogate pair"),
    ],
)
def test_an_unusable_record_is_named_with_its_reason(
    tmp_path: Path, item: Any, reason: str
) -> None:
    records, problems = load_records(write(tmp_path / "a.json", [GOOD, item, GOOD]))
    assert [record.index for record in records] == [0, 2]
    assert [str(problem) for problem in problems] == [f"record 1: {reason}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'[{"instruction": "a"', "not JSON (Expecting ',' delimiter: line 1 column 21 (char 20))"),
        (b'{"data": []}', "must hold a list of records, got an object"),
        (b'"text"', "must hold a list of records, got a string"),
        (b"null", "must hold a list of records, got null"),
        (b"[]", "holds no records"),
        (b'["\xff"]', "not UTF-8 text (invalid start byte at 2)"),
        (b"[1, null]", "2 of 2 records cannot be used (numbered from 0): "
         "record 0: must be an object, got a number; "
         "record 1: must be an object, got null"),
        pytest.param(b"[" * 100_000, "not JSON (maximum recursion depth exceeded", id="deep"),
    ],
)  # fmt: skip
def test_an_unusable_file_is_one_line_that_names_it(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r".") as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_records(tmp_path / "none.json")
    assert str(caught.value) == f"{tmp_path / 'none.json'}: no such file"
    with pytest.raises(FileNotFoundError):
        load_records(tmp_path)


def test_json_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps(GOOD, ensure_ascii=False)
    path.write_text(f"\ufeff{line}\n\n{line[:20]}\n{line}\n", encoding="utf-8")
    records, problems = load_records(path)
    assert [record.index for record in records] == [0, 2]
    assert [str(p) for p in problems] == [
        "record 1: not JSON (Unterminated string starting at: line 1 column 17 (char 16))"
    ]


def test_a_summary_shows_the_first_three_and_counts_the_rest() -> None:
    problems = [Problem(i, "output is empty") for i in (2, 3, 5, 7, 11)]
    assert summarise(problems, 12, "a.json") == (
        "a.json: 5 of 12 records cannot be used (numbered from 0): record 2: output is empty; "
        "record 3: output is empty; record 5: output is empty; and 2 more"
    )


def test_the_split_is_disjoint_complete_and_fixed_by_its_seed() -> None:
    records = records_of([(f"question {i}", "") for i in range(101)])
    train, held_out = split_records(records, 17, seed=3)
    assert len(held_out) == 17
    assert sorted([*train, *held_out], key=lambda record: record.index) == records
    assert split_records(records, 17, seed=3) == (train, held_out)
    others = [split_records(records, 17, seed=seed)[1] for seed in range(4, 9)]
    assert all(other != held_out for other in others)


def test_duplicate_questions_never_straddle_the_split() -> None:
    # every question up to seven times, with other answers and other outer blanks
    questions = [(f"question {i % 29}", f"input {i % 3}" + " " * (i % 2)) for i in range(523)]
    records = records_of(questions)
    for seed in range(12):
        train, held_out = split_records(records, 100, seed)
        assert 90 < len(held_out) <= 100
        assert not {r.question for r in train} & {r.question for r in held_out}
        assert len(train) + len(held_out) == len(records)


def test_the_same_instruction_with_another_input_is_another_question() -> None:
    records = records_of([("Reverse.", f"input {i}") for i in range(10)])
    train, held_out = split_records(records, 5, seed=0)
    assert (len(train), len(held_out)) == (5, 5)


@pytest.mark.parametrize("size", [-1, 4, 5])
def test_a_split_leaves_records_on_both_sides(size: int) -> None:
    records = records_of([(f"question {i}", "") for i in range(4)])
    with pytest.raises(ValueError, match=f"val_size must be from 0 to 3, got {size}"):
        split_records(records, size, seed=0)


def test_a_split_of_nothing_but_duplicates_is_refused() -> None:
    records = records_of([("same", "")] * 5)
    message = "val_size = 2 is too small: every question has more duplicates"
    with pytest.raises(ValueError, match=message):
        split_records(records, 2, seed=0)


def test_what_a_held_out_file_asks_is_taken_out_of_the_training_records() -> None:
    train = records_of([("a", ""), ("b", "x"), ("b", "y"), ("c ", "")])
    held_out = records_of([("z", ""), ("b", "y"), ("c", "")])
    kept, problems = remove_held_out(train, held_out)
    assert [record.index for record in kept] == [0, 1]
    assert [str(problem) for problem in problems] == [
        "record 2: asks the same as held-out record 1",
        "record 3: asks the same as held-out record 2",
    ]
