"""First tokens of words, predicates behind them, and sentences that are too long."""

import random
from typing import Any

import pytest

from llama_adapter.tasks.conll_files import Sentence
from llama_adapter.tasks.tagged_tokens import Tagged
from tests.llama_adapter.tasks.text_hosts import (
    TEXTS,
    bert_tokenizer,
    roberta_tokenizer,
    word_tokenizer,
)


def sentence(*words: str, predicate: int | None = None) -> Sentence:
    return Sentence(words, ("O",) * len(words), "a", 1, predicate)


def tokens(tagged: Tagged, one: Sentence) -> tuple[list[str], list[int | None]]:
    found = tagged.tokenised(one)
    return tagged.tokenizer.convert_ids_to_tokens(found.inputs["input_ids"]), found.first_tokens


def test_entities_by_hand() -> None:
    tagged = Tagged(bert_tokenizer(), 20)
    assert tokens(tagged, sentence("tower", "be", "Paris", "on")) == (
        ["[CLS]", "tower", "b", "##e", "paris", "o", "##n", "[SEP]"],
        [1, 2, 4, 5],
    )


def test_a_predicate_stands_behind_and_is_no_words_first_token() -> None:
    words = sentence("w1", "w2", "w3", predicate=1)
    tagged = Tagged(word_tokenizer(), 20)
    expected = ["[CLS]", "w1", "w2", "w3", "[SEP]", "w2", "[SEP]"]
    assert tokens(tagged, words) == (expected, [1, 2, 3])
    tagged = Tagged(word_tokenizer(), 20, separator="w9")
    assert tokens(tagged, words)[0] == ["[CLS]", "w1", "w2", "w3", "w9", "w2", "[SEP]"]
    found, first = tokens(Tagged(roberta_tokenizer(), 20), sentence("The", "tower", predicate=0))
    assert found[0] == "<s>"
    assert found[-3:] == ["</s>", "ĠThe", "</s>"]
    assert first == [1, 2]


@pytest.mark.parametrize(
    ("length", "words", "first"),
    [
        (12, "w0 w1 w2 w3 w4 w5", [1, 2, 3, 4, 5, 6]),
        (10, "w0 w1 w2 w3 w4 w5", [1, 2, 3, 4, 5, 6]),
        (9, "w0 w1 w2 w3 w4", [1, 2, 3, 4, 5, None]),
        (5, "w0", [1, None, None, None, None, None]),
        (4, "", [None] * 6),
    ],
)
def test_what_does_not_fit_falls_off_and_the_predicate_stays(
    length: int, words: str, first: list[int | None]
) -> None:
    one = sentence(*(f"w{place}" for place in range(6)), predicate=5)
    found = tokens(Tagged(word_tokenizer(), length), one)
    assert found == (["[CLS]", *words.split(), "[SEP]", "w5", "[SEP]"], first)


@pytest.mark.parametrize("make", [roberta_tokenizer, bert_tokenizer])
@pytest.mark.parametrize("with_predicate", [False, True])
def test_every_word_is_whole_or_absent(make: Any, with_predicate: bool) -> None:
    """Each word's tokens are those that it has alone, and no more fit than are there."""
    tokenizer = make()
    rng = random.Random(9)
    choice = " ".join(TEXTS).split()
    for _ in range(60):
        words = rng.choices(choice, k=rng.randint(1, 14))
        predicate = rng.randrange(len(words)) if with_predicate else None
        limit = rng.randint(16, 60)
        found = Tagged(tokenizer, limit).tokenised(sentence(*words, predicate=predicate))
        ids, first = found.inputs["input_ids"], found.first_tokens
        own = [
            tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"]
            for word in words
        ]
        kept = [place for place, token in enumerate(first) if token is not None]
        assert kept == [*range(len(kept))]
        for place in kept:
            begin = first[place]
            assert begin is not None
            assert ids[begin : begin + len(own[place])] == own[place]
        tail = [] if predicate is None else [tokenizer.sep_token_id, *own[predicate]]
        fixed = 2 + len(tail)
        assert ids[1 + sum(map(len, own[: len(kept)])) : -1] == tail
        assert len(ids) == fixed + sum(map(len, own[: len(kept)])) <= limit
        assert len(kept) == len(words) or len(ids) + len(own[len(kept)]) > limit
        assert ("token_type_ids" in found.inputs) == (make is bert_tokenizer)


def test_a_word_that_is_nothing_to_the_tokenizer_has_no_token() -> None:
    found, first = tokens(Tagged(bert_tokenizer(), 20), sentence("tower", "\u200b", "on"))
    assert found == ["[CLS]", "tower", "o", "##n", "[SEP]"]
    assert first == [1, None, 2]


def test_tokenizers_and_lengths_that_will_not_do() -> None:
    with pytest.raises(ValueError, match="tokenizer must be made with add_prefix_space=True"):
        Tagged(roberta_tokenizer(add_prefix_space=False))
    with pytest.raises(ValueError, match=r"more than the 2 special tokens and at most .* got 2"):
        Tagged(word_tokenizer(), 2)
    with pytest.raises(ValueError, match=r"at most 512, .* got 513"):
        Tagged(word_tokenizer(model_max_length=512), 513)
    with pytest.raises(ValueError, match="separator must be given"):
        Tagged(word_tokenizer(sep_token=None)).tokenised(sentence("w1", predicate=0))
