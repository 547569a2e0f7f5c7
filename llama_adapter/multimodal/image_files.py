"""Images by Pillow, in RGB with 8 bits a channel, whatever their files hold.

Imported only where images are.
"""

from pathlib import Path

import numpy as np
from PIL import Image

# of an image's sides, the longest there may be, as a multiple of the other
_LONGEST = 100


def opened(image: str | Path | Image.Image) -> Image.Image:
    """An image in RGB; as in CoOp, a camera's note that a JPEG lies on its side is not heeded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, one side is more than a hundred times the other, or its
            numbers have no range of their own.
    """
    if isinstance(image, Image.Image):
        reason = _against(image)
        if reason is not None:
            raise ValueError(f"image: {reason}")
        return _in_rgb(image)
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as image_file:
            reason = _against(image_file)
            if reason is None:
                return _in_rgb(image_file)
    except (
        OSError, SyntaxError, RuntimeError, MemoryError, ValueError, Image.DecompressionBombError
    ) as error:  # fmt: skip
        # Pillow's own, which name no file
        raise ValueError(f"{path}: no image that can be read ({error})") from error
    raise ValueError(f"{path}: {reason}")


def _against(image: Image.Image) -> str | None:
    """Why an image is not taken, or None.

    It is a thread, which a CLIP's preparation would make gigabytes of, or its numbers have no range
    of their own.
    """
    short, long = sorted(image.size)
    if short < 1 or long > _LONGEST * short:
        return (
            f"one side must be at most {_LONGEST} times the other, got "
            f"{image.size[0]} x {image.size[1]}"
        )
    if image.mode in ("I", "F"):
        return f"must have 8 or 16 bits a channel, got Pillow's mode {image.mode}"
    return None


def _in_rgb(image: Image.Image) -> Image.Image:
    """An image with 8 bits a channel."""
    if image.mode.startswith("I;16"):
        # Pillow would cut off at 255
        grey = np.asarray(image).astype(np.float32) * (255 / 65535)
        image = Image.fromarray(grey.round().astype(np.uint8))
    return image.convert("RGB")
