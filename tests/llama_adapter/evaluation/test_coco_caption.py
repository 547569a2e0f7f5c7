"""COCO Caption's files, and BLEU and CIDEr against numbers worked out by hand."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.evaluation import coco_caption
from llama_adapter.evaluation.coco_caption import (
    aggregate,
    caption_scores,
    java_tokenizer_runs,
    load,
    score,
    tokens,
    write,
)
from llama_adapter.evaluation.runner import Item

REFERENCES = [["A cat sat on it.", "a cat sits"], ["the dog runs fast"], ["Blue bus here, now!"]]
PREDICTIONS = ["A cat sat.", "The dog\nruns fast", "red bus"]


def karpathy_image(cocoid: int, split: str, captions: list[str]) -> dict[str, Any]:
    sentences = [
        {"tokens": caption.lower().split(), "raw": caption, "imgid": cocoid, "sentid": 10 * cocoid}
        for caption in captions
    ]
    return {
        "filepath": "val2014", "sentids": [10 * cocoid] * len(captions), "imgid": cocoid - 1,
        "filename": f"COCO_val2014_{cocoid:012d}.jpg", "split": split, "cocoid": cocoid,
        "sentences": sentences,
    }  # fmt: skip


def saved(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def items() -> list[Item]:
    return [
        {"id": str(i + 7), "question": "", "image": "a", "references": references}
        for i, references in enumerate(REFERENCES)
    ]


def test_karpathys_splits(tmp_path: Path) -> None:
    captions = ["A man rides a horse.", "A horse ."]
    splits = ["test", "train", "restval", "val", "test"]
    images = [karpathy_image(i + 3, split, captions) for i, split in enumerate(splits)]
    path = saved(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    found, problems = load(path, "pictures")
    assert problems == []
    assert found[1] == {
        "id": "7",
        "question": "Generate caption for this image",
        "image": "pictures/val2014/COCO_val2014_000000000007.jpg",
        "references": captions,
    }
    assert [item["id"] for item in found] == ["3", "7"]
    assert [item["id"] for item in load(path, "", "train+restval")[0]] == ["4", "5"]
    message = "split must be of restval, test, train, val, got 'dev'"
    with pytest.raises(ValueError, match=message):
        load(path, "pictures", "dev")


def test_malformed_images_of_karpathys_file_are_named(tmp_path: Path) -> None:
    images = [karpathy_image(i, "test", ["a"]) for i in range(10)]
    images[1]["sentences"] = []
    images[2]["sentences"] = [{"raw": "a"}, {"tokens": ["a"]}]
    images[3]["cocoid"] = "3"
    images[4]["cocoid"] = 0
    for place, filepath in ((6, None), (7, 5), (8, ["a"])):
        images[place]["filepath"] = filepath
    del images[9]["filepath"]
    path = saved(tmp_path / "k.json", {"images": [*images, "x"]})
    found, problems = load(path, "")
    assert [item["id"] for item in found] == ["0", "5", "9"]
    assert found[2]["image"] == "COCO_val2014_000000000009.jpg"
    assert sorted(map(str, problems)) == [
        f"{path}: images 10: must be an object, got a string",
        f"{path}: images 1: sentences is empty",
        f"{path}: images 2: sentence 1: raw is missing",
        f"{path}: images 3: cocoid must be an integer, got a string",
        f"{path}: images 4: cocoid 0 occurs before",
        f"{path}: images 6: filepath must be a string, got null",
        f"{path}: images 7: filepath must be a string, got a number",
        f"{path}: images 8: filepath must be a string, got a list",
    ]


def test_cocos_own_annotations(tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "height": 4, "width": 4},
            {"id": 2, "file_name": "COCO_val2014_000000000002.jpg"},
            {"id": 5, "file_name": "five.jpg"},
            {"id": 6},
        ],
        "annotations": [
            {"image_id": 2, "id": 1, "caption": "A cup."},
            {"image_id": 9, "id": 2, "caption": "Two birds."},
            {"image_id": 2, "id": 3, "caption": "A red cup."},
            {"image_id": 2, "id": 4, "caption": ""},
            {"image_id": 6, "id": 5, "caption": "A cup."},
        ],
    }
    path = saved(tmp_path / "captions_val2014.json", content)
    found, problems = load(path, tmp_path)
    assert [(item["id"], item["image"], item["references"]) for item in found] == [
        ("9", f"{tmp_path}/COCO_val2014_000000000009.jpg", ["Two birds."]),
        ("2", f"{tmp_path}/COCO_val2014_000000000002.jpg", ["A cup.", "A red cup."]),
    ]
    assert sorted(map(str, problems)) == [
        f"{path}: annotations 3: caption is empty",
        f"{path}: annotations 4: image_id 6 is none of the images",
        f"{path}: images 2: no annotation is of id 5",
        f"{path}: images 3: file_name is missing",
    ]
    with pytest.raises(ValueError, match="is one split of its own: split must be None, got 'val'"):
        load(path, tmp_path, "val")


@pytest.mark.parametrize("content", [[], {}, {"images": [], "annotations": []}, {"images": [1]}])
def test_files_with_nothing_usable_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(
        ValueError, match=r"must hold an object with a list|nothing in it can be us"
    ):
        load(saved(tmp_path / "a.json", content), "")


@pytest.mark.parametrize("java", [True, False])
def test_bleu_and_cider_by_hand(
    java: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # BLEU. Words that match: 3 of 3, 4 of 4, 1 of 2 (bus) = 8/9; pairs 2/2, 3/3, 0/1 = 5/6; triples
    # 1/1, 2/2 = 1; fours 1/1 = 1. Length 3 + 4 + 2 = 9, closest references 3 + 4 + 4 = 11.
    penalty = math.exp(1 - 11 / 9)
    precisions = [8 / 9, 5 / 6, 1, 1]
    bleu = [penalty * math.prod(precisions[:n]) ** (1 / n) for n in (1, 2, 3, 4)]
    # CIDEr. No n-gram is of two images, so each has idf log 3 and cancels in the cosines.
    # First image against "a cat sat on it": cosines 3/sqrt(3*5), 2/sqrt(2*4), 1/sqrt(1*3), 0, with
    # 2 against 4 pairs of words; against "a cat sits": 2/3, 1/2, 0, 0, as long.
    long = (3 / math.sqrt(15) + 2 / math.sqrt(8) + 1 / math.sqrt(3)) / 4 * math.exp(-4 / 72)
    short = (2 / 3 + 1 / 2) / 4
    # second: equal, so 1. Third: 1/sqrt(2*4) for words, nothing else, 1 against 3 pairs.
    third = 1 / math.sqrt(8) / 4 * math.exp(-4 / 72)
    ciders = [10 * (long + short) / 2, 10, 10 * third]
    pytest.importorskip("pycocoevalcap")
    if java and not java_tokenizer_runs():
        pytest.skip("needs Java, in which the official tokenizer is written")
    monkeypatch.setattr(coco_caption, "java_tokenizer_runs", lambda: java)
    got = caption_scores(items(), PREDICTIONS)
    assert [got.scores[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, rel=1e-7)
    assert [scores["cider"] for scores in got.image_scores] == pytest.approx(ciders, rel=1e-9)
    assert got.scores["cider"] == pytest.approx(sum(ciders) / 3, rel=1e-9)
    assert got.scores["ptb_tokens"] == java
    assert ("Java)" in got.tokenizer, "no Java" in got.tokenizer) == (True, not java)
    assert aggregate(items(), PREDICTIONS) == got.scores
    printed = capsys.readouterr().err
    assert f"BLEU and CIDEr on tokens of {got.tokenizer}\n" in printed


def test_an_empty_caption_scores_nothing() -> None:
    # words: 0 of 0, 4 of 4, 1 of 2 = 5/6; length 6 against 3 (the shorter of 5 and 3) + 4 + 4 = 11
    pytest.importorskip("pycocoevalcap")
    got = caption_scores(items(), ["", *PREDICTIONS[1:]])
    assert got.image_scores[0] == {"cider": 0.0}
    assert got.scores["bleu_1"] == pytest.approx(5 / 6 * math.exp(1 - 11 / 6), rel=1e-7)


def test_the_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ModuleNotFoundError, match=r"need pycocoevalcap .*kernels\[eval\]'$"):
        aggregate(items(), PREDICTIONS)


CAPTIONS = {
    'The dog\'s "red" ball.': "the dog 's red ball",
    "It isn't big -- it can't fly 3,000...": "it is n't big it ca n't fly 3,000",
    "A TV/monitor & a mid-air jump, 30 m; cannot": "a tv/monitor & a mid-air jump 30 m can not",
    "two (small) men": "two -lrb- small -rrb- men",
    "it\u2019s a \u201cnice\u201d one!": "it 's a nice one",
    "we'll see they're\u2028here at 5:30, U.S.": "we 'll see they 're here at 5:30 u.s.",
    "": "",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_tokens(caption: str) -> None:
    assert " ".join(tokens(caption)) == CAPTIONS[caption]


def test_the_approximation_is_the_java_tokenizer_on_these() -> None:
    pytest.importorskip("pycocoevalcap")
    if not java_tokenizer_runs():
        pytest.skip("needs Java, in which the official tokenizer is written")
    got = coco_caption._tokens_of_java({0: list(CAPTIONS), 1: ["A cup."]})
    assert got == {0: list(CAPTIONS.values()), 1: ["a cup"]}


def test_results_are_what_cocos_server_takes(tmp_path: Path) -> None:
    write(tmp_path / "captions_val2014_llama_results.json", items(), ["a", "b ü", ""])
    got = json.loads((tmp_path / "captions_val2014_llama_results.json").read_text("utf-8"))
    assert got == [
        {"image_id": 7, "caption": "a"},
        {"image_id": 8, "caption": "b ü"},
        {"image_id": 9, "caption": ""},
    ]
    with pytest.raises(ValueError, match="one for each of 3 items"):
        write(tmp_path / "b.json", items(), ["a"])
    assert score(items()[0], " a red  cup ") == {"words": 3.0}
