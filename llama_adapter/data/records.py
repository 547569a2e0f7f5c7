"""Which records of an instruction file can be trained on, and which are held out.

Files are Alpaca's: a JSON list of {"instruction", "input", "output"}, or one such object per line
in a `.jsonl` file. What cannot be used is named by index and reason.
"""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("instruction", "input", "output")
_SHOWN = 3


@dataclass(frozen=True)
class Record:
    """One instruction with its answer, and its position in the file, counted from 0."""

    index: int
    instruction: str
    input: str
    output: str

    @property
    def question(self) -> tuple[str, str]:
        """What is asked, for telling duplicates: instruction and input without outer blanks."""
        return self.instruction.strip(), self.input.strip()


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


def read_items(path: str | Path) -> list[Any]:
    """Read the values of an instruction file, unchecked but for their being at least one.

    Args:
        path: a JSON list, or a `.jsonl` file with one value per line.

    Returns:
        The values; in the place of a line that is no JSON a string that says why.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, not a list, or empty.
    """
    path = Path(path)
    if not path.is_file():
        absent = "is no regular file" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {absent}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at {error.start})") from None
    items = _parse_lines(text) if path.suffix == ".jsonl" else _parse_list(text, path)
    if not items:
        raise ValueError(f"{path}: holds no records")
    return items


def load_records(path: str | Path) -> tuple[list[Record], list[Problem]]:
    """Read an instruction file and check every record.

    "input" may be missing, which means "". "instruction" and "output" must be there and hold more
    than blanks; further fields are ignored.

    Args:
        path: a JSON list, or a `.jsonl` file with one object per line.

    Returns:
        The usable records in file order, and one problem for each of the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, not a list, empty, or holds nothing usable.
    """
    items = read_items(path)
    records, problems = [], []
    for index, item in enumerate(items):
        reason = _reason_against(item)
        if reason is None:
            records.append(
                Record(index, item["instruction"], item.get("input", ""), item["output"])
            )
        else:
            problems.append(Problem(index, reason))
    if not records:
        raise ValueError(summarise(problems, len(items), path))
    return records, problems


class _NotJson(str):
    """In place of a line's value: why the line could not be parsed."""


def _parse_list(text: str, path: Path) -> list[Any]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(items, list):
        raise ValueError(f"{path}: must hold a list of records, got {_kind(items)}")
    return items


def _parse_lines(text: str) -> list[Any]:
    items: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                items.append(_NotJson(f"not JSON ({error})"))
    return items


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _reason_against(item: Any) -> str | None:
    """Why `item` is not a usable record, or None."""
    if isinstance(item, _NotJson):
        return str(item)
    if not isinstance(item, dict):
        return f"must be an object, got {_kind(item)}"
    for name in FIELDS:
        if name not in item:
            if name == "input":
                continue
            return f"{name} is missing"
        value = item[name]
        if not isinstance(value, str):
            return f"{name} must be a string, got {_kind(value)}"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return f"{name} holds half of a surrogate pair"
        if name != "input" and not value.strip():
            return f"{name} is empty"
    return None


def split_records(
    records: Sequence[Record], size: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Hold `size` records out, at random.

    Records that ask the same (instruction and input) stay on one side together, so a question of
    the held-out part is never one that was trained on. The held-out part can therefore come out a
    little smaller than asked for, never larger.

    Args:
        records: checked records of one file.
        size: records to hold out; 0 holds none out.
        seed: of the choice.

    Returns:
        The training records and the held-out records, each in file order.

    Raises:
        ValueError: size is negative, or leaves no record on one of the sides.
    """
    if not 0 <= size < len(records):
        raise ValueError(f"val_size must be from 0 to {len(records) - 1}, got {size}")
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.question].append(record)
    questions = list(groups)
    # a string seeds by its hash, which does not change between Python versions
    random.Random(f"held out {seed}").shuffle(questions)
    chosen: set[tuple[str, str]] = set()
    count = 0
    for question in questions:
        if count + len(groups[question]) <= size:
            chosen.add(question)
            count += len(groups[question])
    if size and not chosen:
        raise ValueError(f"val_size = {size} is too small: every question has more duplicates")
    train = [record for record in records if record.question not in chosen]
    return train, [record for record in records if record.question in chosen]


def remove_held_out(
    records: Sequence[Record], held_out: Sequence[Record]
) -> tuple[list[Record], list[Problem]]:
    """Take out of `records` what a separate held-out file asks too.

    Args:
        records: training records.
        held_out: records of the held-out file.

    Returns:
        The training records that remain, and one problem for each that was taken out.
    """
    asked = {record.question: record.index for record in held_out}
    kept = [record for record in records if record.question not in asked]
    problems = [
        Problem(record.index, f"asks the same as held-out record {asked[record.question]}")
        for record in records
        if record.question in asked
    ]
    return kept, problems
