"""The CLIP's downstream data sets of `benchmarks.hosts`: known things, as other cameras see them.

A class is a thing in words, such as "red striped circle". Which classes are base and which are
novel is drawn, so that neither half is easier by its words.
"""

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.hosts_vision_models import phrase
from benchmarks.hosts_vision_pictures import (
    COLOURS,
    SHAPES,
    SIDE,
    TEXTURES,
    choice,
    grounds,
    noisy,
    paint,
    somewhere,
    tinted,
    write_png,
)

CLASSES = 20
# a class: its shape, texture and colour, -1 where any may be shown
Class = tuple[int, int, int]


def behind_fence(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Dark slanted bars in front, and noise."""
    steps = torch.arange(SIDE)
    bars = (steps[:, None] + steps[None]) % 6 < 3
    return noisy(torch.where(bars, 0.2 * pictures, pictures), 0.2, generator)


def at_dusk(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Dark and half grey, and noise."""
    pale = (pictures + pictures.mean(1, keepdim=True)) / 2
    return noisy(0.1 + 0.75 * pale, 0.08, generator)


def under_water(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Wavy, greenish and noisy."""
    steps = torch.arange(SIDE)
    shift = (1.6 * torch.sin(steps * math.tau / 9)).round().long()
    columns = (steps[None] + shift[:, None]) % SIDE
    waved = pictures.gather(3, columns.expand(*pictures.shape[:2], -1, -1))
    cast = torch.tensor([0.55, 0.9, 0.75]).view(3, 1, 1)
    return noisy(0.12 + 0.85 * cast * waved, 0.1, generator)


@dataclass(frozen=True)
class Domain:
    """A data set.

    Attributes:
        told: whether a class says shape, texture and colour.
        change: what becomes of pictures (B, 3, S, S) in 0 to 1.
        words: what it is, for people.
    """

    told: tuple[bool, bool, bool]
    change: Callable[[Tensor, torch.Generator], Tensor]
    words: str


DOMAINS = {
    "fence": Domain((True, False, True), behind_fence, "shape and colour behind dark bars"),
    "dusk": Domain((True, True, False), at_dusk, "shape and texture, dark and half grey"),
    "water": Domain((True, True, True), under_water, "all three, wavy and greenish"),
}


def classes_of(name: str) -> list[Class]:
    """The classes of a data set in the order of their labels: the first half is the base."""
    kinds = (SHAPES, TEXTURES, tuple(COLOURS))
    told = DOMAINS[name].told
    ranges = [range(len(k)) if said else (-1,) for k, said in zip(kinds, told, strict=True)]
    every = [(a, b, c) for a, b, c in itertools.product(*ranges)]
    return random.Random(f"classes {name}").sample(every, CLASSES)


def name_of(one: Class) -> str:
    """A class in words."""
    shape, texture, colour = one
    return phrase(
        SHAPES[shape],
        TEXTURES[texture] if texture >= 0 else "",
        list(COLOURS)[colour] if colour >= 0 else "",
    )


def draw(name: str, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, S, S) of the classes with labels (B,)."""
    wanted = torch.tensor(classes_of(name))[labels]
    n = len(labels)
    kinds = (len(SHAPES), len(TEXTURES), len(COLOURS))
    any_ = torch.stack([choice(count, n, generator) for count in kinds], 1)
    shape, texture, colour = torch.where(wanted < 0, any_, wanted).unbind(1)
    things = somewhere(shape, texture, tinted(colour, generator), generator)
    return DOMAINS[name].change(paint(grounds(n, generator), things), generator)


def write_domain(folder: Path, name: str, counts: dict[str, int], seed: int) -> None:
    """Pictures and split_zhou_NAME.json as CoOp has them.

    Args:
        folder: which is made.
        name: of DOMAINS.
        counts: pictures of each class in "train", "val" and "test".
        seed: of the pictures.
    """
    names = [name_of(one) for one in classes_of(name)]
    generator = torch.Generator().manual_seed(2000 + seed)
    splits: dict[str, list[list[str | int]]] = {}
    for split, count in counts.items():
        labels = torch.arange(CLASSES).repeat(count)
        paths = [f"{split}/{i:04d}.png" for i in range(len(labels))]
        write_png(draw(name, labels, generator), [folder / "images" / one for one in paths])
        splits[split] = [
            [path, label, names[label]] for path, label in zip(paths, labels.tolist(), strict=True)
        ]
    text = json.dumps(splits, indent=0) + "\n"
    (folder / f"split_zhou_{name}.json").write_text(text, encoding="utf-8")
