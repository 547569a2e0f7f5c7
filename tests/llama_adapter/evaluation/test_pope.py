"""POPE: the parser's quirks, the five numbers by hand, the files and the question builder."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data.checked_files import write_lines
from llama_adapter.evaluation.pope import (
    SETTINGS,
    aggregate,
    build_questions,
    load,
    load_objects,
    parsed,
    prompt_of,
    score,
    write,
)
from llama_adapter.evaluation.runner import evaluate


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question(number: int, label: str) -> dict[str, Any]:
    text = f"Is there a dog in the image {number}?"
    return {"question_id": number, "image": f"COCO_{number}.jpg", "text": text, "label": label}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("No, there is not", "no"),
        ("Yes.", "yes"),
        ("", "yes"),
        ("There is none", "yes"),
        ("There is not", "no"),
        ("no", "no"),
        ("NO", "yes"),
        ("None", "yes"),
        ("Yes, no,", "no"),
        # only what stands before the first full stop
        ("Yes. No", "yes"),
        # parts are cut at single spaces: a newline joins two words to one that is none of them
        ("I see\nno dog", "yes"),
        ("No\n", "yes"),
        ("no!", "yes"),
        ("  no", "no"),
    ],
)
def test_parser(prediction: str, expected: str) -> None:
    assert parsed(prediction) == expected


# label and prediction; read as yes: all but the first and the fifth
PAIRS = [
    ("no", "No, there is not"),
    ("yes", "Yes."),
    ("yes", ""),
    ("no", "There is none"),
    ("yes", "no"),
    ("no", "Maybe"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [question(number, label) for number, (label, _) in enumerate(PAIRS, 1)]
    return lines(tmp_path / "coco_pope_random.json", rows)


def test_numbers_computed_by_hand(path: Path, tmp_path: Path) -> None:
    items, problems = load(path)
    assert problems == []
    answers = {item["id"]: text for item, (_, text) in zip(items, PAIRS, strict=True)}
    found = evaluate(
        items,
        lambda batch: [answers[item["id"]] for item in batch],
        score,
        tmp_path / "run",
        aggregate=aggregate,
    )
    # right: 1, 2, 3 of 6; said yes: 2, 3, 4, 6, of which 2 and 3 are; yes: 2, 3, 5
    # F1 = 2 (2/4) (2/3) / (2/4 + 2/3) = (2/3) / (7/6) = 4/7
    assert found.scores == pytest.approx(
        {
            "accuracy": 3 / 6,
            "precision": 2 / 4,
            "recall": 2 / 3,
            "f1": 4 / 7,
            "yes_ratio": 4 / 6,
        },
        rel=1e-12,
    )


def test_nothing_to_divide_by(path: Path) -> None:
    items, _ = load(path)
    # never yes: right where the label is no, 3 of 6
    never = aggregate([score(item, "no") for item in items])
    assert never == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    # no label is yes, all said yes
    none = aggregate([score(items[0], "yes"), score(items[3], "yes")])
    assert none == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 1}
    with pytest.raises(ValueError, match="prediction of item '1' must be a string"):
        score(items[0], True)


def test_items_and_images(path: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3, 4, 5):
        (tmp_path / f"COCO_{number}.jpg").write_bytes(b"jpg")
    items, problems = load(path, tmp_path)
    assert items[1] == {
        "id": "2",
        "image": str(tmp_path / "COCO_2.jpg"),
        "image_name": "COCO_2.jpg",
        "question": "Is there a dog in the image 2?",
        "label": "yes",
    }
    assert prompt_of(items[1]) == "Is there a dog in the image 2?"
    assert len(items) == 5
    reason = f"image {tmp_path / 'COCO_6.jpg'}: no such file"
    assert [str(problem) for problem in problems] == [f"{path}: line 6: {reason}"]
    assert load(path)[0][1]["image"] is None


def test_malformed_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    good = question(1, "yes")
    rows = [
        good,
        {**good, "question_id": "2"},
        {**good, "question_id": 3, "label": "Yes"},
        {name: good[name] for name in ("question_id", "image", "label")},
        good,
        [1],
    ]
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    items, problems = load(path)
    assert [item["id"] for item in items] == ["1"]
    reasons = [str(problem).removeprefix(f"{path}: ") for problem in problems]
    assert reasons[:-1] == [
        "line 3: question_id must be an integer, got a string",
        "line 4: label must be yes or no, got 'Yes'",
        "line 5: text is missing",
        "line 6: question_id 1 is there twice",
        "line 7: must be an object, got a list",
    ]
    assert reasons[-1].startswith("line 8: not JSON (")
    with pytest.raises(ValueError, match=r"nothing in it can be used: .*line 1: must"):
        load(lines(path, [3]))
    path.write_text("")
    with pytest.raises(ValueError, match="it is empty"):
        load(path)


def test_the_answer_file(path: Path, tmp_path: Path) -> None:
    items, _ = load(path)
    write(tmp_path / "answers.json", items, [text for _, text in PAIRS])
    rows = [json.loads(line) for line in (tmp_path / "answers.json").read_text().splitlines()]
    assert rows[0] == {"question": "Is there a dog in the image 1?", "answer": "No, there is not"}
    assert [row["answer"] for row in rows] == [text for _, text in PAIRS]
    with pytest.raises(ValueError, match=r"one for each of 6 items .*got 1"):
        write(tmp_path / "answers.json", items, ["yes"])


# frequencies: dog 3, cat 3, car 2, bus 2, orange 1, cup 1, tie 1, fork 2
RECORDS = [
    {"image": "1.jpg", "objects": ["dog", "orange", "cat", "bus", "dog"]},
    {"image": "2.jpg", "objects": ["dog", "car"]},
    {"image": "3.jpg", "objects": ["car", "cup", "fork"]},
    {"image": "4.jpg", "objects": ["dog", "cat", "bus", "tie"]},
    {"image": "5.jpg", "objects": ["cat", "fork"]},
]


def asked(questions: list[dict[str, Any]], image: str, label: str) -> list[str]:
    return [
        row["text"].removeprefix("Is there ").removesuffix(" in the image?")
        for row in questions
        if (row["image"], row["label"]) == (image, label)
    ]


def test_built_questions_are_balanced_and_name_the_right_objects() -> None:
    for setting in SETTINGS:
        questions = build_questions(RECORDS, setting, seed=5)
        # images 2 and 5 have two objects only
        assert [row["image"] for row in questions] == [
            f"{n}.jpg" for n in (1, 3, 4) for _ in "123456"
        ]
        assert [row["label"] for row in questions] == ["yes", "no"] * 9
        assert [row["question_id"] for row in questions] == list(range(1, 19))
        assert asked(questions, "1.jpg", "yes") == ["a dog", "an orange", "a cat"]
        for record in RECORDS:
            absent = {name.split()[1] for name in asked(questions, record["image"], "no")}
            assert not absent & set(record["objects"])
            assert len(absent) in (0, 3)


def test_popular_and_adversarial_by_hand() -> None:
    popular = build_questions(RECORDS, "popular")
    # not in 1: car 2, fork 2, cup 1, tie 1; car comes first in the files, cup before tie
    assert asked(popular, "1.jpg", "no") == ["a car", "a fork", "a cup"]
    # not in 3: dog 3, cat 3, bus 2
    assert asked(popular, "3.jpg", "no") == ["a dog", "a cat", "a bus"]
    adversarial = build_questions(RECORDS, "adversarial", seed=1)
    # image 1: beside dog are car 1 and tie 1, car first; beside orange are dog, cat and bus, which
    # are all there, so one of cup, fork and tie is drawn; beside cat are fork 1 and tie 1
    first, drawn, third = asked(adversarial, "1.jpg", "no")
    assert first == "a car"
    assert drawn in ("a cup", "a fork", "a tie")
    assert third == ("a tie" if drawn == "a fork" else "a fork")
    # image 3: beside car is dog 1; beside cup are car and fork only, so one is drawn; beside fork
    # is cat 1, if it was not drawn
    first, drawn, third = asked(adversarial, "3.jpg", "no")
    assert first == "a dog"
    assert third == "a cat" or drawn == "a cat"


def test_adversarial_is_not_popular() -> None:
    lists = [
        ["sofa", "tv", "rug"],
        ["dog"],
        ["dog", "sofa"],
        ["dog"],
        ["sofa", "lamp"],
        ["lamp", "sofa"],
    ]
    records = [
        {"image": str(number), "objects": names} for number, names in enumerate([*lists, ["p"]])
    ]
    # there are three dogs and two lamps; beside sofa are two lamps and one dog
    assert asked(build_questions(records, "popular"), "0", "no")[0] == "a dog"
    assert asked(build_questions(records, "adversarial"), "0", "no")[0] == "a lamp"


def test_a_seed_decides() -> None:
    many = [
        {"image": f"{n}.jpg", "objects": [f"t{(n + step) % 23}" for step in range(4)]}
        for n in range(23)
    ]
    one = build_questions(many, "random", images=9, seed=1)
    assert one == build_questions(many, "random", images=9, seed=1)
    assert one != build_questions(many, "random", images=9, seed=2)
    assert len({row["image"] for row in one}) == 9
    # 27 draws of 19 objects each: far from always the same
    assert len({row["text"] for row in one if row["label"] == "no"}) > 9
    assert len(build_questions(many, "random", images=99)) == 23 * 6


@pytest.mark.parametrize(
    ("name", "article"),
    [
        ("orange", "an"),
        ("umbrella", "an"),
        ("Airplane", "an"),
        ("hourglass", "an"),
        ("dog", "a"),
        ("unicorn", "a"),
        ("utensil", "a"),
        ("one-way sign", "a"),
        ("onion", "an"),
        ("uninflated ball", "an"),
    ],
)
def test_articles(name: str, article: str) -> None:
    records = [
        {"image": "a", "objects": [name, "x", "y"]},
        {"image": "b", "objects": ["p", "q", "r"]},
    ]
    text = build_questions(records, "popular")[0]["text"]
    assert text == f"Is there {article} {name} in the image?"


def test_the_builder_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"setting must be one of random, .*, got 'all'"):
        build_questions(RECORDS, "all")
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        build_questions(RECORDS, "random", images=0)
    with pytest.raises(ValueError, match="an image with 3 objects or more, got none"):
        build_questions(RECORDS[1:2], "random")
    with pytest.raises(ValueError, match=r"image '1.jpg' must lack at least 3 objects"):
        build_questions(RECORDS[:2], "popular")


def test_questions_from_a_file_of_objects_are_read_back(tmp_path: Path) -> None:
    bad = [{"image": "6.jpg"}, {"image": "7.jpg", "objects": ["a", 1]}, {"objects": []}]
    records, problems = load_objects(lines(tmp_path / "objects.json", [*RECORDS, *bad]))
    assert records == RECORDS
    assert [str(problem).removeprefix(f"{tmp_path}/objects.json: ") for problem in problems] == [
        "line 6: objects is missing",
        "line 7: objects must hold names only",
        "line 8: image is missing",
    ]
    questions = build_questions(records, "popular")
    write_lines(tmp_path / "built.json", questions)
    items, problems = load(tmp_path / "built.json")
    assert problems == []
    assert [(item["question"], item["label"]) for item in items] == [
        (row["text"], row["label"]) for row in questions
    ]
