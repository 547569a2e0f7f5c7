"""MMBench: multiple choice with circular evaluation.

The file holds every question once per option, its options shifted each time; a question is a hit
where all its rotations are answered correctly. Images are base64 inside the table.
"""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import FileProblem, usable
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.evaluation.source_files import (
    answered,
    prediction_text,
    table_rows,
    write_table,
)

# of the column l2-category, with the papers' abbreviations
ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
LETTERS = ("A", "B", "C", "D")
# between the indices of a group's rotations
ROTATION = 10**6
_COLUMNS = ("index", "question", "hint", *LETTERS, "category", "l2-category", "image")
_RESULT_COLUMNS = (*_COLUMNS[:-1], "answer", "prediction")
# whole in a float
_LONGEST_INDEX = 15
# a shorter cell is the index of the row whose image it is
_SHORTEST_IMAGE = 65
# of tokens from the end, that a letter must be among
_TAIL = 4
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def load(path: str | Path) -> tuple[list[Item], list[FileProblem]]:
    """Read a table of MMBench.

    Args:
        path: the TSV: index, question, hint, A to D (C and D may be empty), answer, category,
            l2-category and image, the answer absent in a test split. An image of at most 64
            characters is the index of the row that holds it.

    Returns:
        Items in the file's order (id, group, rotation, question, hint, options: text by letter,
        answer: a letter, or None in a test split, category, ability: a value of `ABILITIES`,
        l2_category, image: base64, see `image_of`), and what could not be used. A group that has
        not one usable row per option is left out whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, the file is not UTF-8, or nothing is usable.
    """
    malformed: list[FileProblem] = []
    rows = list(table_rows(path, _COLUMNS, malformed, "\t"))
    images = {row["index"].strip(): row["image"].strip() for _, row in rows}
    groups: dict[int, dict[int, dict[str, Any]]] = {}
    for line, row in rows:
        found = _item(row, images)
        if not isinstance(found, str):
            group = groups.setdefault(found["group"], {})
            if found["rotation"] not in group:
                group[found["rotation"]] = found
                continue
            found = f"index {found['id']} is there twice"
        malformed.append(FileProblem(line, found, str(path), "line"))
    items: list[dict[str, Any]] = []
    for name, group in groups.items():
        wanted = {rotation: len(item["options"]) for rotation, item in group.items()}
        if sorted(group) == list(range(max(wanted.values()))) and len({*wanted.values()}) == 1:
            items += group.values()
        else:
            rotations = ", ".join(map(str, sorted(group)))
            reason = (
                f"must have rotations 0 to {max(wanted.values()) - 1}, got {rotations}: left out"
            )
            malformed.append(FileProblem(name, reason, str(path), "group"))
    return usable(items, malformed, path)


def _item(row: Mapping[str, str], images: Mapping[str, str]) -> dict[str, Any] | str:
    """A row as an item, or why it is none."""
    index = row["index"].strip()
    if not (index.isascii() and index.isdigit() and len(index) <= _LONGEST_INDEX):
        got = index if len(index) <= _LONGEST_INDEX else f"{index[:_LONGEST_INDEX]}..."
        return f"index must be a number of at most {_LONGEST_INDEX} digits, got {got!r}"
    if not row["question"].strip():
        return "question is empty"
    options = {letter: row[letter].strip() for letter in LETTERS if row[letter].strip()}
    if tuple(options) != LETTERS[: max(2, len(options))]:
        return f"options must be A, B and so on, at least two, got {', '.join(options) or 'none'}"
    answer = row["answer"].strip() if "answer" in row else None
    if answer is not None and answer not in options:
        return f"answer must be one of {', '.join(options)}, got {answer!r}"
    if row["l2-category"].strip() not in ABILITIES:
        return f"l2-category must be one of {', '.join(ABILITIES)}, got {row['l2-category']!r}"
    image = row["image"].strip()
    if len(image) < _SHORTEST_IMAGE:
        image = images.get(image, "") if image else ""
    try:
        empty = not base64.b64decode(image, validate=True)
    except binascii.Error as error:
        return f"image must be base64, got {error}"
    if empty or len(image) < _SHORTEST_IMAGE:
        return f"image must be base64 or the index of a row with an image, got {row['image']!r}"
    return {
        "id": index,
        "group": int(index) % ROTATION,
        "rotation": int(index) // ROTATION,
        "question": row["question"],
        "hint": row["hint"].strip(),
        "options": options,
        "answer": answer,
        "category": row["category"].strip(),
        "l2_category": row["l2-category"].strip(),
        "ability": ABILITIES[row["l2-category"].strip()],
        "image": image,
    }


