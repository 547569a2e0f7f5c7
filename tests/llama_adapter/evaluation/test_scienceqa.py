"""ScienceQA: prompts, answers and the columns of table 2 on six problems in the real format."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.runner import evaluate
from llama_adapter.evaluation.scienceqa import (
    CLASSES,
    aggregate,
    answer_of,
    extracted,
    load,
    prompt_of,
    score,
    target_of,
    write,
)

NAT, SOC, LAN = "natural science", "social science", "language science"
# id: subject, grade, hint, image, choices, answer
ROWS = {
    "11": (NAT, "grade2", "Iron is a metal.", "image.png", ["iron", "wood"], 0),
    "12": (NAT, "grade9", "A hint.", None, ["a", "b", "c"], 2),
    "13": (SOC, "grade6", "", "image.png", ["Ohio", "Utah", "Iowa", "Maine"], 1),
    "14": (SOC, "grade7", "", None, ["x", "y", "z", "u", "v"], 4),
    "15": (LAN, "grade1", "", None, ["noun", "verb"], 1),
    "16": (LAN, "grade12", "Read  this.", None, ["p", "q", "r"], 1),
}
# 11 right; 12 right, in brackets; 13 no sentence; 14 two sentences; 15 a letter beyond two options;
# 16 wrong
OUTPUTS = [
    "The answer is A.",
    "Answer: The answer is (C)",
    "B",
    "The answer is E. The answer is E.",
    "The answer is C.",
    "The answer is A.\nBECAUSE: it is.",
]
# what counts without the random fallback: 11 and 12 of six; by class
#   NAT 11, 12: 2 of 2; SOC 13, 14: 0 of 2; LAN 15, 16: 0 of 2
#   TXT 11, 12, 16: 2 of 3; IMG 11, 13: 1 of 2; NO 14, 15: 0 of 2
#   G1-6 11, 13, 15: 1 of 3; G7-12 12, 14, 16: 1 of 3; all 2 of 6
STRICT = {
    "NAT": 100.0,
    "SOC": 0.0,
    "LAN": 0.0,
    "TXT": 66.67,
    "IMG": 50.0,
    "NO": 0.0,
    "G1-6": 33.33,
    "G7-12": 33.33,
    "Avg": 33.33,
}


def problem(name: str) -> dict[str, Any]:
    subject, grade, hint, image, choices, answer = ROWS[name]
    return {
        "question": f"Question  number {name}?",
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": grade,
        "subject": subject,
        "topic": "physics",
        "category": "Materials",
        "skill": "Compare",
        "lecture": "A lecture.",
        "solution": "A solution.",
        "split": "test",
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "problems.json").write_text(json.dumps({name: problem(name) for name in ROWS}))
    splits = {"train": [], "test": list(ROWS), "minitest": ["13", "12"]}
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    for name in ("11", "13"):
        (tmp_path / "images/test" / name).mkdir(parents=True)
        (tmp_path / "images/test" / name / "image.png").write_bytes(b"png")
    return tmp_path


def loaded(folder: Path, split: str = "test", images: bool = True) -> tuple[list[Any], list[str]]:
    found, problems = load(
        folder / "problems.json",
        folder / "pid_splits.json",
        split,
        folder / "images" if images else None,
    )
    return list(found), [str(each).removeprefix(f"{folder}/") for each in problems]


def changed(folder: Path, name: str, **fields: Any) -> None:
    path = folder / "problems.json"
    content = json.loads(path.read_text())
    content[name] = {**content[name], **fields}
    path.write_text(json.dumps(content))


def test_items_of_a_split(files: Path) -> None:
    items, problems = loaded(files)
    assert problems == []
    assert [item["id"] for item in items] == list(ROWS)
    assert items[0]["image"] == str(files / "images/test/11/image.png")
    assert [item["image"] is None for item in items] == [False, True, False, True, True, True]
    assert [item["id"] for item in loaded(files, "minitest")[0]] == ["13", "12"]
    # without the folder of images the questions stay questions with an image
    texts = loaded(files, images=False)[0]
    assert [item["image"] for item in texts] == [None] * 6
    assert [item["has_image"] for item in texts] == [True, False, True, False, False, False]


def test_prompt_and_target(files: Path) -> None:
    items = loaded(files)[0]
    assert prompt_of(items[0]) == (
        "Question: Question number 11?\nContext: Iron is a metal.\n"
        "Options: (A) iron (B) wood\nAnswer:"
    )
    assert prompt_of(items[0]) + target_of(items[0]) == prompt_of(items[0]) + " The answer is A."
    assert prompt_of(items[3]) == (
        "Question: Question number 14?\nContext: N/A\n"
        "Options: (A) x (B) y (C) z (D) u (E) v\nAnswer:"
    )
    assert target_of(items[3]) == " The answer is E."
    assert "\nContext: Read this.\n" in prompt_of(items[5])


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The answer is B.", 1),
        ("The answer is (B)", 1),
        (" The answer is (B).", 1),
        # the official pattern takes any character behind the letter, and needs one
        ("The answer is B, because", 1),
        ("The answer is B", None),
        ("The answer is B\n", None),
        ("the answer is B.", None),
        ("The answer is b.", None),
        ("B", None),
        ("(B)", None),
        ("", None),
        ("The answer is A. The answer is (A)", None),
        ("The answer is D.", None),
    ],
)
def test_extraction(prediction: str, expected: int | None) -> None:
    assert extracted(prediction, 3) == expected


def test_columns_computed_by_hand(files: Path) -> None:
    items = loaded(files)[0]
    rows = [score(item, text, fallback="wrong") for item, text in zip(items, OUTPUTS, strict=True)]
    assert rows[0] == {"NAT": 1, "TXT": 1, "IMG": 1, "G1-6": 1, "Avg": 1}
    assert rows[3] == {"SOC": 0, "NO": 0, "G7-12": 0, "Avg": 0}
    assert aggregate(rows) == STRICT
    assert tuple(aggregate(rows)) == CLASSES
    # 13 has Utah, B, as its answer, 14 E, 15 B: option A is right in none of these
    first = [score(item, text, fallback="first") for item, text in zip(items, OUTPUTS, strict=True)]
    assert aggregate(first) == STRICT
    # of 12 alone there is no SOC, LAN, IMG, NO or G1-6
    assert aggregate(rows[1:2]) == {
        **dict.fromkeys(("NAT", "TXT", "G7-12", "Avg"), 100.0),
        **dict.fromkeys(("SOC", "LAN", "IMG", "NO", "G1-6"), -1.0),
    }


def test_random_fallback_is_one_of_the_questions_own_options(files: Path) -> None:
    items = loaded(files)[0]
    draws = {seed: answer_of(items[4], OUTPUTS[4], seed=seed) for seed in range(40)}
    assert set(draws.values()) == {0, 1}
    assert draws == {seed: answer_of(items[4], "B", seed=seed) for seed in range(40)}
    # questions draw for themselves
    same = [answer_of(items[4], "", seed=s) == answer_of(items[0], "", seed=s) for s in range(40)]
    assert {True, False} == set(same)
    assert answer_of(items[2], "B", fallback="wrong") == -1
    assert answer_of(items[2], "B", fallback="first") == 0
    assert answer_of(items[2], "The answer is B.", fallback="wrong") == 1
    with pytest.raises(ValueError, match="fallback must be one of random, wrong, first, got 'x'"):
        answer_of(items[2], "B", fallback="x")


def test_through_the_runner(files: Path, tmp_path: Path) -> None:
    items = loaded(files)[0]
    answers = dict(zip(ROWS, OUTPUTS, strict=True))
    found = evaluate(
        items,
        lambda batch: [answers[item["id"]] for item in batch],
        partial(score, fallback="wrong"),
        tmp_path / "run",
        aggregate=aggregate,
    )
    assert found.scores == STRICT


def test_the_official_result_file(files: Path) -> None:
    items = loaded(files)[0]
    path = files / "result.json"
    write(path, items, OUTPUTS, fallback="first", args={"model": "tiny"})
    content = json.loads(path.read_text())
    assert content == {
        # 2 of 6, unrounded
        "acc": 100 * 2 / 6,
        "correct": 2,
        "count": 6,
        "args": {"model": "tiny", "fallback": "first", "seed": 0},
        "results": {"11": 0, "12": 2, "13": 0, "14": 0, "15": 0, "16": 0},
        "outputs": dict(zip(ROWS, OUTPUTS, strict=True)),
    }
    write(path, items, OUTPUTS, seed=3)
    drawn = json.loads(path.read_text())["results"]
    assert drawn == {
        item["id"]: answer_of(item, text, seed=3) for item, text in zip(items, OUTPUTS, strict=True)
    }
    with pytest.raises(ValueError, match=r"must be one for each of 6 items .*got 5"):
        write(path, items, OUTPUTS[1:])
    with pytest.raises(ValueError, match="at least one"):
        write(path, [], [])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": " "}, "question is empty"),
        ({"hint": None}, "hint must be a string, got null"),
        ({"choices": ["a"]}, "choices must be 2 to 26, got 1"),
        ({"choices": "ab"}, "choices must be a list, got a string"),
        ({"choices": ["a", 2]}, "choices 1 must be a string, got a number"),
        ({"answer": 3}, "answer must be an index of 3 choices, got 3"),
        ({"answer": True}, "answer must be an integer, got a boolean"),
        ({"answer": "B"}, "answer must be an integer, got a string"),
        (
            {"subject": "sport"},
            "subject must be one of natural science, social science, language science, got 'sport'",
        ),
        ({"grade": "grade13"}, "grade must be one of grade1 to grade12, got 'grade13'"),
        ({"image": 4}, "image must be a string, got a number"),
    ],
)
def test_malformed_problems_are_named(files: Path, fields: dict[str, Any], reason: str) -> None:
    changed(files, "12", **fields)
    items, problems = loaded(files)
    assert problems == [f"problems.json: entry 1: question '12': {reason}"]
    assert [item["id"] for item in items] == ["11", "13", "14", "15", "16"]


def test_other_problems(files: Path) -> None:
    (files / "pid_splits.json").write_text(json.dumps({"test": ["11", 12, "11", "99", "13"]}))
    (files / "images/test/13/image.png").unlink()
    items, problems = loaded(files)
    assert [item["id"] for item in items] == ["11"]
    image = files / "images/test/13/image.png"
    assert problems == [
        "pid_splits.json: test 1: question id must be a string, got 12",
        'pid_splits.json: test 2: question id is there twice, got "11"',
        f"pid_splits.json: test 3: question '99' is not in {files / 'problems.json'}",
        f"problems.json: entry 2: question '13': image {image}: no such file",
    ]
    with pytest.raises(ValueError, match="must hold a list as split 'val', it has test"):
        loaded(files, "val")
    (files / "pid_splits.json").write_text(json.dumps({"test": ["99"]}))
    with pytest.raises(ValueError, match=r"nothing in it can be used: .*'99' is not in "):
        loaded(files)
