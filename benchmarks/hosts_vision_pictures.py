"""Small pictures for the vision worlds of `benchmarks.hosts`: textured shapes on a ground.

A batch is drawn at once: each shape is a function of the plane, twice as fine as the pixels, and a
texture mixes its colour with a darker tone of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# pixels of a picture's side
SIDE = 24
_FINE = 2
COLOURS = {
    "red": (0.80, 0.15, 0.15),
    "green": (0.15, 0.60, 0.22),
    "blue": (0.20, 0.30, 0.85),
    "yellow": (0.92, 0.82, 0.15),
    "purple": (0.55, 0.20, 0.65),
    "orange": (0.95, 0.52, 0.10),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "bar", "moon")
TEXTURES = ("plain", "striped", "checked", "dotted")
# of a task that no host has been trained on
NEW_TEXTURES = ("ringed", "latticed", "wavy", "speckled", "fading", "slanted", "barred", "spotted")


@dataclass(frozen=True)
class Things:
    """One thing in each of B pictures; every field is (B,), colours are (B, 3) in 0 to 1.

    Attributes:
        shape: index into SHAPES.
        texture: index into TEXTURES, and behind them NEW_TEXTURES.
        colour: of the thing.
        x, y: centre, in pixels.
        radius: in pixels.
        angle: in radians.
    """

    shape: Tensor
    texture: Tensor
    colour: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    angle: Tensor


def uniform(low: float, high: float, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Numbers of a uniform distribution."""
    return low + (high - low) * torch.rand(*size, generator=generator)


def choice(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Indices below n."""
    return torch.randint(n, (size,), generator=generator)


def tinted(names: Tensor, generator: torch.Generator, spread: float = 0.06) -> Tensor:
    """Colours (B, 3) near those of COLOURS that indices (B,) name."""
    pure = torch.tensor(list(COLOURS.values()))[names]
    return (pure + uniform(-spread, spread, pure.shape, generator)).clamp(0, 1)


def somewhere(
    shape: Tensor,
    texture: Tensor,
    colour: Tensor,
    generator: torch.Generator,
    *,
    radius: tuple[float, float] = (6.5, 9.0),
    shift: float = 3.0,
) -> Things:
    """Things near the middle, of random size and a little turned."""
    n = len(shape)
    return Things(
        shape,
        texture,
        colour,
        SIDE / 2 + uniform(-shift, shift, (n,), generator),
        SIDE / 2 + uniform(-shift, shift, (n,), generator),
        uniform(*radius, (n,), generator),
        uniform(-0.25, 0.25, (n,), generator),
    )


def grounds(n: int, generator: torch.Generator) -> Tensor:
    """Plain grounds (n, 3, S, S), light or dark and hardly coloured."""
    grey = torch.where(torch.rand(n, generator=generator) < 0.7, 0.85, 0.15)[:, None]
    colour = grey + uniform(-0.1, 0.1, (n, 3), generator)
    return colour[:, :, None, None].expand(n, 3, SIDE, SIDE)


def _inside(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Whether points (B, H, W), in radii from the centre, belong to shapes (B,)."""
    r, a = (u * u + v * v).sqrt(), torch.atan2(v, u) + math.pi / 2
    sector = math.tau / 3
    triangle = r * torch.cos(torch.remainder(a, sector) - sector / 2) < 0.55
    spoke = torch.remainder(a, math.tau / 5) - math.pi / 5
    kinds = [
        r < 0.9,
        torch.maximum(u.abs(), v.abs()) < 0.78,
        triangle,
        (torch.minimum(u.abs(), v.abs()) < 0.3) & (torch.maximum(u.abs(), v.abs()) < 0.95),
        (r < 0.95) & (r > 0.5),
        r < 0.4 + 0.6 * (spoke.abs() / (math.pi / 5)),
        (u.abs() < 0.98) & (v.abs() < 0.36),
        (r < 0.92) & (((u - 0.45) ** 2 + v * v).sqrt() > 0.7),
    ]
    return torch.stack(kinds, 1)[torch.arange(len(shape)), shape]


def _tone(texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Part of the light tone (B, H, W) at points given in pixels from the centre, for (B,)."""
    r = (u * u + v * v).sqrt()

    def wave(t: Tensor, length: float) -> Tensor:
        return torch.sin(t * math.tau / length)

    speckle = torch.sin(37.1 * torch.floor(u / 1.5) + 17.7 * torch.floor(v / 1.5)) * 43758.5
    kinds = [
        torch.ones_like(u),
        wave(u, 5) > 0,
        wave(u, 7) * wave(v, 7) > 0,
        wave(u, 5) + wave(v, 5) < 0.9,
        wave(r, 4.5) > 0,
        torch.maximum(wave(u, 6), wave(v, 6)) > 0.6,
        wave(u + 1.6 * wave(v, 8), 5.5) > 0,
        speckle - torch.floor(speckle) > 0.5,
        torch.sigmoid(0.6 * u),
        wave(u + v, 5) > 0,
        wave(v, 3) > 0,
        wave(u, 8) + wave(v, 8) < 0.2,
    ]
    return torch.stack([k.float() for k in kinds], 1)[torch.arange(len(texture)), texture]


def paint(pictures: Tensor, things: Things, drawn: Tensor | None = None) -> Tensor:
    """The pictures (B, 3, S, S) with a thing on each, or on those alone that `drawn` (B,) marks."""
    steps = (torch.arange(SIDE * _FINE) + 0.5) / _FINE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    dx, dy = x - things.x[:, None, None], y - things.y[:, None, None]
    cos, sin = things.angle.cos()[:, None, None], things.angle.sin()[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    radius = things.radius[:, None, None]
    inside = _inside(things.shape, u / radius, v / radius)
    if drawn is not None:
        inside = inside & drawn[:, None, None]
    tone = 0.35 + 0.65 * _tone(things.texture, u, v)
    own = things.colour[:, :, None, None] * tone[:, None]
    mask = F.avg_pool2d(inside[:, None].float(), _FINE)
    return pictures * (1 - mask) + F.avg_pool2d(own * inside[:, None], _FINE)


def noisy(pictures: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """The pictures with normal noise, within 0 to 1."""
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + deviation * noise).clamp(0, 1)


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, S, S) in 0 to 1 as bytes."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def write_png(pictures: Tensor, paths: Sequence[Path]) -> None:
    """Write each of the pictures (B, 3, S, S) as a PNG."""
    for picture, path in zip(as_bytes(pictures), paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
