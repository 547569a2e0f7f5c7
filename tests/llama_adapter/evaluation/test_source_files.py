"""Tables with long cells, pictures that are there, predictions."""

import csv
from pathlib import Path

import pytest

from llama_adapter.data.checked_files import FileProblem
from llama_adapter.evaluation.source_files import (
    answered,
    image_path,
    table_rows,
    write_table,
)


def test_rows_of_a_table(tmp_path: Path) -> None:
    """A cell of two lines, one beyond csv's own limit, and rows that are none."""
    path = tmp_path / "table.tsv"
    long = "x" * (csv.field_size_limit() + 1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([["a", "b"], ["1", "two\nlines"], ["2", long], ["3"]])
        file.write('"4" x\t4\n5\t5\n6\t"6\n')
    before = csv.field_size_limit()
    problems: list[FileProblem] = []
    rows = list(table_rows(path, ["b"], problems, "\t"))
    assert csv.field_size_limit() == before
    # the header is line 1, the row of two lines begins in line 2
    assert rows == [
        (2, {"a": "1", "b": "two\nlines"}),
        (4, {"a": "2", "b": long}),
        (7, {"a": "5", "b": "5"}),
    ]
    reasons = [str(problem).removeprefix(f"{path}: ") for problem in problems]
    assert reasons[0] == "line 5: must have 2 cells, got 1"
    assert [reason[:25] for reason in reasons[1:]] == [
        "line 6: no row of a table",
        "line 8: no row of a table",
    ]
    with pytest.raises(ValueError, match="must have one column 'c', got columns a, b"):
        list(table_rows(path, ["c"], problems, "\t"))
    path.write_text("")
    with pytest.raises(ValueError, match="must have one column 'a', got columns none"):
        list(table_rows(path, ["a"], problems))


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
    # names that no file can have
    for name in ("b" * 5000, "b\0.png", "b/" * 5000):
        path, reason = image_path(tmp_path, name)
        assert path is None
        assert reason == f"image {tmp_path / name}: no such file"


def test_predictions_are_one_string_per_item() -> None:
    items = [{"id": "7"}]
    assert answered(items, ["yes"]) == [({"id": "7"}, "yes")]
    with pytest.raises(ValueError, match=r"one for each of 1 items .*got 2"):
        answered(items, ["yes", "no"])
    with pytest.raises(ValueError, match="prediction of item '7' must be a string, got null"):
        answered(items, [None])
