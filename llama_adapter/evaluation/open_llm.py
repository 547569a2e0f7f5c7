"""The Open LLM benchmark's four tasks from their own files (supplement, section E.4).

Below one folder lie arc/ARC-Challenge-{Train,Test}.jsonl, hellaswag/hellaswag_{train,val}.jsonl,
mmlu/{dev,test}/SUBJECT_{dev,test}.csv and truthfulqa/mc_task.json. Each becomes documents as
lm-evaluation-harness wants them, whose own tasks make the prompts and the scores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    ID,
    LIST,
    OBJECT,
    STRING,
    TEXT,
    FileProblem,
    against,
    json_entries,
    line_entries,
    read_json,
    usable,
)
from llama_adapter.evaluation.runner import Scores, mean_scores
from llama_adapter.evaluation.source_files import table_rows

ARC, HELLASWAG, MMLU, TRUTHFULQA = "arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"
# how many examples precede a question, and the score that counts: the leaderboard's of 2023
SHOTS = {ARC: 25, HELLASWAG: 10, MMLU: 5, TRUTHFULQA: 0}
METRICS = {ARC: "acc_norm", HELLASWAG: "acc_norm", MMLU: "acc", TRUTHFULQA: "acc"}
AVERAGE = "average"
SUBJECTS = 57
LETTERS = "ABCD"
_COLUMNS = ("question", *LETTERS, "answer")

Doc = dict[str, Any]
Reader = Callable[[Path, list[FileProblem]], dict[str, Doc]]


@dataclass(frozen=True)
class Documents:
    """What one of lm-evaluation-harness' tasks is given.

    Attributes:
        task: its name there.
        part: which of the four it is, or is a subject of.
        shots: examples that precede every question.
        examples: what these are taken from; none where there are no shots.
        questions: what is asked, by id.
    """

    task: str
    part: str
    shots: int
    examples: Sequence[Doc]
    questions: dict[str, Doc]


def read_documents(folder: str | Path) -> tuple[list[Documents], list[FileProblem]]:
    """The documents of every task whose files lie in a folder.

    Returns:
        Documents by task, MMLU's subjects in alphabetical order, and what cannot be used: entries
        by file and place, and tasks without files.

    Raises:
        FileNotFoundError: one of two files of a task is missing.
        ValueError: a file is not what it should be, holds too few examples, or no task is there.
    """
    root, problems = Path(folder), list[FileProblem]()
    found: list[Documents] = []
    for part, (place, names, reader) in _FILES.items():
        if not (root / place).is_dir():
            reason = f"{place}: no such folder, {part} is not asked"
            problems.append(FileProblem(len(SHOTS), reason, str(root), "task"))
        else:
            own = [_read(root / place / name, reader, problems) for name in names]
            examples = [*own[0].values()] if len(own) > 1 else []
            found.append(_documents(part, part, examples, own[-1], root / place / names[0]))
    found += _mmlu(root, problems)
    if not found:
        raise ValueError(
            f"{root}: must hold one of {', '.join(_PLACES)}, got none of these folders"
        )
    return found, problems


def _read(path: Path, reader: Reader, problems: list[FileProblem]) -> dict[str, Doc]:
    own: list[FileProblem] = []
    found = reader(path, own)
    usable(found, own, path)
    problems += own
    return found


def _documents(
    task: str, part: str, examples: list[Doc], questions: dict[str, Doc], path: Path
) -> Documents:
    shots = SHOTS[part]
    if len(examples) < shots:
        raise ValueError(f"{path}: must hold at least {shots} examples, got {len(examples)}")
    return Documents(task, part, shots, examples, questions)


def _mmlu(root: Path, problems: list[FileProblem]) -> list[Documents]:
    """A task for every subject that has files."""
    place = root / "mmlu"
    tests = sorted((place / "test").glob("*_test.csv")) if place.is_dir() else []
    found = []
    for path in tests:
        subject = path.name.removesuffix("_test.csv")
        dev = place / "dev" / f"{subject}_dev.csv"
        examples = [*_read(dev, _questions, problems).values()]
        questions = _read(path, _questions, problems)
        for doc in (*examples, *questions.values()):
            doc["subject"] = subject
        found.append(_documents(f"mmlu_{subject}", MMLU, examples, questions, dev))
    if len(found) < SUBJECTS:
        reason = f"{place / 'test'}: must have {SUBJECTS} subjects, got {len(found)}"
        problems.append(FileProblem(len(SHOTS), reason, str(root), "task"))
    return found


def _arc(path: Path, problems: list[FileProblem]) -> dict[str, Doc]:
    """ARC's own lines, or those of its data set at Hugging Face."""
    entries, found = line_entries(path, problems), dict[str, Doc]()
    for number, entry in entries.having({"id": ID, "answerKey": TEXT}):
        own = isinstance(entry.get("question"), dict)
        content = entry["question"] if own else entry
        stem = "stem" if own else "question"
        reason = against(content, {stem: TEXT, "choices": LIST if own else OBJECT})
        choices = None if reason else _choices(content["choices"])
        if choices is None:
            entries.refuse(number, reason or "choices must be texts with labels")
        elif entry["answerKey"] not in choices["label"]:
            labels = ", ".join(choices["label"])
            entries.refuse(number, f"answerKey must be one of {labels}, got {entry['answerKey']!r}")
        elif str(entry["id"]) in found:
            entries.refuse(number, f"id {entry['id']!r} is in the file already")
        else:
            found[str(entry["id"])] = {
                "id": str(entry["id"]),
                "question": content[stem],
                "choices": choices,
                "answerKey": entry["answerKey"],
            }
    return found


