"""CoOp's files are read or named entry by entry; classes are halved and images drawn as it does."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.tasks.few_shot import (
    COOP_DATA,
    NamedImage,
    base_and_novel,
    draw,
    read_aircraft,
    read_imagenet,
    read_split,
)
from tests.llama_adapter.tasks.image_hosts import noise, write_split


def test_the_eleven_data_sets() -> None:
    assert len(COOP_DATA) == 11
    assert all(one.template.count("{}") == 1 for one in COOP_DATA.values())
    assert COOP_DATA["OxfordFlowers"].template == "a photo of a {}, a type of flower."
    assert COOP_DATA["Caltech101"].split == "split_zhou_Caltech101.json"
    assert [name for name, one in COOP_DATA.items() if not one.split] == [
        "ImageNet", "FGVCAircraft"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "base", "novel"),
    [
        ([3, 1, 3, 0, 7], [0, 1], [3, 7]),
        ([5, 2, 9], [2, 5], [9]),
        ([4], [4], []),
        (list(range(101)), list(range(51)), list(range(51, 101))),
    ],
)
def test_the_base_is_the_first_half_rounded_up(
    labels: list[int], base: list[int], novel: list[int]
) -> None:
    assert base_and_novel(labels) == (base, novel)


def test_shots_are_drawn_class_by_class_and_all_of_a_class_with_fewer() -> None:
    images = [NamedImage(f"{n}", f"{n}", n % 3 if n < 9 else 4) for n in range(11)]
    drawn = draw(images, 3, random.Random(2))
    by_label = {n: [one for one in drawn if one.label == n] for n in (0, 1, 2, 4)}
    assert [len(rows) for rows in by_label.values()] == [3, 3, 3, 2]
    assert len({one.id for one in drawn}) == 11
    two = draw(images, 2, random.Random(2))
    assert [one.label for one in two] == [0, 0, 1, 1, 2, 2, 4, 4]
    assert draw(images, 2, random.Random(2)) == two
    assert any(draw(images, 2, random.Random(n)) != two for n in range(3, 6))
    # one source of chance draws class after class, in the order in which classes come
    chance = random.Random(2)
    pools = [[one for one in images if one.label == n] for n in (0, 1, 2, 4)]
    assert two == tuple(one for pool in pools for one in chance.sample(pool, 2))


def test_a_split_file_is_read(tmp_path: Path) -> None:
    path = write_split(tmp_path, classes=4, counts={"train": 8, "val": 4, "test": 6})
    splits, problems = read_split(path, tmp_path / "images")
    assert not problems
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [8, 4, 6]
    assert splits.names == {0: "class_a", 1: "class_b", 2: "class_c", 3: "class_d"}
    assert splits.test[5] == NamedImage(
        "test/test/5.png", str(tmp_path / "images" / "test" / "5.png"), 1
    )


def test_entries_that_name_no_image_are_named(tmp_path: Path) -> None:
    path = write_split(tmp_path, classes=2, counts={"train": 4, "val": 2, "test": 2})
    content = json.loads(path.read_text())
    content["train"] += [
        ["train/0.png", 0],
        "train/0.png",
        ["train/0.png", "0", "class_a"],
        ["train/0.png", True, "class_a"],
        ["train/0.png", 0, " "],
        ["train/0.png", 0, "class_b"],
        ["absent.png", 0, "class_a"],
        ["../../x.png", 0, "class_a"],
        ["train/1.png", 1, "class_b"],
        ["absent.png", 8, "class_x"],
        ["train/2.png", 9, "class_\ud800"],
    ]
    path.write_text(json.dumps(content))
    splits, problems = read_split(path, tmp_path / "images")
    assert len(splits.train) == 4
    assert 8 not in splits.names
    told = [str(one).removeprefix(f"{path}: train ") for one in problems]
    assert [one.split(":")[0] for one in told] == [str(n) for n in range(4, 15)]
    expected = (
        "must be a path, a label and a class's name, got 2 values",
        "must be a path, a label and a class's name, got a string",
        "label must be a number from 0, got '0'",
        "label must be a number from 0, got True",
        "path and class's name must be texts, got 'train/0.png' and ' '",
        "label 0 must be of 'class_a' as before, got 'class_b'",
        "absent.png: no such file",
        "must lie in",
        "image 'train/1.png' is in the split already",
        "absent.png: no such file",
        "class's name holds half of a surrogate pair",
    )
    for reason, wanted in zip(told, expected, strict=True):
        assert wanted in reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "must be an object, got a list"),
        ({"train": [], "val": []}, "test is missing"),
        ({"train": [], "val": {}, "test": []}, "val must be a list, got an object"),
        ({"train": [], "val": [], "test": []}, "nothing in it can be used: it is empty"),
    ],
)
def test_a_file_without_splits_is_an_error(content: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"split.json: {reason}"):
        read_split(tmp_path / "split.json", tmp_path)


def test_imagenet_has_a_folder_per_class(tmp_path: Path) -> None:
    for n, key in enumerate(("n02", "n01", "n03")):
        for split, count in (("train", 3), ("val", 2)):
            for m in range(count):
                noise(tmp_path / "images" / split / key / f"{m}.png", 10 * n + m)
    (tmp_path / "images" / "train" / "n01" / ".DS_Store").write_text("no image")
    (tmp_path / "classnames.txt").write_text("n01 tench\nn02 great white shark\nn09 lost\nn03\n")
    splits, problems = read_imagenet(tmp_path)
    assert splits.names == {0: "tench", 1: "great white shark"}
    assert [one.id for one in splits.test] == [
        "val/n01/0.png", "val/n01/1.png", "val/n02/0.png", "val/n02/1.png"
    ]  # fmt: skip
    assert [one.label for one in splits.train] == [0, 0, 0, 1, 1, 1]
    assert splits.validation == ()
    assert [one.index for one in problems] == [3, 4]
    with pytest.raises(FileNotFoundError, match="images/train: no such folder"):
        read_imagenet(tmp_path / "images")


def test_aircraft_has_lists_of_numbers_and_variants(tmp_path: Path) -> None:
    (tmp_path / "variants.txt").write_text("A300B4\n707-320\nDC-3 a\n")
    for n, split in enumerate(("train", "val", "test")):
        noise(tmp_path / "images" / f"00{n}.jpg", n)
        (tmp_path / f"images_variant_{split}.txt").write_text(f"00{n} DC-3 a\n")
    with (tmp_path / "images_variant_test.txt").open("a") as file:
        file.write("001 Concorde\n009 707-320\n")
    splits, problems = read_aircraft(tmp_path)
    assert splits.names == {0: "A300B4", 1: "707-320", 2: "DC-3 a"}
    assert [one.label for one in splits.test] == [2]
    assert [one.index for one in problems] == [2, 3]
    assert "must name a variant of variants.txt, got 'Concorde'" in str(problems[0])
    assert "009.jpg: no such file" in str(problems[1])
