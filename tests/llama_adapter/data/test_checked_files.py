"""Entries of benchmarks' files are used or named: file, place, reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data.checked_files import (
    ID,
    INTEGER,
    LIST,
    TEXT,
    FileProblem,
    against,
    json_entries,
    line_entries,
    numbered_lines,
    pairs,
    read_json,
    usable,
    write_json,
    write_lines,
)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": "x", "b": 1}, None),
        ({"a": "x", "b": "1"}, None),
        ([], "must be an object, got a list"),
        (None, "must be an object, got null"),
        ({"b": 1}, "a is missing"),
        ({"a": " \n", "b": 1}, "a is empty"),
        ({"a": 3, "b": 1}, "a must be a string, got a number"),
        ({"a": "x\ud83d", "b": 1}, "a holds half of a surrogate pair"),
        ({"a": "x", "b": "\ud83d"}, "b holds half of a surrogate pair"),
        ({"a": "x", "b": True}, "b must be an id, got a boolean"),
        ({"a": "x", "b": None}, "b must be an id, got null"),
    ],
)
def test_fields(value: Any, reason: str | None) -> None:
    assert against(value, {"a": TEXT, "b": ID}) == reason


def test_entries_of_a_list_are_numbered_from_0_and_lines_from_1(tmp_path: Path) -> None:
    rows: list[Any] = [{"n": 1}, {"n": "x"}, {"n": 3}]
    path, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    lines.write_text('{"n": 1}\n\n{"n": \n{"n": 3}\r\n"\u2028"', encoding="utf-8")
    problems: list[FileProblem] = []
    found = list(json_entries(path, read_json(path), "rows", problems).having({"n": INTEGER}))
    assert found == [(0, {"n": 1}), (2, {"n": 3})]
    assert [*map(str, problems)] == [f"{path}: rows 1: n must be an integer, got a string"]
    problems.clear()
    assert [*line_entries(lines, problems).having({"n": INTEGER})] == [(1, {"n": 1}), (4, {"n": 3})]
    assert [*map(str, problems)] == [
        f"{lines}: line 3: not JSON (Expecting value: line 1 column 7 (char 6))",
        f"{lines}: line 5: must be an object, got a string",
    ]


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"rows": 1}, "rows", 'must hold an object with a list "rows", got a number'),
        ({}, "rows", 'must hold an object with a list "rows", got null'),
        ({}, None, "must hold a list, got an object"),
    ],
)
def test_a_file_without_its_list_is_refused(content: Any, key: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^a.json: {message}$"):
        json_entries("a.json", content, key, [])


@pytest.mark.parametrize("content", [b"", b"{", b'"\xff"', b"[" * 100_000])
def test_what_is_no_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+a\.json: not JSON \([^\n]+\)$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_lines_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{}\n"\xff"')
    with pytest.raises(ValueError, match=r"a\.jsonl: not UTF-8 text"):
        line_entries(tmp_path / "a.jsonl", [])


def test_nothing_usable_is_refused_with_the_first_reasons() -> None:
    problems = [FileProblem(i, "is odd", "q.json", "questions") for i in range(9)]
    message = (
        "^q.json: nothing in it can be used: q.json: questions 0: is odd; "
        "q.json: questions 1: is odd; q.json: questions 2: is odd$"
    )
    with pytest.raises(ValueError, match=message):
        usable([], problems, "q.json")
    with pytest.raises(ValueError, match=r"^q\.json: nothing in it can be used: it is empty$"):
        usable([], [], "q.json")
    assert usable([{"id": "1"}], problems, "q.json") == ([{"id": "1"}], problems)


@pytest.mark.parametrize(("items", "predictions"), [(2, 1), (1, 2), (0, 0)])
def test_predictions_are_as_many_as_items(items: int, predictions: int) -> None:
    message = f"one for each of {items} items"
    with pytest.raises(ValueError, match=message):
        pairs([{"id": "1"}] * items, ["x"] * predictions)
    assert pairs([{"id": "1"}], ["x"]) == [({"id": "1"}, "x")]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [{"a": "ü\n"}, {"a": "x\u2028"}]
    write_json(tmp_path / "a.json", rows)
    write_lines(tmp_path / "a.jsonl", rows)
    assert read_json(tmp_path / "a.json") == rows
    found = line_entries(tmp_path / "a.jsonl", []).having({"a": TEXT})
    assert [entry for _, entry in found] == rows
    assert against({"a": []}, {"a": LIST}) is None


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n two\tx \n \nthree")
    assert numbered_lines(path) == [(1, "one"), (3, " two\tx "), (5, "three")]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"not UTF-8 text .* at 3"):
        numbered_lines(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        numbered_lines(tmp_path / "absent.txt")
