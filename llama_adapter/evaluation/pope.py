"""POPE: is an object in the image? Asked of objects that are there and of objects that are not.

The questions are the released files or built here from lists of objects; what is asked about in
vain is any object, a frequent one, or one that often stands beside what is there.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.evaluation.source_files import (
    Malformed,
    answered,
    image_path,
    json_lines,
    prediction_text,
    reason_against,
    reason_against_string,
    some_usable,
)

LABELS = ("yes", "no")
SETTINGS = ("random", "popular", "adversarial")
# objects asked for per image that are there, and as many that are not
PAIRS = 3
_NEGATIONS = ("No", "not", "no")
# where spelling and sound of the first letter differ
_AN = re.compile(
    r"(?!eu|one\b|once|ewe|u(?:ni(?!n)|s[aeiu]|kulele|tensil))[aeiou]|hour|honest|heir"
)


def load(path: str | Path, images: str | Path | None = None) -> tuple[list[Item], list[Malformed]]:
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
    items: list[Item] = []
    malformed: list[Malformed] = []
    seen: set[str] = set()
    for line, value in json_lines(path):
        found = _item(value, images)
        if not isinstance(found, str) and found["id"] in seen:
            found = f"question_id {found['id']} is there twice"
        if isinstance(found, str):
            malformed.append(Malformed(str(path), f"line {line}", found))
        else:
            seen.add(found["id"])
            items.append(found)
    return some_usable(items, malformed, path)


def _item(value: Any, images: str | Path | None) -> Item | str:
    """A line's value as an item, or why it is none."""
    reason = reason_against(value, ("image", "text", "label"))
    if reason is not None:
        return reason
    name = value.get("question_id")
    if type(name) is not int:
        return f"question_id must be a whole number, got {json.dumps(name)}"
    if value["label"] not in LABELS:
        return f"label must be yes or no, got {value['label']!r}"
    image, reason = image_path(images, value["image"])
    if reason is not None:
        return reason
    return {
        "id": str(name),
        "image": image,
        "image_name": value["image"],
        "question": value["text"],
        "label": value["label"],
    }


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
    _write_lines(path, rows)


def load_objects(path: str | Path) -> tuple[list[dict[str, Any]], list[Malformed]]:
    """Read what the question builder needs: one {"image", "objects": [name]} a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or nothing is usable.
    """
    records: list[Item] = []
    malformed: list[Malformed] = []
    for line, value in json_lines(path):
        reason = reason_against(value, ("image",))
        objects = value.get("objects") if reason is None else None
        if reason is None and not isinstance(objects, list):
            reason = "objects must be a list"
        for name in objects if isinstance(objects, list) else ():
            reason = reason or reason_against_string("an object", name)
        if reason is not None:
            malformed.append(Malformed(str(path), f"line {line}", reason))
        else:
            records.append({"image": value["image"], "objects": objects})
    found, problems = some_usable(records, malformed, path)
    return [dict(record) for record in found], problems


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
        Lines of a question file, question_id from 1: 6 per image.

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


def write_questions(path: str | Path, questions: Sequence[Mapping[str, Any]]) -> None:
    """Write a question file: one object a line."""
    _write_lines(path, questions)


def _write_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
