"""A streamed file gives what reading it whole gives, messages included, in little memory."""

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data import items
from llama_adapter.data.items import NotJson, read_items, stream_items

# what json says where a comma has nothing behind it depends on Python's version
TRAILING = ("Illegal trailing comma", "Expecting value", "Expecting property name")


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, with the texts and numbers that are hard to cut."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([True, False, None, 0, -1, 12345678901234567890])
    if kind == 1:
        return rng.choice([1.5, -0.25, 1e-7, 3e200, float("inf"), float("-inf")])
    if kind < 6:
        return "".join(rng.choices('ab \\"\n\t[]{},:é東😀\u2028', k=rng.randrange(12)))
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{i}": value(rng, depth + 1) for i in range(rng.randrange(4))}


def document(rng: random.Random) -> str:
    """A list of such values as text, its blanks and escapes at random."""
    found = [value(rng) for _ in range(rng.randrange(1, 6))]
    indent, ascii_only = rng.choice([None, 0, 2, "\t"]), rng.random() < 0.5
    text = json.dumps(found, indent=indent, ensure_ascii=ascii_only)
    return rng.choice(["", " \n", "\t"]) + text + rng.choice(["", "\n", " \n\n "])


def outcome(path: Path) -> tuple[Any, str]:
    try:
        return read_items(path), ""
    except ValueError as error:
        return None, str(error).removeprefix(f"{path}: ")


def expected(text: str) -> tuple[Any, str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        return None, f"not JSON ({error})"
    if not isinstance(found, list):
        return None, f"must hold a list of records, got {items.kind_of(found)}"
    return (found, "") if found else (None, "holds no records")


def test_a_list_is_the_same_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, path = random.Random(3), tmp_path / "a.json"
    for number in range(400):
        monkeypatch.setattr(items, "CHUNK", rng.choice([3, 4, 5, 7, 16, 1000]))
        text = document(rng)
        path.write_bytes(("\ufeff" * (number % 2) + text).encode())
        assert outcome(path) == expected(text), text


def test_a_damaged_list_has_the_message_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, path = random.Random(5), tmp_path / "a.json"
    refused = 0
    for _ in range(1500):
        monkeypatch.setattr(items, "CHUNK", rng.choice([3, 5, 16, 1000]))
        text = document(rng)
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["", "", *'",:]}[{\\1eu-x\n']) + text[at + 1 :]
        path.write_bytes(text.encode())
        got, right = outcome(path), expected(text)
        refused += right[0] is None
        if got != right:
            said = [message.removeprefix("not JSON (") for _, message in (got, right)]
            assert all(one.startswith(TRAILING) for one in said), (text, got, right)
            if "Illegal trailing comma" not in "".join(said):
                assert said[0] == said[1], text
    assert refused > 700


@pytest.mark.parametrize("chunk", [3, 4, 5, 1 << 20])
def test_lines_are_the_same_however_they_are_cut(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    lines = ['{"a": "é東😀"}', "", "  ", '{"a"', "[1, 2]", '"\u2028"', "7", '{"b": {}}']
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(("\ufeff" + end.join(lines) + end).encode())
        found = read_items(path)
        assert found == [
            {"a": "é東😀"},
            "not JSON (Expecting ':' delimiter: line 1 column 5 (char 4))",
            [1, 2],
            "\u2028",
            7,
            {"b": {}},
        ]
        assert [isinstance(item, NotJson) for item in found] == [False, True, *[False] * 4]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(("before", "bad"), [(0, b"\xff"), (5, b"\xc3("), (31, b"\xe6\x9d")])
def test_the_place_of_a_byte_that_is_no_text_is_that_in_the_file(
    name: str, before: int, bad: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "CHUNK", 4)
    path = tmp_path / name
    path.write_bytes(b'["' + b"x" * before + bad)
    message = f"{path}: not UTF-8 text \\(.* at {before + 2}\\)"
    with pytest.raises(ValueError, match=message):
        read_items(path)


def test_a_number_that_json_refuses_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + "9" * 5000 + "]")
    with pytest.raises(ValueError, match=re.escape(f"{path}: not JSON (Exceeds the limit")):
        read_items(path)


def test_records_one_a_line_are_read_from_any_jsonl_and_named_elsewhere(tmp_path: Path) -> None:
    record = {"instruction": "x" * 500, "output": "y" * 500}
    text = "\n".join([json.dumps(record)] * 20_000)
    path = tmp_path / "a.json"
    path.write_text(text)
    message = "must hold a list of records, got one after the other: a file with one record a line "
    message = re.escape(f"{path}: {message}is named .jsonl")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            read_items(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    upper = path.rename(tmp_path / "A.JSONL")
    assert sum(item == record for item in stream_items(upper)) == 20_000


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_little_of_a_long_file_is_in_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    record = {"instruction": "x" * 500, "output": "y" * 500}
    text = "\n".join([json.dumps(record)] * 20_000)
    path.write_text(text if name == "a.jsonl" else "[" + text.replace("\n", ", ") + "]")
    del text
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert sum(item == record for item in stream_items(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
