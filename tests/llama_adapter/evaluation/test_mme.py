"""MME: both layouts, the four-character parser, scores by hand and the result files."""

from pathlib import Path

import pytest

from llama_adapter.evaluation.mme import (
    COGNITION,
    PERCEPTION,
    TASKS,
    aggregate,
    load,
    parsed,
    prompt_of,
    sanitised,
    score,
    write,
)
from llama_adapter.evaluation.runner import evaluate

ASK = "Please answer yes or no."
# two subtasks, two images each, in the order of `load`
PREDICTIONS = {
    # right, and right: "yes" in the first four characters
    "existence/0001/1": "Yes",
    "existence/0001/2": "no.",
    # right; "It i" holds neither, which counts as wrong though it says yes
    "existence/0002/1": "yes, there is",
    "existence/0002/2": "It is yes",
    # wrong; right
    "code_reasoning/0003/1": "No",
    "code_reasoning/0003/2": "\nNot\tat all",
    # wrong; wrong
    "code_reasoning/0004/1": "",
    "code_reasoning/0004/2": "Yes",
}


def text(*answers: str) -> str:
    return "\n".join(f"Question {n}? {ASK}\t{answer}" for n, answer in enumerate(answers, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One subtask with folders of its own inside, one flat."""
    texts, images = tmp_path / "existence/questions_answers_YN", tmp_path / "existence/images"
    flat = tmp_path / "code_reasoning"
    for each in (texts, images, flat):
        each.mkdir(parents=True)
    (texts / "0002.txt").write_text(text("Yes", "Yes"))
    (texts / "0001.txt").write_text(text("Yes", "No") + "\n\n")
    (images / "0001.jpg").write_bytes(b"jpg")
    (images / "0002.png").write_bytes(b"png")
    (flat / "0003.txt").write_text(text("Yes", "No"))
    (flat / "0004.txt").write_text(text("Yes", "No"))
    for name in ("0003.png", "0004.png"):
        (flat / name).write_bytes(b"png")
    return tmp_path


BOTH = ("existence", "code_reasoning")


def test_both_layouts(folder: Path) -> None:
    items, problems = load(folder, BOTH)
    assert problems == []
    assert [item["id"] for item in items] == list(PREDICTIONS)
    assert items[2] == {
        "id": "existence/0002/1",
        "task": "existence",
        "pair": 1,
        "image": str(folder / "existence/images/0002.png"),
        "image_name": "0002.png",
        "question": f"Question 1? {ASK}",
        "gold": "Yes",
    }
    assert prompt_of(items[2]) == f"Question 1? {ASK}"
    assert items[4]["image"] == str(folder / "code_reasoning/0003.png")
    with pytest.raises(FileNotFoundError, match="count: no such folder"):
        load(folder)
    with pytest.raises(ValueError, match=r"tasks must be among existence, .*, got 'ocr'"):
        load(folder, ["ocr"])


def test_without_images_the_items_are_there_all_the_same(folder: Path) -> None:
    seen, _ = load(folder, BOTH)
    (folder / "existence/images/0001.jpg").unlink()
    items, problems = load(folder, BOTH, with_images=False)
    assert problems == []
    assert items == [{**item, "image": None} for item in seen]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("yes, there is", "yes"),
        ("no.", "no"),
        (" yes", "yes"),
        # four characters are looked at, of which yes takes three
        ("  yes", "other"),
        ("It is yes", "other"),
        ("None", "no"),
        ("Know", "no"),
        ("I do not", "other"),
        ("", "other"),
    ],
)
def test_parser(prediction: str, expected: str) -> None:
    assert parsed(prediction) == expected


def test_scores_computed_by_hand(folder: Path, tmp_path: Path) -> None:
    items, _ = load(folder, BOTH)
    found = evaluate(
        items,
        lambda batch: [PREDICTIONS[item["id"]] for item in batch],
        score,
        tmp_path / "run",
        aggregate=aggregate,
    )
    # existence: 3 of 4 questions, 1 of 2 images: 75 + 50
    # code_reasoning: 1 of 4 questions, 0 of 2 images: 25 + 0
    assert found.scores == {
        "existence/acc": 0.75,
        "existence/acc+": 0.5,
        "existence": 125.0,
        "code_reasoning/acc": 0.25,
        "code_reasoning/acc+": 0.0,
        "code_reasoning": 25.0,
    }


def test_sums_of_whole_groups_only() -> None:
    # every subtask has one image; of perception the first is half right: 50 + 0, the others 200
    rows = [
        {task: 0.0 if (task, half) == ("existence", 1) else 1.0, "pair": 0.0}
        for task in TASKS
        for half in (0, 1)
    ]
    scores = aggregate(rows)
    assert scores["existence"] == 50
    assert scores["perception"] == 50 + 9 * 200
    assert scores["cognition"] == 800
    assert scores["ALL"] == 1850 + 800
    assert (len(PERCEPTION), len(COGNITION)) == (10, 4)
    some = aggregate(rows[2:])
    assert "perception" not in some
    assert "ALL" not in some
    assert some["cognition"] == 800
    # always yes: one of the two is right, the pair is not: 50 + 0
    assert aggregate([{"OCR": 1.0, "pair": 0.0}, {"OCR": 0.0, "pair": 0.0}])["OCR"] == 50


def test_result_files(folder: Path, tmp_path: Path) -> None:
    items, _ = load(folder, BOTH)
    write(tmp_path / "results", items, list(PREDICTIONS.values()))
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "code_reasoning.txt",
        "existence.txt",
    ]
    lines = (tmp_path / "results/code_reasoning.txt").read_text().split("\n")
    assert lines == [
        f"0003.png\tQuestion 1? {ASK}\tYes\tNo",
        f"0003.png\tQuestion 2? {ASK}\tNo\tNot at all",
        f"0004.png\tQuestion 1? {ASK}\tYes\t",
        f"0004.png\tQuestion 2? {ASK}\tNo\tYes",
        "",
    ]
    # what is written is what is scored
    assert sanitised("\n\nYes,\t it\r\nis ") == "Yes, it is"
    assert score(items[0], "\n\n\nYes\n")["existence"] == 1
    with pytest.raises(ValueError, match="one for each of 8 items"):
        write(tmp_path / "results", items, ["Yes"])
    with pytest.raises(ValueError, match="must be a string"):
        score(items[0], 1)


def test_malformed_lines_are_named_and_pairs_stay_whole(folder: Path) -> None:
    texts = folder / "existence/questions_answers_YN"
    (texts / "0001.txt").write_text(f"One? {ASK}\tYes\n\nTwo? {ASK} No\nThree?\tmaybe\n\tNo\n")
    (folder / "existence/images/0002.png").unlink()
    items, problems = load(folder, BOTH)
    assert [item["id"] for item in items] == list(PREDICTIONS)[4:]
    image = folder / "existence/images/0002.jpg"
    assert [str(problem) for problem in problems] == [
        f"{texts}/0001.txt: line 3: must be a question, a tab and Yes or No, got 1 cells",
        f"{texts}/0001.txt: line 4: answer must be Yes or No, got 'maybe'",
        f"{texts}/0001.txt: line 5: question is empty",
        f"{texts}/0001.txt: pair 0: must hold 2 usable questions, got 1: none is used",
        f"{texts}/0002.txt: image 1: image {image} or .png: no such file",
    ]
    with pytest.raises(ValueError, match="nothing in it can be used"):
        load(folder, ["existence"])
