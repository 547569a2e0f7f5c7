"""Base classes and novel ones of an image data set, and a few images of each to train on.

CoOp's files and CoCoOp's protocol (LLaMA-Adapter, appendix B.3, Table 11): classes in the order of
their labels, the first half of them, rounded up, is the base; the rest is novel.
"""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.data.checked_files import (
    LIST,
    FileProblem,
    against,
    numbered_lines,
    read_json,
    usable,
)
from llama_adapter.data.items import kind_of
from llama_adapter.data.records import against_text
from llama_adapter.multimodal.pictures import located

SHOTS = 16
# as many of a class are chosen by, where there are shots enough
VALIDATION_SHOTS = 4
SPLITS = ("train", "val", "test")
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class CoopSource:
    """One of CoOp's eleven data sets.

    Attributes:
        name: as its split file is named.
        folder: where it lies below the folder of all.
        images: folder below that, from which images' paths start.
        template: of a class's text.
        split: its split file; "" where it has other files.
    """

    name: str
    folder: str
    images: str
    template: str = TEMPLATE
    split: str = ""


def _split(name: str, folder: str, images: str, template: str = TEMPLATE) -> CoopSource:
    return CoopSource(name, folder, images, template, f"split_zhou_{name}.json")


COOP_DATA: dict[str, CoopSource] = {
    source.name: source
    for source in (
        CoopSource("ImageNet", "imagenet", "images"),
        _split("Caltech101", "caltech-101", "101_ObjectCategories"),
        _split("OxfordPets", "oxford_pets", "images", "a photo of a {}, a type of pet."),
        _split("StanfordCars", "stanford_cars", ""),
        _split("OxfordFlowers", "oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
        _split("Food101", "food-101", "images", "a photo of {}, a type of food."),
        CoopSource(
            "FGVCAircraft", "fgvc_aircraft", "images", "a photo of a {}, a type of aircraft."
        ),
        _split("SUN397", "sun397", "SUN397"),
        _split("DescribableTextures", "dtd", "images", "{} texture."),
        _split("EuroSAT", "eurosat", "2750", "a centered satellite photo of {}."),
        _split("UCF101", "ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
    )
}


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image, and which class it shows.

    Attributes:
        id: its split and its path, as the data has it.
        path: where it lies.
        label: among the classes of its half, from 0.
        novel: the class is none of those that are trained on.
    """

    id: str
    path: str
    label: int
    novel: bool = False


@dataclass(frozen=True)
class Splits:
    """All images of a data set, with the labels that its files give.

    Attributes:
        train, validation, test: its images.
        names: of the classes, by their labels in ascending order.
    """

    train: tuple[NamedImage, ...]
    validation: tuple[NamedImage, ...]
    test: tuple[NamedImage, ...]
    names: Mapping[int, str]


def read_split(path: str | Path, images: str | Path) -> tuple[Splits, list[FileProblem]]:
    """A split file: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.

    Args:
        path: of the file.
        images: folder that the images' paths start from and may not leave.

    Returns:
        The images, and what cannot be used by file and place.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, a split is missing, or nothing in one can be used.
    """
    content = read_json(path)
    reason = against(content, dict.fromkeys(SPLITS, LIST))
    if reason is not None:
        raise ValueError(f"{path}: {reason}")
    names: dict[int, str] = {}
    problems: list[FileProblem] = []
    found = []
    for split in SPLITS:
        rows: dict[str, NamedImage] = {}
        own: list[FileProblem] = []
        for place, entry in enumerate(content[split]):
            image = _image(entry, split, Path(images), names)
            if isinstance(image, NamedImage) and image.id in rows:
                image = f"image {entry[0]!r} is in the split already"
            if isinstance(image, str):
                own.append(FileProblem(place, image, str(path), split))
            else:
                rows[image.id] = image
        found.append(tuple(usable(rows.values(), own, path)[0]))
        problems += own
    return Splits(*found, names=dict(sorted(names.items()))), problems


def _image(entry: Any, split: str, root: Path, names: dict[int, str]) -> NamedImage | str:
    """What an entry says, whose class is added to the names; or why it cannot be used."""
    if not isinstance(entry, list) or len(entry) != 3:
        got = f"{len(entry)} values" if isinstance(entry, list) else kind_of(entry)
        return f"must be a path, a label and a class's name, got {got}"
    image, label, name = entry
    if not isinstance(image, str) or not isinstance(name, str) or not name.strip():
        return f"path and class's name must be texts, got {image!r} and {name!r}"
    if (reason := against_text("class's name", name)) is not None:
        return reason
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        return f"label must be a number from 0, got {label!r}"
    if names.get(label, name) != name:
        return f"label {label} must be of {names[label]!r} as before, got {name!r}"
    try:
        place = located(image, root)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    names[label] = name
    return NamedImage(f"{split}/{image}", str(place), label)


def read_imagenet(folder: str | Path) -> tuple[Splits, list[FileProblem]]:
    """ImageNet as CoOp has it: classnames.txt, images/train and images/val with a folder per class.

    As in CoOp the validation images are the test; there are none to choose by but training images.

    Args:
        folder: of classnames.txt, whose lines are `n01440764 tench`, and of images.

    Raises:
        FileNotFoundError: classnames.txt or a folder of images is missing.
        ValueError: no class or no image can be used.
    """
    root, path = Path(folder), Path(folder) / "classnames.txt"
    problems: list[FileProblem] = []
    names: dict[int, str] = {}
    found: dict[str, list[NamedImage]] = {"train": [], "val": []}
    for split in found:
        if not (root / "images" / split).is_dir():
            raise FileNotFoundError(f"{root / 'images' / split}: no such folder, of images")
    for number, line in numbered_lines(path):
        key, _, name = line.strip().partition(" ")
        folders = {split: root / "images" / split / key for split in found}
        absent = [str(one) for one in folders.values() if not one.is_dir()]
        if not name.strip() or absent:
            reason = f"{absent[0]}: no such folder, of images" if absent else "must have a name"
            problems.append(FileProblem(number, reason, str(path), "line"))
            continue
        label = len(names)
        names[label] = name.strip()
        for split, place in folders.items():
            # as in CoOp without hidden ones, which are no images
            files = sorted(one.name for one in os.scandir(place) if one.is_file())
            files = [file for file in files if not file.startswith(".")]
            found[split] += [
                NamedImage(f"{split}/{key}/{file}", str(place / file), label) for file in files
            ]
    for split in found:
        usable(found[split], problems, root / "images" / split)
    train, test = tuple(found["train"]), tuple(found["val"])
    return Splits(train, (), test, names), problems


def read_aircraft(folder: str | Path) -> tuple[Splits, list[FileProblem]]:
    """FGVC Aircraft's own lists: variants.txt, images_variant_{train,val,test}.txt, images/ID.jpg.

    Raises:
        FileNotFoundError: a list is missing.
        ValueError: nothing in one can be used.
    """
    root = Path(folder)
    labels = {line.strip(): n for n, (_, line) in enumerate(numbered_lines(root / "variants.txt"))}
    problems: list[FileProblem] = []
    found = []
    for split in SPLITS:
        path, rows = root / f"images_variant_{split}.txt", list[NamedImage]()
        own: list[FileProblem] = []
        for number, line in numbered_lines(path):
            image, _, name = line.strip().partition(" ")
            entry = [f"{image}.jpg", labels.get(name.strip(), -1), name]
            one = _image(entry, split, root / "images", {})
            if entry[1] == -1:
                one = f"must name a variant of variants.txt, got {name!r}"
            if isinstance(one, str):
                own.append(FileProblem(number, one, str(path), "line"))
            else:
                rows.append(one)
        found.append(tuple(usable(rows, own, path)[0]))
        problems += own
    return Splits(*found, names={n: name for name, n in labels.items()}), problems


def base_and_novel(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The first half of the labels in ascending order, ceil(n / 2) of them, and the others."""
    ordered = sorted(set(labels))
    half = (len(ordered) + 1) // 2
    return ordered[:half], ordered[half:]


def draw(images: Sequence[NamedImage], shots: int, chance: random.Random) -> tuple[NamedImage, ...]:
    """So many images of every class, all of a class that has no more; classes as they first come.

    Args:
        images: of any classes.
        shots: of each.
        chance: what draws them without putting back.
    """
    by_label: dict[int, list[NamedImage]] = {}
    for image in images:
        by_label.setdefault(image.label, []).append(image)
    return tuple(
        image
        for rows in by_label.values()
        for image in (chance.sample(rows, shots) if len(rows) >= shots else rows)
    )
