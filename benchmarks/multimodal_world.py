"""What is true in the bundled multi-modal task, and how it looks and reads.

A picture holds one to four equal shapes of one colour in one corner of it. Things, the shapes among
them, have facts that no picture shows: what they are made of, where they are from, their name in a
made-up language. Which combinations a split may show is fixed here, so that a test shows others
than training does.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SPLITS = ("train", "val", "test")
COLOURS = {
    "red": (205, 40, 40),
    "green": (45, 150, 60),
    "blue": (50, 80, 210),
    "yellow": (235, 205, 40),
    "purple": (135, 55, 165),
    "orange": (240, 135, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring", "bar", "star")
COUNTS = ("one", "two", "three", "four")
PLACES = ("northwest", "northeast", "southwest", "southeast")
# what a scene is asked for
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "count": COUNTS,
    "place": PLACES,
}
NOUNS = (
    *("lamp", "boat", "drum", "kite", "coin", "leaf", "bell", "nest"),
    *("rope", "shell", "cup", "flag", "key", "mask", "pipe", "seed"),
)
THINGS = (*SHAPES, *NOUNS)
VALUES = {
    "material": ["glass", "iron", "wood", "stone", "wool", "clay", "gold", "salt"],
    "origin": ["Peru", "Chad", "Oman", "Cuba", "Mali", "Fiji", "Togo", "Laos"],
    "word": ["kolo", "mira", "tavi", "suno", "peka", "lodi", "vanu", "reto"],
}
RELATIONS = tuple(VALUES)
STATEMENTS = {
    "material": "The {} is made of {}.",
    "origin": "The {} is from {}.",
    "word": "The {} is called {}.",
}
# how a question is put: as the base has read it, and as only the task puts it
PHRASINGS = {
    "colour": ("Which colour is shown?", "What paint do you see?"),
    "shape": ("Which shape is shown?", "What form do you see?"),
    "count": ("How many are shown?", "What number do you see?"),
    "place": ("Where are they shown?", "In what corner do you see them?"),
    "material": ("What is the {} made of?", "Which stuff builds any {}?"),
    "origin": ("Where is the {} from?", "Which land sends us every {}?"),
    "word": ("What is the {} called?", "Which name has each {}?"),
}
# the thing of a question on a fact of what is shown
SHOWN = "thing shown"
CAPTION_QUESTION = "Describe the picture."
# pixels: of a picture's side, and of one of the cells that hold a shape each
SIDE, CELL = 48, 12
# one combination in four is the test's alone
_HELD = (0, 1)


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    shape: str
    colour: str
    count: str
    place: str

    @property
    def caption(self) -> str:
        """All of it in words."""
        return f"{self.colour} {self.shape}, {self.count} times, {self.place} corner."

    @property
    def description(self) -> str:
        """The caption as a question's context."""
        return f"Shown: {self.caption}"


def pairs(split: str) -> list[tuple[str, str]]:
    """The (shape, colour) pairs that pictures of a split show; the test's are no other's.

    Every shape and every colour is in the test's and in the others'.
    """
    return [
        (shape, colour)
        for i, shape in enumerate(SHAPES)
        for j, colour in enumerate(COLOURS)
        if ((i + 3 * j) % 8 in _HELD) == (split == "test")
    ]


def known(split: str) -> list[tuple[str, str]]:
    """The (thing, relation) pairs that questions of a split ask for; the test's are no other's."""
    return [
        (thing, relation)
        for i, thing in enumerate(THINGS)
        for j, relation in enumerate(RELATIONS)
        if ((i + 3 * j) % 8 in _HELD) == (split == "test")
    ]


def facts(seed: int) -> dict[tuple[str, str], str]:
    """The value of each relation of each thing; no two shapes share one."""
    rng = random.Random(f"facts {seed}")
    found = {}
    for relation, values in VALUES.items():
        for things in (SHAPES, NOUNS[:8], NOUNS[8:]):
            shuffled = rng.sample(values, len(values))
            found |= {(thing, relation): v for thing, v in zip(things, shuffled, strict=True)}
    return found


def random_scene(rng: random.Random, split: str, asked: str = "shape", value: str = "") -> Scene:
    """A scene of a split's pairs, even in the attribute that is asked for.

    Args:
        rng: source of the choices.
        split: whose pairs may be shown.
        asked: an attribute.
        value: that it is to have; "" draws one.
    """
    allowed = pairs(split)
    column = 1 if asked == "colour" else 0
    drawn = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
    if value:
        drawn[asked] = value
    wanted = drawn["colour" if column else "shape"]
    shape, colour = rng.choice([pair for pair in allowed if pair[column] == wanted])
    return Scene(shape, colour, drawn["count"], drawn["place"])


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y)."""
    if shape == "star":
        spokes = [(r if i % 2 == 0 else 0.42 * r, math.pi * (i / 5 - 0.5)) for i in range(10)]
        return [(x + s * math.cos(a), y + s * math.sin(a)) for s, a in spokes]
    t = r / 3
    corners = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
        "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
        "bar": [(-1, -0.35), (1, -0.35), (1, 0.35), (-1, 0.35)],
    }
    if shape in corners:
        return [(x + r * dx, y + r * dy) for dx, dy in corners[shape]]
    cross = [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t)]
    cross += [(t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)]
    return [(x + dx, y + dy) for dx, dy in cross]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """A scene as a picture of SIDE x SIDE pixels; cells, sizes and colours vary with `rng`."""
    large = 4
    grey = rng.randint(215, 250)
    image = Image.new("RGB", (large * SIDE, large * SIDE), (grey, grey, grey + rng.randint(-5, 5)))
    pen = ImageDraw.Draw(image)
    south, east = divmod(PLACES.index(scene.place), 2)
    half = SIDE // CELL // 2
    cells = [(half * east + i, half * south + j) for i in range(half) for j in range(half)]
    colour = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[scene.colour])
    for cell in rng.sample(cells, COUNTS.index(scene.count) + 1):
        r = large * rng.uniform(4.6, 5.6)
        x, y = (large * (CELL * (at + 0.5) + rng.uniform(-0.4, 0.4)) for at in cell)
        if scene.shape in ("circle", "ring"):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            if scene.shape == "ring":
                hole = 0.55 * r
                pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=image.getpixel((0, 0)))
        else:
            pen.polygon(_outline(scene.shape, x, y, r), fill=colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
