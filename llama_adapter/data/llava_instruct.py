"""Conversations about pictures: the files of LLaVA-Instruct, turn by turn.

A file is a JSON list of {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}]};
records without "image" are conversations in text alone. What cannot be used is named by index.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.data.chat import Turn
from llama_adapter.data.items import NotJson, kind_of
from llama_adapter.data.records import Problem, against_text, checked

# stands in the first question for the picture, on a line of its own before or behind it
IMAGE_MARK = "<image>"
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class Conversation:
    """A checked record.

    Attributes:
        index: its position in the file, counted from 0.
        image: the picture's path as the file has it, relative to a folder; None without one.
        turns: at least one, all answered, as `chat.encode_chat` takes them; questions are without
            `IMAGE_MARK`.
    """

    index: int
    image: str | None
    turns: tuple[Turn, ...]

    @property
    def question(self) -> tuple[str, ...]:
        """What is asked, for telling duplicates; one turn is as an instruction without input."""
        asked = *(turn.question.strip() for turn in self.turns), ""
        return asked if self.image is None else (*asked, self.image)


def load_conversations(path: str | Path) -> tuple[list[Conversation], list[Problem]]:
    """Read a file of conversations and check every record.

    Args:
        path: a JSON list, or a `.jsonl` file with one object per line.

    Returns:
        The usable records in file order, and one problem for each of the others. That pictures are
        there is not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, not a list, empty, or holds nothing usable.
    """
    return checked(path, check_conversation)


def check_conversation(index: int, item: Any) -> Conversation | Problem:
    """The value at `index` of a file as a conversation, or why it is none."""
    if isinstance(item, NotJson):
        return Problem(index, str(item))
    if not isinstance(item, dict):
        return Problem(index, f"must be an object, got {kind_of(item)}")
    image, said = item.get("image"), item.get("conversations")
    reason = None if image is None else against_text("image", image)
    if reason is not None:
        return Problem(index, reason)
    if not isinstance(said, list):
        got = kind_of(said) if "conversations" in item else "none"
        return Problem(index, f"conversations must be a list, got {got}")
    texts: list[str] = []
    marks = 0
    for number, message in enumerate(said):
        reason = _against_message(message, number)
        if reason is not None:
            return Problem(index, reason)
        text = message["value"]
        if number % 2 == 0 and IMAGE_MARK in text:
            marks += text.count(IMAGE_MARK)
            text = text.replace(IMAGE_MARK, "").strip()
            if not text:
                return Problem(index, f"conversations[{number}] holds nothing but {IMAGE_MARK}")
        texts.append(text)
    if not texts or len(texts) % 2:
        what = "is empty" if not texts else "ends with a question"
        return Problem(index, f"conversations {what}")
    if marks > (image is not None):
        had = "no image" if image is None else "one image"
        return Problem(index, f"{IMAGE_MARK} occurs {marks} times in a record with {had}")
    turns = tuple(map(Turn, texts[::2], texts[1::2]))
    return Conversation(index, image, turns)


def _against_message(message: Any, number: int) -> str | None:
    """Why a message is not the one that is due at its place, or None."""
    name, due = f"conversations[{number}]", _SPEAKERS[number % 2]
    if not isinstance(message, dict):
        return f"{name} must be an object, got {kind_of(message)}"
    if message.get("from") != due:
        return f"{name} must be from {due}, got {message.get('from')!r}"
    return against_text(f"value of {name}", message.get("value"))
