"""The bundled multi-modal task: disjoint splits, known shares, files of ScienceQA's layout."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import multimodal_task
from benchmarks.multimodal_task import PICTURED, QUOTA, Question, question, questions, write_task
from benchmarks.multimodal_world import (
    ATTRIBUTES,
    COLOURS,
    COUNTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SHOWN,
    SIDE,
    SPLITS,
    THINGS,
    VALUES,
    Scene,
    draw,
    facts,
    known,
    pairs,
    random_scene,
)
from llama_adapter.evaluation import scienceqa

SIZES = {"train": 200, "test": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task")
    write_task(path, SIZES, seed=3)
    return path


@pytest.mark.parametrize(
    ("combined", "parts"), [(pairs, (SHAPES, COLOURS)), (known, (THINGS, RELATIONS))]
)
def test_the_tests_combinations_are_no_others_and_each_split_has_every_part(
    combined, parts
) -> None:
    found = {split: set(combined(split)) for split in SPLITS}
    assert found["train"] == found["val"]
    assert not found["train"] & found["test"]
    assert len(found["train"] | found["test"]) == len(parts[0]) * len(parts[1])
    assert 4 * len(found["test"]) == len(parts[0]) * len(parts[1])
    for pairs_of in found.values():
        assert {pair[1] for pair in pairs_of} == {*parts[1]}
    assert {pair[0] for pair in found["train"]} == {*parts[0]}


def test_questions_of_the_test_ask_for_and_show_what_training_does_not(folder: Path) -> None:
    problems = json.loads((folder / "problems.json").read_text())
    scenes = json.loads((folder / "scenes.json").read_text())
    shown = {
        split: {
            (scene["shape"], scene["colour"])
            for name, scene in scenes.items()
            if problems[name]["split"] == split
        }
        for split in SIZES
    }
    assert shown["train"] <= {*pairs("train")}
    assert not shown["train"] & shown["test"]
    asked = {
        split: {
            (scenes[name]["shape"], one["category"])
            for name, one in problems.items()
            if one["topic"] == "recall" and one["split"] == split
        }
        for split in SIZES
    }
    assert asked["test"]
    assert not asked["train"] & asked["test"]


def test_the_share_that_needs_a_picture_is_known_exactly(folder: Path) -> None:
    problems = json.loads((folder / "problems.json").read_text())
    for split, count in SIZES.items():
        kinds = Counter(one["topic"] for one in problems.values() if one["split"] == split)
        assert {kind: 20 * n / count for kind, n in kinds.items()} == QUOTA
        assert 20 * sum(kinds[kind] for kind in PICTURED) / count == 8
    with pytest.raises(ValueError, match="multiple of 20, got 30"):
        questions("train", 30, facts(0))


def test_scienceqas_loader_reads_all_of_it_into_every_class(folder: Path) -> None:
    for split, count in SIZES.items():
        items, problems = scienceqa.load(
            folder / "problems.json", folder / "pid_splits.json", split, folder / "images"
        )
        assert (len(items), problems) == (count, [])
        assert {name for item in items for name in scienceqa.classes_of(item)} == {
            *scienceqa.CLASSES
        }
        for item in items:
            assert item["has_image"] == (item["topic"] in ("see", "recall", "told"))
            assert bool(item["hint"]) == (item["topic"] in ("told", "read"))
            if item["image"] is not None:
                with Image.open(item["image"]) as picture:
                    assert (picture.size, picture.mode) == ((SIDE, SIDE), "RGB")


def test_the_right_answer_is_what_the_scene_or_the_facts_say(folder: Path) -> None:
    problems = json.loads((folder / "problems.json").read_text())
    scenes = json.loads((folder / "scenes.json").read_text())
    world = facts(3)
    for name, one in problems.items():
        right = one["choices"][one["answer"]]
        assert len(set(one["choices"])) == len(one["choices"]) in (2, 3, 4)
        if one["topic"] in ("see", "told"):
            assert right == scenes[name][one["category"]]
        elif one["topic"] == "recall":
            assert right == world[scenes[name]["shape"], one["category"]]
            assert SHOWN in one["question"]
        elif one["topic"] == "read":
            assert sum(f" {choice}" in one["hint"] for choice in one["choices"]) == 1
        else:
            words = one["question"].rstrip("?").split()
            (thing,) = (thing for thing in THINGS if thing in words)
            assert right == world[thing, one["category"]]


def test_the_same_seed_writes_the_same_files_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_task(tmp_path / name, {"test": 20}, seed)
    a, b, c = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in "abc"
    )
    assert a == b
    assert a != c


def test_options_tell_nothing_of_a_question_that_needs_its_picture() -> None:
    rng, world = random.Random(1), facts(1)
    for split in ("train", "test"):
        right: Counter[str] = Counter()
        offered: Counter[str] = Counter()
        for _ in range(6000):
            one = question(rng, rng.choice(PICTURED), split, world, False)
            right[one.right] += 1
            for choice in one.choices:
                offered[choice] += 1 / len(one.choices)
        for value, count in offered.items():
            # a guess among the options is right as often for each value
            assert abs(right[value] - count) < 5 * count**0.5, (split, value)
    recalled = {
        split: {
            choice
            for _ in range(400)
            for choice in question(rng, "recall", split, world, False).choices
        }
        for split in ("train", "test")
    }
    assert not recalled["train"] & recalled["test"]


def test_facts_are_one_value_a_relation_and_no_two_shapes_share_one() -> None:
    world = facts(7)
    assert set(world) == {(thing, relation) for thing in THINGS for relation in RELATIONS}
    for relation, values in VALUES.items():
        assert sorted(world[shape, relation] for shape in SHAPES) == sorted(values)


def test_a_picture_shows_its_scene() -> None:
    rng = random.Random(5)
    for _ in range(60):
        scene = random_scene(rng, rng.choice(SPLITS))
        pixels = np.asarray(draw(scene, rng)).astype(int)
        coloured = pixels.max(2) - pixels.min(2) > 60
        south, east = divmod(PLACES.index(scene.place), 2)
        half = SIDE // 2
        quarter = coloured[half * south : half * (south + 1), half * east : half * (east + 1)]
        assert quarter.sum() == coloured.sum() > 0
        mean = np.median(pixels[coloured], axis=0)
        assert np.abs(mean - COLOURS[scene.colour]).max() < 40
        starts = (0, half // 2)
        cells = [
            quarter[a : a + half // 2, b : b + half // 2].sum() for a in starts for b in starts
        ]
        assert sum(cell > 8 for cell in cells) == COUNTS.index(scene.count) + 1


def test_a_scene_may_be_asked_for_by_value() -> None:
    rng = random.Random(2)
    for name, values in ATTRIBUTES.items():
        for value in values:
            scene = random_scene(rng, "train", name, value)
            assert getattr(scene, name) == value
            assert (scene.shape, scene.colour) in pairs("train")
            assert value in scene.caption


def test_the_command_writes_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--train", "20", "--val", "20", "--test", "20"]
    assert multimodal_task.main(arguments) == 0
    assert "60 questions" in capsys.readouterr().out
    splits = json.loads((tmp_path / "pid_splits.json").read_text())
    assert {name: len(ids) for name, ids in splits.items()} == dict.fromkeys(SPLITS, 20)


def test_right_is_the_right_choice() -> None:
    one = Question("see", "count", "?", "", ("one", "two"), 1, Scene("bar", "red", "two", "n"))
    assert one.right == "two"
