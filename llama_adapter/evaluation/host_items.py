"""What an evaluation of a host's task keeps: items, their scores, the task's own result file."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import write_json
from llama_adapter.evaluation.runner import Item, Scores, mean_scores
from llama_adapter.tasks.base_to_novel import BASE, HARMONIC, NOVEL, averages, harmonic_mean
from llama_adapter.tasks.conll_files import Sentence, write_conlleval
from llama_adapter.tasks.few_shot import NamedImage
from llama_adapter.tasks.squad_files import Question, write_answers
from llama_adapter.tasks.task import Task
from llama_adapter.tasks.vtab import VTAB_TASKS, LabelledImage, table_means

TAGS_FILE = "conlleval.txt"
LABELS_FILE = "predictions.txt"
ACCURACIES_FILE = "accuracies.json"
# scores of one item, among those that its task has
_OF_AN_ITEM = ("accuracy", "exact", "f1", "base", "novel")


def items_of(found: Sequence[Any]) -> list[Item]:
    """A task's items as the runner keeps them.

    What names a place on this machine is left out; of an image there is a hash of its file instead,
    so that other images of the same names are other items.

    Raises:
        OSError: an image cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for one in found:
        row = asdict(one)
        path = row.pop("path", None)
        if isinstance(one, LabelledImage | NamedImage):
            row["sha256"] = hashlib.sha256(Path(one.path).read_bytes()).hexdigest()
        elif isinstance(one, Sentence):
            predicate = "" if one.predicate is None else f":{one.predicate}"
            row["id"] = f"{Path(str(path)).name}:{one.at}{predicate}"
        rows.append(row)
    # files of one name in two folders, or a question that is asked twice
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row["id"]] += 1
        if seen[row["id"]] > 1:
            row["id"] = f"{row['id']} ({seen[row['id']]})"
    return [*rows]


def item_scores(task: Task, item: Any, prediction: Any) -> Scores:
    """One item's own scores, in per cent."""
    found = task.score([item], [prediction])
    return {name: value for name, value in found.items() if name in _OF_AN_ITEM}


def write_result(
    folder: Path, items: Sequence[Any], predictions: Sequence[Any], scores: Mapping[str, float]
) -> Path:
    """Write a task's own form of result: SQuAD's predictions, conlleval's columns, or a list.

    Args:
        folder: of the evaluation.
        items: the task's.
        predictions: for each.
        scores: of all.

    Returns:
        The file; of images there are the predicted labels and the accuracies.
    """
    first = items[0]
    if isinstance(first, Question):
        write_answers(folder, items, predictions)
        return folder / "predictions.json"
    if isinstance(first, Sentence):
        write_conlleval(folder / TAGS_FILE, items, predictions)
        paths = [*dict.fromkeys(item.path for item in items)]
        # the papers' tables have a column for each file, of which two may have one name
        for number, path in enumerate(paths if len(paths) > 1 else (), 1):
            own = [place for place, item in enumerate(items) if item.path == path]
            some = [[of[place] for place in own] for of in (items, predictions)]
            write_conlleval(folder / f"conlleval-{number}-{Path(path).name}.txt", *some)
        return folder / TAGS_FILE
    pairs = zip(items, predictions, strict=True)
    lines = [f"{item.id} {item.label} {found}\n" for item, found in pairs]
    (folder / LABELS_FILE).write_text("".join(lines), encoding="utf-8")
    write_json(folder / ACCURACIES_FILE, dict(scores))
    return folder / ACCURACIES_FILE


def over_seeds(task: str, rows: Sequence[Scores]) -> Scores:
    """Means of one data set's runs; the harmonic mean is that of the two means, as Table 11's."""
    found = mean_scores(rows)
    if task == "base_to_novel" and {BASE, NOVEL} <= found.keys():
        found[HARMONIC] = harmonic_mean(found[BASE], found[NOVEL])
    return found


def means(task: str, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What the papers' tables have below a list of data sets, by the task.

    Args:
        task: "vtab": means of groups and of all, of its own 19 tasks; "base_to_novel": means of
            accuracies and of harmonic means, where all have both halves; else the mean of each.
        scores: of each data set, as `over_seeds` has them.
    """
    if task == "vtab" and all(name in VTAB_TASKS for name in scores):
        return table_means({name: found["accuracy"] for name, found in scores.items()})
    if task == "base_to_novel" and all({BASE, NOVEL} <= found.keys() for found in scores.values()):
        return averages([*scores.values()])
    return mean_scores([*scores.values()])
