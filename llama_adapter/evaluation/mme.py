"""MME: fourteen subtasks of yes and no, two questions per image.

A subtask's score is its accuracy plus the share of images with both answers right, in percent each:
at most 200. Perception adds ten subtasks, cognition four.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.data.checked_files import FileProblem, numbered_lines, usable
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.evaluation.source_files import answered, prediction_text

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
TASKS = PERCEPTION + COGNITION
GOLD = ("yes", "no")
# an image's questions
PAIR = 2
# png in cognition, jpg in perception but for one file: both are tried everywhere
_SUFFIXES = (".jpg", ".png")
# where the official script looks for a yes or a no that has something behind it
_PREFIX = 4


def load(
    folder: str | Path, tasks: Sequence[str] = TASKS, *, with_images: bool = True
) -> tuple[list[Item], list[FileProblem]]:
    """Read MME's folder, in either of its layouts.

    A subtask holds questions_answers_YN/NAME.txt and images/NAME.jpg or .png, or both kinds of
    files directly. A line of a text file is a question, a tab and Yes or No. An image counts as a
    pair: where it has not two usable questions none of them is used.

    Args:
        folder: what holds one folder per subtask.
        tasks: the subtasks to read, all of them unless told otherwise.
        with_images: False leaves the images out, which need not be there then: image is None.

    Returns:
        Items in the subtasks' order, the two of an image adjacent (id, task, pair: number of the
        image in its subtask, image: path, image_name, question, gold: "Yes" or "No" as it is
        there), and what could not be used.

    Raises:
        FileNotFoundError: a subtask's folder is absent.
        ValueError: there is no such subtask, a file is not UTF-8, or nothing is usable.
    """
    items: list[dict[str, Any]] = []
    malformed: list[FileProblem] = []
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {task!r}")
        home = Path(folder) / task
        if not home.is_dir():
            raise FileNotFoundError(f"{home}: no such folder, a subtask of MME")
        texts, images = home / "questions_answers_YN", home / "images"
        if not texts.is_dir():
            texts = images = home
        for pair, path in enumerate(sorted(texts.glob("*.txt"))):
            questions, problems = _questions(path)
            found = [images / f"{path.stem}{suffix}" for suffix in _SUFFIXES]
            image = next((each for each in found if each.is_file()), None)
            if image is None and with_images:
                reason = f"image {found[0]} or {_SUFFIXES[1]}: no such file"
                problems.append(FileProblem(pair, reason, str(path), "image"))
            if len(questions) != PAIR:
                reason = f"must hold {PAIR} usable questions, got {len(questions)}: none is used"
                problems.append(FileProblem(pair, reason, str(path), "pair"))
            malformed += problems
            if (image is not None or not with_images) and len(questions) == PAIR:
                shared = {"task": task, "pair": pair, "image": str(image) if with_images else None}
                for number, (question, gold) in enumerate(questions, 1):
                    items.append(
                        {
                            "id": f"{task}/{path.stem}/{number}",
                            **shared,
                            "image_name": (image or found[0]).name,
                            "question": question,
                            "gold": gold,
                        }
                    )
    return usable(items, malformed, folder)


def _questions(path: Path) -> tuple[list[tuple[str, str]], list[FileProblem]]:
    """Questions of one image with their answers, and the lines that are none."""
    questions, problems = [], []
    for number, line in numbered_lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2:
            reason = f"must be a question, a tab and Yes or No, got {len(cells)} cells"
        elif not cells[0]:
            reason = "question is empty"
        elif cells[1].lower() not in GOLD:
            reason = f"answer must be Yes or No, got {cells[1]!r}"
        else:
            questions.append((cells[0], cells[1]))
            continue
        problems.append(FileProblem(number, reason, str(path), "line"))
    return questions, problems


def prompt_of(item: Item) -> str:
    """The question as it is: it ends "Please answer yes or no." in the files themselves."""
    return item["question"]


def sanitised(prediction: str) -> str:
    """A prediction as one cell of the result file: every run of blanks is one space, none outside.

    A tab would be a further cell, a newline a further line.
    """
    return " ".join(prediction.split())


def parsed(prediction: str) -> str:
    """Whether a prediction is a "yes", a "no" or "other", as the official script reads it.

    Other than the words themselves only the first four characters count: "yes" in them is a yes,
    else "no" a no ("not", "None" and "Know" are).
    """
    lowered = prediction.lower()
    if lowered in GOLD:
        return lowered
    prefix = lowered[:_PREFIX]
    return next((word for word in GOLD if word in prefix), "other")


def score(item: Item, prediction: Any) -> Scores:
    """1 or 0 under the subtask's name, and the image's number, by which `aggregate` finds pairs.

    What is parsed is the prediction as the result file holds it.
    """
    answer = parsed(sanitised(prediction_text(item, prediction)))
    return {item["task"]: float(answer == item["gold"].lower()), "pair": float(item["pair"])}


def aggregate(item_scores: Sequence[Mapping[str, float]]) -> Scores:
    """Scores of subtasks and of their sums.

    score = 100 acc + 100 acc+, acc = right / questions, acc+ = images with both right / images

    Args:
        item_scores: of `score`, in any order.

    Returns:
        By subtask TASK/acc and TASK/acc+ (0 to 1) and TASK (0 to 200); perception (0 to 2000) and
        cognition (0 to 800) where all of their subtasks are there, and ALL where both are.
    """
    scores: Scores = {}
    for task in TASKS:
        pairs: dict[float, list[float]] = {}
        for row in item_scores:
            if task in row:
                pairs.setdefault(row["pair"], []).append(row[task])
        if pairs:
            right = [value for pair in pairs.values() for value in pair]
            accuracy = math.fsum(right) / len(right)
            both = sum(all(pair) for pair in pairs.values()) / len(pairs)
            scores |= {
                f"{task}/acc": accuracy,
                f"{task}/acc+": both,
                task: 100 * accuracy + 100 * both,
            }
    for name, tasks in (
        ("perception", PERCEPTION),
        ("cognition", COGNITION),
        ("ALL", ("perception", "cognition")),
    ):
        if scores.keys() >= set(tasks):
            scores[name] = math.fsum(scores[task] for task in tasks)
    return scores


def write(folder: str | Path, items: Sequence[Item], predictions: Sequence[Any]) -> None:
    """Write the official result files, TASK.txt: image, question, gold and prediction by tabs.

    Args:
        folder: where the files go, created if absent.
        items: of `load`, in its order: the two questions of an image are adjacent.
        predictions: the model's texts; see `sanitised`.

    Raises:
        ValueError: there is not one string per item.
    """
    folder = Path(folder)
    lines: dict[str, list[str]] = {}
    for item, text in answered(items, predictions):
        cells = (item["image_name"], item["question"], item["gold"], sanitised(text))
        lines.setdefault(item["task"], []).append("\t".join(cells) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in lines.items():
        write_atomically(folder / f"{task}.txt", "".join(rows).encode())
