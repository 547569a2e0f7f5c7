"""What a file to train on may hold: instructions and conversations, with pictures and without.

A value with "conversations" is one of LLaVA-Instruct's form, one with "prompt" and no "instruction"
is text as it is, any other one of Alpaca's; one file may mix them.
"""

from typing import Any

from llama_adapter.data.chat import Turn, chat_text, encode_chat
from llama_adapter.data.examples import Example, encode_pair, encode_record
from llama_adapter.data.llava_instruct import Conversation, check_conversation
from llama_adapter.data.records import (
    Completion,
    Problem,
    Record,
    check_completion,
    check_item,
)
from llama_adapter.data.template import prompt_text
from llama_adapter.tokenizer import Tokenizer

AnyRecord = Record | Completion | Conversation


def check_any(index: int, item: Any) -> AnyRecord | Problem:
    """The value at `index` of a file as a record of its form, or why it is none."""
    if isinstance(item, dict) and "conversations" in item:
        return check_conversation(index, item)
    if isinstance(item, dict) and "prompt" in item and "instruction" not in item:
        return check_completion(index, item)
    return check_item(index, item)


def encode_any(record: AnyRecord, tokenizer: Tokenizer, max_length: int) -> Example:
    """Tokenise a checked record in the template of its form; see `encode_pair`, `encode_chat`."""
    if isinstance(record, Record):
        return encode_record(record, tokenizer, max_length)
    if isinstance(record, Completion):
        texts = record.prompt, record.completion
        return encode_pair(record.index, *texts, tokenizer, max_length, record.image)
    return encode_chat(record.index, record.turns, tokenizer, max_length, image=record.image)


def templates() -> list[str]:
    """Texts that differ wherever a record would be given another text."""
    turns = [Turn("\0", "\1"), Turn("\2", "\3")]
    return [prompt_text("\0"), prompt_text("\0", "\1"), chat_text(turns)]
