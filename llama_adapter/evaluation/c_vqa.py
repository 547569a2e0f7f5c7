"""C-VQA: how much is lost where a question supposes what the image does not show?

Every row has a question about an image and a counterfactual one ("If there were two more, ...").
C-VQA-Real asks for numbers (direct, indirect) and for yes or no (boolean), C-VQA-Synthetic for one
of the letters A to D.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import FileProblem, usable
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.evaluation.source_files import (
    answered,
    image_path,
    prediction_text,
    table_rows,
    write_table,
)

NUMERICAL = ("direct", "indirect")
BOOLEAN = "boolean"
LETTERS = ("A", "B", "C", "D")
FAIL = "fail"
# a row's two questions, with the columns of question, answer and response
_KINDS = {
    "original": ("query", "answer", "response"),
    "counterfactual": ("new query", "new answer", "new_response"),
}
_COLUMNS = ("img_path", "query", "answer", "new query", "new answer", "type")
_RESULT_COLUMNS = (*_COLUMNS, "response", "new_response")
_NUMBERS = {
    word: number
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"no": 0, "none": 0}
_NEGATIVE = ("no", "false", "not")
_POSITIVE = ("yes", "true", "be", "is", "are")
_WORD = re.compile(r"\w+")


def load(
    path: str | Path, images: str | Path | None = None
) -> tuple[list[Item], list[FileProblem]]:
    """Read a table of C-VQA, Real or Synthetic.

    Args:
        path: the CSV: img_path, query, answer, new query, new answer and type. Any type but
            direct, indirect and boolean is one of multiple choice.
        images: the folder that img_path starts from; None leaves the images out.

    Returns:
        Items in the file's order, a row's original question before its counterfactual one (id,
        row: its number from 0 among those that are rows, kind: original or counterfactual, type,
        image: path or None, image_name, question, answer), and what could not be used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, the file is not UTF-8, or nothing is usable.
    """
    items: list[dict[str, Any]] = []
    malformed: list[FileProblem] = []
    for number, (line, row) in enumerate(table_rows(path, _COLUMNS, malformed)):
        found = _pair(number, row, images)
        if isinstance(found, str):
            malformed.append(FileProblem(line, found, str(path), "line"))
        else:
            items += found
    return usable(items, malformed, path)


def _pair(
    number: int, row: Mapping[str, str], images: str | Path | None
) -> list[dict[str, Any]] | str:
    """A row's two questions, or why they are not used."""
    empty = [name for name in _COLUMNS if not row[name].strip()]
    if empty:
        return f"{empty[0]} is empty"
    name, type_ = row["img_path"].strip(), row["type"].strip()
    image, reason = image_path(images, name)
    if reason is not None:
        return reason
    items: list[dict[str, Any]] = []
    for kind, (query, gold, _) in _KINDS.items():
        answer = row[gold].strip()
        # formatted answers are equal to such a gold only
        wanted = _reason_against_gold(type_, answer)
        if wanted is not None:
            return f"{gold} of type {type_} must be {wanted}, got {answer!r}"
        items.append(
            {
                "id": f"{number}/{kind}",
                "row": number,
                "kind": kind,
                "type": type_,
                "image": image,
                "image_name": name,
                "question": row[query].strip(),
                "answer": answer,
            }
        )
    return items


def _reason_against_gold(type_: str, answer: str) -> str | None:
    """What the answer of a type has to be, where this one is not."""
    if type_ in NUMERICAL:
        return None if answer.isascii() and answer.isdigit() else "a whole number"
    if type_ == BOOLEAN:
        return None if answer.lower() in ("yes", "no") else "yes or no"
    return None if answer in LETTERS else f"one of {', '.join(LETTERS)}"


def prompt_of(item: Item) -> str:
    """The question as it is; those of multiple choice hold their options."""
    return item["question"]


def formatted(prediction: str, type_: str) -> str:
    """What a prediction is compared as, "fail" where nothing is found.

    - direct and indirect: in lower case; of an answer that starts with the word "if", what follows
      the first comma (all of it without a comma), of any other, what stands before an "if". There
      the first run of digits or number word, no and none (0) to ten, as a number.
    - boolean: "no" where a word is no, false or not, else "yes" where one is yes, true, be, is or
      are.
    - any other type: the letter A to D, if exactly one of the four is there as a word.

    Args:
        prediction: the model's text.
        type_: of the question.
    """
    words = _WORD.findall(prediction.lower())
    if type_ in NUMERICAL:
        if words and words[0] == "if":
            before, comma, after = prediction.lower().partition(",")
            words = _WORD.findall(after if comma else before)
        elif "if" in words:
            words = words[: words.index("if")]
        for word in words:
            if word.isascii() and word.isdigit():
                return str(int(word))
            if word in _NUMBERS:
                return str(_NUMBERS[word])
        return FAIL
    if type_ == BOOLEAN:
        if any(word in words for word in _NEGATIVE):
            return "no"
        return "yes" if any(word in words for word in _POSITIVE) else FAIL
    letters = set(_WORD.findall(prediction)) & set(LETTERS)
    return letters.pop() if len(letters) == 1 else FAIL


def score(item: Item, prediction: Any) -> Scores:
    """1 or 0 under "TYPE original" or "TYPE counterfactual"."""
    answer = formatted(prediction_text(item, prediction), item["type"])
    gold = item["answer"]
    if item["type"] in NUMERICAL:
        gold = str(int(gold))
    elif item["type"] == BOOLEAN:
        gold = gold.lower()
    return {f"{item['type']} {item['kind']}": float(answer == gold)}


def aggregate(item_scores: Sequence[Mapping[str, float]]) -> Scores:
    """Accuracies in percent and their difference in points, by type.

    loss = original - counterfactual; the paper's tables print "counterfactual (loss)".

    Args:
        item_scores: of `score`.

    Returns:
        "TYPE original", "TYPE counterfactual" and "TYPE loss", types in order of appearance; a
        type with one kind of question only has no loss.
    """
    rows: dict[str, list[float]] = {}
    for row in item_scores:
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    scores = {name: 100 * math.fsum(values) / len(values) for name, values in rows.items()}
    for name in list(scores):
        type_, _, kind = name.rpartition(" ")
        counterfactual = scores.get(f"{type_} counterfactual")
        if kind == "original" and counterfactual is not None:
            scores[f"{type_} loss"] = scores[name] - counterfactual
    return scores


def write(path: str | Path, items: Sequence[Item], predictions: Sequence[Any]) -> None:
    """Write the official result table: the file's columns, response and new_response.

    Args:
        path: the CSV.
        items: of `load`, both of every row.
        predictions: the model's texts as they are; the official script formats them itself.

    Raises:
        ValueError: there is not one string per item, or a row lacks one of its two questions.
    """
    rows: dict[int, dict[str, str]] = {}
    for item, text in answered(items, predictions):
        query, gold, response = _KINDS[item["kind"]]
        rows.setdefault(item["row"], {}).update(
            {
                "img_path": item["image_name"],
                "type": item["type"],
                query: item["question"],
                gold: item["answer"],
                response: text,
            }
        )
    for number, row in rows.items():
        if len(row) != len(_RESULT_COLUMNS):
            raise ValueError(f"items must hold both questions of a row, got one of row {number}")
    write_table(path, _RESULT_COLUMNS, list(rows.values()))
