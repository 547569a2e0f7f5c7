"""How benchmarks' own files are read: what cannot be used is named by file and place.

A loader returns the usable items and a list of problems, and raises where nothing is usable.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.data.items import NotJson, check_file, kind_of
from llama_adapter.evaluation.runner import Item

_SHOWN = 3
# of a cell, in characters: images are cells of MMBench, and csv allows 131,072 unless told
_CELL_LIMIT = 1 << 30


@dataclass(frozen=True)
class Malformed:
    """Why a record of a file is not used.

    Attributes:
        path: the file.
        place: where in it: "line 3", or what names the record there.
        reason: what was expected and what was got.
    """

    path: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, {self.place}: {self.reason}"


def summarise(problems: Sequence[Malformed]) -> str:
    """One line: how many records are unusable, and the first few of them."""
    listed = "; ".join(str(problem) for problem in problems[:_SHOWN])
    rest = len(problems) - _SHOWN
    return f"{len(problems)} unusable: {listed}" + (f"; and {rest} more" if rest > 0 else "")


def some_usable(
    items: list[Item], problems: list[Malformed], path: str | Path
) -> tuple[list[Item], list[Malformed]]:
    """What a loader returns, if there is any item.

    Raises:
        ValueError: there is none.
    """
    if not items:
        why = summarise(problems) if problems else "it is empty"
        raise ValueError(f"{path} must hold at least one usable record ({why})")
    return items, problems


def read_text(path: str | Path) -> str:
    """A file's text without its byte order mark, line ends as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    path = check_file(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at {error.start})") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, got {kind_of(value)}")
    return value


def numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a file that hold more than blanks, with their numbers from 1."""
    lines = enumerate(io.StringIO(read_text(path), newline=None), 1)
    return [(number, line.rstrip("\n")) for number, line in lines if line.strip()]


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """The values of a file with one JSON value a line, whatever its name, numbered from 1.

    Yields:
        Line number and value; a `NotJson` in place of what could not be parsed.
    """
    for number, line in numbered_lines(path):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, NotJson(f"not JSON ({error})")


def table_rows(
    path: str | Path, columns: Sequence[str], delimiter: str = ","
) -> list[tuple[int, dict[str, str] | str]]:
    """The rows of a table with a header, which must have `columns` and may have more.

    Args:
        path: a CSV file, quoted as spreadsheets do.
        columns: names that the header must hold.
        delimiter: what separates cells.

    Returns:
        The line where each row begins, counted from 1, and its cells by column; for a row that is
        not one, why.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or a column is missing or there twice.
    """
    # strict: a quote that is never closed is an error, not one cell up to the end of the file
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str] | str]] = []
    header: list[str] | None = None
    with _long_cells():
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                rows.append((line, f"no row of a table ({error})"))
                continue
            if cells is None:
                break
            if header is None:
                header = _header(path, columns, cells)
            elif cells and len(cells) != len(header):
                rows.append((line, f"must have {len(header)} cells, got {len(cells)}"))
            elif cells:
                rows.append((line, dict(zip(header, cells, strict=True))))
    if header is None:
        _header(path, columns, [])
    return rows


def _header(path: str | Path, columns: Sequence[str], cells: list[str]) -> list[str]:
    """The names of a table's columns, if the wanted ones are there once."""
    header = [cell.strip() for cell in cells]
    absent = [name for name in columns if header.count(name) != 1]
    if absent:
        got = ", ".join(header) or "none"
        raise ValueError(f"{path} must have one column {absent[0]!r}, got columns {got}")
    return header


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_CELL_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def reason_against(
    record: Any, strings: Sequence[str], may_be_blank: Sequence[str] = ()
) -> str | None:
    """Why a parsed value is no object with these strings, or None.

    Args:
        record: the value.
        strings: fields that must hold a string of more than blanks.
        may_be_blank: fields that must hold a string.
    """
    if isinstance(record, NotJson):
        return str(record)
    if not isinstance(record, dict):
        return f"must be an object, got {kind_of(record)}"
    for name in (*strings, *may_be_blank):
        if name not in record:
            return f"{name} is missing"
        found = reason_against_string(name, record[name], may_be_blank=name in may_be_blank)
        if found is not None:
            return found
    return None


def reason_against_string(name: str, value: Any, *, may_be_blank: bool = False) -> str | None:
    """Why a value is no usable string, or None."""
    if not isinstance(value, str):
        return f"{name} must be a string, got {kind_of(value)}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name} holds half of a surrogate pair"
    if not may_be_blank and not value.strip():
        return f"{name} is empty"
    return None


def image_path(folder: str | Path | None, name: str) -> tuple[str | None, str | None]:
    """Where an image is: its path, or None where no folder is given, and why there is none."""
    if folder is None:
        return None, None
    path = Path(folder) / name
    return (str(path), None) if path.is_file() else (None, f"image {path}: no such file")


def answered(items: Sequence[Item], predictions: Sequence[Any]) -> list[tuple[Item, str]]:
    """Items with their predictions.

    Raises:
        ValueError: there is not one prediction per item, or one is no string.
    """
    if len(items) != len(predictions):
        raise ValueError(f"predictions must be {len(items)}, one per item, got {len(predictions)}")
    return [
        (item, prediction_text(item, prediction))
        for item, prediction in zip(items, predictions, strict=True)
    ]


def prediction_text(item: Item, prediction: Any) -> str:
    """A prediction, if it is a string.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(prediction, str):
        raise ValueError(
            f"prediction of item {item['id']!r} must be a string, got {kind_of(prediction)}"
        )
    return prediction


def write_table(
    path: str | Path,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    delimiter: str = ",",
) -> None:
    """Write a table with a header, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, columns, delimiter=delimiter, lineterminator="\n", extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
