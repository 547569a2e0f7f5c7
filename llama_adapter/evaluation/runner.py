"""How a benchmark is run: items in, predictions as JSON lines, scores as JSON, resumable.

A benchmark is a list of items, a function that predicts a batch of them and a function that scores
one prediction. A run that was killed goes on where it stopped; a folder that holds another run is
refused, and the error names what differs.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_adapter.checkpoints.atomic import write_atomically

RUN_FILE = "run.json"
PREDICTIONS_FILE = "predictions.jsonl"
SCORES_FILE = "scores.json"
FORMAT = 1

Item = Mapping[str, Any]
Scores = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one run.

    Attributes:
        scores: the aggregate, by name.
        item_scores: every item's own scores, in the order of the items.
        predictions: every item's prediction, in the order of the items.
    """

    scores: Scores
    item_scores: list[Scores]
    predictions: list[Any]


def mean_scores(item_scores: Sequence[Mapping[str, float]]) -> Scores:
    """Mean of every score over the items that have it: (1 / n) sum_i score_i.

    Args:
        item_scores: one mapping per item; a score that only some items have (a category's) is
            averaged over those.

    Returns:
        Mean by name, in order of first appearance.
    """
    values: dict[str, list[float]] = {}
    for scores in item_scores:
        for name, value in scores.items():
            values.setdefault(name, []).append(value)
    return {name: math.fsum(row) / len(row) for name, row in values.items()}


