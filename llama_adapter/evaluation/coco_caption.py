"""COCO Caption: one sentence per picture, scored by BLEU and CIDEr against those people wrote.

Karpathy's file and COCO's own annotation file are read; results are written as the server of COCO
takes them. BLEU and CIDEr are pycocoevalcap's. Its tokenizer is a Java program: where that cannot
run an approximation in Python takes its place, and the scores say so. Tables print scores x 100.
"""

import importlib
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    ID,
    INTEGER,
    LIST,
    STRING,
    TEXT,
    Entries,
    FileProblem,
    against,
    json_entries,
    pairs,
    read_json,
    usable,
    write_json,
)
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.multimodal.experts import CAPTION_INSTRUCTION

# what the Java tokenizer's caller drops; it drops brackets in capitals, which never occur
DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}|[a-z]+(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b|can(?=not\b)|"
    r"\d+(?:[.,:]\d+)*|\w+(?:[-/&]\w+)*|\.\.\.|--|\S"
)


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        scores: bleu_1 to bleu_4 (0 to 1) and cider (0 to 10) of the whole, and ptb_tokens, which
            is 1 where the tokens were the Java tokenizer's and 0 where they were approximated.
        image_scores: each image's cider.
        tokenizer: which tokenizer it was, in words.
    """

    scores: Scores
    image_scores: list[Scores]
    tokenizer: str


def is_one_split(path: str | Path) -> bool:
    """Whether a file is COCO's own, of one split, and not Karpathy's; errors as `load`."""
    content = read_json(path)
    return isinstance(content, dict) and "annotations" in content


def load(
    path: str | Path, images: str | Path, split: str | None = None
) -> tuple[list[Item], list[FileProblem]]:
    """Read the images of one split with their captions.

    Args:
        path: Karpathy's dataset_coco.json, or a COCO annotation file (captions_val2014.json).
        images: folder of the pictures: of train2014 and val2014 for Karpathy's file, of the
            pictures themselves for COCO's. That they are there is not checked.
        split: of Karpathy's file: train, restval, val, test, or several joined by "+" (training
            is on "train+restval"); None is test. COCO's file is one split: None.

    Returns:
        Items with id (COCO's image id), question, image (a path) and references (captions), in the
        file's order, and one problem for every entry that cannot be used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON or neither of the two, has no such split or nothing usable.
    """
    content = read_json(path)
    problems: list[FileProblem] = []
    if isinstance(content, dict) and "annotations" in content:
        if split is not None:
            raise ValueError(f"{path} is one split of its own: split must be None, got {split!r}")
        return usable(_annotated(path, content, Path(images), problems), problems, path)
    entries = json_entries(path, content, "images", problems)
    return usable(_karpathy(entries, Path(images), split or "test"), problems, path)


def _item(number: int, image: Path, references: list[str]) -> dict[str, Any]:
    return {
        "id": str(number),
        "question": CAPTION_INSTRUCTION,
        "image": str(image),
        "references": references,
    }


def _karpathy(entries: Entries, folder: Path, split: str) -> list[dict[str, Any]]:
    wanted, there, items = set(split.split("+")), set(), {}
    fields = {"split": TEXT, "cocoid": INTEGER, "filename": TEXT, "sentences": LIST}
    for number, entry in entries.having(fields):
        there.add(entry["split"])
        if entry["split"] not in wanted:
            continue
        raw = {"raw": TEXT}
        reasons = [against(sentence, raw) for sentence in entry["sentences"]]
        reason = next((f"sentence {i}: {why}" for i, why in enumerate(reasons) if why), None)
        if not reasons:
            reason = "sentences is empty"
        elif entry["cocoid"] in items:
            reason = f"cocoid {entry['cocoid']} occurs before"
        elif "filepath" in entry:
            reason = reason or against(entry, {"filepath": STRING})
        if reason is not None:
            entries.refuse(number, reason)
            continue
        image = folder / entry.get("filepath", "") / entry["filename"]
        references = [sentence["raw"] for sentence in entry["sentences"]]
        items[entry["cocoid"]] = _item(entry["cocoid"], image, references)
    if there and not wanted <= there:
        raise ValueError(
            f"{entries.path}: split must be of {', '.join(sorted(there))}, got {split!r}"
        )
    return list(items.values())


def _annotated(
    path: str | Path, content: dict[str, Any], folder: Path, problems: list[FileProblem]
) -> list[dict[str, Any]]:
    files: dict[Any, str] = {}
    order: dict[Any, int] = {}
    images = json_entries(path, content, "images", problems)
    for number, entry in images.having({"id": INTEGER, "file_name": TEXT}):
        if entry["id"] in files:
            images.refuse(number, f"id {entry['id']} occurs before")
        else:
            files[entry["id"]], order[entry["id"]] = entry["file_name"], number
    captions: dict[Any, list[str]] = {}
    annotations = json_entries(path, content, "annotations", problems)
    for number, entry in annotations.having({"image_id": ID, "caption": TEXT}):
        if entry["image_id"] in files:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        else:
            annotations.refuse(number, f"image_id {entry['image_id']!r} is none of the images")
    for name, number in order.items():
        if name not in captions:
            images.refuse(number, f"no annotation is of id {name}")
    return [_item(i, folder / files[i], captions[i]) for i in order if i in captions]


def score(item: Item, prediction: str) -> Scores:
    """What one caption is scored by alone: its words. BLEU and CIDEr are a whole set's."""
    return {"words": float(len(prediction.split()))}


def aggregate(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """BLEU and CIDEr of a set of captions; prints to stderr which tokenizer was used.

    Arguments and errors as `caption_scores`, whose `scores` these are.
    """
    found = caption_scores(items, predictions)
    print(f"BLEU and CIDEr on tokens of {found.tokenizer}", file=sys.stderr)
    return found.scores


def caption_scores(items: Sequence[Item], predictions: Sequence[str]) -> CaptionScores:
    """BLEU and CIDEr of a set of captions.

    bleu_n = min(1, exp(1 - r / c)) (prod_{k<=n} p_k)^(1/n), clipped precisions p_k over the set,
    c the captions' length, r that of the closest references; CIDEr (D) = 10 times the mean over
    n = 1..4 and references of the clipped cosine of tf-idf vectors of n-grams, times
    exp(-(difference of lengths)^2 / 72). Document frequencies are the items' own, so one item's
    CIDEr is always 0.

    Args:
        items: of `load`, the whole split.
        predictions: a caption for each.

    Returns:
        The scores, by image too, and the tokenizer's name.

    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed.
        ValueError: there are no items, or not as many predictions.
    """
    rows = pairs(items, predictions)
    bleu = _library("bleu.bleu").Bleu(4)
    cider = _library("cider.cider").Cider()
    texts = {row: [prediction] for row, (_, prediction) in enumerate(rows)}
    golds = {row: list(item["references"]) for row, (item, _) in enumerate(rows)}
    exact = java_tokenizer_runs()
    tokenize = _tokens_of_java if exact else _tokens_approximated
    results, references = tokenize(texts), tokenize(golds)
    bleus, _ = bleu.compute_score(references, results, verbose=0)
    whole, per_image = cider.compute_score(references, results)
    scores = {f"bleu_{n}": float(value) for n, value in enumerate(bleus, 1)}
    scores |= {"cider": float(whole), "ptb_tokens": float(exact)}
    name = "PTBTokenizer (Java)" if exact else "an approximation of PTBTokenizer (no Java)"
    return CaptionScores(scores, [{"cider": float(value)} for value in per_image], name)


def java_tokenizer_runs() -> bool:
    """Whether there is a Java, and a folder that pycocoevalcap may put its temporary file in."""
    folder = Path(_library("tokenizer.ptbtokenizer").__file__).parent
    return shutil.which("java") is not None and os.access(folder, os.W_OK)


def _library(module: str) -> Any:
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"BLEU and CIDEr need pycocoevalcap ({error}): "
            "pip install 'llama-adapter-kernels[eval]'"
        ) from None


def _one_line(text: str) -> str:
    # a caption is a line of the Java tokenizer's input, whatever ends lines there
    return " ".join(text.split())


def _tokens_of_java(captions: Mapping[int, list[str]]) -> dict[int, list[str]]:
    tokenizer = _library("tokenizer.ptbtokenizer").PTBTokenizer()
    given = {
        row: [{"caption": _one_line(text)} for text in texts] for row, texts in captions.items()
    }
    return tokenizer.tokenize(given)


def _tokens_approximated(captions: Mapping[int, list[str]]) -> dict[int, list[str]]:
    return {row: [" ".join(tokens(text)) for text in texts] for row, texts in captions.items()}


def tokens(caption: str) -> list[str]:
    """A caption's words as PTBTokenizer would give them, nearly.

    Lower case; "dog's" is two words, "can't" is "ca n't"; brackets have names; `DROPPED` are gone.
    """
    found: list[str] = _TOKEN.findall(_one_line(caption).lower().translate(_QUOTES))
    return [_BRACKETS.get(token, token) for token in found if token not in DROPPED | {'"'}]


def write(path: str | Path, items: Sequence[Item], predictions: Sequence[str]) -> None:
    """Write results as COCO's server takes them: [{"image_id": int, "caption": str}].

    Raises:
        ValueError: there are no items, or not as many predictions.
    """
    rows = pairs(items, predictions)
    write_json(path, [{"image_id": int(item["id"]), "caption": text} for item, text in rows])
