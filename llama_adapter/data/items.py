"""The values of an instruction file, one after the other: however long it is, little is in memory.

Of a JSON list a window is held, moved along as its values are decoded; a `.jsonl` file is read line
by line.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# bytes read at a time; one value may be longer
CHUNK = 1 << 20
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\n\r]*")
# more of a number may follow
_NUMBER = re.compile(r"[-+.0-9eE]*")
# what is cut off looks wrong at its end, or where its last word begins: -Infinity, \uXXXX
_LAST_WORD = 12


class NotJson(str):
    """In place of a line's value: why the line could not be parsed."""


def kind_of(value: Any) -> str:
    """A JSON value's kind in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def read_items(path: str | Path) -> list[Any]:
    """Read the values of an instruction file; see `stream_items`."""
    return list(stream_items(path))


def stream_items(path: str | Path) -> Iterator[Any]:
    """Read the values of an instruction file, unchecked but for their being at least one.

    Args:
        path: a JSON list, or a `.jsonl` file with one value per line.

    Returns:
        The values, each as it is reached; in the place of a line that is no JSON a `NotJson`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, not a list, or empty.
    """
    path = check_file(path)
    empty = True
    for item in _lines(path) if is_lines(path) else _List(path):
        empty = False
        yield item
    if empty:
        raise ValueError(f"{path}: holds no records")


def is_lines(path: Path) -> bool:
    """Whether a file is read as one value a line."""
    return path.suffix.lower() == ".jsonl"


def check_file(path: str | Path) -> Path:
    """A path, if it is that of a file.

    Raises:
        FileNotFoundError: it is not.
    """
    path = Path(path)
    if not path.is_file():
        absent = "is no regular file" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {absent}")
    return path


def _text(path: Path) -> Iterator[str]:
    """A file's text in pieces, without its byte order mark, every end of a line as \\n."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    at, rest = 0, b""
    with path.open("rb") as file:
        while True:
            piece = file.read(CHUNK)
            try:
                text, used = codecs.utf_8_decode(rest + piece, "strict", not piece)
            except UnicodeDecodeError as error:
                where = at + error.start
                raise ValueError(f"{path}: not UTF-8 text ({error.reason} at {where})") from None
            if not at:
                text = text.removeprefix("\ufeff")
            at, rest = at + used, (rest + piece)[used:]
            yield newlines.decode(text, final=not piece)
            if not piece:
                return


def _lines(path: Path) -> Iterator[Any]:
    for line in _split(path):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield NotJson(f"not JSON ({error})")


def _split(path: Path) -> Iterator[str]:
    begun: list[str] = []
    for text in _text(path):
        first, *others = text.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield "".join(begun)


class _List:
    """The values of a file that holds a JSON list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces = _text(path)
        self._window, self._at = "", 0
        # what lies before the window: characters, line ends, and behind the last of these
        self._before, self._lines, self._column = 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        if self._next() != "[":
            self._refuse()
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            yield self._value()
            while self._next() == ",":
                self._at += 1
                yield self._value()
            if self._next() != "]":
                raise self._error("Expecting ',' delimiter", self._at)
            self._at += 1
        if self._next():
            raise self._error("Extra data", self._at)

    def _next(self) -> str:
        """The next character that is no blank, where it now is; "" at the end."""
        while True:
            found = _BLANKS.match(self._window, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._window) - _LAST_WORD
                if (cut or error.msg.startswith("Unterminated")) and self._more():
                    continue
                raise self._error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}: not JSON ({error})") from None
            number = _NUMBER.match(self._window, end)
            cut = isinstance(value, int | float) and number and number.end() == len(self._window)
            if not cut or not self._more():
                self._at = end
                return value

    def _more(self) -> bool:
        """Read on, at least as much as is held, and drop what was decoded; False at the end."""
        held, size = len(self._window) - self._at, 0
        pieces: list[str] = []
        while size <= held and (piece := next(self._pieces, None)) is not None:
            pieces.append(piece)
            size += len(piece)
        if not size:
            return False
        gone = self._window[: self._at]
        self._before += len(gone)
        if "\n" in gone:
            self._lines += gone.count("\n")
            self._column = len(gone) - gone.rindex("\n") - 1
        else:
            self._column += len(gone)
        self._window, self._at = self._window[self._at :] + "".join(pieces), 0
        return True

    def _error(self, message: str, at: int) -> ValueError:
        """As json says it, of a place in the window."""
        line = self._lines + self._window.count("\n", 0, at) + 1
        newline = self._window.rfind("\n", 0, at)
        column = self._column + at + 1 if newline < 0 else at - newline
        place = f"line {line} column {column} (char {self._before + at})"
        return ValueError(f"{self.path}: not JSON ({message}: {place})")

    def _refuse(self) -> None:
        """Raise for a file that does not begin as a list does."""
        found = self._value()
        following = self._next()
        if following == "{" and isinstance(found, dict):
            raise ValueError(
                f"{self.path}: must hold a list of records, got one after the other: a file with "
                "one record a line is named .jsonl"
            )
        if following:
            raise self._error("Extra data", self._at)
        raise ValueError(f"{self.path}: must hold a list of records, got {kind_of(found)}")
