"""The ViT's tasks of `benchmarks.hosts`, in VTAB's three groups in kind, and its sources.

Natural pictures show what the host has not been told apart: other textures, more hues. Specialised
ones come from other cameras: grey and noisy scans, false colours. Structured ones ask for what
the host was trained to ignore: how many things, and where.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.hosts_vision_pictures import (
    COLOURS,
    NEW_TEXTURES,
    SHAPES,
    SIDE,
    TEXTURES,
    Things,
    choice,
    grounds,
    noisy,
    paint,
    somewhere,
    tinted,
    uniform,
)

GROUPS = ("natural", "specialised", "structured")
HUES = 12
_PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom",
           "bottom right")  # fmt: skip
COUNTS = ("one", "two", "three", "four", "five")


def sources(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """What a host is pre-trained on: pictures (n, 3, S, S), and shape, texture and colour, (n,)."""
    shape, texture = choice(len(SHAPES), n, generator), choice(len(TEXTURES), n, generator)
    colour = choice(len(COLOURS), n, generator)
    things = somewhere(shape, texture, tinted(colour, generator), generator)
    return noisy(paint(grounds(n, generator), things), 0.05, generator), (shape, texture, colour)


def _anything(n: int, generator: torch.Generator) -> Things:
    """Things of any source class."""
    shape, texture = choice(len(SHAPES), n, generator), choice(len(TEXTURES), n, generator)
    return somewhere(
        shape, texture, tinted(choice(len(COLOURS), n, generator), generator), generator
    )


def textures(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """New textures on the known shapes."""
    label = choice(len(NEW_TEXTURES), n, generator)
    things = replace(_anything(n, generator), texture=len(TEXTURES) + label)
    things = replace(things, radius=1.2 * things.radius)
    return noisy(paint(grounds(n, generator), things), 0.05, generator), label


def hues(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Colours between and beside the known ones, of any lightness."""
    label = choice(HUES, n, generator)
    hue = (label + uniform(0.1, 0.9, (n,), generator)) / HUES
    light = uniform(0.3, 0.7, (n,), generator)
    found = [
        colorsys.hls_to_rgb(h, v, 0.5) for h, v in zip(hue.tolist(), light.tolist(), strict=True)
    ]
    things = replace(_anything(n, generator), colour=torch.tensor(found))
    return noisy(paint(grounds(n, generator), things), 0.08, generator), label


def scans(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The known shapes in grey, of little contrast and with much noise."""
    things = _anything(n, generator)
    grey = paint(grounds(n, generator), things).mean(1, keepdim=True)
    return noisy(0.3 + 0.4 * grey.expand(-1, 3, -1, -1), 0.12, generator), things.shape


def thermal(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The known textures in false colours of how light they are."""
    things = _anything(n, generator)
    light = noisy(paint(grounds(n, generator), things).mean(1), 0.08, generator)
    waves = [0.5 + 0.5 * torch.cos(math.tau * (0.8 * light - phase)) for phase in (0.1, 0.4, 0.75)]
    return torch.stack(waves, 1), things.texture


def count(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One to five small things in the cells of a grid."""
    label = choice(len(COUNTS), n, generator)
    cells = torch.rand(n, 9, generator=generator).argsort(1)
    pictures = grounds(n, generator)
    for i in range(len(COUNTS)):
        things = _placed(cells[:, i], generator, 3.4)
        pictures = paint(pictures, things, label >= i)
    return noisy(pictures, 0.05, generator), label


def place(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One thing in one of the cells of a grid."""
    label = choice(len(_PLACES), n, generator)
    return noisy(
        paint(grounds(n, generator), _placed(label, generator, 4.5)), 0.05, generator
    ), label


def _placed(cell: Tensor, generator: torch.Generator, radius: float) -> Things:
    """Small things of any source class in cells (n,) of a 3 x 3 grid."""
    n, width = len(cell), SIDE / 3
    x = width * (cell % 3 + 0.5) + uniform(-1.2, 1.2, (n,), generator)
    y = width * (cell // 3 + 0.5) + uniform(-1.2, 1.2, (n,), generator)
    size = uniform(0.85, 1.1, (n,), generator) * radius
    return replace(_anything(n, generator), x=x, y=y, radius=size)


@dataclass(frozen=True)
class Kind:
    """A downstream task.

    Attributes:
        group: of GROUPS.
        classes: what its labels mean.
        draw: gives pictures (n, 3, S, S) in 0 to 1 and labels (n,).
    """

    group: str
    classes: tuple[str, ...]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


TASKS = {
    "textures": Kind("natural", NEW_TEXTURES, textures),
    "hues": Kind("natural", tuple(f"hue {i}" for i in range(HUES)), hues),
    "scans": Kind("specialised", SHAPES, scans),
    "thermal": Kind("specialised", TEXTURES, thermal),
    "count": Kind("structured", COUNTS, count),
    "place": Kind("structured", _PLACES, place),
}