def image_of(item: Item) -> bytes:
    """The bytes of an item's image file (JPEG or PNG), decoded when asked for."""
    return base64.b64decode(item["image"])


def prompt_of(item: Item) -> str:
    """Hint if there is one, question, options and the request for one of them."""
    hint = f"Hint: {item['hint']}\n" if item["hint"] else ""
    options = "".join(f"{letter}. {text}\n" for letter, text in item["options"].items())
    return (
        f"{hint}Question: {item['question']}\nOptions:\n{options}"
        "Please select the correct answer from the options above. \n"
    )


def matched(prediction: str, options: Mapping[str, str]) -> str | None:
    """The option that a prediction names, or None: by its letter, else by its text.

    A letter counts where no other option's stands among the words and its first place is one of
    the last four. A text counts where no other option's is contained, in lower case, and the
    prediction is at most twice as long as all options together. (The official script asks a
    language model about the rest; without one, exact matching, the rest is wrong.)

    Args:
        prediction: the model's text.
        options: texts by letter.
    """
    words = prediction.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _TAIL:
        return letters[0]
    if len(prediction) > 2 * sum(map(len, options.values())):
        return None
    lowered = prediction.lower()
    texts = [letter for letter, text in options.items() if text.lower() in lowered]
    return texts[0] if len(texts) == 1 else None


def score(item: Item, prediction: Any) -> Scores:
    """1 or 0 under the ability's name, with group and rotation, by which `aggregate` finds circles.

    Args:
        item: of `load`.
        prediction: the model's text; where options are chosen by their likelihood, the letter.

    Raises:
        ValueError: the file has no answers, or the prediction is no string.
    """
    if item["answer"] is None:
        raise ValueError(f"item {item['id']!r} has no answer: a test split is scored by its owner")
    right = matched(prediction_text(item, prediction), item["options"]) == item["answer"]
    return {
        item["ability"]: float(right),
        "group": float(item["group"]),
        "rotation": float(item["rotation"]),
    }


def aggregate(item_scores: Sequence[Mapping[str, float]]) -> Scores:
    """Share of groups that are hits, of all and by ability, and accuracies of single rows.

    hit(g) = prod_k [answer_gk = gold_gk],  Overall = (1 / n) sum_g hit(g)

    Args:
        item_scores: of `score`, in any order.

    Returns:
        0 to 1: Overall (a mean over groups, not over abilities), those of the six abilities that
        are there, "vanilla" (rotation 0 alone) and "vanilla all" (every rotation for itself).
    """
    groups: dict[float, list[float]] = {}
    by_ability: dict[str, set[float]] = {}
    first, every = [], []
    for row in item_scores:
        ability = next(name for name in ABILITIES.values() if name in row)
        groups.setdefault(row["group"], []).append(row[ability])
        by_ability.setdefault(ability, set()).add(row["group"])
        every.append(row[ability])
        if row["rotation"] == 0:
            first.append(row[ability])
    hits = {name: float(all(rows)) for name, rows in groups.items()}
    abilities = {
        name: _mean([hits[group] for group in by_ability[name]])
        for name in ABILITIES.values()
        if name in by_ability
    }
    return {
        "Overall": _mean(list(hits.values())),
        **abilities,
        "vanilla": _mean(first),
        "vanilla all": _mean(every),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def write(path: str | Path, items: Sequence[Item], predictions: Sequence[Any]) -> None:
    """Write the predictions as a table: the file's columns but the image, and prediction.

    These are the columns that MMBench's server and VLMEvalKit read, with tabs between them.

    Args:
        path: the TSV.
        items: of `load`.
        predictions: the model's texts.

    Raises:
        ValueError: there is not one string per item.
    """
    rows = [
        {
            **{letter: item["options"].get(letter, "") for letter in LETTERS},
            **{name: item[name] for name in ("question", "hint", "category")},
            "index": item["id"],
            "l2-category": item["l2_category"],
            "answer": item["answer"] or "",
            "prediction": text,
        }
        for item, text in answered(items, predictions)
    ]
    write_table(path, _RESULT_COLUMNS, rows, "\t")
