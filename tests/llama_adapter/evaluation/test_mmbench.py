"""MMBench: circular groups, letters and texts as answers, images in the table, scores by hand."""

import base64
import csv
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.mmbench import (
    ROTATION,
    aggregate,
    image_of,
    load,
    matched,
    prompt_of,
    score,
    write,
)
from llama_adapter.evaluation.runner import evaluate

COLUMNS = "index question hint A B C D answer category l2-category image source comment split"
# longer than csv's own limit for a cell
LARGE = bytes(range(256)) * 600
SMALL = bytes(range(100, 190))


def rotations(
    group: int, options: list[str], answer: int, ability: str, image: bytes, **more: str
) -> list[dict[str, Any]]:
    """The rows of a question: rotation k has every option k places further."""
    rows = []
    for k in range(len(options)):
        shifted = [options[(i - k) % len(options)] for i in range(len(options))]
        rows.append(
            {
                **dict.fromkeys(COLUMNS.split(), ""),
                "index": group + k * ROTATION,
                "question": f"Question {group}?",
                **dict(zip("ABCD", shifted, strict=False)),
                "answer": "ABCD"[(answer + k) % len(options)],
                "category": "leaf",
                "l2-category": ability,
                "image": base64.b64encode(image).decode() if k == 0 else str(group),
                "split": "dev",
                **more,
            }
        )
    return rows


def table(path: Path, rows: list[dict[str, Any]], columns: str = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns.split(), delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


ALL_RIGHT = rotations(
    7, ["red", "green", "blue", "pink"], 1, "coarse_perception", LARGE, hint="Look\nclosely."
)
ONE_WRONG = rotations(8, ["one", "two", "ten"], 0, "finegrained_perception (instance-level)", SMALL)
TWO = rotations(300, ["dog", "cat"], 1, "coarse_perception", SMALL)
ROWS = [*ALL_RIGHT, *ONE_WRONG, *TWO]
# answers are B C D A; A B C; B A
PREDICTIONS = {
    "7": "B",
    "1000007": "The answer is C.",
    "2000007": "It is green",
    "3000007": "(A)",
    "8": "A",
    "1000008": "B. one",
    "2000008": "B",
    "300": "I am not sure",
    "1000300": "A",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return table(tmp_path / "mmbench.tsv", ROWS)


def test_items_and_their_images(path: Path) -> None:
    items, problems = load(path)
    assert problems == []
    assert [item["id"] for item in items] == list(PREDICTIONS)
    assert (items[2]["group"], items[2]["rotation"], items[2]["answer"]) == (7, 2, "D")
    assert items[2]["options"] == {"A": "blue", "B": "pink", "C": "red", "D": "green"}
    # the rotations name the first row's image
    assert [image_of(item) for item in items[:4]] == [LARGE] * 4
    assert image_of(items[8]) == SMALL
    assert items[7]["options"] == {"A": "dog", "B": "cat"}
    assert [items[i]["ability"] for i in (0, 4, 7)] == ["CP", "FP-S", "CP"]


def test_prompt(path: Path) -> None:
    items, _ = load(path)
    assert prompt_of(items[0]) == (
        "Hint: Look\nclosely.\nQuestion: Question 7?\nOptions:\nA. red\nB. green\nC. blue\n"
        "D. pink\nPlease select the correct answer from the options above. \n"
    )
    assert prompt_of(items[7]) == (
        "Question: Question 300?\nOptions:\nA. dog\nB. cat\n"
        "Please select the correct answer from the options above. \n"
    )


OPTIONS = {"A": "a red car", "B": "a blue car", "C": "a car"}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is: A!", "A"),
        # two letters of options are none, nor is a small one
        ("A or B", None),
        ("b", None),
        # a letter that is no option's does not count
        ("D, I mean C", "C"),
        # the letter is word 2 of 6: index 1 is not above 6 - 5
        ("answer B is what I say", None),
        # word 2 of 5: index 1 is above 5 - 5
        ("answer B is what I", "B"),
        # by text, in any case; "a car" is not contained in it
        ("It is a RED car", "A"),
        ("it is a car", "C"),
        ("a red car, a blue car", None),
        # 9 + 10 + 5 = 24 characters of options: 48 are looked at, 49 are not
        ("a car" + 43 * ".", "C"),
        ("a car" + 44 * ".", None),
        ("", None),
    ],
)
def test_matching(prediction: str, expected: str | None) -> None:
    assert matched(prediction, OPTIONS) == expected


