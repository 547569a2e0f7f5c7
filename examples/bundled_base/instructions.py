"""Which instruction records does the package ship?

Two sets in Alpaca's format, each with a training and a held-out part: `follow` (plain answers) and
`json` (the same world, answers as a JSON object). No (task, argument) pair is in both parts of a
set, and half of the held-out records are asked in a phrasing that the training part never uses.
`python -m examples.bundled_base.instructions` writes the files again, byte for byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.bundled_base.lexicon import LIST_WORDS
from examples.bundled_base.tasks import LIST_TASKS, WORD_TASKS, Task, as_json_answer, ask
from llama_adapter.assets import INSTRUCTIONS

Record = dict[str, str]
HELDOUT_SHARE = 0.25
HELDOUT_LISTS_PER_TASK = 30
LISTS_PER_TASK = {"follow": 200, "json": 160}
SEED = {"follow": 20230328, "json": 20230428}


def random_list(rng: random.Random) -> str:
    """Three to five different words, separated by spaces."""
    return " ".join(rng.sample(LIST_WORDS, rng.randint(3, 5)))


def _list_records(task: Task, count: int, seen: set[str], rng: random.Random) -> Iterator[Record]:
    """`count` list records for the training part; their arguments are added to `seen`."""
    for index in range(count):
        argument = random_list(rng)
        seen.add(argument)
        yield ask(task.phrasings[index % len(task.phrasings)], argument, task.solve(argument))


def _heldout_list_records(task: Task, seen: set[str], rng: random.Random) -> Iterator[Record]:
    """List records on arguments that are not in `seen`, seen and unseen phrasings in turn."""
    for index in range(HELDOUT_LISTS_PER_TASK):
        argument = random_list(rng)
        while argument in seen:
            argument = random_list(rng)
        pool = task.unseen_phrasings if index % 2 else task.phrasings
        yield ask(pool[index // 2 % len(pool)], argument, task.solve(argument))


def generate(name: str) -> tuple[list[Record], list[Record]]:
    """One instruction set.

    Args:
        name: "follow" or "json".

    Returns:
        (training records, held-out records), each a list of Alpaca's dicts, shuffled.

    Raises:
        KeyError: if there is no set of this name.
    """
    rng = random.Random(SEED[name])
    style: Callable[[str], str] = as_json_answer if name == "json" else str
    train: list[Record] = []
    heldout: list[Record] = []
    for task in LIST_TASKS:
        seen: set[str] = set()
        train += _list_records(task, LISTS_PER_TASK[name], seen, rng)
        heldout += _heldout_list_records(task, seen, rng)
    for task in WORD_TASKS:
        arguments = rng.sample(task.arguments or (), len(task.arguments or ()))
        cut = round(len(arguments) * HELDOUT_SHARE)
        for argument in arguments[cut:]:
            train += [ask(phrasing, argument, task.solve(argument)) for phrasing in task.phrasings]
        for argument in arguments[:cut]:
            for pool in (task.phrasings, task.unseen_phrasings):
                heldout.append(ask(rng.choice(pool), argument, task.solve(argument)))
    for records in (train, heldout):
        rng.shuffle(records)
        for record in records:
            record["output"] = style(record["output"])
    return train, heldout


def as_text(records: list[Record]) -> str:
    """JSON with one record a line, so that a person can read it and a diff stays small."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def main() -> None:
    """Write the files of both sets."""
    for name in SEED:
        for part, records in zip(("train", "heldout"), generate(name), strict=True):
            path = Path(INSTRUCTIONS) / f"{name}_{part}.json"
            path.write_text(as_text(records), encoding="utf-8", newline="\n")
            print(f"{path.name}: {len(records)} records")


if __name__ == "__main__":
    main()
