"""LLaVA-Instruct's conversations: with pictures and without, one turn and several."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data.chat import Turn, encode_chat
from llama_adapter.data.llava_instruct import (
    Conversation,
    check_conversation,
    load_conversations,
)
from llama_adapter.data.records import Problem
from llama_adapter.tokenizer import Tokenizer


def said(*texts: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


IMAGE = "000000033471.jpg"


def test_records_with_and_without_a_picture(tmp_path: Path) -> None:
    records = [
        {"id": "000000033471", "image": IMAGE, "conversations": said(
            "<image>\nWhat colour is the bus?", "White\nand red.", "And behind it?", "Trees. "
        )},
        {"id": "x", "image": IMAGE, "conversations": said("Where is it?\n<image>", "On a road.")},
        {"id": "y", "image": IMAGE, "conversations": said("Describe it.", "A bus.")},
        {"id": "z", "conversations": said(" Sing.", "la <image>")},
        {"id": "u", "image": None, "conversations": said("Sing.", "la")},
    ]  # fmt: skip
    expected = [
        Conversation(0, IMAGE, (
            Turn("What colour is the bus?", "White\nand red."), Turn("And behind it?", "Trees. "),
        )),
        Conversation(1, IMAGE, (Turn("Where is it?", "On a road."),)),
        Conversation(2, IMAGE, (Turn("Describe it.", "A bus."),)),
        Conversation(3, None, (Turn(" Sing.", "la <image>"),)),
        Conversation(4, None, (Turn("Sing.", "la"),)),
    ]  # fmt: skip
    path, lines = tmp_path / "llava_instruct_150k.json", tmp_path / "a.jsonl"
    path.write_text(json.dumps(records), encoding="utf-8")
    lines.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    assert load_conversations(path) == load_conversations(lines) == (expected, [])


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (None, "must be an object, got null"),
        ({}, "conversations must be a list, got none"),
        ({"conversations": "a"}, "conversations must be a list, got a string"),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": said("a")}, "conversations ends with a question"),
        ({"conversations": said("a", "b", "c")}, "conversations ends with a question"),
        ({"conversations": ["a", "b"]}, "conversations[0] must be an object, got a string"),
        ({"conversations": said("a", "b")[::-1]},
         "conversations[0] must be from human, got 'gpt'"),
        ({"conversations": [*said("a"), {"value": "b"}]},
         "conversations[1] must be from gpt, got None"),
        ({"conversations": said("a", 3)},
         "value of conversations[1] must be a string, got a number"),
        ({"conversations": said("a", " ")}, "value of conversations[1] is empty"),
        ({"conversations": said("a\ud83d", "b")},
         "value of conversations[0] holds half of a surrogate pair"),
        ({"image": 7, "conversations": said("a", "b")}, "image must be a string, got a number"),
        ({"image": "", "conversations": said("a", "b")}, "image is empty"),
        ({"image": IMAGE, "conversations": said("<image>\n", "b")},
         "conversations[0] holds nothing but <image>"),
        ({"conversations": said("<image>\na", "b")},
         "<image> occurs 1 times in a record with no image"),
        ({"image": IMAGE, "conversations": said("<image>\na", "b", "c <image>", "d")},
         "<image> occurs 2 times in a record with one image"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path: Path, item: Any, reason: str) -> None:
    assert check_conversation(5, item) == Problem(5, reason)
    good = {"image": IMAGE, "conversations": said("a", "b")}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([good, item, good]), encoding="utf-8")
    found, problems = load_conversations(path)
    assert [record.index for record in found] == [0, 2]
    assert problems == [Problem(1, reason)]
    path.write_text(json.dumps([item]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json: 1 of 1 records cannot be used .* record 0: "):
        load_conversations(path)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": said("a", "b")}) + "\n{\n", encoding="utf-8")
    _, problems = load_conversations(path)
    assert [problem.index for problem in problems] == [1]
    assert problems[0].reason.startswith("not JSON")


def test_turns_are_what_a_chat_is_encoded_from(tiny_tokenizer: Tokenizer) -> None:
    record = {"image": IMAGE, "conversations": said("<image>\na river", "green", "light", "red")}
    found = check_conversation(3, record)
    assert isinstance(found, Conversation)
    turns = [Turn("a river", "green"), Turn("light", "red")]
    expected = encode_chat(3, turns, tiny_tokenizer, 512)
    assert encode_chat(found.index, found.turns, tiny_tokenizer, 512) == expected
    assert expected.n_labels > 0
