"""LVLM-eHub: many datasets in one form of record, a metric for each, four capabilities.

Records are the hub's; which dataset has which metric, and which capability it belongs to, is the
caller's to say. A capability's score is relative to the best of the models compared.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    TEXT,
    FileProblem,
    json_entries,
    pairs,
    read_json,
    usable,
    write_json,
)
from llama_adapter.data.items import kind_of
from llama_adapter.evaluation import coco_caption
from llama_adapter.evaluation.runner import Item, Scores, mean_scores
from llama_adapter.evaluation.vqa_answer import holds_words, normalise

# the score that stands for a dataset, by metric
MAIN_SCORE = {
    "vqa": "accuracy", "ocr": "accuracy", "kie": "f1", "mrr": "mrr", "caption": "cider",
}  # fmt: skip
AVERAGE = "average"
_ODD = re.compile(r"[^a-zA-Z0-9\s]")


def load(path: str | Path, images: str | Path, metric: str) -> tuple[list[Item], list[FileProblem]]:
    """Read one dataset: a list of {"question", "gt_answers", "image_path"}, as the hub writes it.

    Args:
        path: the JSON file; "answer" and "model_name", of a finished run, are not used.
        images: folder that an image_path is relative to. That pictures are there is not checked.
        metric: "vqa" (questions, classes, yes or no), "ocr", "kie" (one gold text), "mrr" (golds
            in order of preference) or "caption".

    Returns:
        Items with id (the index in the file), question, image (a path), answers (one or several)
        and metric, and one problem for every record that cannot be used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: metric is none of these, the file is no JSON list or nothing in it is usable.
    """
    if metric not in MAIN_SCORE:
        raise ValueError(f"metric must be one of {', '.join(MAIN_SCORE)}, got {metric!r}")
    problems: list[FileProblem] = []
    items: list[dict[str, Any]] = []
    entries = json_entries(path, read_json(path), None, problems)
    for number, entry in entries.having({"question": TEXT, "image_path": TEXT}):
        answers = entry.get("gt_answers")
        listed = [answers] if isinstance(answers, str) else answers
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            entries.refuse(
                number, f"gt_answers must be a string or a list of strings, got {kind_of(answers)}"
            )
        elif not any(one.strip() for one in listed):
            entries.refuse(number, "gt_answers is empty")
        elif metric == "kie" and len(listed) > 1:
            entries.refuse(number, f"gt_answers must be one text for kie, got {len(listed)}")
        else:
            items.append(
                {
                    "id": str(number),
                    "question": entry["question"],
                    "image": str(Path(images) / entry["image_path"]),
                    "answers": listed,
                    "metric": metric,
                }
            )
    return usable(items, problems, path)


def score(item: Item, prediction: str) -> Scores:
    """One answer by its dataset's metric.

    vqa: whether a gold stands in the answer as whole words, both in VQA's normal form. ocr: the
    same on letters, digits and blanks in lower case. mrr: 1 / the place of the first gold that
    stands in the answer. kie: words of the gold and the answer, and how many they share. A gold
    that the normal form leaves nothing of ("A") is never held; in the hub's scorer it always is.

    Args:
        item: of `load`.
        prediction: the answer.

    Returns:
        {"accuracy"}, {"mrr"}, {"shared", "predicted", "gold"} or, of a caption, {"words"}.
    """
    metric = item["metric"]
    if metric == "caption":
        return coco_caption.score(item, prediction)
    if metric == "kie":
        gold, given = (Counter(text.split()) for text in (item["answers"][0], prediction))
        counts = {"shared": gold & given, "predicted": given, "gold": gold}
        return {name: float(count.total()) for name, count in counts.items()}
    clean = _letters if metric == "ocr" else normalise
    answer = clean(prediction)
    held = [holds_words(answer, clean(gold)) for gold in item["answers"]]
    if metric == "mrr":
        return {"mrr": 1 / (held.index(True) + 1) if any(held) else 0.0}
    return {"accuracy": float(any(held))}


def _letters(text: str) -> str:
    return _ODD.sub("", text).lower()


def aggregate(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """Scores of one dataset.

    kie: precision = shared / predicted, recall = shared / gold over all words of the dataset, f1 =
    their harmonic mean. caption: `coco_caption.aggregate` (the hub's own CIDEr splits at blanks
    without a tokenizer). Else the means.

    Returns:
        Scores by name, 0 to 1 (CIDEr to 10); `MAIN_SCORE` says which stands for the dataset.

    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed and captions are scored.
        ValueError: there are no items, or not as many predictions, or items of several metrics.
    """
    rows = pairs(items, predictions)
    metrics = sorted({item["metric"] for item in items})
    if len(metrics) > 1:
        raise ValueError(f"items must be of one dataset, got metrics {', '.join(metrics)}")
    if metrics == ["caption"]:
        captioned = [{**item, "references": item["answers"]} for item in items]
        return coco_caption.aggregate(captioned, predictions)
    scored = [score(item, prediction) for item, prediction in rows]
    if metrics != ["kie"]:
        return mean_scores(scored)
    shared, predicted, gold = (
        math.fsum(one[name] for one in scored) for name in ("shared", "predicted", "gold")
    )
    return {
        "precision": shared / predicted if predicted else 0.0,
        "recall": shared / gold,
        "f1": 2 * shared / (predicted + gold),
    }


def capability_scores(
    table: Mapping[str, Mapping[str, float]],
    capabilities: Mapping[str, Sequence[str]],
    maxima: Mapping[str, float] | None = None,
) -> dict[str, Scores]:
    """Scores of models by capability, relative to the best.

    capability = mean over its datasets of score / best score; average = mean over capabilities

    Args:
        table: of every model every dataset's main score.
        capabilities: the datasets of each capability.
        maxima: the best score of each dataset; None takes the best of the models in the table.

    Returns:
        For every model the capabilities' scores and, last, "average".

    Raises:
        ValueError: one model is compared with no maxima, no capability or one without datasets is
            given, a score or a maximum is missing or no number, or a best score is not positive.
    """
    if maxima is None and len(table) < 2:
        raise ValueError(
            f"maxima must be given unless two or more models are compared, got {len(table)}"
        )
    if not capabilities or not all(capabilities.values()):
        raise ValueError("capabilities must each name at least one dataset")
    best: dict[str, float] = {}
    for dataset in dict.fromkeys(name for names in capabilities.values() for name in names):
        for model, row in table.items():
            if dataset not in row:
                raise ValueError(f"table must have every dataset, got no {dataset} of {model}")
            if not math.isfinite(row[dataset]):
                raise ValueError(f"{dataset} of {model} must be finite, got {row[dataset]}")
        if maxima is not None and dataset not in maxima:
            raise ValueError(f"maxima must have every dataset, got no {dataset}")
        reference = (row[dataset] for row in table.values())
        best[dataset] = max(reference) if maxima is None else maxima[dataset]
        if not best[dataset] > 0:
            raise ValueError(f"best score of {dataset} must be positive, got {best[dataset]}")
    result: dict[str, Scores] = {}
    for model, row in table.items():
        scores = {
            capability: math.fsum(row[name] / best[name] for name in names) / len(names)
            for capability, names in capabilities.items()
        }
        result[model] = scores | {AVERAGE: math.fsum(scores.values()) / len(scores)}
    return result


def write(
    path: str | Path, items: Sequence[Item], predictions: Sequence[str], *, model_name: str
) -> None:
    """Write a run as the hub does: a list of {"question", "answer", "gt_answers", "image_path",
    "model_name"}.

    Raises:
        ValueError: there are no items, or not as many predictions.
    """
    rows = [
        {
            "question": item["question"],
            "answer": text,
            "gt_answers": item["answers"] if len(item["answers"]) > 1 else item["answers"][0],
            "image_path": item["image"],
            "model_name": model_name,
        }
        for item, text in pairs(items, predictions)
    ]
    write_json(path, rows)
