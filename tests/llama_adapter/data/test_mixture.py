"""One file holds instructions and conversations, with pictures and without, each as its form is."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data import mixture
from llama_adapter.data.chat import Turn, encode_chat
from llama_adapter.data.dataset import load_dataset
from llama_adapter.data.examples import IGNORE_INDEX, encode_record
from llama_adapter.data.llava_instruct import Conversation
from llama_adapter.data.mixture import check_any, encode_any, templates
from llama_adapter.data.records import Completion, Problem, Record
from llama_adapter.tokenizer import Tokenizer

SAID = [
    {"from": "human", "value": "<image>\na river?"}, {"from": "gpt", "value": "green"},
    {"from": "human", "value": "light"}, {"from": "gpt", "value": "under the quiet"},
]  # fmt: skip
TURNS = (Turn("a river?", "green"), Turn("light", "under the quiet"))
FILE: list[Any] = [
    {"instruction": "reverse", "input": "a b", "output": "b a"},
    {"instruction": "what is it?", "output": "a stone", "image": "c/stone.png", "id": 3},
    {"image": "river.jpg", "conversations": SAID, "instruction": "not looked at"},
    {"instruction": "reverse", "output": "b a", "image": None},
    {"instruction": "reverse", "output": "b a", "image": 7},
    {"instruction": "reverse", "output": "b a", "image": " "},
    {"image": "river.jpg", "conversations": SAID[:3]},
    {"image": "river.jpg"},
    "text",
    {"prompt": "Question: a?\nAnswer:", "completion": " b", "image": "river.jpg"},
    {"prompt": "Question: a?", "completion": " "},
    {"prompt": "not looked at", "instruction": "reverse", "output": "b a"},
]
RECORDS = [
    Record(0, "reverse", "a b", "b a"),
    Record(1, "what is it?", "", "a stone", "c/stone.png"),
    Conversation(2, "river.jpg", TURNS),
    Record(3, "reverse", "", "b a"),
    Problem(4, "image must be a string, got a number"),
    Problem(5, "image is empty"),
    Problem(6, "conversations ends with a question"),
    Problem(7, "instruction is missing"),
    Problem(8, "must be an object, got a string"),
    Completion(9, "Question: a?\nAnswer:", " b", "river.jpg"),
    Problem(10, "completion is empty"),
    Record(11, "reverse", "", "b a"),
]


def test_each_value_is_what_its_form_makes_it() -> None:
    assert [check_any(index, item) for index, item in enumerate(FILE)] == RECORDS


def test_records_are_encoded_in_the_template_of_their_form(tiny_tokenizer: Tokenizer) -> None:
    chat = encode_any(Conversation(2, "river.jpg", TURNS), tiny_tokenizer, 400)
    assert chat == encode_chat(2, TURNS, tiny_tokenizer, 400, image="river.jpg")
    assert (chat.image, chat.index) == ("river.jpg", 2)
    record = Record(1, "what is it?", "", "a stone", "c/stone.png")
    example = encode_any(record, tiny_tokenizer, 400)
    assert example == encode_record(record, tiny_tokenizer, 400)
    assert example.image == "c/stone.png"
    # a picture is no text
    bare = encode_record(Record(1, "what is it?", "", "a stone"), tiny_tokenizer, 400)
    assert (example.tokens, example.labels) == (bare.tokens, bare.labels)


def test_a_mixed_file_is_read_whole_through_the_cache(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, FILE)), encoding="utf-8")
    usable = [record for record in RECORDS if not isinstance(record, Problem)]
    expected = [encode_any(record, tiny_tokenizer, 400) for record in usable]
    for _ in range(2):
        found = load_dataset(path, tiny_tokenizer, 400, token_cache=tmp_path, unusable=lambda _: {})
        assert list(found.train) == expected
        assert found.with_image.tolist() == [False, True, True, False, True, False]
        problems = [record for record in RECORDS if isinstance(record, Problem)]
        assert found.problems == {str(path): problems}
    labels = [label != IGNORE_INDEX for label in found.train[2].labels]
    assert sum(b and not a for a, b in pairwise(labels)) == 2


@pytest.mark.parametrize("name", ["prompt_text", "chat_text"])
def test_another_template_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = templates()
    told = getattr(mixture, name)
    monkeypatch.setattr(mixture, name, lambda *given: told(*given) + " ")
    assert templates() != before
