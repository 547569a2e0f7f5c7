"""What can the bundled world be asked, in which words, and what is the right answer?

A task has an argument (a list of words, or one word), a function that solves it, and several ways
to ask for it. A phrasing with `{x}` holds the argument itself; any other one is given the argument
as Alpaca's input. The last phrasings of a task are kept for held-out instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from examples.bundled_base import lexicon


@dataclass(frozen=True)
class Task:
    """One skill.

    Args:
        name: the task's name in tables of results.
        solve: argument, words separated by spaces -> the right answer.
        phrasings: ways to ask, used in training and held-out instructions.
        unseen_phrasings: ways to ask that only held-out instructions use.
        arguments: the legal single-word arguments, or None where the argument is a list of words.
    """

    name: str
    solve: Callable[[str], str]
    phrasings: tuple[str, ...]
    unseen_phrasings: tuple[str, ...]
    arguments: tuple[str, ...] | None = None


def _reverse(words: str) -> str:
    return " ".join(reversed(words.split()))


def _twice(words: str) -> str:
    return " ".join(f"{word} {word}" for word in words.split())


def _count(words: str) -> str:
    return lexicon.NUMBERS[len(words.split()) - 1]


def _swap_ends(words: str) -> str:
    first, *middle, last = words.split()
    return " ".join([last, *middle, first])


LIST_TASKS: tuple[Task, ...] = (
    Task(
        "reverse",
        _reverse,
        (
            "Reverse the order of the words.",
            "Write the words in reverse order.",
            "List the words backwards.",
            "Reverse these words: {x}",
            "Write these words backwards: {x}",
        ),
        ("Put the words in reverse order.", "List these words backwards: {x}"),
    ),
    Task(
        "first",
        lambda words: words.split()[0],
        (
            "What is the first word?",
            "Give the first word of the list.",
            "Write only the first word.",
            "Give the first of these words: {x}",
            "Which word comes first here: {x}",
        ),
        ("Which word comes first?", "Write the first of these words: {x}"),
    ),
    Task(
        "last",
        lambda words: words.split()[-1],
        (
            "What is the last word?",
            "Give the last word of the list.",
            "Write only the last word.",
            "Give the last of these words: {x}",
            "Which word comes last here: {x}",
        ),
        ("Which word comes last?", "Write the last of these words: {x}"),
    ),
    Task(
        "twice",
        _twice,
        (
            "Repeat each word twice.",
            "Write every word two times.",
            "Double each word of the list.",
            "Repeat each of these words twice: {x}",
            "Double these words: {x}",
        ),
        ("Double every word.", "Write each of these words two times: {x}"),
    ),
    Task(
        "count",
        _count,
        (
            "Count the words.",
            "How many words are there?",
            "What is the number of words?",
            "Count these words: {x}",
            "How many words are in this list: {x}",
        ),
        ("How many words are in the list?", "Give the number of these words: {x}"),
    ),
    Task(
        "remove_first",
        lambda words: " ".join(words.split()[1:]),
        (
            "Remove the first word.",
            "Write the list without its first word.",
            "Leave out the first word.",
            "Remove the first of these words: {x}",
            "Write these words without the first: {x}",
        ),
        ("Drop the first word.", "Leave out the first of these words: {x}"),
    ),
    Task(
        "swap_ends",
        _swap_ends,
        (
            "Swap the first and the last word.",
            "Exchange the first word and the last word.",
            "Let the first and the last word change places.",
            "Swap the first and the last of these words: {x}",
            "Exchange the ends of this list: {x}",
        ),
        ("Exchange the first and the last word.", "Swap the ends of this list: {x}"),
    ),
    Task(
        "join",
        lambda words: " and ".join(words.split()),
        (
            'Join the words with "and".',
            'Put "and" between the words.',
            'Write the list with "and" between its words.',
            'Join these words with "and": {x}',
            'Put "and" between these words: {x}',
        ),
        ('Write the words with "and" between them.', 'Write these words joined with "and": {x}'),
    ),
)

WORD_TASKS: tuple[Task, ...] = (
    Task(
        "opposite",
        lexicon.OPPOSITE.__getitem__,
        (
            "What is the opposite of {x}?",
            "Give the opposite of {x}.",
            "Write the opposite of the word.",
            "Give a word that means the opposite.",
        ),
        ("Write the opposite of {x}.", "What is the opposite of the word?"),
        tuple(lexicon.OPPOSITE),
    ),
    Task(
        "plural",
        lexicon.PLURAL.__getitem__,
        (
            "What is the plural of {x}?",
            "Give the plural of {x}.",
            "Write the plural of the word.",
            "Give the word for more than one.",
        ),
        ("Write the plural of {x}.", "What is the plural of the word?"),
        tuple(lexicon.PLURAL),
    ),
    Task(
        "past",
        lexicon.PAST.__getitem__,
        (
            "What is the past tense of {x}?",
            "Give the past tense of {x}.",
            "Write the past tense of the word.",
            "Put the verb in the past.",
        ),
        ("Write the past tense of {x}.", "What is the past tense of the word?"),
        tuple(lexicon.PAST),
    ),
    Task(
        "kind",
        lexicon.KIND.__getitem__,
        (
            "What kind of thing is a {x}?",
            "Say what kind of thing a {x} is.",
            "What kind of thing is it?",
            "Name the kind of thing.",
        ),
        ("Name the kind of thing a {x} is.", "Say what kind of thing it is."),
        tuple(lexicon.KIND),
    ),
    Task(
        "colour",
        lexicon.COLOUR.__getitem__,
        (
            "What colour is {x}?",
            "Name the colour of {x}.",
            "What colour does it have?",
            "Name its colour.",
        ),
        ("Say what colour {x} is.", "What colour is it?"),
        tuple(lexicon.COLOUR),
    ),
    Task(
        "next_number",
        lexicon.NEXT_NUMBER.__getitem__,
        (
            "What number comes after {x}?",
            "Which number follows {x}?",
            "Write the next number.",
            "What number comes next?",
        ),
        ("Write the number after {x}.", "Which number follows?"),
        tuple(lexicon.NEXT_NUMBER),
    ),
)

TASKS: tuple[Task, ...] = LIST_TASKS + WORD_TASKS


def as_json_answer(answer: str) -> str:
    """The second expertise: the same answer, as a JSON object."""
    return f'{{"answer": "{answer}"}}'


def ask(phrasing: str, argument: str, output: str) -> dict[str, str]:
    """An Alpaca record: the argument goes into the phrasing's `{x}`, or else into the input."""
    if "{x}" in phrasing:
        return {"instruction": phrasing.format(x=argument), "input": "", "output": output}
    return {"instruction": phrasing, "input": argument, "output": output}
