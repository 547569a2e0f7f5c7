"""POPE: is an object in the image? Asked of objects that are there and of objects that are not.

The questions are the released files or built here from lists of objects; what is asked about in
vain is any object, a frequent one, or one that often stands beside what is there.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    INTEGER,
    LIST,
    TEXT,
    FileProblem,
    line_entries,
    usable,
    write_lines,
)
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.evaluation.source_files import answered, image_path, prediction_text

LABELS = ("yes", "no")
SETTINGS = ("random", "popular", "adversarial")
# objects asked for per image that are there, and as many that are not
PAIRS = 3
_NEGATIONS = ("No", "not", "no")
_FIELDS = {"question_id": INTEGER, "image": TEXT, "text": TEXT, "label": TEXT}
# where spelling and sound of the first letter differ
_AN = re.compile(
    r"(?!eu|one\b|once|ewe|u(?:ni(?!n)|s[aeiu]|kulele|tensil))[aeiou]|hour|honest|heir"
)


def load(
    path: str | Path, images: str | Path | None = None
) -> tuple[list[Item], list[FileProblem]]:
    """Read a file of questions.

    Args:
        path: one JSON object a line: question_id, image (a file's name), text and label.
        images: the folder of the images; None leaves them out.

    Returns:
        Items in the file's order (id, image: path or None, image_name, question, label), and what
        could not be used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or nothing is usable.
    """
    items: dict[str, dict[str, Any]] = {}
    malformed: list[FileProblem] = []
    lines = line_entries(path, malformed)
    for line, value in lines.having(_FIELDS):
        name, label = str(value["question_id"]), value["label"]
        image, reason = image_path(images, value["image"])
        if name in items:
            reason = f"question_id {name} is there twice"
        elif label not in LABELS:
            reason = f"label must be yes or no, got {label!r}"
        if reason is not None:
            lines.refuse(line, reason)
        else:
            items[name] = {
                "id": name,
                "image": image,
                "image_name": value["image"],
                "question": value["text"],
                "label": label,
            }
    return usable(list(items.values()), malformed, path)


def prompt_of(item: Item) -> str:
    """The question as it is."""
    return item["question"]


def parsed(prediction: str) -> str:
    """Whether a prediction is a "yes" or a "no", as the official script reads it.

    Of the text before the first full stop, without commas and cut at single spaces, a part "No",
    "not" or "no" makes it a no. Everything else is a yes: nothing, "None" and "NO" are.
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in _NEGATIONS) else "yes"


def score(item: Item, prediction: Any) -> Scores:
    """1 or 0: is the prediction right, does it say yes, does the label."""
    said = parsed(prediction_text(item, prediction))
    return {
        "correct": float(said == item["label"]),
        "said_yes": float(said == "yes"),
        "is_yes": float(item["label"] == "yes"),
    }


def aggregate(item_scores: Sequence[Mapping[str, float]]) -> Scores:
    """The five numbers of the papers' tables, 0 to 1; yes is what is looked for.

    precision = right yes / said yes, recall = right yes / yes, F1 = 2 p r / (p + r)

    Returns:
        accuracy, precision, recall, f1 and yes_ratio; a ratio of nothing to nothing is 0.
    """
    count = len(item_scores)
    said = sum(row["said_yes"] for row in item_scores)
    there = sum(row["is_yes"] for row in item_scores)
    both = sum(row["said_yes"] * row["is_yes"] for row in item_scores)
    precision, recall = _ratio(both, said), _ratio(both, there)
    return {
        "accuracy": _ratio(sum(row["correct"] for row in item_scores), count),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(said, count),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def write(path: str | Path, items: Sequence[Item], predictions: Sequence[Any]) -> None:
    """Write the official answer file: one object {"question", "answer"} a line.

    The official script pairs the lines with those of the question file, so that all of its
    questions must be there in its order.

    Args:
        path: the JSON lines.
        items: of `load`.
        predictions: the model's texts.

    Raises:
        ValueError: there is not one string per item.
    """
    rows = [
        {"question": item["question"], "answer": text}
        for item, text in answered(items, predictions)
    ]
    write_lines(path, rows)


def load_objects(path: str | Path) -> tuple[list[dict[str, Any]], list[FileProblem]]:
    """Read what the question builder needs: one {"image", "objects": [name]} a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or nothing is usable.
    """
    records: list[dict[str, Any]] = []
    malformed: list[FileProblem] = []
    lines = line_entries(path, malformed)
    for line, value in lines.having({"image": TEXT, "objects": LIST}):
        objects = value["objects"]
        if all(isinstance(name, str) and name.strip() for name in objects):
            records.append({"image": value["image"], "objects": objects})
        else:
            lines.refuse(line, "objects must hold names only")
    usable(records, malformed, path)
    return records, malformed


def build_questions(
    records: Sequence[Mapping[str, Any]],
    setting: str,
    *,
    images: int = 500,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Ask for three objects that an image holds and for three that it does not, in turns.

    The first three objects of an image are those that are there. Those that are not differ from
    each other and are, by the setting, drawn evenly from all others ("random"), the most frequent
    of all ("popular"), or the ones most often in one image with the object asked for before
    ("adversarial", drawn where none ever is). Of equals the one that is listed first is taken.

    Args:
        records: of `load_objects`. Frequencies are of images, over all of them.
        setting: random, popular or adversarial.
        images: how many of the images with at least three objects are drawn, all if there are
            fewer; they stay in their order.
        seed: of the draws.

    Returns:
        Objects of a question file, question_id from 1, 6 per image; `checked_files.write_lines`
        writes them.

    Raises:
        ValueError: there is no such setting, no image has three objects, or an image lacks fewer
            than three.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    lists = [list(dict.fromkeys(record["objects"])) for record in records]
    usable = [index for index, objects in enumerate(lists) if len(objects) >= PAIRS]
    if not usable:
        raise ValueError(f"records must hold an image with {PAIRS} objects or more, got none")
    generator = random.Random(seed)
    drawn = sorted(generator.sample(usable, min(images, len(usable))))
    choose = _chooser(lists, setting, generator)
    questions: list[dict[str, Any]] = []
    for index in drawn:
        image, taken = records[index]["image"], set(lists[index])
        for present in lists[index][:PAIRS]:
            absent = choose(present, taken)
            if absent is None:
                raise ValueError(
                    f"image {image!r} must lack at least {PAIRS} objects of the others"
                )
            taken.add(absent)
            for name, label in ((present, "yes"), (absent, "no")):
                number = len(questions) + 1
                text = f"Is there {_article(name)} {name} in the image?"
                questions.append(
                    {"question_id": number, "image": image, "text": text, "label": label}
                )
    return questions


def _chooser(
    lists: Sequence[Sequence[str]], setting: str, generator: random.Random
) -> Callable[[str, set[str]], str | None]:
    """A function from an object that is there and the names in use to one that is not there."""
    frequency = Counter(name for objects in lists for name in objects)
    beside: dict[str, Counter[str]] = {name: Counter() for name in frequency}
    for objects in lists:
        for name in objects:
            beside[name].update(other for other in objects if other != name)

    def choose(present: str, taken: set[str]) -> str | None:
        others = [name for name in frequency if name not in taken]
        if not others:
            return None
        if setting == "popular":
            return max(others, key=lambda name: frequency[name])
        together = beside[present]
        if setting == "adversarial" and any(together[name] for name in others):
            return max(others, key=lambda name: together[name])
        return generator.choice(others)

    return choose


def _article(name: str) -> str:
    return "an" if _AN.match(name.lower()) else "a"
