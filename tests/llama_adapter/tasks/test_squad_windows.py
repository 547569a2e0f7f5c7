"""Windows over contexts: counted by hand, and against what transformers' own tokenizers give."""

import random
from typing import Any

import pytest

from llama_adapter.tasks.squad_files import Question
from llama_adapter.tasks.squad_windows import Windowing, context_of, tokens_of
from tests.llama_adapter.tasks.text_hosts import (
    TEXTS,
    bert_tokenizer,
    roberta_tokenizer,
    word_tokenizer,
)

LONG = " ".join(TEXTS)


def asked(context: str, answer: str | None, question: str = "w1 w2") -> Question:
    if answer is None:
        return Question("q", question, context, (), ())
    return Question("q", question, context, (answer,), (context.index(answer),))


def test_windows_by_hand() -> None:
    """[CLS] and two words, [SEP], 7 words of the context, [SEP]; each window 4 words further."""
    tokenizer = word_tokenizer()
    words = [f"w{number}" for number in range(20, 38)]
    question = asked(" ".join(words), "w30 w31")
    windows = Windowing(tokenizer, max_length=12, stride=3).training([question])
    texts = [tokenizer.convert_ids_to_tokens(one.inputs["input_ids"]) for one in windows]
    front = ["[CLS]", "w1", "w2", "[SEP]"]
    assert texts == [
        [*front, *words[0:7], "[SEP]"],
        [*front, *words[4:11], "[SEP]"],
        [*front, *words[8:15], "[SEP]"],
        [*front, *words[12:18], "[SEP]"],
    ]
    # w30 is a part of the second window, w30 w31 of the third alone
    assert [(one.start, one.end) for one in windows] == [(0, 0), (0, 0), (6, 7), (0, 0)]


def test_unanswerable_questions_have_cls_everywhere() -> None:
    windows = Windowing(word_tokenizer(), 12, 3).training([asked("w20 w21 w22", None)])
    assert [(one.start, one.end) for one in windows] == [(0, 0)]


@pytest.mark.parametrize("make", [roberta_tokenizer, bert_tokenizer])
def test_labels_are_the_fewest_tokens_that_hold_the_answer(make: Any) -> None:
    tokenizer = make()
    rng = random.Random(3)
    windowing = Windowing(tokenizer, max_length=60, stride=20)
    questions = []
    for _ in range(40):
        start = rng.randrange(len(LONG) - 1)
        answer = LONG[start : start + rng.randint(1, 30)]
        if answer.strip() == answer:
            questions.append(Question("q", "Where is it?", LONG, (answer,), (start,)))
    held = 0
    windows = windowing.training(questions)
    for question, encodings in windowing.encoded(questions):
        start = question.starts[0]
        end = start + len(question.answers[0])
        for encoding in encodings:
            window = windows.pop(0)
            assert window.inputs["input_ids"].tolist() == encoding.ids
            inputs = {"input_ids", *(["token_type_ids"] if make is bert_tokenizer else [])}
            assert {*window.inputs} == inputs
            if make is bert_tokenizer:
                types = window.inputs["token_type_ids"].tolist()
                assert types == [
                    int(place >= context_of(encoding).start) for place in range(len(types))
                ]
            context = context_of(encoding)
            first, last = encoding.offsets[context[0]], encoding.offsets[context[-1]]
            if first[0] > start or last[1] < end:
                assert (window.start, window.end) == (0, 0)
                continue
            held += 1
            # every token that has a character of the answer, and no other at either end
            touching = [
                place
                for place in context
                if encoding.offsets[place][0] < end and encoding.offsets[place][1] > start
            ]
            assert (window.start, window.end) == (touching[0], touching[-1])
    assert held > 30
    assert not windows


@pytest.mark.parametrize("make", [roberta_tokenizer, bert_tokenizer])
def test_windows_hold_all_of_the_context(make: Any) -> None:
    tokenizer = make()
    windowing = Windowing(tokenizer, max_length=40, stride=9)
    [(_, encodings)] = windowing.encoded([asked(LONG, None, "Who is it?")])
    whole = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    asked_ids = tokenizer("Who is it?", add_special_tokens=False)["input_ids"]
    pair = tokenizer("Who is it?", LONG)["input_ids"]
    joined: list[int] = []
    for encoding in encodings:
        context = context_of(encoding)
        own = encoding.ids[context.start : context.stop]
        assert len(encoding.ids) <= 40
        assert encoding.ids[: context.start] == pair[: pair.index(whole[0], len(asked_ids) + 1)]
        assert not joined or joined[-9:] == own[:9]
        joined += own[9:] if joined else own
    assert joined == whole


def test_a_character_of_several_tokens_is_held_by_all_of_them() -> None:
    tokenizer = roberta_tokenizer(size=262)
    windowing = Windowing(tokenizer, 40, 5)
    question = asked("see 日 now", "日", "Who?")
    [(_, [encoding])] = windowing.encoded([question])
    span = tokens_of(encoding, 4, 5)
    assert span is not None
    first, last = span
    assert {encoding.offsets[place] for place in range(first, last + 1)} <= {(4, 5), (3, 5)}
    assert last - first >= 2
    assert tokenizer.decode(encoding.ids[first : last + 1]).strip() == "日"


def test_questions_that_leave_no_room_are_shortened() -> None:
    tokenizer = word_tokenizer()
    windowing = Windowing(tokenizer, max_length=12, stride=3)
    long = "  " + " ".join(f"w{number}" for number in range(30))
    question = asked("w40 w41 w42 w43", "w43", long)
    windows = windowing.training([question, asked("w40 w41", "w41")])
    texts = [tokenizer.convert_ids_to_tokens(one.inputs["input_ids"]) for one in windows]
    front = ["[CLS]", "w0", "w1", "w2", "w3", "w4", "[SEP]"]
    assert texts[0] == [*front, "w40", "w41", "w42", "w43", "[SEP]"]
    assert texts[1] == ["[CLS]", "w1", "w2", "[SEP]", "w40", "w41", "[SEP]"]
    assert (windows[0].start, windows[0].end) == (10, 10)


def test_a_shortened_question_of_word_pieces_fits() -> None:
    rng = random.Random(4)
    for make in (roberta_tokenizer, bert_tokenizer):
        windowing = Windowing(make(), max_length=24, stride=8)
        for _ in range(20):
            start = rng.randrange(40)
            for _, encodings in windowing.encoded([asked(LONG, None, LONG[start:])]):
                assert max(len(one.ids) for one in encodings) <= 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 12, "stride": 9}, "stride must be at least 0 and leave .* got 9 of 12, 3"),
        ({"max_length": 12, "stride": -1}, "stride must be at least 0"),
        ({"max_length": 385, "stride": 9}, "max_length must be at most 384, .* got 385"),
    ],
)
def test_what_a_window_cannot_be(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windowing(word_tokenizer(model_max_length=384), **arguments)
