"""Every unusable record and file has its message."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data.records import (
    Problem,
    Record,
    load_records,
    summarise,
)

GOOD = {"instruction": "Name it.", "input": "", "output": "stone"}


def write(path: Path, items: Any) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


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
