"""Which of two models answers better, as a judge model sees it: the 80 questions, each asked twice.

A judge is any function from a prompt to a text. It gives both answers a mark from 1 to 10; every
question is put to it in both orders, since judges favour a position: 80 questions are 160 items.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    ID,
    STRING,
    TEXT,
    FileProblem,
    line_entries,
    pairs,
    usable,
    write_lines,
)
from llama_adapter.evaluation.runner import Item, Scores

SYSTEM = "You judge how good the answers of assistants are, helpfully and precisely."
_TASKS = {
    "general": (
        "Compare how the two assistants did on the question above: how helpful, relevant, accurate "
        "and detailed each answer is."
    ),
    "coding": (
        "Compare the two programs asked for above: whether each is right and does what was asked, "
        "how readable and fast it is, and whether its explanation helps. Try them on examples in "
        "your mind first."
    ),
    "math": (
        "Solve the problem above yourself first. Then compare each answer with your solution: the "
        "result, the steps that lead to it, and whether they can be followed."
    ),
}
_FORMAT = (
    "Begin with one line that holds two numbers from 1 to 10 and a space between them and nothing "
    "else: the marks of assistant 1 and of assistant 2, higher for better. From the next line on, "
    "give your reasons; do not let the order of the answers sway you."
)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_MARKS = re.compile(rf"({_NUMBER})[\s,]+({_NUMBER})")
_WIN, _TIE, _LOSE = "win", "tie", "lose"


def prompt(question: str, category: str, first: str, second: str) -> str:
    """What the judge is asked about two answers, in the order in which it sees them.

    There are three tasks: of category "coding", of "math", and the general one of all others.
    """
    task = _TASKS.get(category, _TASKS["general"])
    return (
        f"[Question]\n{question}\n\n[Assistant 1]\n{first}\n[End of assistant 1]\n\n"
        f"[Assistant 2]\n{second}\n[End of assistant 2]\n\n[Task]\n{task}\n{_FORMAT}\n"
    )


def marks_of(review: str) -> tuple[float, float] | None:
    """The two marks on a review's first line, "8 9", "8, 9" or "(8, 9)"; None: a person must look.

    None stands for FastChat's [-1, -1].
    """
    line = review.lstrip().split("\n", 1)[0].strip()
    if line[:1] + line[-1:] in ("()", "[]"):
        line = line[1:-1].strip()
    found = _MARKS.fullmatch(line)
    return (float(found[1]), float(found[2])) if found else None


def load_questions(path: str | Path) -> tuple[list[Item], list[FileProblem]]:
    """Read question.jsonl: {"question_id", "text", "category"} per line.

    Returns:
        Items with id, question, image (None) and category, in the file's order, and one problem
        for every line that cannot be used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 or nothing in it can be used.
    """
    problems: list[FileProblem] = []
    items: dict[str, dict[str, Any]] = {}
    entries = line_entries(path, problems)
    for number, entry in entries.having({"question_id": ID, "text": TEXT, "category": TEXT}):
        name = str(entry["question_id"])
        if name in items:
            entries.refuse(number, f"question_id {name} occurs before")
            continue
        items[name] = {
            "id": name,
            "question": entry["text"],
            "image": None,
            "category": entry["category"],
        }
    return usable(list(items.values()), problems, path)


def load(
    questions: str | Path, answers: str | Path, baseline: str | Path
) -> tuple[list[Item], list[FileProblem]]:
    """Read two models' answers to the questions, as items for a judge: two of every question.

    Args:
        questions: question.jsonl.
        answers: answer.jsonl of the model: {"question_id", "answer_id", "text", "model_id"?}.
        baseline: that of the model it is compared with.

    Returns:
        Items with id ("<question_id>-1": the model comes first; "-2": it comes second),
        question_id, category, question, image (None), prompt (for the judge), swapped, and of the
        answers in the judge's order answer_ids and model_ids; then one problem for every line that
        cannot be used and every question without both answers.

    Raises:
        FileNotFoundError, ValueError: as `load_questions`, for each file.
    """
    asked, problems = load_questions(questions)
    own, other = _answers(answers, problems), _answers(baseline, problems)
    rows: list[dict[str, Any]] = []
    for position, item in enumerate(asked):
        name = item["id"]
        missing = [path for path, got in ((answers, own), (baseline, other)) if name not in got]
        if missing:
            reason = f"question_id {name} has no usable answer in {missing[0]}"
            problems.append(FileProblem(position, reason, str(questions), "question"))
            continue
        for suffix, order in (("1", (own, other)), ("2", (other, own))):
            first, second = (side[name] for side in order)
            rows.append(
                {
                    "id": f"{name}-{suffix}",
                    "question_id": name,
                    "category": item["category"],
                    "question": item["question"],
                    "image": None,
                    "prompt": prompt(
                        item["question"], item["category"], first["text"], second["text"]
                    ),
                    "swapped": suffix == "2",
                    "answer_ids": [first["answer_id"], second["answer_id"]],
                    "model_ids": [first.get("model_id"), second.get("model_id")],
                }
            )
    return usable(rows, problems, questions)


def _answers(path: str | Path, problems: list[FileProblem]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    entries = line_entries(path, problems)
    # an empty answer is an answer, a bad one
    for number, entry in entries.having({"question_id": ID, "text": STRING, "answer_id": ID}):
        name = str(entry["question_id"])
        if name in found:
            entries.refuse(number, f"question_id {name} occurs before")
        else:
            found[name] = entry
    return found


def load_reviews(
    path: str | Path, items: Sequence[Item]
) -> tuple[list[Item], list[str], list[FileProblem]]:
    """Read review.jsonl: {"question_id", "answer1_id", "answer2_id", "text"} per line.

    Args:
        path: the file, ours or FastChat's.
        items: of `load`.

    Returns:
        The items that a line reviews, their reviews, and one problem for every line that cannot be
        used and every item without a review.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, nothing in it can be used, or both answers to a question
            have the same id, so that a review does not say which came first.
    """
    problems: list[FileProblem] = []
    wanted: set[tuple[str, ...]] = set()
    for item in items:
        first, second = map(str, item["answer_ids"])
        if first == second:
            raise ValueError(
                f"{path}: the answers to question {item['question_id']} must have different ids "
                f"to tell its reviews' orders apart, got answer_id {first!r} twice"
            )
        wanted.add((item["question_id"], first, second))
    found: dict[tuple[str, ...], str] = {}
    fields = {"question_id": ID, "answer1_id": ID, "answer2_id": ID, "text": STRING}
    entries = line_entries(path, problems)
    for number, entry in entries.having(fields):
        key = tuple(str(entry[name]) for name in list(fields)[:3])
        if key not in wanted or key in found:
            what = "occurs before" if key in found else "is none of the items"
            entries.refuse(number, f"review of question {key[0]} in this order {what}")
        else:
            found[key] = entry["text"]
    reviewed: list[Item] = []
    reviews = []
    for position, item in enumerate(items):
        key = (item["question_id"], *map(str, item["answer_ids"]))
        if key in found:
            reviewed.append(item)
            reviews.append(found[key])
        else:
            reason = f"item {item['id']} has no usable review"
            problems.append(FileProblem(position, reason, str(path), "item"))
    kept, problems = usable(reviewed, problems, path)
    return kept, reviews, problems


def ask(judge: Callable[[str], str]) -> Callable[[list[Item]], list[str]]:
    """A judge as the predictor that `runner.evaluate` takes: its predictions are the reviews."""
    return lambda items: [judge(item["prompt"]) for item in items]


def score(item: Item, review: str) -> Scores:
    """One review: the model's marks, and whether it won, drew or lost by them.

    Returns:
        {"win", "tie", "lose", "first_wins": 0 or 1, "marks", "baseline_marks", "malformed": 0}, or
        {"malformed": 1} where a person must look.
    """
    marks = marks_of(review)
    if marks is None:
        return {"malformed": 1.0}
    first, second = marks
    own, other = (second, first) if item["swapped"] else (first, second)
    return {
        "win": float(own > other),
        "tie": float(own == other),
        "lose": float(own < other),
        "first_wins": float(first > second),
        "marks": own,
        "baseline_marks": other,
        "malformed": 0.0,
    }


@dataclass(frozen=True)
class Verdict:
    """What a judge's reviews come to.

    Attributes:
        items: win, tie and lose of the model over all items (160) whose review could be read.
        merged: the same over the questions (80): a win only where both orders agree on it, a loss
            likewise; a tie otherwise. A question with an unreadable review is in none of them.
        malformed: items whose review could not be read.
        win_rate: (wins + ties / 2) / items, 0 to 1.
        first_share: share of the items that are no ties which position 1 won; 0.5 is no bias, and
            None is written where all are ties.
        ratio: the model's marks over the baseline's, summed over the items, in percent (V2).
    """

    items: dict[str, int]
    merged: dict[str, int]
    malformed: int
    win_rate: float
    first_share: float | None
    ratio: float | None


def verdict(items: Sequence[Item], reviews: Sequence[str]) -> Verdict:
    """Count the reviews of items; see `Verdict`.

    Args:
        items: of `load`; of one order alone (V2's way) too.
        reviews: the judge's text for each.

    Raises:
        ValueError: there are no items, not as many reviews, or none that can be read.
    """
    single: Counter[str] = Counter()
    by_question: dict[str, list[str | None]] = {}
    firsts = malformed = 0
    own = other = 0.0
    for item, review in pairs(items, reviews):
        scores = score(item, review)
        outcome = next((name for name in (_WIN, _TIE, _LOSE) if scores.get(name)), None)
        by_question.setdefault(item["question_id"], []).append(outcome)
        if outcome is None:
            malformed += 1
            continue
        single[outcome] += 1
        firsts += scores["first_wins"] > 0
        own, other = own + scores["marks"], other + scores["baseline_marks"]
    count = single.total()
    if not count:
        raise ValueError(f"none of {len(items)} reviews begins with two marks")
    merged: Counter[str] = Counter()
    for outcomes in by_question.values():
        if None not in outcomes:
            agreed = outcomes[0] if len(set(outcomes)) == 1 else _TIE
            merged[agreed or _TIE] += 1
    decided = single[_WIN] + single[_LOSE]
    return Verdict(
        {name: single[name] for name in (_WIN, _TIE, _LOSE)},
        {name: merged[name] for name in (_WIN, _TIE, _LOSE)},
        malformed,
        (single[_WIN] + single[_TIE] / 2) / count,
        firsts / decided if decided else None,
        100 * own / other if other else None,
    )


def aggregate(items: Sequence[Item], reviews: Sequence[str]) -> Scores:
    """`verdict` as scores by name; what is None there is absent here."""
    found = verdict(items, reviews)
    scores = {f"items_{name}": float(count) for name, count in found.items.items()}
    scores |= {f"merged_{name}": float(count) for name, count in found.merged.items()}
    scores |= {"malformed": float(found.malformed), "win_rate": found.win_rate}
    optional = {"first_share": found.first_share, "ratio": found.ratio}
    return scores | {name: value for name, value in optional.items() if value is not None}


def write(
    path: str | Path, items: Sequence[Item], reviews: Sequence[str], *, reviewer: str = "judge"
) -> None:
    """Write review.jsonl: {"review_id", "question_id", "answer1_id", "answer2_id", "text", "score",
    "reviewer_id", "metadata"} per line, the answers in the judge's order.

    A score that could not be read is [-1, -1].

    Raises:
        ValueError: there are no items, or not as many reviews.
    """
    rows = []
    for item, review in pairs(items, reviews):
        first, second = item["answer_ids"]
        name = item["question_id"]
        rows.append(
            {
                "review_id": item["id"],
                "question_id": _number(name),
                "answer1_id": first,
                "answer2_id": second,
                "text": review,
                "score": list(marks_of(review) or (-1, -1)),
                "reviewer_id": reviewer,
                "metadata": {"swapped": item["swapped"], "models": item["model_ids"]},
            }
        )
    write_lines(path, rows)


def write_answers(
    path: str | Path, items: Sequence[Item], answers: Sequence[str], *, model: str
) -> None:
    """Write answer.jsonl: {"answer_id", "question_id", "model_id", "text", "metadata"} per line.

    Args:
        path: the file, which `load` reads.
        items: of `load_questions`.
        answers: the model's, to each.
        model: what it is called.

    Raises:
        ValueError: there are no items, or not as many answers.
    """
    rows = [
        {
            "answer_id": f"{model}-{item['id']}",
            "question_id": _number(item["id"]),
            "model_id": model,
            "text": text,
            "metadata": {},
        }
        for item, text in pairs(items, answers)
    ]
    write_lines(path, rows)


def _number(name: str) -> int | str:
    return int(name) if name.isascii() and name.isdecimal() else name
