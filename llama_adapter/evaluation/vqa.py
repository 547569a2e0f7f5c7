"""Questions about pictures with short answers: VQAv2, OK-VQA, TextVQA, VizWiz and GQA.

The files are each benchmark's own. All but GQA have about ten people's answers a question and are
scored by VQA accuracy; GQA has one, compared after the same normalisation. VQA's own scorer, which
VQAv2 and OK-VQA use, compares as they are an answer and people's that are all the same; the scorers
of TextVQA normalise always.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    ID,
    INTEGER,
    LIST,
    TEXT,
    Entries,
    FileProblem,
    json_entries,
    pairs,
    read_json,
    usable,
    write_json,
)
from llama_adapter.data.items import kind_of
from llama_adapter.evaluation.runner import Item, Scores
from llama_adapter.evaluation.vqa_answer import accuracy, normalise

BENCHMARKS = ("vqav2", "okvqa", "textvqa", "vizwiz", "gqa")
_BY_VQAS_SCORER = ("vqav2", "okvqa")


def load(
    benchmark: str,
    questions: str | Path,
    images: str | Path,
    annotations: str | Path | None = None,
    *,
    image_name: str = "COCO_val2014_{:012d}.jpg",
) -> tuple[list[Item], list[FileProblem]]:
    """Read the questions of one split.

    Args:
        benchmark: one of `BENCHMARKS`.
        questions: vqav2, okvqa: {"questions": [{"image_id", "question", "question_id"}]}; textvqa:
            {"data": [{"question_id", "image_id", "question", "answers"?}]}; vizwiz: [{"image",
            "question", "answers"?: [{"answer"}]}]; gqa: {id: {"imageId", "question", "answer"?}}.
        images: folder of the pictures. That they are there is not checked.
        annotations: of vqav2 and okvqa: {"annotations": [{"question_id", "answers": [{"answer"}]}]}
            of the same split; None: nothing can be scored (a test split). The others have none.
        image_name: how vqav2 and okvqa name a picture by its image_id.

    Returns:
        Items with id, benchmark, question, image (a path), answers (people's, [] where none are
        known) and answer_type (if the file tells), in the file's order, and one problem for every
        entry that cannot be used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: benchmark is none of them, annotations are given to one that has none, a file is
            not JSON or of another form, or nothing in it can be used.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {benchmark!r}")
    if annotations is not None and benchmark not in ("vqav2", "okvqa"):
        raise ValueError(f"{benchmark} has its answers with its questions, got {annotations} too")
    problems: list[FileProblem] = []
    folder, content = Path(images), read_json(questions)
    if benchmark in ("vqav2", "okvqa"):
        entries = json_entries(questions, content, "questions", problems)
        items = _vqav2(entries, folder, image_name)
        if annotations is not None:
            items = _annotate(items, entries, annotations, problems)
    elif benchmark == "textvqa":
        items = _textvqa(json_entries(questions, content, "data", problems), folder)
    elif benchmark == "vizwiz":
        items = _vizwiz(json_entries(questions, content, None, problems), folder)
    else:
        items = _gqa(questions, content, folder, problems)
    for item in items.values():
        item.pop("_at")
    rows = [{"benchmark": benchmark, **item} for item in items.values()]
    return usable(rows, problems, questions)


Items = dict[str, dict[str, Any]]


def _collect(
    entries: Entries,
    fields: dict[str, str],
    name: str,
    item_of: Callable[[dict[str, Any]], dict[str, Any] | str],
) -> Items:
    """Items by the field that names them; `item_of` gives an item or the reason against it."""
    items: Items = {}
    for number, entry in entries.having(fields):
        found = item_of(entry)
        if str(entry[name]) in items:
            found = f"{name} {entry[name]} occurs before"
        if isinstance(found, str):
            entries.refuse(number, found)
        else:
            # where it stands, until the annotations have been read
            items[str(entry[name])] = {"id": str(entry[name]), **found, "_at": number}
    return items


def _vqav2(entries: Entries, folder: Path, image_name: str) -> Items:
    fields = {"question_id": ID, "image_id": INTEGER, "question": TEXT}

    def item_of(entry: dict[str, Any]) -> dict[str, Any]:
        image = folder / image_name.format(entry["image_id"])
        return {"question": entry["question"], "image": str(image), "answers": []}

    return _collect(entries, fields, "question_id", item_of)