def test_scores_computed_by_hand(path: Path, tmp_path: Path) -> None:
    items, _ = load(path)
    found = evaluate(
        items,
        lambda batch: [PREDICTIONS[item["id"]] for item in batch],
        score,
        tmp_path / "run",
        aggregate=aggregate,
    )
    # group 7: 4 of 4, a hit; 8: right, right, wrong, none; 300: wrong, right, none
    # by ability: CP has groups 7 and 300, FP-S has 8
    # rotation 0: right, right, wrong; rows: 4 + 2 + 1 of 9
    assert found.scores == {
        "Overall": 1 / 3,
        "CP": 0.5,
        "FP-S": 0.0,
        "vanilla": 2 / 3,
        "vanilla all": 7 / 9,
    }


def test_overall_is_a_mean_over_groups_not_over_abilities() -> None:
    # CP has one group and hits it, LR three and hits none: 1 of 4 and not (1 + 0) / 2
    rows = [{"CP": 1.0, "group": 1.0, "rotation": 0.0}]
    rows += [{"LR": 0.0, "group": float(group), "rotation": 0.0} for group in (2, 3, 4)]
    scores = aggregate(rows)
    assert (scores["Overall"], scores["CP"], scores["LR"]) == (0.25, 1.0, 0.0)


def test_the_result_table(path: Path, tmp_path: Path) -> None:
    items, _ = load(path)
    texts = [*PREDICTIONS.values()][:-1]
    write(tmp_path / "result.tsv", items, [*texts, 'two\nlines\tand "more"'])
    with (tmp_path / "result.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert rows[0] == {
        "index": "7",
        "question": "Question 7?",
        "hint": "Look\nclosely.",
        **dict(zip("ABCD", ["red", "green", "blue", "pink"], strict=True)),
        "category": "leaf",
        "l2-category": "coarse_perception",
        "answer": "B",
        "prediction": "B",
    }
    assert rows[8]["prediction"] == 'two\nlines\tand "more"'
    assert rows[8]["C"] == ""


def test_a_test_split_has_no_answers(path: Path) -> None:
    items, problems = load(table(path, TWO, COLUMNS.replace("answer ", "")))
    assert problems == []
    assert [item["answer"] for item in items] == [None, None]
    with pytest.raises(ValueError, match="item '300' has no answer"):
        score(items[0], "A")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"index": "x7"}, "index must be a number of at most 15 digits, got 'x7'"),
        ({"index": "1" * 5000}, "index must be a number of at most 15 digits, got '11111111111111"),
        ({"question": ""}, "question is empty"),
        ({"B": ""}, "options must be A, B and so on, at least two, got A"),
        ({"B": "", "C": "bird"}, "options must be A, B and so on, at least two, got A, C"),
        ({"answer": "C"}, "answer must be one of A, B, got 'C'"),
        ({"answer": ""}, "answer must be one of A, B, got ''"),
        ({"image": 40 * "ab*c"}, "image must be base64, got "),
        ({"image": "77"}, "image must be base64 or the index of a row with an image, got '77'"),
        ({"image": ""}, "image must be base64 or the index of a row with an image, got ''"),
        ({"l2-category": "sport"}, "l2-category must be one of coarse_perception, "),
        ({"index": 300}, "index 300 is there twice"),
    ],
)
def test_malformed_rows_are_named(path: Path, fields: dict[str, Any], reason: str) -> None:
    """The table is the header, two good rows and two more, the second of which is changed."""
    last = {**TWO[1], "image": base64.b64encode(SMALL).decode()}
    other = rotations(9, ["x", "y"], 0, "logic_reasoning", SMALL)
    items, problems = load(table(path, [*other, TWO[0], {**last, **fields}]))
    assert [item["id"] for item in items] == ["9", "1000009"]
    assert str(problems[0]).startswith(f"{path}: line 5: {reason}")
    # what is left of its group has no rotation 1
    assert str(problems[1]) == f"{path}: group 300: must have rotations 0 to 1, got 0: left out"


def test_a_file_without_a_whole_group_or_column(path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing in it can be used: .*group 8: must have rot"):
        load(table(path, ONE_WRONG[:2]))
    with pytest.raises(ValueError, match="must have one column 'image'"):
        load(table(path, TWO, COLUMNS.replace("image ", "")))
