"""The Open LLM benchmark in small: its four tasks' own files, written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

SUBJECTS = ("anatomy", "virology")


def arc_line(n: int, key: str = "B") -> dict[str, Any]:
    """One question in ARC's own form, whose second choice is the longest."""
    choices = [{"text": text, "label": label} for text, label in zip(
        (f"cow {n}", "a river stone and a lamp", "ash"), "ABC", strict=True)]  # fmt: skip
    question = {"stem": f"What is number {n}?", "choices": choices}
    return {"id": f"Mercury_{n}", "question": question, "answerKey": key}


def hellaswag_line(n: int, label: int | str = 1) -> dict[str, Any]:
    """One beginning with four endings, with WikiHow's marks."""
    return {
        "ind": n,
        "activity_label": "Washing dishes",
        "ctx_a": f"A [header] person {n} [title] stands.",
        "ctx_b": "then she",
        "ctx": "not read",
        "endings": [f"sits  down {n}.", "[step] walks on for a long time.", "ends.", "sings."],
        "label": label,
    }


def truthful_entry(n: int) -> dict[str, Any]:
    """One question with two true answers of four."""
    choices = {f"It is {n}.": 1, "Nobody knows.": 1, "A lamp.": 0, "It is a horse.": 0}
    first = {f"It is {n}.": 1, "A lamp.": 0}
    return {"question": f"What about {n}?", "mc1_targets": first, "mc2_targets": choices}


def mmlu_row(n: int) -> list[str]:
    """One row: question, four choices, letter."""
    return [f" Which, {n}?\nOr not?", "a cow", "two", 'a "lamp"', "4", "ABCD"[n % 4]]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_files(folder: Path) -> Path:
    """All four tasks: three questions each, of MMLU three of one subject and one of the other."""
    arc = folder / "arc"
    write_lines(arc / "ARC-Challenge-Train.jsonl", [arc_line(100 + n) for n in range(26)])
    write_lines(arc / "ARC-Challenge-Test.jsonl", [arc_line(n, "BAC"[n]) for n in range(3)])
    swag = folder / "hellaswag"
    write_lines(swag / "hellaswag_train.jsonl", [hellaswag_line(100 + n) for n in range(11)])
    write_lines(swag / "hellaswag_val.jsonl", [hellaswag_line(n, n) for n in range(3)])
    for place, subject in enumerate(SUBJECTS):
        test = [mmlu_row(n) for n in range(3 - 2 * place)]
        write_table(folder / "mmlu" / "test" / f"{subject}_test.csv", test)
        dev = [mmlu_row(10 + n) for n in range(5)]
        write_table(folder / "mmlu" / "dev" / f"{subject}_dev.csv", dev)
    truthful = folder / "truthfulqa" / "mc_task.json"
    truthful.parent.mkdir()
    truthful.write_text(json.dumps([truthful_entry(n) for n in range(3)]))
    return folder
