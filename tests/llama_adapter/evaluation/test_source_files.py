"""Benchmarks' files: what is unusable is named by file and line, and long cells are read."""

import csv
import json
from pathlib import Path

import pytest

from llama_adapter.data.items import NotJson
from llama_adapter.evaluation.source_files import (
    Malformed,
    answered,
    image_path,
    json_lines,
    numbered_lines,
    read_object,
    read_text,
    reason_against,
    some_usable,
    summarise,
    table_rows,
    write_table,
)


def test_a_problem_names_file_and_place() -> None:
    problems = [Malformed("q.json", f"line {line}", "label is missing") for line in range(1, 6)]
    assert str(problems[2]) == "q.json, line 3: label is missing"
    assert summarise(problems).endswith("line 3: label is missing; and 2 more")
    with pytest.raises(ValueError, match=r"q.json must hold .* \(1 unusable: q.json, line 1: lab"):
        some_usable([], problems[:1], "q.json")
    with pytest.raises(ValueError, match="it is empty"):
        some_usable([], [], "q.json")


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": \n \n[2]')
    assert [number for number, _ in numbered_lines(path)] == [1, 3, 5]
    rows = dict(json_lines(path))
    assert rows[1] == {"a": 1}
    assert rows[5] == [2]
    assert isinstance(rows[3], NotJson)
    assert reason_against(rows[3], ()) == str(rows[3])


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_text(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_object(path)
    for text, message in (("{", "not JSON"), ("[1]", "must hold an object, got a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_object(path)


def test_reasons() -> None:
    assert reason_against([], ()) == "must be an object, got a list"
    assert reason_against({}, ("label",)) == "label is missing"
    assert reason_against({"label": 3}, ("label",)) == "label must be a string, got a number"
    assert reason_against({"label": " "}, ("label",)) == "label is empty"
    assert reason_against({"label": " "}, (), ("label",)) is None
    half = json.loads('{"label": "\\ud800"}')
    assert reason_against(half, ("label",)) == "label holds half of a surrogate pair"


def test_rows_of_a_table(tmp_path: Path) -> None:
    """A cell of two lines, one beyond csv's own limit, and rows that are none."""
    path = tmp_path / "table.tsv"
    long = "x" * (csv.field_size_limit() + 1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([["a", "b"], ["1", "two\nlines"], ["2", long], ["3"]])
        file.write('"4" x\t4\n5\t5\n6\t"6\n')
    before = csv.field_size_limit()
    rows = table_rows(path, ["b"], "\t")
    assert csv.field_size_limit() == before
    # the header is line 1, the row of two lines begins in line 2
    assert rows[0] == (2, {"a": "1", "b": "two\nlines"})
    assert rows[1] == (4, {"a": "2", "b": long})
    assert rows[2] == (5, "must have 2 cells, got 1")
    assert (rows[3][0], str(rows[3][1])[:17]) == (6, "no row of a table")
    assert rows[4] == (7, {"a": "5", "b": "5"})
    assert (rows[5][0], str(rows[5][1])[:17]) == (8, "no row of a table")
    assert len(rows) == 6
    with pytest.raises(ValueError, match="must have one column 'c', got columns a, b"):
        table_rows(path, ["c"], "\t")
    path.write_text("")
    with pytest.raises(ValueError, match="must have one column 'a'"):
        table_rows(path, ["a"])


def test_a_written_table_is_read_by_csv(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_table(path, ["a", "b"], [{"a": 'say "x", y', "b": "1\n2", "more": 0}])
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"a": 'say "x", y', "b": "1\n2"}]


def test_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    assert image_path(tmp_path, "a.png") == (str(tmp_path / "a.png"), None)
    assert image_path(None, "b.png") == (None, None)
    path, reason = image_path(tmp_path, "b.png")
    assert path is None
    assert reason == f"image {tmp_path / 'b.png'}: no such file"


def test_predictions_are_one_string_per_item() -> None:
    items = [{"id": "7"}]
    assert answered(items, ["yes"]) == [({"id": "7"}, "yes")]
    with pytest.raises(ValueError, match="must be 1, one per item, got 2"):
        answered(items, ["yes", "no"])
    with pytest.raises(ValueError, match="prediction of item '7' must be a string, got null"):
        answered(items, [None])
