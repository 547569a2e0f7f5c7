"""C-VQA: both tables, how answers are formatted, losses by hand and the table of results."""

import csv
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.c_vqa import aggregate, formatted, load, prompt_of, score, write
from llama_adapter.evaluation.runner import evaluate

COLUMNS = ["img_path", "query", "answer", "new query", "new answer", "type"]
ROWS = [
    ["a.jpg", "How many dogs?", "3", "If one left, how many dogs?", "2", "direct"],
    ["b.jpg", "How many cups?", "2", "If two, more came,\nhow many?", "4", "direct"],
    ["a.jpg", "How many legs?", "8", "If a dog left, how many legs?", "4", "indirect"],
    ["b.jpg", "Is it red?", "yes", "Would it be red if it were painted?", "no", "boolean"],
]
# right, right; right, wrong; wrong, wrong; right, fail
PREDICTIONS = [
    "There are three dogs.",
    "If one left, 2",
    "2",
    "There would be two if they came",
    "many",
    "If a dog left, four legs are 1 pair",
    "It is",
    "maybe",
]


def table(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return table(tmp_path / "real.csv", ROWS)


def test_a_row_is_two_items(path: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"jpg")
    items, problems = load(path, tmp_path)
    assert [item["id"] for item in items] == [
        f"{row}/{kind}" for row in (1, 3) for kind in ("original", "counterfactual")
    ]
    assert items[1] == {
        "id": "1/counterfactual",
        "row": 1,
        "kind": "counterfactual",
        "type": "direct",
        "image": str(tmp_path / "b.jpg"),
        "image_name": "b.jpg",
        "question": "If two, more came,\nhow many?",
        "answer": "4",
    }
    assert prompt_of(items[0]) == "How many cups?"
    absent = f"image {tmp_path / 'a.jpg'}: no such file"
    # row 2 has two lines
    assert [str(problem) for problem in problems] == [
        f"{path}: line 2: {absent}",
        f"{path}: line 5: {absent}",
    ]
    items, problems = load(path)
    assert problems == []
    assert [item["image"] for item in items] == [None] * 8


@pytest.mark.parametrize(
    ("prediction", "type_", "expected"),
    [
        ("If one left, 3", "direct", "3"),
        ("There would be two if…", "indirect", "2"),
        # a number behind the "if" is part of what is supposed
        ("There would be many if 3 left", "indirect", "fail"),
        # without a comma nothing is dropped
        ("If one left there are 3", "direct", "1"),
        # the first comma only, and no further "if" is looked for
        ("if so, five, or six if", "direct", "5"),
        ("There is a difference of 4.", "direct", "4"),
        ("None of them", "direct", "0"),
        ("no dogs", "direct", "0"),
        ("07", "direct", "7"),
        ("Ten!", "direct", "10"),
        ("12 or two", "direct", "12"),
        ("eleven", "direct", "fail"),
        ("if 3", "direct", "3"),
        ("", "direct", "fail"),
        ("yes", "boolean", "yes"),
        ("maybe", "boolean", "fail"),
        ("It is.", "boolean", "yes"),
        ("It is not", "boolean", "no"),
        ("Yes, no doubt", "boolean", "no"),
        ("False", "boolean", "no"),
        ("nothing", "boolean", "fail"),
        ("B", "abs_counting_1", "B"),
        ("The answer is (C).", "abs_counting_1", "C"),
        ("A or B", "abs_counting_1", "fail"),
        ("b", "abs_counting_1", "fail"),
        ("3", "abs_counting_1", "fail"),
    ],
)
def test_formatting(prediction: str, type_: str, expected: str) -> None:
    assert formatted(prediction, type_) == expected


def test_losses_computed_by_hand(path: Path, tmp_path: Path) -> None:
    items, _ = load(path)
    answers = {item["id"]: text for item, text in zip(items, PREDICTIONS, strict=True)}
    found = evaluate(
        items,
        lambda batch: [answers[item["id"]] for item in batch],
        score,
        tmp_path / "run",
        aggregate=aggregate,
    )
    # direct: 2 of 2, then 1 of 2 (4 is wanted, two is said): 100 - 50
    # indirect: 0 of 1, then 1 of 1: a loss of -100
    # boolean: 1 of 1, then 0 of 1
    assert found.scores == {
        "direct original": 100.0,
        "direct counterfactual": 50.0,
        "indirect original": 0.0,
        "indirect counterfactual": 100.0,
        "boolean original": 100.0,
        "boolean counterfactual": 0.0,
        "direct loss": 50.0,
        "indirect loss": -100.0,
        "boolean loss": 100.0,
    }
    # the paper prints 80.6 (19.4) for a model that is right on every original
    rows = [{"direct original": 1.0}] * 1000
    rows += [{"direct counterfactual": float(number < 806)} for number in range(1000)]
    scores = aggregate(rows)
    assert scores["direct counterfactual"] == pytest.approx(80.6, rel=1e-12)
    assert scores["direct loss"] == pytest.approx(19.4, rel=1e-12)
    assert "direct loss" not in aggregate(rows[:3])


def test_gold_is_compared_as_answers_are_formatted(tmp_path: Path) -> None:
    rows = [["a", "q", "02", "n", "3", "direct"], ["a", "q", "No", "n", "Yes", "boolean"]]
    items, _ = load(table(tmp_path / "real.csv", rows))
    assert score(items[0], "two") == {"direct original": 1.0}
    assert score(items[2], "no") == {"boolean original": 1.0}
    with pytest.raises(ValueError, match="prediction of item '0/original' must be a string"):
        score(items[0], 2)


def test_synthetic_is_multiple_choice(tmp_path: Path) -> None:
    options = "A. 1 B. 2 C. 3 D. 4"
    rows = [
        ["x.png", f"How many? {options}", "B", f"If one came? {options}", "C", "abs_counting_1"]
    ]
    items, problems = load(table(tmp_path / "synthetic.csv", rows))
    assert problems == []
    assert score(items[0], "B. 2") == {"abs_counting_1 original": 1.0}
    assert score(items[1], "B") == {"abs_counting_1 counterfactual": 0.0}


def test_the_result_table(path: Path, tmp_path: Path) -> None:
    items, _ = load(path)
    write(tmp_path / "result.csv", items, PREDICTIONS)
    with (tmp_path / "result.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == [*COLUMNS, "response", "new_response"]
    assert rows[1:] == [
        [*row, *PREDICTIONS[2 * number : 2 * number + 2]] for number, row in enumerate(ROWS)
    ]
    with pytest.raises(ValueError, match="both questions of a row, got one of row 3"):
        write(tmp_path / "result.csv", items[:-1], PREDICTIONS[:-1])


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("query", " ", "query is empty"),
        ("type", "", "type is empty"),
        ("answer", "two", "answer of type direct must be a whole number, got 'two'"),
        ("new answer", "-1", "new answer of type direct must be a whole number, got '-1'"),
        ("type", "boolean", "answer of type boolean must be yes or no, got '3'"),
        ("type", "other", "answer of type other must be one of A, B, C, D, got '3'"),
    ],
)
def test_malformed_rows_are_named(path: Path, column: str, value: str, reason: str) -> None:
    changed: dict[str, Any] = {**dict(zip(COLUMNS, ROWS[0], strict=True)), column: value}
    items, problems = load(table(path, [ROWS[2], list(changed.values()), ["a.jpg"]]))
    assert [item["id"] for item in items] == ["0/original", "0/counterfactual"]
    assert [str(problem) for problem in problems] == [
        f"{path}: line 3: {reason}",
        f"{path}: line 4: must have 6 cells, got 1",
    ]


def test_a_table_without_a_column_or_a_usable_row(path: Path) -> None:
    with pytest.raises(ValueError, match="must have one column 'type', got columns img_path, "):
        load(table(path, [row[:5] for row in ROWS], COLUMNS[:5]))
    with pytest.raises(ValueError, match="nothing in it can be used"):
        load(table(path, [["a.jpg"]]))
    with pytest.raises(ValueError, match="it is empty"):
        load(table(path, []))
