"""The picture of a run's losses."""

from pathlib import Path

import numpy as np
from PIL import Image

from llama_adapter.loss_curve import draw_curves


def colours(path: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, row)) for row, n in zip(found, counts, strict=True) if n > 50}


def test_every_curve_is_drawn_in_a_colour_of_its_own(tmp_path: Path) -> None:
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    two = {"one": [(1, 3.0), (2, 2.0)], "two": [(3, 4.0), (4, 1.0)], "none": []}
    draw_curves(tmp_path / "a.png", two, [(2, 90.0), (4, 95.0)], ("loss", "per cent"))
    assert {blue, orange, green} <= colours(tmp_path / "a.png")
    draw_curves(tmp_path / "b.png", {"one": two["one"]}, [(2, 2.5)], ("loss", None))
    assert {blue, orange} <= colours(tmp_path / "b.png")
    assert green not in colours(tmp_path / "b.png")
    draw_curves(tmp_path / "c.png", {}, [], ("loss", None))
    assert Image.open(tmp_path / "c.png").size == (840, 480)
