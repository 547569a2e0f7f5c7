"""The files of VQAv2, OK-VQA, TextVQA, VizWiz and GQA, their scores and their results."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.runner import evaluate
from llama_adapter.evaluation.vqa import load, score, write


def saved(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def people(*answers: str) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i}
        for i, answer in enumerate(answers, 1)
    ]


QUESTIONS = {
    "info": {"version": "2.0"},
    "questions": [
        {"image_id": 458752, "question": "What is he throwing?", "question_id": 458752000},
        {"image_id": 9, "question": "How many dogs?", "question_id": 9001},
        {"image_id": 9, "question": "Is it red?", "question_id": 9002},
        {"image_id": "x", "question": "Is it?", "question_id": 9003},
        {"image_id": 9, "question": " ", "question_id": 9004},
        {"image_id": 9, "question": "Again?", "question_id": 9001},
        {"image_id": 9, "question": "Who?", "question_id": 9007},
    ],
}
ANSWERS = [
    {"question_id": 9001, "answer_type": "number", "answers": people(*["2"] * 2, *"3456789x")},
    {"question_id": 458752000, "answer_type": "other", "answers": people(*["frisbee"] * 10)},
    {"question_id": 9002, "answer_type": "yes/no", "answers": []},
    {"question_id": 5, "answers": people("a")},
    {"question_id": 9001, "answers": people("a")},
    {"question_id": 9007, "answers": [{"answer": 3}]},
]


@pytest.mark.parametrize("benchmark", ["vqav2", "okvqa"])
def test_vqav2_and_okvqa(tmp_path: Path, benchmark: str) -> None:
    questions = saved(tmp_path / "q.json", QUESTIONS)
    annotations = saved(tmp_path / "a.json", {"annotations": ANSWERS})
    items, problems = load(benchmark, questions, "val2014", annotations)
    assert [item["id"] for item in items] == ["458752000", "9001"]
    assert items[0] == {
        "benchmark": benchmark,
        "id": "458752000",
        "question": "What is he throwing?",
        "image": "val2014/COCO_val2014_000000458752.jpg",
        "answers": ["frisbee"] * 10,
        "answer_type": "other",
    }
    assert sorted(map(str, problems)) == [
        f"{annotations}: annotations 2: answers is empty",
        f"{annotations}: annotations 3: question_id 5 is none of the questions",
        f"{annotations}: annotations 4: question_id 9001 occurs before",
        f"{annotations}: annotations 5: answers 0 must be or hold a string, got a number",
        f"{questions}: questions 2: no usable annotation is of question_id 9002",
        f"{questions}: questions 3: image_id must be an integer, got a string",
        f"{questions}: questions 4: question is empty",
        f"{questions}: questions 5: question_id 9001 occurs before",
        f"{questions}: questions 6: no usable annotation is of question_id 9007",
    ]
    # "frisbee" is everybody's; "two" is two people's: (2 * 1/3 + 8 * 2/3) / 10 = 0.6
    got = evaluate(items, lambda batch: ["frisbee", "Two"], score)
    assert got.scores == pytest.approx(
        {"accuracy": 0.8, "accuracy/other": 1.0, "accuracy/number": 0.6}
    )
    # VQA's scorer does not normalise what everybody says
    assert score(items[0], "Frisbee.") == {"accuracy": 0, "accuracy/other": 0}
    write(tmp_path / "r.json", items, ["Frisbee.", "Two"])
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"question_id": 458752000, "answer": "Frisbee."},
        {"question_id": 9001, "answer": "Two"},
    ]


def test_a_test_split_has_nothing_to_score(tmp_path: Path) -> None:
    questions = saved(tmp_path / "q.json", QUESTIONS)
    name = "COCO_test2015_{:012d}.jpg"
    items, problems = load("vqav2", questions, "t", image_name=name)
    assert [item["id"] for item in items] == ["458752000", "9001", "9002", "9007"]
    assert items[1]["image"] == "t/COCO_test2015_000000000009.jpg"
    assert len(problems) == 3
    assert score(items[0], "frisbee") == {}


def test_textvqa(tmp_path: Path) -> None:
    data = [
        {"question_id": 34602, "image_id": "003a8ae2", "question": "what brand?",
         "answers": ["nous les gosses"] * 3 + ["dakota"] * 7, "image_classes": ["Person"]},
        {"question_id": 34603, "image_id": "003a8ae2", "question": "what?", "answers": "x"},
        {"question_id": 34604, "image_id": "1b", "question": "what next?"},
    ]  # fmt: skip
    path = saved(tmp_path / "TextVQA_0.5.1_val.json", {"data": data, "dataset_type": "val"})
    items, problems = load("textvqa", path, "train_images")
    assert [(item["id"], item["image"]) for item in items] == [
        ("34602", "train_images/003a8ae2.jpg"),
        ("34604", "train_images/1b.jpg"),
    ]
    assert [*map(str, problems)] == [f"{path}: data 1: answers must be a list, got a string"]
    # three of ten agree: (3 * 2/3 + 7) / 10
    assert score(items[0], "Nous les gosses!") == pytest.approx({"accuracy": 0.9})
    assert score({**items[0], "answers": ["dakota"] * 10}, "Dakota.") == {"accuracy": 1.0}
    assert score(items[1], "x") == {}
    write(tmp_path / "r.json", items, ["a", "b"])
    assert json.loads((tmp_path / "r.json").read_text())[1] == {"question_id": 34604, "answer": "b"}


def test_vizwiz(tmp_path: Path) -> None:
    image = "VizWiz_val_00000000.jpg"
    rows = [
        {"image": image, "question": "Can you tell me?", "answerable": 0,
         "answer_type": "unanswerable", "answers": people(*["unanswerable"] * 9, "no")},
        {"image": image, "question": "What?", "answers": people("a")},
        {"question": "What?", "answers": people("a")},
    ]  # fmt: skip
    path = saved(tmp_path / "val.json", rows)
    items, problems = load("vizwiz", path, "val")
    assert [*map(str, problems)] == [
        f"{path}: entry 2: image is missing",
        f"{path}: entry 1: image {image} occurs before",
    ][::-1]
    # one of ten says no: 9 * (1/3) / 10
    assert score(items[0], "No") == pytest.approx({"accuracy": 0.3, "accuracy/unanswerable": 0.3})
    write(tmp_path / "r.json", items, ["No"])
    assert json.loads((tmp_path / "r.json").read_text()) == [{"image": image, "answer": "No"}]
    assert items[0]["image"] == f"val/{image}"


def test_gqa(tmp_path: Path) -> None:
    content = {
        "05515938": {"question": "What is this bird called?", "imageId": "2405722",
                     "answer": "parrot", "fullAnswer": "This is a parrot."},
        "7": {"question": "Is it?", "answer": "yes"},
        "8": "x",
        "9": {"question": "Is it?", "imageId": "n1", "answer": 3},
        "10": {"question": "Which?", "imageId": "n1"},
    }  # fmt: skip
    path = saved(tmp_path / "testdev_balanced_questions.json", content)
    items, problems = load("gqa", path, "images")
    assert [(item["id"], item["image"], item["answers"]) for item in items] == [
        ("05515938", "images/2405722.jpg", ["parrot"]),
        ("10", "images/n1.jpg", []),
    ]
    assert [*map(str, problems)] == [
        f"{path}: question 1: imageId is missing",
        f"{path}: question 2: must be an object, got a string",
        f"{path}: question 3: answer must be a string, got a number",
    ]
    assert score(items[0], "A parrot.") == {"accuracy": 1.0}
    assert score(items[0], "a parrot bird") == {"accuracy": 0.0}
    write(tmp_path / "r.json", items, ["parrot", "x"])
    assert json.loads((tmp_path / "r.json").read_text())[0] == {
        "questionId": "05515938",
        "prediction": "parrot",
    }


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", {"questions": [3]})
    with pytest.raises(ValueError, match=r"must be one of vqav2, okvqa, .*, got 'vqa'"):
        load("vqa", path, "")
    with pytest.raises(ValueError, match=r"gqa has its answers with its questions, got b.json too"):
        load("gqa", path, "", "b.json")
    with pytest.raises(ValueError, match=r"nothing in it can be used: \S+a\.json: questions 0:"):
        load("vqav2", path, "")
    with pytest.raises(ValueError, match="must hold a list, got an object"):
        load("vizwiz", path, "")
    with pytest.raises(ValueError, match="must hold an object of questions by id, got a list"):
        load("gqa", saved(tmp_path / "b.json", []), "")