def _choices(given: Any) -> dict[str, list[str]] | None:
    """Texts and labels of a list of choices, or of an object with both; None where they are not."""
    if isinstance(given, list):
        if any(against(one, {"text": TEXT, "label": TEXT}) for one in given):
            return None
        given = {key: [one[key] for one in given] for key in ("text", "label")}
    if against(given, {"text": LIST, "label": LIST}):
        return None
    texts, labels = given["text"], given["label"]
    fine = len(texts) == len(labels) > 1 and all(_is_text(one) for one in (*texts, *labels))
    return {"text": texts, "label": labels} if fine else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _hellaswag(path: Path, problems: list[FileProblem]) -> dict[str, Doc]:
    entries, found = line_entries(path, problems), dict[str, Doc]()
    wanted = {"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": STRING, "endings": LIST}
    for number, entry in entries.having(wanted):
        endings, label = entry["endings"], entry.get("label")
        if len(endings) != len(LETTERS) or not all(_is_text(one) for one in endings):
            entries.refuse(number, f"endings must be {len(LETTERS)} texts, got {endings!r:.80}")
        elif isinstance(label, bool) or str(label) not in ("0", "1", "2", "3"):
            # the test split has none
            entries.refuse(number, f"label must be from 0 to 3, got {label!r}")
        else:
            found[str(number)] = {**{key: entry[key] for key in wanted}, "label": str(label)}
    return found


def _truthfulqa(path: Path, problems: list[FileProblem]) -> dict[str, Doc]:
    entries, found = json_entries(path, read_json(path), None, problems), dict[str, Doc]()
    names = ("mc1_targets", "mc2_targets")
    for number, entry in entries.having({"question": TEXT, **dict.fromkeys(names, OBJECT)}):
        targets = {name: _targets(entry[name]) for name in names}
        bad = [name for name, one in targets.items() if one is None]
        if bad:
            reason = f"{bad[0]} must be choices with 0 or 1, at least one of them 1"
            entries.refuse(number, reason)
        else:
            found[str(number)] = {"question": entry["question"], **targets}
    return found


def _targets(given: Any) -> dict[str, list[Any]] | None:
    """Choices and whether each is true, of {choice: 0 or 1} or of {choices, labels}."""
    if set(given) == {"choices", "labels"} and isinstance(given["choices"], list):
        choices, labels = given["choices"], given["labels"]
    else:
        choices, labels = [*given], [*given.values()]
    fine = isinstance(labels, list) and len(labels) == len(choices)
    fine = fine and all(_is_text(one) for one in choices)
    known = fine and all(one in (0, 1) and not isinstance(one, bool) for one in labels)
    return {"choices": choices, "labels": labels} if known and 1 in labels else None


def _questions(path: Path, problems: list[FileProblem]) -> dict[str, Doc]:
    """MMLU's rows: question, four choices and a letter."""
    found: dict[str, Doc] = {}
    for line, row in table_rows(path, _COLUMNS, problems, header=_COLUMNS):
        empty = [name for name in _COLUMNS[:-1] if not row[name].strip()]
        answer = row["answer"].strip()
        if empty or len(answer) != 1 or answer not in LETTERS:
            reason = f"answer must be one of {', '.join(LETTERS)}, got {row['answer']!r}"
            reason = f"{empty[0]} is empty" if empty else reason
            problems.append(FileProblem(line, reason, str(path), "line"))
        else:
            choices = [row[letter] for letter in LETTERS]
            number = LETTERS.index(answer)
            found[str(line)] = {"question": row["question"], "choices": choices, "answer": number}
    return found


# where each task lies: its folder there, the file of examples and that of questions
_FILES: dict[str, tuple[str, tuple[str, ...], Reader]] = {
    ARC: ("arc", ("ARC-Challenge-Train.jsonl", "ARC-Challenge-Test.jsonl"), _arc),
    HELLASWAG: ("hellaswag", ("hellaswag_train.jsonl", "hellaswag_val.jsonl"), _hellaswag),
    TRUTHFULQA: ("truthfulqa", ("mc_task.json",), _truthfulqa),
}
_PLACES = ("arc", "hellaswag", "mmlu", "truthfulqa")


def aggregate(rows: Sequence[Scores]) -> Scores:
    """Scores in per cent from those of the items, which are named task/metric.

    Of MMLU it is the mean of the subjects' accuracies, whatever their sizes; `average` is the mean
    of the four tasks, where all are there.
    """
    means = mean_scores(rows)
    found: Scores = {}
    for part, metric in METRICS.items():
        names = [name for name in means if _part_of(name) == part and name.endswith(f"/{metric}")]
        if names:
            found[part] = 100 * math.fsum(means[name] for name in names) / len(names)
    if len(found) == len(METRICS):
        found[AVERAGE] = math.fsum(found.values()) / len(found)
    return found


def _part_of(name: str) -> str:
    task = name.split("/")[0]
    return MMLU if task.startswith("mmlu_") else task
