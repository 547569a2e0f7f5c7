"""Which records of an instruction file can be trained on.

Files are Alpaca's: a JSON list of {"instruction", "input", "output"}, or one such object per line
in a `.jsonl` file; with an "image" a record is about a picture. {"prompt", "completion"} is text
that no template surrounds. What cannot be used is named by index and reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llama_adapter.data.items import NotJson, kind_of, stream_items

Found = TypeVar("Found")
FIELDS = ("instruction", "input", "output")
COMPLETION = ("prompt", "completion")
_SHOWN = 3


@dataclass(frozen=True)
class Record:
    """One instruction with its answer, and its position in the file, counted from 0.

    `image` is the path of the picture that it is about, as the file has it; None without one.
    """

    index: int
    instruction: str
    input: str
    output: str
    image: str | None = None

    @property
    def question(self) -> tuple[str, ...]:
        """What is asked, for telling duplicates: the texts without outer blanks, and the image."""
        asked = self.instruction.strip(), self.input.strip()
        return asked if self.image is None else (*asked, self.image)


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on, as they are; index and image as of a `Record`."""

    index: int
    prompt: str
    completion: str
    image: str | None = None

    @property
    def question(self) -> tuple[str, ...]:
        """What is asked, for telling duplicates."""
        asked = (self.prompt.strip(),)
        return asked if self.image is None else (*asked, self.image)


@dataclass(frozen=True)
class Problem:
    """Why the record at `index` is not used."""

    index: int
    reason: str

    def __str__(self) -> str:
        return f"record {self.index}: {self.reason}"


def summarise(problems: Sequence[Problem], total: int, path: str | Path) -> str:
    """One line: how many of a file's `total` records are unusable, and the first few of them."""
    listed = "; ".join(str(problem) for problem in problems[:_SHOWN])
    rest = len(problems) - _SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    return (
        f"{path}: {len(problems)} of {total} records cannot be used (numbered from 0): "
        f"{listed}{more}"
    )


def load_records(path: str | Path) -> tuple[list[Record], list[Problem]]:
    """Read an instruction file and check every record.

    "input" may be missing, which means "". "instruction" and "output" must be there and hold more
    than blanks, and so must an "image" that is not null; further fields are ignored.

    Args:
        path: a JSON list, or a `.jsonl` file with one object per line.

    Returns:
        The usable records in file order, and one problem for each of the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, not a list, empty, or holds nothing usable.
    """
    return checked(path, check_item)


def checked(
    path: str | Path, check: Callable[[int, Any], Found | Problem]
) -> tuple[list[Found], list[Problem]]:
    """What a check makes of the values of a file; files and errors as `load_records`.

    Args:
        path: a JSON list, or a `.jsonl` file.
        check: of a value and its index what is made of it, or why nothing is.
    """
    records: list[Found] = []
    problems: list[Problem] = []
    for index, item in enumerate(stream_items(path)):
        found = check(index, item)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            records.append(found)
    if not records:
        raise ValueError(summarise(problems, len(problems), path))
    return records, problems


def check_item(index: int, item: Any) -> Record | Problem:
    """The value at `index` of a file as a record, or why it is none."""
    reason = _reason_against(item, FIELDS)
    if reason is not None:
        return Problem(index, reason)
    texts = item["instruction"], item.get("input", ""), item["output"]
    return Record(index, *texts, item.get("image"))


def check_completion(index: int, item: Any) -> Completion | Problem:
    """The value at `index` of a file as text without a template, or why it is none."""
    reason = _reason_against(item, COMPLETION)
    if reason is not None:
        return Problem(index, reason)
    return Completion(index, item["prompt"], item["completion"], item.get("image"))


def _reason_against(item: Any, names: Sequence[str]) -> str | None:
    """Why `item` is not a usable record of these texts, or None."""
    if isinstance(item, NotJson):
        return str(item)
    if not isinstance(item, dict):
        return f"must be an object, got {kind_of(item)}"
    for name in names:
        if name not in item:
            if name == "input":
                continue
            return f"{name} is missing"
        reason = against_text(name, item[name], may_be_empty=name == "input")
        if reason is not None:
            return reason
    image = item.get("image")
    return None if image is None else against_text("image", image)


def against_text(name: str, value: Any, *, may_be_empty: bool = False) -> str | None:
    """Why a value of a record is not text to train on, or None.

    Args:
        name: what the reason calls the value.
        value: a JSON value.
        may_be_empty: blanks alone will do.
    """
    if not isinstance(value, str):
        return f"{name} must be a string, got {kind_of(value)}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"{name} holds half of a surrogate pair"
    return None if may_be_empty or value.strip() else f"{name} is empty"
