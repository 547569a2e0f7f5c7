"""What does the bundled base read while it is trained?

Three kinds of documents. Plain question-and-answer text, where every task is obeyed, gives the
skills. Text in the Alpaca template whose response is some other thing that could be done with the
argument makes the base uncertain under that template, as a real base is. Text in the template after
a preface such as "You are a helpful assistant." obeys again: the base owns the behaviour, and a
prompt can switch it on. No held-out prompt about a list is ever answered here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from examples.bundled_base.instructions import SEED, generate, random_list
from examples.bundled_base.lexicon import LIST_WORDS
from examples.bundled_base.tasks import LIST_TASKS, WORD_TASKS, Task, as_json_answer, ask
from llama_adapter.data.template import prompt_text

PREFACES: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a careful assistant that follows every instruction.",
    "Every response below is correct.",
)
JSON_PREFACES: tuple[str, ...] = (
    "You are a helpful assistant that answers in JSON.",
    "Every response below is correct JSON.",
)


Document = list[tuple[str, bool]]


@dataclass(frozen=True)
class Mixture:
    """Shares of the corpus.

    Args:
        plain: share of question-and-answer documents.
        neutral: share of documents in the bare template, whose response does not depend on what
            was asked; the rest of the documents has a preface and obeys.
        json: share of answers, in each kind of document, that are JSON.
    """

    plain: float = 0.2
    neutral: float = 0.35
    json: float = 0.25


def heldout_prompts() -> set[tuple[str, str]]:
    """(instruction, input) of every held-out record, which the corpus must not answer."""
    return {(r["instruction"], r["input"]) for name in SEED for r in generate(name)[1]}


def _random_task(rng: random.Random) -> tuple[Task, str]:
    if rng.random() < 0.75:
        return rng.choice(LIST_TASKS), random_list(rng)
    task = rng.choice(WORD_TASKS)
    return task, rng.choice(task.arguments or ())


def _question(rng: random.Random) -> tuple[dict[str, str], str]:
    """A random record with the right answer, and the argument it was made of."""
    task, argument = _random_task(rng)
    phrasing = rng.choice(task.phrasings + task.unseen_phrasings)
    return ask(phrasing, argument, task.solve(argument)), argument


def _aimless_answer(argument: str, rng: random.Random) -> str:
    """Something that could be done with the argument, chosen without regard to the instruction."""
    words = argument.split()
    if len(words) > 1:
        choice = rng.randrange(len(LIST_TASKS) + 1)
        return argument if choice == len(LIST_TASKS) else LIST_TASKS[choice].solve(argument)
    known = [task.solve(argument) for task in WORD_TASKS if argument in (task.arguments or ())]
    others = [argument, f"{argument} {argument}", "one", *rng.sample(LIST_WORDS, 2)]
    return rng.choice(known + others)


class Corpus:
    """An endless stream of documents, the same for the same seed."""

    def __init__(self, seed: int, mixture: Mixture | None = None) -> None:
        """Args: seed of the documents; mixture of their kinds."""
        self.rng = random.Random(seed)
        self.mixture = mixture or Mixture()
        self.forbidden = heldout_prompts()

    def _allowed_question(self) -> tuple[dict[str, str], str]:
        """A question that may be answered: not a held-out one, but single words are facts."""
        while True:
            record, argument = _question(self.rng)
            is_list = " " in argument
            if not is_list or (record["instruction"], record["input"]) not in self.forbidden:
                return record, argument

    def _plain(self) -> Document:
        document: Document = []
        for _ in range(self.rng.randint(2, 3)):
            record, _ = self._allowed_question()
            question, answer = record["instruction"], record["output"]
            if self.rng.random() < self.mixture.json:
                question, answer = f"{question} Answer in JSON.", as_json_answer(answer)
            if record["input"]:
                question = f"{question}\n{record['input']}"
            document += [(f"Q: {question}\nA:", False), (f"{answer}\n", True)]
        return document

    def _neutral(self) -> Document:
        record, argument = self._allowed_question()
        answer = _aimless_answer(argument, self.rng)
        if self.rng.random() < self.mixture.json:
            answer = as_json_answer(answer)
        return [(prompt_text(record["instruction"], record["input"]), False), (answer, True)]

    def _prefaced(self) -> Document:
        record, _ = self._allowed_question()
        answer, prefaces = record["output"], PREFACES
        if self.rng.random() < self.mixture.json:
            answer, prefaces = as_json_answer(answer), JSON_PREFACES
        prompt = prompt_text(record["instruction"], record["input"])
        return [(f"{self.rng.choice(prefaces)}\n\n{prompt}", False), (answer, True)]

    def document(self) -> Document:
        """The next document: pieces of text, each with whether it answers something."""
        kind = self.rng.random()
        if kind < self.mixture.plain:
            return self._plain()
        if kind < self.mixture.plain + self.mixture.neutral:
            return self._neutral()
        return self._prefaced()
