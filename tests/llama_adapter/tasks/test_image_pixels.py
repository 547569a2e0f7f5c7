"""Pixels are those of transformers' own processors; random pieces are pieces, and seeded."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from llama_adapter.tasks.image_pixels import (
    CLIP,
    HALF,
    VTAB,
    ImageCache,
    ImageReader,
    Preparation,
)
from tests.llama_adapter.tasks.image_hosts import noise

SIZES = [(31, 26), (26, 31), (24, 24), (97, 60), (20, 90), (224, 300)]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return [noise(tmp_path / f"{n}.png", n, size) for n, size in enumerate(SIZES)]


PROCESSORS = [
    ViTImageProcessorPil(),
    ViTImageProcessorPil(size={"height": 24, "width": 40}, resample=3),
    ViTImageProcessorPil(image_mean=[0.2, 0.4, 0.6], image_std=[0.1, 0.2, 0.3]),
    ViTImageProcessorPil(do_normalize=False),
    CLIPImageProcessorPil(),
    CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 24, "width": 21}),
    # the piece is higher than the image: black around it
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 24}),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=range(len(PROCESSORS)))
def test_pixels_are_those_of_transformers(
    processor: Any, pictures: list[Path], tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path / "host")
    reader = ImageReader(Preparation.of_host(tmp_path / "host"))
    got = reader.pixels(pictures)
    images = [Image.open(path).convert("RGB") for path in pictures]
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_settings_without_a_file_are_the_published_ones(tmp_path: Path) -> None:
    assert Preparation.of_host(tmp_path, CLIP) == CLIP
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json"):
        Preparation.of_host(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path / "clip")
    assert Preparation.of_host(tmp_path / "clip") == CLIP
    ViTImageProcessorPil().save_pretrained(tmp_path / "vit")
    assert Preparation.of_host(tmp_path / "vit", VTAB) == Preparation(mean=HALF, std=HALF)
    assert CLIP.squashed().edge is None


def test_without_a_preparation_of_its_own_a_model_says_how_large_images_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"image_size": 24}')
    assert Preparation.of_host(tmp_path, VTAB) == replace(VTAB, size=(24, 24))
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 32}}')
    assert Preparation.of_host(tmp_path, CLIP) == replace(CLIP, size=(32, 32), edge=32)
    for content in ("[]", "{}", '{"image_size": true}', '{"image_size": 0}'):
        (tmp_path / "config.json").write_text(content)
        assert Preparation.of_host(tmp_path, CLIP) == CLIP


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # as ViT's and CLIP's first files have it
        (
            {"size": 384, "do_resize": True, "resample": 2, "image_mean": HALF, "image_std": HALF},
            Preparation((384, 384), mean=HALF, std=HALF),
        ),
        (
            {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3}
            | {"image_mean": CLIP.mean, "image_std": CLIP.std},
            CLIP,
        ),
    ],
)
def test_old_files_have_numbers_for_sizes(
    content: dict[str, Any], expected: Preparation, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert Preparation.of_host(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"do_resize": False}, "do_resize must be true"),
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
        ({}, "'size'"),
        ({"size": {"shortest_edge": 24}}, "size must be a shortest_edge where"),
        ([], "must hold an object"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    content: Any, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: .*{reason}"):
        Preparation.of_host(tmp_path)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"size": (0, 3)}, "size must be height and width"),
        ({"edge": 0}, "edge must be at least 1"),
        ({"resample": "cubic"}, "resample must be one of nearest.*got 'cubic'"),
        ({"mean": (0.5,)}, "mean must have 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be above 0"),
    ],
)
def test_settings_that_make_no_pixels_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Preparation(**given)


def test_random_pieces_lie_in_the_image_and_are_mirrored_half_the_time() -> None:
    """An image whose pixels are their places: every piece tells where it was cut out."""
    width, height = 120, 90
    places = np.zeros((height, width, 3), dtype=np.uint8)
    places[..., 0], places[..., 1] = np.arange(width), np.arange(height)[:, None]
    image = Image.fromarray(places)
    preparation = Preparation((8, 8), resample="bilinear")
    g = torch.Generator().manual_seed(0)
    areas, mirrored, corners = [], 0, set()
    for _ in range(400):
        piece = preparation.varied(image, g).astype(float)
        across, down = piece[0, 0, -1] - piece[0, 0, 0], piece[1, -1, 0] - piece[1, 0, 0]
        mirrored += across < 0
        assert down > 0
        # from the middle of the first of 8 cells to that of the last
        w, h = abs(across) * 8 / 7, down * 8 / 7
        areas.append(w * h / (width * height))
        assert 0.6 < w / h < 1.6
        corners.add((piece[0].min(), piece[1].min()))
    assert 160 < mirrored < 240
    assert 0.05 < min(areas) < 0.15
    assert 0.8 < max(areas) < 1.05
    assert len(corners) > 300


def test_random_pieces_follow_torchs_seed(pictures: list[Path]) -> None:
    reader = ImageReader(Preparation((24, 24)))
    torch.manual_seed(5)
    first, other = reader.varied(pictures), reader.varied(pictures)
    torch.manual_seed(5)
    assert torch.equal(reader.varied(pictures), first)
    assert not torch.equal(first, other)
    g = torch.Generator().manual_seed(7)
    again = torch.Generator().manual_seed(7)
    assert torch.equal(reader.varied(pictures, g), reader.varied(pictures, again))


def test_a_strip_gives_its_middle() -> None:
    """No piece of a ratio from 3/4 to 4/3 has 8 % of it."""
    strip = np.zeros((4, 400, 3), dtype=np.uint8)
    strip[:, 190:210] = 250
    found = Preparation((4, 4), resample="nearest").varied(Image.fromarray(strip))
    assert (found == 250).all()


def test_a_cache_reads_each_file_once_and_keeps_to_its_limit(pictures: list[Path]) -> None:
    own = Preparation((24, 24))
    cache = ImageCache(limit=4 * 24 * 24 * 3)
    reader = ImageReader(own, cache)
    first = reader.pixels(pictures)
    assert cache.used == cache.limit
    for path in pictures[:4]:
        path.unlink()
    assert torch.equal(reader.pixels(pictures), first)
    # what another preparation made is another image
    with pytest.raises(FileNotFoundError):
        ImageReader(Preparation((12, 12)), cache).pixels(pictures)
    whole = ImageCache()
    varied = ImageReader(own, whole)
    torch.manual_seed(1)
    pieces = varied.varied(pictures[4:])
    for path in pictures[4:]:
        path.unlink()
    torch.manual_seed(1)
    assert torch.equal(varied.varied(pictures[4:]), pieces)


def test_without_pillow_the_remedy_is_one_line(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_adapter.multimodal.image_files", None)
    with pytest.raises(ImportError, match=r"pip install 'llama-adapter-kernels\[hf\]'") as caught:
        ImageReader(VTAB).pixels(pictures)
    assert "\n" not in str(caught.value)
