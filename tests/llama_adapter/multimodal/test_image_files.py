"""Pictures of every kind are RGB with 8 bits a channel; what is none is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama_adapter.multimodal.image_files import opened


def test_grey_of_16_bits_is_scaled_and_not_cut_off(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 32768], [65535, 257, 1000]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    found = np.asarray(opened(tmp_path / "grey.png"))
    assert found.shape == (2, 3, 3)
    assert (found == (grey / 257).round().astype(np.uint8)[..., None]).all()


def test_a_palette_and_an_open_image_are_rgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 3), (200, 10, 30))
    image.convert("P").save(tmp_path / "palette.png")
    assert opened(tmp_path / "palette.png").mode == "RGB"
    assert opened(image.convert("RGBA")).getpixel((1, 1)) == (200, 10, 30)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.png: no image that can be read"):
        opened(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"absent.png: no such file"):
        opened(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="at most 100 times the other, got 1 x 101"):
        opened(Image.new("RGB", (1, 101)))
