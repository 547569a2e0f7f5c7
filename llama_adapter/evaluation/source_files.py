"""Benchmarks' tables and pictures, and predictions that are texts.

`data.checked_files` has what JSON files and lines of text need, and the problems that all loaders
report.
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.data.checked_files import FileProblem, pairs, read_text
from llama_adapter.data.items import kind_of
from llama_adapter.evaluation.runner import Item

# of a cell, in characters: images are cells of MMBench, and csv allows 131,072 unless told
_CELL_LIMIT = 1 << 30


def table_rows(
    path: str | Path,
    columns: Sequence[str],
    problems: list[FileProblem],
    delimiter: str = ",",
    *,
    header: Sequence[str] | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with a header, which must have `columns` and may have more.

    Args:
        path: a CSV file, quoted as spreadsheets do.
        columns: names that the header must hold.
        problems: list that is added to where a row is none.
        delimiter: what separates cells.
        header: the columns of a table that begins with its first row.

    Yields:
        The line where each row begins, counted from 1, and its cells by column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or a column is missing or there twice.
    """
    for line, row in _rows(path, columns, delimiter, header):
        if isinstance(row, str):
            problems.append(FileProblem(line, row, str(path), "line"))
        else:
            yield line, row


def _rows(
    path: str | Path, columns: Sequence[str], delimiter: str, header: Sequence[str] | None
) -> list[tuple[int, dict[str, str] | str]]:
    """Cells by column, or why there are none, with the line where they begin."""
    # strict: a quote that is never closed is an error, not one cell up to the end of the file
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str] | str]] = []
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


def image_path(folder: str | Path | None, name: str) -> tuple[str | None, str | None]:
    """Where an image is: its path, or None where no folder is given, and why there is none."""
    if folder is None:
        return None, None
    path = Path(folder) / name
    # False too of a name that no file can have
    return (str(path), None) if os.path.isfile(path) else (None, f"image {path}: no such file")


def answered(items: Sequence[Item], predictions: Sequence[Any]) -> list[tuple[Item, str]]:
    """Items with their predictions.

    Raises:
        ValueError: there is not one prediction per item, no item, or a prediction is no string.
    """
    return [
        (item, prediction_text(item, prediction)) for item, prediction in pairs(items, predictions)
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
