"""SQuAD 1.1 and 2.0: questions from their JSON files, answers in the files that SQuAD scores.

{"version", "data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
[{"text", "answer_start"}], "is_impossible"}]}]}]}: version 2.0 alone has is_impossible.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    INTEGER,
    LIST,
    TEXT,
    Entries,
    FileProblem,
    against,
    json_entries,
    read_json,
    usable,
    write_json,
)

PREDICTIONS_FILE = "predictions.json"
NULL_ODDS_FILE = "null_odds.json"


@dataclass(frozen=True)
class Question:
    """One question about one paragraph.

    Attributes:
        id: its name in files of predictions.
        question: what is asked.
        context: the paragraph.
        answers: texts that are right, in the file's order; none where it cannot be answered.
        starts: where in the context each begins, in characters.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


def read_squad(
    path: str | Path, *, version_2: bool | None = None
) -> tuple[list[Question], list[FileProblem]]:
    """Read a file of SQuAD.

    Args:
        path: `train-v1.1.json`, `dev-v2.0.json` or another file of their form.
        version_2: whether questions may have no answer; None: whether any says is_impossible.

    Returns:
        The usable questions in file order, and a problem for each entry that is not used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, has no list "data", or holds no usable question.
    """
    problems: list[FileProblem] = []
    entries = [*_entries(path, problems)]
    if version_2 is None:
        version_2 = any("is_impossible" in entry for _, _, entry, _ in entries)
    questions: dict[str, Question] = {}
    for within, number, entry, context in entries:
        reason = _against(entry, context, version_2)
        if reason is None and entry["id"] in questions:
            reason = f"id {entry['id']!r} occurs before"
        if reason is None:
            answers = entry["answers"]
            questions[entry["id"]] = Question(
                entry["id"],
                entry["question"],
                context,
                tuple(answer["text"] for answer in answers),
                tuple(answer["answer_start"] for answer in answers),
            )
        else:
            within.refuse(number, reason)
    return usable(questions.values(), problems, path)


def _entries(
    path: str | Path, problems: list[FileProblem]
) -> Iterator[tuple[Entries, int, dict[str, Any], str]]:
    """Every question that has its fields: where it is, the question, its context."""
    articles = json_entries(path, read_json(path), "data", problems)
    for first, article in articles.having({"paragraphs": LIST}):
        unit = f"data {first} paragraphs"
        paragraphs = Entries(path, unit, enumerate(article["paragraphs"]), problems)
        for second, paragraph in paragraphs.having({"context": TEXT, "qas": LIST}):
            unit = f"data {first} paragraphs {second} qas"
            found = Entries(path, unit, enumerate(paragraph["qas"]), problems)
            for number, entry in found.having({"id": TEXT, "question": TEXT, "answers": LIST}):
                yield found, number, entry, paragraph["context"]


def _against(entry: Mapping[str, Any], context: str, version_2: bool) -> str | None:
    """Why a question with these answers cannot be used, or None."""
    for place, answer in enumerate(entry["answers"]):
        reason = against(answer, {"text": TEXT, "answer_start": INTEGER})
        if reason is not None:
            return f"answers {place}: {reason}"
        start, text = answer["answer_start"], answer["text"]
        if start < 0 or context[start : start + len(text)] != text:
            return f"answers {place}: {text!r} is not at character {start} of the context"
    if not version_2:
        return None if entry["answers"] else "answers is empty, which version 2.0 alone allows"
    impossible = entry.get("is_impossible", False)
    if not isinstance(impossible, bool):
        return f"is_impossible must be a boolean, got {impossible!r}"
    if impossible == bool(entry["answers"]):
        wanted = "empty where is_impossible is true" if impossible else "there, or is_impossible"
        return f"answers must be {wanted}, got {len(entry['answers'])}"
    return None


def write_answers(
    folder: str | Path, questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]
) -> None:
    """Write predictions as SQuAD's own scorers read them, into a folder that exists.

    Args:
        folder: where PREDICTIONS_FILE goes, {id: text}, and, where every answer has one,
            NULL_ODDS_FILE, {id: odds of no answer}.
        questions: what was asked.
        answers: for each its "text" and, for version 2.0, its "null_odds".
    """
    pairs = [*zip(questions, answers, strict=True)]
    texts = {question.id: answer["text"] for question, answer in pairs}
    write_json(Path(folder) / PREDICTIONS_FILE, texts)
    if all("null_odds" in answer for answer in answers):
        odds = {question.id: answer["null_odds"] for question, answer in pairs}
        write_json(Path(folder) / NULL_ODDS_FILE, odds)
