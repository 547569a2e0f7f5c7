"""The hub's records, its metrics and its capabilities, against numbers worked out by hand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation.lvlm_ehub import (
    MAIN_SCORE,
    aggregate,
    capability_scores,
    load,
    score,
    write,
)
from llama_adapter.evaluation.runner import Item


def item(metric: str, *answers: str) -> Item:
    return {"id": "0", "question": "?", "image": "a", "answers": list(answers), "metric": metric}


def saved(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_records_are_read_and_written_as_the_hubs(tmp_path: Path) -> None:
    record = {
        "question": "What is it?", "answer": "a cat", "gt_answers": ["cat", "kitten"],
        "image_path": "x/1.jpg", "model_name": "other",
    }  # fmt: skip
    rows = [
        record, {**record, "gt_answers": "dog"}, {**record, "gt_answers": []},
        {**record, "gt_answers": [1]}, {**record, "question": ""}, {**record, "gt_answers": " "},
    ]  # fmt: skip
    path = saved(tmp_path / "VQAv2.json", rows)
    items, problems = load(path, "images", "vqa")
    assert items == [
        {"id": "0", "question": "What is it?", "image": "images/x/1.jpg",
         "answers": ["cat", "kitten"], "metric": "vqa"},
        {"id": "1", "question": "What is it?", "image": "images/x/1.jpg",
         "answers": ["dog"], "metric": "vqa"},
    ]  # fmt: skip
    assert [*map(str, problems)] == [
        f"{path}: entry 2: gt_answers is empty",
        f"{path}: entry 3: gt_answers must be a string or a list of strings, got a list",
        f"{path}: entry 4: question is empty",
        f"{path}: entry 5: gt_answers is empty",
    ]
    write(tmp_path / "r.json", items, ["cat", "a dog"], model_name="ours")
    assert json.loads((tmp_path / "r.json").read_text())[1] == {
        "question": "What is it?", "answer": "a dog", "gt_answers": "dog",
        "image_path": "images/x/1.jpg", "model_name": "ours",
    }  # fmt: skip
    assert [one["id"] for one in load(path, "", "kie")[0]] == ["1"]
    assert str(load(path, "", "kie")[1][0]).endswith("must be one text for kie, got 2")
    with pytest.raises(ValueError, match="metric must be one of vqa, ocr, kie, mrr, caption, got"):
        load(path, "", "bleu")
    with pytest.raises(ValueError, match="nothing in it can be used"):
        load(saved(tmp_path / "b.json", [1]), "", "vqa")


@pytest.mark.parametrize(
    ("metric", "answers", "prediction", "expected"),
    [
        ("vqa", ["cat", "kitten"], "It is a Kitten.", {"accuracy": 1}),
        ("vqa", ["cat"], "a category", {"accuracy": 0}),
        ("vqa", ["two"], "there are 2 of them", {"accuracy": 1}),
        ("vqa", ["A"], "anything", {"accuracy": 0}),
        ("vqa", ["yes"], "", {"accuracy": 0}),
        ("ocr", ["STOP!"], 'The sign says "Stop".', {"accuracy": 1}),
        ("ocr", ["it's"], "its", {"accuracy": 1}),
        ("ocr", ["stop"], "nonstop", {"accuracy": 0}),
        ("ocr", ["two"], "2", {"accuracy": 0}),
        ("mrr", ["no idea", "maybe", "yes"], "Yes, or maybe.", {"mrr": 1 / 2}),
        ("mrr", ["no idea", "maybe", "yes"], "yes", {"mrr": 1 / 3}),
        ("mrr", ["no"], "not", {"mrr": 0}),
        # shared: one "10", one "total"; the second "10" and "Total" have no partner
        ("kie", ["total 10 eur"], "10 10 total Total", {"shared": 2, "predicted": 4, "gold": 3}),
        ("caption", ["a cat"], "a red cat", {"words": 3}),
    ],
)
def test_scores(
    metric: str, answers: list[str], prediction: str, expected: dict[str, float]
) -> None:
    assert score(item(metric, *answers), prediction) == pytest.approx(expected)


def test_information_extraction_counts_the_datasets_words() -> None:
    # shared 2 + 1, predicted 4 + 1, gold 3 + 2: precision 3/5, recall 3/5; the mean of the two f1
    # would be (4/7 + 2/3) / 2 instead
    items = [item("kie", "total 10 eur"), item("kie", "5 May")]
    got = aggregate(items, ["10 10 total Total", "5"])
    assert got == pytest.approx({"precision": 0.6, "recall": 0.6, "f1": 0.6})
    # 3/4 and 3/5: f1 = 2 * 3 / 9
    got = aggregate(items, ["10 total eur x", ""])
    assert got == pytest.approx({"precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3})
    assert aggregate(items, ["", ""]) == {"precision": 0, "recall": 0, "f1": 0}


def test_means_of_the_others() -> None:
    items = [item("vqa", "cat"), item("vqa", "dog"), item("vqa", "bird"), item("vqa", "cow")]
    assert aggregate(items, ["a cat", "cat", "Bird.", "no"]) == {"accuracy": 0.5}
    assert aggregate([item("mrr", "x", "y"), item("mrr", "x")], ["y", "x"]) == {"mrr": 0.75}
    with pytest.raises(ValueError, match="items must be of one dataset, got metrics kie, vqa"):
        aggregate([item("vqa", "x"), item("kie", "x")], ["x", "x"])


def test_captions_are_scored_by_cider() -> None:
    # no n-gram is of two pictures, so equal captions of four words or more have cosines of 1 for
    # n = 1..4, and "a b c" against itself for n = 1..3: 10, 10 and 7.5
    pytest.importorskip("pycocoevalcap")
    captions = ["the dog runs fast", "one red bus here", "birds fly south"]
    got = aggregate([item("caption", text) for text in captions], captions)
    assert got[MAIN_SCORE["caption"]] == pytest.approx((10 + 10 + 7.5) / 3)


CAPABILITIES = {"perception": ["cifar", "count"], "captions": ["flickr"]}
TABLE = {
    "ours": {"cifar": 0.6, "count": 0.3, "flickr": 0.8, "unused": 1.0},
    "other": {"cifar": 0.8, "count": 0.2, "flickr": 0.4},
}


def test_capabilities_are_relative_to_the_best_model() -> None:
    # ours: (0.6/0.8 + 0.3/0.3) / 2 = 0.875, 0.8/0.8 = 1; other: (1 + 2/3) / 2 = 5/6, 0.4/0.8
    got = capability_scores(TABLE, CAPABILITIES)
    assert list(got["ours"]) == ["perception", "captions", "average"]
    assert list(got["ours"].values()) == pytest.approx([0.875, 1.0, 0.9375])
    assert list(got["other"].values()) == pytest.approx([5 / 6, 0.5, (5 / 6 + 0.5) / 2])


def test_one_model_needs_maxima() -> None:
    one = {"ours": TABLE["ours"]}
    message = "maxima must be given unless two or more models are compared, got 1"
    with pytest.raises(ValueError, match=message):
        capability_scores(one, CAPABILITIES)
    got = capability_scores(one, CAPABILITIES, {"cifar": 1.2, "count": 0.4, "flickr": 1.6})
    # (0.6/1.2 + 0.3/0.4) / 2 = 0.625, 0.8/1.6
    assert list(got["ours"].values()) == pytest.approx([0.625, 0.5, 0.5625])


@pytest.mark.parametrize(
    ("change", "capabilities", "maxima", "message"),
    [
        ({}, {"a": ["cifar", "pets"]}, None, "table must have every dataset, got no pets of ours"),
        ({}, {"a": []}, None, "capabilities must each name at least one dataset"),
        ({}, {}, None, "capabilities must each name at least one dataset"),
        ({}, {"a": ["cifar"]}, {"b": 1.0}, "maxima must have every dataset, got no cifar"),
        ({}, {"a": ["cifar"]}, {"cifar": 0.0}, "best score of cifar must be positive, got 0.0"),
        ({"cifar": float("nan")}, {"a": ["cifar"]}, None, "cifar of other must be finite, got nan"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    change: dict[str, float],
    capabilities: dict[str, list[str]],
    maxima: dict[str, float] | None,
    message: str,
) -> None:
    table = {**TABLE, "other": {**TABLE["other"], **change}}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        capability_scores(table, capabilities, maxima)
