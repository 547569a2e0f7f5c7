"""What is held out is never trained on; choices of arrays are those made one by one."""

import random
from collections import defaultdict

import numpy as np
import pytest

from llama_adapter.data.chat import Turn
from llama_adapter.data.llava_instruct import Conversation
from llama_adapter.data.records import Record
from llama_adapter.data.split import asked_again, hold_out, question_of


def records_of(questions: list[tuple[str, str]]) -> list[Record]:
    return [Record(i, *question, f"answer {i}") for i, question in enumerate(questions)]


def numbers(records: list[Record]) -> np.ndarray:
    return np.array([question_of(record) for record in records], np.uint64)


def one_by_one(records: list[Record], size: int, seed: int) -> list[bool]:
    """The same choice over dictionaries, as a text would tell it."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.question].append(record)
    questions = list(groups)
    random.Random(f"held out {seed}").shuffle(questions)
    chosen: set[tuple[str, ...]] = set()
    count = 0
    for question in questions:
        if count + len(groups[question]) <= size:
            chosen.add(question)
            count += len(groups[question])
    return [record.question in chosen for record in records]


def test_the_choice_is_fixed_by_its_seed() -> None:
    questions = numbers(records_of([(f"question {i}", "") for i in range(101)]))
    chosen = hold_out(questions, 17, seed=3)
    assert chosen.sum() == 17
    assert np.array_equal(hold_out(questions, 17, seed=3), chosen)
    others = [hold_out(questions, 17, seed=seed) for seed in range(4, 9)]
    assert not any(np.array_equal(other, chosen) for other in others)
    assert not hold_out(questions, 0, seed=3).any()


def test_duplicate_questions_never_straddle_and_the_choice_is_that_of_one_by_one() -> None:
    # every question up to seven times, with other answers and other outer blanks
    texts = [(f"question {i % 29}", f"input {i % 3}" + " " * (i % 2)) for i in range(523)]
    random.Random(4).shuffle(texts)
    records = records_of(texts)
    questions = numbers(records)
    for seed in range(12):
        for size in (7, 100, 522):
            chosen = hold_out(questions, size, seed)
            assert chosen.tolist() == one_by_one(records, size, seed)
            assert size - 10 < chosen.sum() <= size
            assert not set(questions[chosen]) & set(questions[~chosen])


def test_a_question_is_instruction_and_input_without_outer_blanks() -> None:
    same = records_of([("Reverse.", "a b"), (" Reverse.\n", "a b "), ("Reverse.", "\ta b")])
    assert len(set(numbers(same).tolist())) == 1
    others = records_of(
        [("Reverse.", f"input {i}") for i in range(10)] + [("ab", "c"), ("a", "bc"), ("abc", "")]
    )
    assert len(set(numbers(others).tolist())) == 13


def test_a_picture_is_part_of_a_question_and_one_turn_asks_as_an_instruction_does() -> None:
    def chat(image: str | None, *questions: str) -> Conversation:
        return Conversation(0, image, tuple(Turn(asked, "x") for asked in questions))

    text, image = Record(0, "What is it?", "", "x"), Record(0, "What is it?", "", "x", "a.png")
    assert question_of(chat(None, " What is it?")) == question_of(text)
    assert question_of(chat("a.png", "What is it?\n")) == question_of(image)
    others = [
        text, image, chat("b.png", "What is it?"), chat("a.png", "What is it?", "And that?"),
        chat(None, "What is it?", "And that?"), chat("a.png", "And that?"),
    ]  # fmt: skip
    assert len({question_of(one) for one in others}) == len(others)
    # what earlier versions held out is held out still
    assert question_of(Record(0, "Reverse.", " a b", "x")) == 12948535684925604086


@pytest.mark.parametrize("size", [-1, 4, 5])
def test_a_split_leaves_records_on_both_sides(size: int) -> None:
    questions = np.arange(4, dtype=np.uint64)
    with pytest.raises(ValueError, match=f"val_size must be from 0 to 3, got {size}"):
        hold_out(questions, size, seed=0)


def test_a_split_of_nothing_but_duplicates_is_refused() -> None:
    message = "val_size = 2 is too small: every question has more duplicates"
    with pytest.raises(ValueError, match=message):
        hold_out(np.full(5, 2**63 + 1, np.uint64), 2, seed=0)


def test_what_a_held_out_file_asks_is_found_with_the_last_that_asks_it() -> None:
    train = numbers(records_of([("a", ""), ("b", "x"), ("b", "y"), ("c ", ""), ("c", "")]))
    held_out = numbers(records_of([("z", ""), ("b", "y"), ("c", ""), ("b", "y ")]))
    assert asked_again(train, held_out) == {2: 3, 3: 2, 4: 2}
    assert asked_again(train, held_out[:0]) == {}
