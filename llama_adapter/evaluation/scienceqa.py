"""ScienceQA: problems, the QCM-A prompt, answers and the accuracy of each class of questions.

Files are those of the benchmark: problems.json, pid_splits.json and images/SPLIT/ID/image.png.
The prompt holds question, context and options, the target is the letter alone: neither lecture nor
solution nor a caption of the image. (LLaMA-Adapter, section 4.2 and table 2.)
"""

import json
import math
import random
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    INTEGER,
    LIST,
    STRING,
    TEXT,
    FileProblem,
    against,
    read_json,
    usable,
    write_json,
)
from llama_adapter.data.items import kind_of
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.evaluation.source_files import answered, image_path, prediction_text

# columns of the paper's table 2, in its order
CLASSES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GRADES = tuple(f"grade{number}" for number in range(1, 13))
FALLBACKS = ("random", "wrong", "first")
LETTERS = string.ascii_uppercase
EMPTY_CLASS = -1.0
_FIELDS = {
    **dict.fromkeys(("question", "subject", "grade", "split"), TEXT),
    **dict.fromkeys(("hint", "topic"), STRING),
    "choices": LIST,
    "answer": INTEGER,
}
# any character may follow the letter, as in the official pattern; brackets are how the paper prints
_ANSWER = re.compile(r"The answer is (?:\(([A-Z])\)|([A-Z]).)")


def load(
    problems: str | Path,
    splits: str | Path,
    split: str = "test",
    images: str | Path | None = None,
) -> tuple[list[Item], list[FileProblem]]:
    """Read one split of ScienceQA.

    Args:
        problems: problems.json.
        splits: pid_splits.json.
        split: a name there: train, val, test, trainval, minitrain, minival or minitest.
        images: the folder that holds SPLIT/ID/image.png; None leaves the images out, as for a
            model that reads text only. The classes of the questions do not change.

    Returns:
        Items in the split's order (id, question, hint, choices, answer: index of the right one,
        image: path or None, has_image, subject, grade, topic), and what could not be used.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is no JSON object, there is no such split, or nothing in it is usable.
    """
    by_id, ids_by_split = _object(problems), _object(splits)
    names = ids_by_split.get(split)
    if not isinstance(names, list):
        known = ", ".join(ids_by_split)
        raise ValueError(f"{splits} must hold a list as split {split!r}, it has {known or 'none'}")
    # where a question is in problems.json, for what is said against it
    places = {name: place for place, name in enumerate(by_id)}
    items: list[dict[str, Any]] = []
    malformed: list[FileProblem] = []
    seen: set[str] = set()
    for position, name in enumerate(names):
        if not isinstance(name, str) or name in seen:
            what = "is there twice" if isinstance(name, str) else "must be a string"
            reason = f"question id {what}, got {json.dumps(name)}"
            malformed.append(FileProblem(position, reason, str(splits), split))
        elif name not in by_id:
            reason = f"question {name!r} is not in {problems}"
            malformed.append(FileProblem(position, reason, str(splits), split))
        else:
            found = _item(name, by_id[name], images)
            if isinstance(found, str):
                reason = f"question {name!r}: {found}"
                malformed.append(FileProblem(places[name], reason, str(problems), "entry"))
            else:
                items.append(found)
            seen.add(name)
    return usable(items, malformed, problems)


def _object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object, got {kind_of(content)}")
    return content


def _item(name: str, problem: Any, images: str | Path | None) -> dict[str, Any] | str:
    """A problem as an item, or why it is none."""
    reason = against(problem, _FIELDS)
    if reason is not None:
        return reason
    choices, answer, image = problem["choices"], problem["answer"], problem.get("image")
    if not 1 < len(choices) <= len(LETTERS):
        return f"choices must be 2 to {len(LETTERS)}, got {len(choices)}"
    for position, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            got = "an empty one" if isinstance(choice, str) else kind_of(choice)
            return f"choices {position} must be a string, got {got}"
    if not 0 <= answer < len(choices):
        return f"answer must be an index of {len(choices)} choices, got {answer}"
    if problem["subject"] not in SUBJECTS:
        return f"subject must be one of {', '.join(SUBJECTS)}, got {problem['subject']!r}"
    if problem["grade"] not in GRADES:
        return f"grade must be one of grade1 to grade12, got {problem['grade']!r}"
    path = None
    if image is not None:
        reason = against(problem, {"image": TEXT})
        if reason is None:
            path, reason = image_path(images, f"{problem['split']}/{name}/{image}")
        if reason is not None:
            return reason
    return {
        "id": name,
        **{key: problem[key] for key in ("question", "hint", "choices", "answer")},
        "image": path,
        "has_image": image is not None,
        **{key: problem[key] for key in ("subject", "grade", "topic")},
    }


