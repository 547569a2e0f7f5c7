"""The language host's tasks as files in the real formats, and read back by the library's tasks."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.hosts_text_world import ASKED, TASK_CUED, Event, World, question
from llama_adapter.tasks.conll import TaggingTask
from llama_adapter.tasks.squad import SquadTask
from llama_adapter.tasks.task import Task

SPLITS = ("train", "validation", "test")
# in tokens: no text of the world is longer
MAX_LENGTH, STRIDE, MAX_ANSWER = 96, 32, 8
# of SQuAD 2.0's questions, as many cannot be answered as of the real files'
UNANSWERABLE = {"train": 1 / 3, "validation": 1 / 2, "test": 1 / 2}
# of those, where a place or a day is not told, that ask for it
SILENT = 0.75
# of a paragraph
QUESTIONS = 3


@dataclass(frozen=True)
class Sizes:
    """How many questions or sentences the three splits of a data set have."""

    train: int
    validation: int
    test: int

    def of(self, split: str) -> int:
        """One split's."""
        return getattr(self, split)


def _paragraph(world: World, count: int) -> tuple[list[Event], str]:
    """Events with different predicates, and the text that tells of them."""
    events = [world.event() for _ in range(count)]
    if len({event.predicate for event in events}) < count:
        return _paragraph(world, count)
    return events, " ".join(" ".join(world.sentence(event).words) for event in events)


def _not_told(world: World, event: Event, context: str) -> str:
    """A question on an event's place or day that is not told, or on another event."""
    silent = [asked for asked in ASKED if not question(event, asked)[1]]
    if silent and world.rng.random() < SILENT:
        return question(event, world.rng.choice(silent))[0]
    other = world.event()
    while other.predicate in context:
        other = world.event()
    return question(other, world.rng.choice(ASKED))[0]


def squad(split: str, size: int, version_2: bool) -> dict[str, Any]:
    """Questions on paragraphs, in SQuAD's form; 2.0 tells of one event and asks for more."""
    name = "squad2" if version_2 else "squad"
    world = World(random.Random(f"{name} {split}"), cued=TASK_CUED)
    paragraphs, count = [], 0
    while count < size:
        events, context = _paragraph(world, 1 if version_2 else world.rng.choice((1, 2)))
        told = [
            (event, text, answer)
            for event in events
            for text, answer in (question(event, what) for what in ASKED)
            if answer and context.count(answer) == 1
        ]
        found = []
        for event, text, answer in world.rng.sample(told, min(QUESTIONS, len(told))):
            answers = [{"text": answer, "answer_start": context.index(answer)}]
            item = {"id": f"{split}-{count + len(found)}", "question": text, "answers": answers}
            if version_2:
                item["is_impossible"] = world.rng.random() < UNANSWERABLE[split]
                if item["is_impossible"]:
                    item |= {"question": _not_told(world, event, context), "answers": []}
            found.append(item)
        found = found[: size - count]
        if found:
            paragraphs.append({"context": context, "qas": found})
            count += len(found)
    version = "v2.0" if version_2 else "1.1"
    return {"version": version, "data": [{"title": name, "paragraphs": paragraphs}]}


def _sentences(world: World) -> Iterator[Any]:
    while True:
        events = [world.event() for _ in range(1 + (world.rng.random() < 0.3))]
        yield world.sentence(*events)


def entities(split: str, size: int) -> str:
    """Sentences in CoNLL03's four columns."""
    lines = ["-DOCSTART- -X- -X- O", ""]
    for sentence in islice(_sentences(World(random.Random(split), split, TASK_CUED)), size):
        words = zip(sentence.words, sentence.entities, strict=True)
        lines += [*(f"{word} -X- -X- {tag}" for word, tag in words), ""]
    return "\n".join(lines) + "\n"


def roles(split: str, size: int) -> str:
    """A predicate of a sentence a line, with the roles around it, in P-tuning v2's form."""
    lines: list[str] = []
    for sentence in _sentences(World(random.Random(f"roles {split}"), cued=TASK_CUED)):
        for place, tags in sentence.frames.items():
            lines.append(f"{place} {' '.join(sentence.words)} ||| {' '.join(tags)}")
        if len(lines) >= size:
            return "\n".join(lines[:size]) + "\n"
    raise AssertionError("sentences do not end")


WRITERS = {
    "squad": lambda split, size: json.dumps(squad(split, size, False), indent=1) + "\n",
    "squad2": lambda split, size: json.dumps(squad(split, size, True), indent=1) + "\n",
    "conll03": entities,
    "conll05": roles,
}
SUFFIXES = {"squad": ".json", "squad2": ".json", "conll03": ".txt", "conll05": ".txt"}


def path_of(folder: Path, data: str, split: str) -> Path:
    """A split's file."""
    return folder / data / f"{split}{SUFFIXES[data]}"


def write_data(folder: Path, data: str, sizes: Sizes) -> None:
    """Write a data set's three files."""
    (folder / data).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        text = WRITERS[data](split, sizes.of(split))
        path_of(folder, data, split).write_text(text, encoding="utf-8")


def load_task(folder: Path, data: str, tokenizer: Any) -> Task:
    """A data set as the library reads it.

    Raises:
        ValueError: a file has what cannot be used.
    """
    train, validation, test = (path_of(folder, data, split) for split in SPLITS)
    if data.startswith("squad"):
        load = partial(SquadTask.load, stride=STRIDE, max_answer=MAX_ANSWER)
    else:
        load = partial(TaggingTask.load, data=data)
    task, problems = load(train, test, tokenizer, validation=validation, max_length=MAX_LENGTH)
    if problems:
        raise ValueError(f"{problems[0]}")
    return task
