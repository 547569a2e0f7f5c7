"""Items of a task as the runner keeps them, and the means below a list of data sets."""

import hashlib
import json
from pathlib import Path

import pytest

from llama_adapter.evaluation.host_items import items_of, means, over_seeds, write_result
from llama_adapter.tasks.conll_files import Sentence
from llama_adapter.tasks.few_shot import NamedImage
from llama_adapter.tasks.squad_files import Question
from llama_adapter.tasks.vtab import LabelledImage


def test_items_have_ids_of_their_own_and_no_paths(tmp_path: Path) -> None:
    words, tags = ("Ana", "saw"), ("B-PER", "O")
    found = [
        Sentence(words, tags, "/here/a/test.txt", 3, None),
        Sentence(words, tags, "/here/a/test.txt", 3, 1),
        Sentence(words, tags, "/here/b/test.txt", 3, 1),
    ]
    rows = items_of(found)
    assert [row["id"] for row in rows] == ["test.txt:3", "test.txt:3:1", "test.txt:3:1 (2)"]
    assert "/here" not in json.dumps(rows)
    image = tmp_path / "1.png"
    image.write_bytes(b"pixels")
    (row,) = items_of([NamedImage("x/1.png", str(image), 2, True)])
    content = hashlib.sha256(b"pixels").hexdigest()
    assert row == {"id": "x/1.png", "label": 2, "novel": True, "sha256": content}
    image.write_bytes(b"others")
    assert items_of([LabelledImage("x/1.png", str(image), 2)])[0]["sha256"] != content
    (row,) = items_of([Question("q7", "who?", "Ana.", ("Ana",), (0,))])
    assert (row["id"], row["answers"]) == ("q7", ("Ana",))


def test_vtab_means_are_of_groups_where_the_tasks_are_known() -> None:
    scores = {"cifar100": {"accuracy": 40.0}, "dtd": {"accuracy": 60.0}, "eurosat": {"accuracy": 9}}
    found = means("vtab", scores)
    assert (found["natural"], found["specialized"]) == (50.0, 9.0)
    assert found["mean of groups"] == 29.5
    assert means("vtab", {"own": {"accuracy": 40.0}, "dtd": {"accuracy": 60.0}}) == {"accuracy": 50}


def test_the_mean_of_harmonic_means_is_not_that_of_the_means() -> None:
    scores = {"a": {"base": 80.0, "novel": 20.0}, "b": {"base": 50.0, "novel": 50.0}}
    found = means("base_to_novel", scores)
    assert found["base"] == 65.0
    assert found["harmonic_mean"] == pytest.approx((32 + 50) / 2)


def test_one_data_sets_harmonic_mean_is_that_of_its_seeds_means() -> None:
    """As CoCoOp's tables have it: 2 B N / (B + N) of the numbers beside it in the row."""
    rows = [
        {"base": 90.0, "novel": 10.0, "harmonic_mean": 18.0},
        {"base": 10.0, "novel": 90.0, "harmonic_mean": 18.0},
    ]
    found = over_seeds("base_to_novel", rows)
    assert found == {"base": 50.0, "novel": 50.0, "harmonic_mean": 50.0}
    assert means("base_to_novel", {"own": found}) == found
    assert over_seeds("squad", [{"f1": 1.0}, {"f1": 2.0}]) == {"f1": 1.5}


def test_base_images_alone_have_no_harmonic_mean() -> None:
    """As of a validation, whose images are all of base classes."""
    rows = {"a": over_seeds("base_to_novel", [{"base": 80.0}]), "b": {"base": 60.0}}
    assert means("base_to_novel", rows) == {"base": 70.0}


def test_images_have_a_list_and_accuracies(tmp_path: Path) -> None:
    images = [LabelledImage("a.png", "/x/a.png", 2), LabelledImage("b.png", "/x/b.png", 0)]
    path = write_result(tmp_path, images, [2, 1], {"accuracy": 50.0})
    assert json.loads(path.read_text()) == {"accuracy": 50.0}
    assert (tmp_path / "predictions.txt").read_text() == "a.png 2 2\nb.png 0 1\n"


def test_conlleval_has_all_sentences_and_each_of_several_files(tmp_path: Path) -> None:
    words, tags = ("Ana", "saw"), ("B-PER", "O")
    found = [Sentence(words, tags, f"/here/{name}/test.txt", 1, None) for name in "aba"]
    told = [["O", "O"], ["B-PER", "O"], ["B-PER", "O"]]
    path = write_result(tmp_path, found, told, {"f1": 80.0})
    assert path == tmp_path / "conlleval.txt"
    assert path.read_text().count("Ana B-PER ") == 3
    first, second = (tmp_path / f"conlleval-{number}-test.txt.txt" for number in (1, 2))
    assert [line.split()[-1] for line in first.read_text().splitlines() if "Ana" in line] == [
        "O", "B-PER"
    ]  # fmt: skip
    assert second.read_text().count("Ana B-PER B-PER") == 1
    for one in (*tmp_path.iterdir(),):
        one.unlink()
    write_result(tmp_path, found[:1], told[:1], {"f1": 0.0})
    assert [one.name for one in tmp_path.iterdir()] == ["conlleval.txt"]
