"""A conversation's text is FastChat's, and exactly the answers and their ends carry loss."""

import pytest

from llama_adapter.data.chat import SYSTEM, Turn, chat_text, encode_chat
from llama_adapter.data.examples import IGNORE_INDEX
from llama_adapter.tokenizer import Tokenizer

TURNS = (Turn("green light?", "the river"), Turn("who follows", "seven quiet birds"))


def test_the_text_is_fastchats() -> None:
    assert chat_text(TURNS, "Be kind.") == (
        "Be kind.###Human: green light?###Assistant: the river###"
        "Human: who follows###Assistant: seven quiet birds###"
    )
    asked = (*TURNS, Turn("and then?", None))
    assert chat_text(asked) == f"{chat_text(TURNS)}Human: and then?###Assistant:"
    assert chat_text(asked).startswith(f"{SYSTEM}###Human: green")


def test_answers_and_their_ends_are_labelled(tiny_tokenizer: Tokenizer) -> None:
    example = encode_chat(7, TURNS, tiny_tokenizer, 10_000)
    assert example.index == 7
    assert list(example.tokens) == tiny_tokenizer.encode(chat_text(TURNS), bos=True)
    runs: list[list[int]] = [[]]
    for token, label in zip(example.tokens, example.labels, strict=True):
        if label != IGNORE_INDEX:
            assert label == token
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    texts = [tiny_tokenizer.decode(run).strip() for run in runs if run]
    assert texts == ["the river###", "seven quiet birds###"]
    assert example.labels[0] == IGNORE_INDEX
    assert example.labels[-1] == example.tokens[-1]


def test_it_is_cut_from_the_right(tiny_tokenizer: Tokenizer) -> None:
    whole = encode_chat(0, TURNS, tiny_tokenizer, 10_000)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    for length in (2, first, first + 3, len(whole.tokens)):
        cut = encode_chat(0, TURNS, tiny_tokenizer, length)
        assert cut.tokens == whole.tokens[:length]
        assert cut.labels == whole.labels[:length]
    assert encode_chat(0, TURNS, tiny_tokenizer, first).n_labels == 0


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((), "turns must hold at least one, got none"),
        ((Turn("a", None), *TURNS), r"turns\[0\] has no answer, and is not the last"),
        ((*TURNS, Turn("a", None)), "turns must all be answered to be trained on"),
    ],
)
def test_what_is_no_conversation_is_refused(
    turns: tuple[Turn, ...], message: str, tiny_tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_chat(0, turns, tiny_tokenizer, 100)
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        encode_chat(0, TURNS, tiny_tokenizer, 1)