def _annotate(
    items: Items, questions: Entries, path: str | Path, problems: list[FileProblem]
) -> Items:
    """The items that an annotation answers, with its answers."""
    answered: Items = {}
    annotations = json_entries(path, read_json(path), "annotations", problems)
    for number, entry in annotations.having({"question_id": ID, "answers": LIST}):
        name, answers = str(entry["question_id"]), _answers(entry["answers"])
        if name not in items:
            reason = f"question_id {name} is none of the questions"
        elif name in answered:
            reason = f"question_id {name} occurs before"
        elif isinstance(answers, str):
            reason = answers
        else:
            answered[name] = {**items[name], "answers": answers, **_type(entry)}
            continue
        annotations.refuse(number, reason)
    for name, item in items.items():
        if name not in answered:
            questions.refuse(item["_at"], f"no usable annotation is of question_id {name}")
    return {name: answered[name] for name in items if name in answered}


def _answers(found: Any) -> list[str] | str:
    """People's answers, of a list of strings or of objects with "answer"; or why they are none."""
    if not isinstance(found, list):
        return f"answers must be a list, got {kind_of(found)}"
    if not found:
        return "answers is empty"
    answers = []
    for position, answer in enumerate(found):
        text = answer.get("answer") if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            return f"answers {position} must be or hold a string, got {kind_of(text)}"
        answers.append(text)
    return answers


def _type(entry: dict[str, Any]) -> dict[str, str]:
    kind = entry.get("answer_type")
    return {"answer_type": kind} if isinstance(kind, str) else {}


def _textvqa(entries: Entries, folder: Path) -> Items:
    def item_of(entry: dict[str, Any]) -> dict[str, Any] | str:
        answers = _answers(entry["answers"]) if "answers" in entry else []
        if isinstance(answers, str):
            return answers
        image = folder / f"{entry['image_id']}.jpg"
        return {"question": entry["question"], "image": str(image), "answers": answers}

    fields = {"question_id": ID, "image_id": ID, "question": TEXT}
    return _collect(entries, fields, "question_id", item_of)


def _vizwiz(entries: Entries, folder: Path) -> Items:
    def item_of(entry: dict[str, Any]) -> dict[str, Any] | str:
        answers = _answers(entry["answers"]) if "answers" in entry else []
        if isinstance(answers, str):
            return answers
        image = str(folder / entry["image"])
        return {"question": entry["question"], "image": image, "answers": answers, **_type(entry)}

    return _collect(entries, {"image": TEXT, "question": TEXT}, "image", item_of)


def _gqa(path: str | Path, content: Any, folder: Path, problems: list[FileProblem]) -> Items:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object of questions by id, got {kind_of(content)}")
    named = (
        {**entry, "id": name} if isinstance(entry, dict) else entry
        for name, entry in content.items()
    )

    def item_of(entry: dict[str, Any]) -> dict[str, Any] | str:
        answer = entry.get("answer")
        if answer is not None and not isinstance(answer, str):
            return f"answer must be a string, got {kind_of(answer)}"
        image = str(folder / f"{entry['imageId']}.jpg")
        answers = [] if answer is None else [answer]
        return {"question": entry["question"], "image": image, "answers": answers}

    entries = Entries(path, "question", enumerate(named), problems)
    return _collect(entries, {"imageId": ID, "question": TEXT, "id": ID}, "id", item_of)


def score(item: Item, prediction: str) -> Scores:
    """VQA accuracy of one answer, or for GQA whether it is the answer; by answer type too.

    Args:
        item: of `load`.
        prediction: the answer given.

    Returns:
        {"accuracy": 0 to 1}, and the same as "accuracy/<answer_type>" where the item has one;
        nothing where no answers are known. `runner.mean_scores` aggregates.
    """
    if not item["answers"]:
        return {}
    if item["benchmark"] == "gqa":
        value = float(normalise(prediction) == normalise(item["answers"][0]))
    else:
        as_is = item["benchmark"] in _BY_VQAS_SCORER
        value = accuracy(prediction, item["answers"], unanimous_as_is=as_is)
    kind = item.get("answer_type")
    return {"accuracy": value} | ({f"accuracy/{kind}": value} if kind else {})


def write(path: str | Path, items: Sequence[Item], predictions: Sequence[str]) -> None:
    """Write results as the benchmark's server takes them.

    VQAv2, OK-VQA, TextVQA: [{"question_id", "answer"}]; VizWiz: [{"image", "answer"}]; GQA:
    [{"questionId", "prediction"}]. An id that is a number in decimal is written as one, but GQA's.

    Raises:
        ValueError: there are no items, or not as many predictions.
    """
    rows = []
    for item, text in pairs(items, predictions):
        name = item["id"]
        if item["benchmark"] == "gqa":
            rows.append({"questionId": name, "prediction": text})
        elif item["benchmark"] == "vizwiz":
            rows.append({"image": name, "answer": text})
        else:
            number = int(name) if name.isascii() and name.isdecimal() else name
            rows.append({"question_id": number, "answer": text})
    write_json(path, rows)