def evaluate(
    items: Iterable[Item],
    predict: Callable[[list[Item]], Sequence[Any]],
    score: Callable[[Item, Any], Mapping[str, float]],
    folder: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    batch_key: Callable[[Item], Any] | None = None,
    aggregate: Callable[[list[Scores]], Mapping[str, float]] = mean_scores,
    corpus: Callable[[list[Item], list[Any]], Mapping[str, float]] | None = None,
    progress: str | None = None,
    opened: Callable[[], None] | None = None,
) -> Evaluation:
    """Predict and score every item.

    The folder receives run.json (the settings and a hash of every item), predictions.jsonl (one
    line {"id", "prediction"} per item, written out after every batch) and, at the end, scores.json.
    Items that have a prediction there are not predicted again; a torn last line is dropped.

    Args:
        items: mappings of JSON values, each with a string "id" that no other item has.
        predict: predictions of a batch of items, JSON values, in the batch's order.
        score: finite numbers by name for one item and its prediction as JSON keeps it.
        folder: where the run is kept, created if absent; None keeps nothing.
        settings: whatever the predictions depend on besides the items, as JSON values: the model,
            the adapter, the sampling.
        batch_size: items per call of `predict`.
        batch_key: items are batched in ascending order of it, lengths for instance; None keeps
            the order of the items.
        aggregate: scores of the whole from the items' scores, in the order of the items.
        corpus: the same from the items and their predictions, for what is no function of the items'
            scores; used in place of `aggregate`.
        progress: caption of a progress bar on stderr; None shows none.
        opened: called once the folder is this run's, before anything is predicted.

    Returns:
        The scores and predictions, the same whether the run was interrupted or not.

    Raises:
        ValueError: there are no items, an id is missing or repeated, a value is no JSON value, the
            folder holds a run of other items or settings, or predict or score returns what it
            must not.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    listed = list(items)
    run = _Run(listed, dict(settings or {}), None if folder is None else Path(folder))
    done = run.open()
    if opened is not None:
        opened()
    pending = [item for item in listed if item["id"] not in done]
    if batch_key is not None:
        pending.sort(key=batch_key)
    with tqdm(
        total=len(listed), initial=len(done), desc=progress, unit="item", disable=progress is None
    ) as bar:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            done.update(run.append(batch, predict(batch)))
            bar.update(len(batch))
    predictions = [done[item["id"]] for item in listed]
    item_scores = [
        _checked_scores(score(item, prediction), f"score of item {item['id']!r}")
        for item, prediction in zip(listed, predictions, strict=True)
    ]
    whole = aggregate(item_scores) if corpus is None else corpus(listed, predictions)
    scores = _checked_scores(whole, "aggregate")
    run.finish(scores, item_scores)
    return Evaluation(scores, item_scores, predictions)


class _Run:
    """One set of items and settings, and the folder that keeps its predictions, if any."""

    def __init__(self, items: list[Item], settings: dict[str, Any], folder: Path | None) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        for position, item in enumerate(items):
            name = item.get("id")
            if not isinstance(name, str):
                raise ValueError(f"item {position} must have a string as id, got {name!r}")
            if name in self.digests:
                raise ValueError(f"item ids must differ, got {name!r} more than once")
            text = _as_json(dict(item), f"item {name!r}", sort_keys=True)
            self.digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not items:
            raise ValueError("items must hold at least one item, got none")
        self.settings = json.loads(_as_json(settings, "settings"))

    def open(self) -> dict[str, Any]:
        """Take the folder for this run, and read the predictions that it holds already."""
        if self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        run_file, predictions_file = self.folder / RUN_FILE, self.folder / PREDICTIONS_FILE
        if run_file.exists():
            self._refuse_another(run_file)
        elif predictions_file.exists():
            raise ValueError(f"{self.folder} holds {PREDICTIONS_FILE} but no {RUN_FILE}")
        else:
            run = {"format": FORMAT, "settings": self.settings, "items": self.digests}
            _write_json(run_file, run)
        return self._read(predictions_file) if predictions_file.exists() else {}

    def _refuse_another(self, path: Path) -> None:
        """Raise unless the file describes the same items and settings."""
        try:
            there = json.loads(path.read_bytes())
            version, settings, digests = there["format"], there["settings"], there["items"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged: it describes no evaluation run") from None
        if version != FORMAT:
            raise ValueError(f"{path} has format {version}, this version reads {FORMAT}")
        differences = [
            f"{name} is {_shown(settings, name)} there and {_shown(self.settings, name)} now"
            for name in dict.fromkeys([*settings, *self.settings])
            if _shown(settings, name) != _shown(self.settings, name)
        ]
        both = [name for name in digests if name in self.digests]
        for names, what in (
            ([name for name in both if digests[name] != self.digests[name]], "changed"),
            ([name for name in digests if name not in self.digests], "missing now"),
            ([name for name in self.digests if name not in digests], "new"),
        ):
            if names:
                differences.append(f"items {what}: {len(names)}, the first is {names[0]!r}")
        if differences:
            raise ValueError(
                f"{path.parent} holds another evaluation run: {'; '.join(differences)} "
                "(choose another folder)"
            )

    def _read(self, path: Path) -> dict[str, Any]:
        """Predictions by id; a last line that a kill has torn is cut off the file."""
        lines = path.read_bytes().splitlines(keepends=True)
        done: dict[str, Any] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if isinstance(row, dict) and row.get("id") in self.digests and "prediction" in row:
                done[row["id"]] = row["prediction"]
            elif number == len(lines):
                os.truncate(path, sum(map(len, lines[:-1])))
            else:
                raise ValueError(f"{path} line {number} is no prediction of this run's items")
        return done

    def append(self, batch: list[Item], predictions: Sequence[Any]) -> dict[str, Any]:
        """Keep a batch's predictions; returns them by id, as a reader of the file gets them."""
        if len(predictions) != len(batch):
            raise ValueError(
                f"predict must return {len(batch)} predictions, got {len(predictions)}"
            )
        lines = []
        for item, prediction in zip(batch, predictions, strict=True):
            row = {"id": item["id"], "prediction": prediction}
            lines.append(_as_json(row, f"prediction of item {item['id']!r}") + "\n")
        if self.folder is not None:
            with open(self.folder / PREDICTIONS_FILE, "ab") as file:
                file.write("".join(lines).encode())
        rows = map(json.loads, lines)
        return {row["id"]: row["prediction"] for row in rows}

    def finish(self, scores: Scores, item_scores: list[Scores]) -> None:
        """Write the scores."""
        if self.folder is not None:
            by_id = dict(zip(self.digests, item_scores, strict=True))
            content = {"scores": scores, "settings": self.settings, "items": by_id}
            _write_json(self.folder / SCORES_FILE, content)


def _as_json(value: Any, name: str, *, sort_keys: bool = False) -> str:
    """One line of JSON; readable in any script, and nothing that JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold JSON values only: {error}") from None
    return text


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    write_atomically(path, f"{text}\n".encode())


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], sort_keys=True) if name in settings else "absent"


def _checked_scores(scores: Mapping[str, float], name: str) -> Scores:
    """The scores as plain floats."""
    for key, value in scores.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must hold finite numbers, got {key} = {value!r}")
    return {key: float(value) for key, value in scores.items()}