def prompt_of(item: Item) -> str:
    """The QCM-A prompt up to and including "Answer:", without a blank behind it.

    Double spaces become single ones, in one pass as in the official template.
    """
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, item["choices"], strict=False)
    )
    # a hint of blanks is shown as it is, though nothing is left of it
    context = item["hint"] or "N/A"
    text = f"Question: {item['question']}\nContext: {context}\nOptions: {options}\nAnswer:"
    return text.replace("  ", " ").strip()


def target_of(item: Item) -> str:
    """What follows the prompt, its leading blank included: " The answer is B."."""
    return _target(LETTERS[item["answer"]])


def _target(letter: str) -> str:
    return f" The answer is {letter}."


def targets_of(item: Item) -> dict[str, str]:
    """What could follow the prompt, one of each option, by the same without its leading blank."""
    targets = [_target(letter) for letter in LETTERS[: len(item["choices"])]]
    return {target.strip(): target for target in targets}


def extracted(prediction: str, options: int) -> int | None:
    """The index of the option that a prediction names, or None.

    Exactly one "The answer is B." or "The answer is (B)" must be there, and the letter must be one
    of the question's own. As in the official pattern any character may stand for the full stop,
    but there must be one.
    """
    found = _ANSWER.findall(prediction)
    if len(found) != 1:
        return None
    index = LETTERS.index("".join(found[0]))
    return index if index < options else None


def answer_of(item: Item, prediction: Any, *, fallback: str = "random", seed: int = 0) -> int:
    """The index that is counted as the answer; -1 is none.

    Args:
        item: the question.
        prediction: the model's text.
        fallback: what an answer without a usable letter counts as: "random" one of the question's
            options, as the official script does, drawn from the seed and the question's id, so
            that it depends on no other answer; "wrong" none; "first" option A.
        seed: of the random fallback.

    Raises:
        ValueError: there is no such fallback, or the prediction is no string.
    """
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback must be one of {', '.join(FALLBACKS)}, got {fallback!r}")
    options = len(item["choices"])
    index = extracted(prediction_text(item, prediction), options)
    if index is not None:
        return index
    if fallback == "random":
        return random.Random(f"{seed} {item['id']}").randrange(options)
    return 0 if fallback == "first" else -1


def classes_of(item: Item) -> list[str]:
    """The columns that a question counts in; one with text and image counts in both of them."""
    context = [
        name for name, there in (("TXT", bool(item["hint"])), ("IMG", item["has_image"])) if there
    ]
    grade = "G1-6" if GRADES.index(item["grade"]) < 6 else "G7-12"
    return [SUBJECTS[item["subject"]], *(context or ["NO"]), grade, "Avg"]


def score(item: Item, prediction: Any, *, fallback: str = "random", seed: int = 0) -> Scores:
    """1 or 0 in each column that the question counts in; arguments as `answer_of`."""
    right = answer_of(item, prediction, fallback=fallback, seed=seed) == item["answer"]
    return {name: float(right) for name in classes_of(item)}


def aggregate(item_scores: Sequence[Mapping[str, float]]) -> Scores:
    """Accuracy of every column in percent with two decimals, -1 where no question counts.

    acc(c) = 100 / n_c sum_{i in c} [answer_i = gold_i]
    """
    columns = {name: [row[name] for row in item_scores if name in row] for name in CLASSES}
    return {
        name: round(100 * math.fsum(row) / len(row), 2) if row else EMPTY_CLASS
        for name, row in columns.items()
    }


def write(
    path: str | Path,
    items: Sequence[Item],
    predictions: Sequence[Any],
    *,
    fallback: str = "random",
    seed: int = 0,
    args: Mapping[str, Any] | None = None,
) -> None:
    """Write the official result file: acc (percent), correct, count, args, results and outputs.

    Args:
        path: the JSON file.
        items: of `load`.
        predictions: the model's texts.
        fallback: as `answer_of`. The official scorer reads results, indices by question id, where
            an answer that counts as none is -1.
        seed: of the random fallback.
        args: what the run was given, kept in the file beside the fallback and the seed.

    Raises:
        ValueError: there are no items, or not one string per item.
    """
    pairs = answered(items, predictions)
    results = {
        item["id"]: answer_of(item, text, fallback=fallback, seed=seed) for item, text in pairs
    }
    correct = sum(results[item["id"]] == item["answer"] for item in items)
    content = {
        "acc": 100 * correct / len(items),
        "correct": correct,
        "count": len(items),
        "args": {**(args or {}), "fallback": fallback, "seed": seed},
        "results": results,
        "outputs": {item["id"]: text for item, text in pairs},
    }
    write_json(path, content)
