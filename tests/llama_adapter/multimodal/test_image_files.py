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


@pytest.mark.parametrize(
    "content",
    [
        # Pillow's own ValueErrors: a number that is none, a header that is cut off, a bare header
        b"P6 33R21 4 255\n" + bytes(300),
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\x04IHDR\x00\x00\x00\x01\x0a\x0b\x0c\x0d",
        b"\x01\xda\x00\x07" + bytes(600),
    ],
)
def test_a_damaged_header_is_named_too(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.png: no image that can be read") as caught:
        opened(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGBA", "LA", "P"])
def test_every_mode_is_rgb_and_lies_as_it_is_stored(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 3), (200, 10, 30)).convert(mode)
    path = tmp_path / ("stored.jpg" if mode == "CMYK" else "stored.png")
    exif = image.getexif()
    # on its side, as cameras write it
    exif[0x0112] = 6
    image.save(path, exif=exif)
    found = opened(path)
    assert (found.mode, found.size) == ("RGB", (5, 3))
    assert found.getpixel((0, 0)) == pytest.approx(image.convert("RGB").getpixel((0, 0)), abs=2)
