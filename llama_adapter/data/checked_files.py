"""What loaders of benchmarks and tasks share: checked entries of files, results in their formats.

An entry that cannot be used becomes a `FileProblem`, which names the file, the place and the
reason; a file without one usable entry is a ValueError.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.data.items import check_file, kind_of
from llama_adapter.data.records import Problem, against_text

Found = TypeVar("Found")
Prediction = TypeVar("Prediction")
# what a field of an entry may be asked to hold, by the words that its problem says
TEXT, ID, INTEGER, LIST, NUMBER = "text", "an id", "an integer", "a list", "a number"
STRING, OBJECT = "a string", "an object"
_TYPES: dict[str, type | tuple[type, ...]] = {
    TEXT: str,
    STRING: str,
    ID: (int, str),
    INTEGER: int,
    NUMBER: (int, float),
    LIST: list,
    OBJECT: dict,
}
_SHOWN = 3


@dataclass(frozen=True)
class FileProblem(Problem):
    """Why one entry of one file is not used.

    Attributes:
        path: the file.
        unit: what `index` counts: "line" from 1, the entries of a list or their keys from 0.
    """

    path: str
    unit: str

    def __str__(self) -> str:
        return f"{self.path}: {self.unit} {self.index}: {self.reason}"


class Entries:
    """The entries of one list in one file, and the problems met in them.

    Args:
        path: the file, for the problems.
        unit: what an entry is called in them: "line", "annotation".
        numbered: every entry with its number.
        problems: list that problems are added to; several files may share one.
    """

    def __init__(
        self,
        path: str | Path,
        unit: str,
        numbered: Iterable[tuple[int, Any]],
        problems: list[FileProblem],
    ) -> None:
        self.path, self.unit, self.problems = str(path), unit, problems
        self._numbered = numbered

    def having(self, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The entries that are objects with these fields; a problem for each of the others.

        Args:
            fields: for every field needed, one of this module's kinds.
        """
        for number, value in self._numbered:
            reason = against(value, fields)
            if reason is None:
                yield number, value
            else:
                self.refuse(number, reason)

    def refuse(self, number: int, reason: str) -> None:
        """Note why an entry is not used."""
        self.problems.append(FileProblem(number, reason, self.path, self.unit))


def against(value: Any, fields: Mapping[str, str]) -> str | None:
    """Why a JSON value is not an object with these fields, or None."""
    if isinstance(value, _NotJson):
        return value.reason
    if not isinstance(value, dict):
        return f"must be an object, got {kind_of(value)}"
    for name, kind in fields.items():
        if name not in value:
            return f"{name} is missing"
        found = value[name]
        # true is an int in Python
        if isinstance(found, bool) or not isinstance(found, _TYPES[kind]):
            wanted = "a string" if kind == TEXT else kind
            return f"{name} must be {wanted}, got {kind_of(found)}"
        if isinstance(found, str):
            reason = against_text(name, found, may_be_empty=kind != TEXT)
            if reason is not None:
                return reason
    return None


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


def numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a file that hold more than blanks, with their numbers from 1."""
    lines = enumerate(io.StringIO(read_text(path), newline=None), 1)
    return [(number, line.rstrip("\n")) for number, line in lines if line.strip()]


@dataclass(frozen=True)
class _NotJson:
    reason: str


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 or not JSON.
    """
    path = check_file(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def json_entries(
    path: str | Path, content: Any, key: str | None, problems: list[FileProblem]
) -> Entries:
    """The entries of the list that a JSON file's content holds under a key.

    Args:
        path: the file, for the problems.
        content: what `read_json` gave for it.
        key: where the list is; None: the content is the list.
        problems: list that problems are added to.

    Raises:
        ValueError: there is no such list.
    """
    found = content.get(key) if key is not None and isinstance(content, dict) else content
    if not isinstance(found, list):
        where = "a list" if key is None else f'an object with a list "{key}"'
        raise ValueError(f"{path}: must hold {where}, got {kind_of(found)}")
    return Entries(path, key or "entry", enumerate(found), problems)


def line_entries(path: str | Path, problems: list[FileProblem]) -> Entries:
    """The values of a file of JSON lines, numbered by line from 1; blank lines are no entries.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8.
    """
    return Entries(path, "line", _values(read_text(path)), problems)


def _values(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, _NotJson(f"not JSON ({error})")


def usable(
    items: Iterable[Found], problems: list[FileProblem], path: str | Path
) -> tuple[list[Found], list[FileProblem]]:
    """What a loader returns, if it found anything.

    Raises:
        ValueError: there are no items.
    """
    found = [*items]
    if not found:
        first = "; ".join(str(problem) for problem in problems[:_SHOWN]) or "it is empty"
        raise ValueError(f"{path}: nothing in it can be used: {first}")
    return found, problems


def pairs(
    items: Sequence[Found], predictions: Sequence[Prediction]
) -> list[tuple[Found, Prediction]]:
    """Items with their predictions.

    Raises:
        ValueError: there are not as many of the one as of the other, or none.
    """
    if len(items) != len(predictions) or not items:
        raise ValueError(
            f"predictions must be one for each of {len(items)} items (at least one), "
            f"got {len(predictions)}"
        )
    return list(zip(items, predictions, strict=True))


def write_json(path: str | Path, content: Any) -> None:
    """Replace a file by one JSON value."""
    write_atomically(path, (json.dumps(content, ensure_ascii=False) + "\n").encode())


def write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one JSON object per line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode())
