"""The bundled multi-modal task, in ScienceQA's own files: `python -m benchmarks.multimodal_task F`.

Of every 20 questions 8 cannot be answered without their picture: 5 ask for what it shows, 3 for a
fact of the thing shown. 2 have a picture that their text tells of, 4 a text alone, and 6 neither:
they ask for facts. The same seed writes the same files.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.multimodal_world import (
    ATTRIBUTES,
    PHRASINGS,
    SHAPES,
    SHOWN,
    SPLITS,
    VALUES,
    Scene,
    draw,
    facts,
    known,
    random_scene,
)
from llama_adapter.checkpoints.atomic import write_atomically

# the kinds of 20 questions in a row
QUOTA = {"see": 5, "recall": 3, "told": 2, "read": 4, "fact": 6}
# the kinds that no text answers
PICTURED = ("see", "recall")
SUBJECTS = {
    "natural science": ("colour", "count", "material"),
    "social science": ("place", "origin"),
    "language science": ("shape", "word"),
}
OPTIONS = (2, 3, 4)
SEED = 0


@dataclass(frozen=True)
class Question:
    """A question before it is an entry of problems.json.

    Attributes:
        kind: of QUOTA.
        asked: an attribute or a relation.
        text, hint, choices, answer: as ScienceQA has them.
        scene: of the picture; None without one.
    """

    kind: str
    asked: str
    text: str
    hint: str
    choices: tuple[str, ...]
    answer: int
    scene: Scene | None

    @property
    def right(self) -> str:
        """The right choice."""
        return self.choices[self.answer]


def _options(rng: random.Random, right: str, others: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Two to four options in random order, and the place of the right one."""
    wrong = [value for value in others if value != right]
    count = min(rng.choice(OPTIONS), 1 + len(wrong))
    options = [right, *rng.sample(wrong, count - 1)]
    rng.shuffle(options)
    return tuple(options), options.index(right)


def question(
    rng: random.Random, kind: str, split: str, world: Mapping[tuple[str, str], str], new: bool
) -> Question:
    """One question.

    Options of a question on a fact of what is shown are values of that split's shapes, so that
    how often a value was right in training tells nothing of a test.

    Args:
        rng: source of all choices.
        kind: of QUOTA.
        split: whose combinations it may ask for.
        world: the facts.
        new: put as only the task puts it, not as the base has read it.
    """
    scene, thing = None, ""
    if kind in ("recall", "fact"):
        thing, asked = rng.choice(
            [pair for pair in known(split) if (pair[0] in SHAPES) or kind == "fact"]
        )
        right, others = world[thing, asked], VALUES[asked]
        if kind == "recall":
            scene = random_scene(rng, split, "shape", thing)
            own = [one for one, relation in known(split) if relation == asked]
            others = [world[one, asked] for one in SHAPES if one in own]
            thing = SHOWN
    else:
        asked = rng.choice(tuple(ATTRIBUTES))
        scene = random_scene(rng, split, asked)
        right, others = getattr(scene, asked), ATTRIBUTES[asked]
    choices, answer = _options(rng, right, others)
    hint = scene.description if scene is not None and kind in ("told", "read") else ""
    text = PHRASINGS[asked][new].format(thing)
    return Question(kind, asked, text, hint, choices, answer, None if kind == "read" else scene)


def questions(
    split: str, count: int, world: Mapping[tuple[str, str], str], seed: int = SEED
) -> list[Question]:
    """The questions of a split, each 20 in a row with the shares of QUOTA.

    Raises:
        ValueError: count is no multiple of 20.
    """
    kinds = [kind for kind, share in QUOTA.items() for _ in range(share)]
    if count % len(kinds):
        raise ValueError(f"count must be a multiple of {len(kinds)}, got {count}")
    rng = random.Random(f"{split} {seed}")
    found = []
    for _ in range(count // len(kinds)):
        rng.shuffle(kinds)
        found += [question(rng, kind, split, world, rng.random() < 0.5) for kind in kinds]
    return found


def entry(one: Question, split: str, rng: random.Random) -> dict[str, Any]:
    """A question as problems.json has it; topic is its kind, category what it asks for."""
    subject = next(name for name, asked in SUBJECTS.items() if one.asked in asked)
    return {
        "question": one.text,
        "choices": list(one.choices),
        "answer": one.answer,
        "hint": one.hint,
        "image": None if one.scene is None else "image.png",
        "task": "closed choice",
        "grade": f"grade{rng.randint(1, 12)}",
        "subject": subject,
        "topic": one.kind,
        "category": one.asked,
        "skill": f"{one.kind} {one.asked}",
        "lecture": "",
        "solution": "",
        "split": split,
    }


def write_task(folder: Path, counts: Mapping[str, int], seed: int = SEED) -> None:
    """Write problems.json, pid_splits.json and images/SPLIT/ID/image.png.

    Besides, scenes.json has what each picture shows, by question.

    Args:
        folder: created where it is absent.
        counts: questions of each split, multiples of 20.
        seed: of the facts, the questions and the pictures.

    Raises:
        ValueError: a count is no multiple of 20.
    """
    world, problems, splits, scenes = facts(seed), {}, {}, {}
    for split, count in counts.items():
        rng, names = random.Random(f"looks {split} {seed}"), []
        for one in questions(split, count, world, seed):
            name = str(len(problems) + 1)
            names.append(name)
            problems[name] = entry(one, split, rng)
            if one.scene is not None:
                path = folder / "images" / split / name / "image.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(one.scene, rng).save(path)
                scenes[name] = asdict(one.scene)
        splits[split] = names
    for name, content in (
        ("problems.json", problems),
        ("pid_splits.json", splits),
        ("scenes.json", scenes),
    ):
        write_atomically(folder / name, (json.dumps(content, indent=1) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Write the task; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=SEED)
    for split, count in zip(SPLITS, (2400, 300, 600), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help="questions")
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split) for split in SPLITS}
    write_task(options.folder, counts, options.seed)
    shares = ", ".join(f"{kind} {5 * share}%" for kind, share in QUOTA.items())
    print(f"{sum(counts.values())} questions in {options.folder} ({shares})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
