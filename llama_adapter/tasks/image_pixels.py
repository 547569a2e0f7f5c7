"""From images' files to the pixels that a ViT or CLIP takes, the same for every task.

As transformers' ViTImageProcessor (both sides resized) or CLIPImageProcessor (short side resized,
middle cut out) does it with Pillow; training may cut out and mirror at random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llama_adapter.data.checked_files import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# Pillow's filters, by the numbers that transformers' files have for them
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# share of an image's area and ratio of width to height that are cut out at random, and how often a
# piece that fits is looked for: torchvision's, which the papers' code uses
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_REMEDY = "images need Pillow: pip install 'llama-adapter-kernels[hf]'"
PREPARATION_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Preparation:
    """What is done to an image: x = (resized / 255 - mean) / std.

    Attributes:
        size: height and width of the pixels.
        edge: of the short side before the middle is cut out; None resizes both sides to `size`,
            whatever their ratio, and cuts nothing.
        resample: name of Pillow's filter, one of `FILTERS`.
        mean, std: by channel.
    """

    size: tuple[int, int] = (224, 224)
    edge: int | None = None
    resample: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be height and width of at least 1, got {self.size}")
        if self.edge is not None and self.edge < 1:
            raise ValueError(f"edge must be at least 1, got {self.edge}")
        if self.resample not in FILTERS.values():
            raise ValueError(
                f"resample must be one of {', '.join(FILTERS.values())}, got {self.resample!r}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have 3 numbers, got {getattr(self, name)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    @classmethod
    def of_host(cls, folder: str | Path, otherwise: "Preparation | None" = None) -> "Preparation":
        """What the preprocessor_config.json of a host's folder says.

        Args:
            folder: of a model that transformers saved.
            otherwise: where the folder has no such file, in the size that the model's config.json
                names; None raises.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it says what is not done here.
        """
        path = Path(folder) / PREPARATION_FILE
        if otherwise is not None and not path.is_file():
            return otherwise._sized(Path(folder) / "config.json")
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: must hold an object, got {found!r}")
        try:
            return cls._of(found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no preparation of images that is known ({error})") from None

    @classmethod
    def _of(cls, found: dict[str, Any]) -> "Preparation":
        for name in ("do_resize", "do_rescale"):
            if not found.get(name, True):
                raise ValueError(f"{name} must be true")
        if not math.isclose(found.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise ValueError(f"rescale_factor must be 1/255, got {found['rescale_factor']}")
        cut, size = bool(found.get("do_center_crop")), found["size"]
        # older files have a number, of the short side where the middle is cut out
        edge = size if isinstance(size, int) and cut else None
        if isinstance(size, dict) and "shortest_edge" in size:
            edge = size["shortest_edge"]
        if (edge is None) == cut:
            raise ValueError(
                f"size must be a shortest_edge where do_center_crop is true, got {size}"
            )
        height, width = _sides(found["crop_size"] if cut else size)
        normal = bool(found.get("do_normalize", True))
        return cls(
            (height, width),
            edge,
            FILTERS[int(found.get("resample", 3 if cut else 2))],
            tuple(found["image_mean"]) if normal else (0.0, 0.0, 0.0),
            tuple(found["image_std"]) if normal else (1.0, 1.0, 1.0),
        )

    def _sized(self, config: Path) -> "Preparation":
        """The same for images as large as a model's configuration says, if it does."""
        content = read_json(config) if config.is_file() else {}
        own = content.get("vision_config", content) if isinstance(content, dict) else {}
        edge = own.get("image_size") if isinstance(own, dict) else None
        if not isinstance(edge, int) or isinstance(edge, bool) or edge < 1:
            return self
        return replace(self, size=(edge, edge), edge=None if self.edge is None else edge)

    def squashed(self) -> "Preparation":
        """The same without cutting: both sides are resized, as VTAB's protocol has it."""
        return replace(self, edge=None)

    def prepared(self, image: "Image") -> np.ndarray:
        """Resized channels (3, height, width) in uint8 of an image in RGB."""
        height, width = self.size
        if self.edge is None:
            return _channels(image.resize((width, height), self._filter))
        short = min(image.size)
        # the long side is rounded down
        resized = image.resize(
            (int(self.edge * image.width / short), int(self.edge * image.height / short)),
            self._filter,
        )
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        # beyond the image it is black
        return _channels(resized.crop((left, top, left + width, top + height)))

    def varied(self, image: "Image", generator: torch.Generator | None = None) -> np.ndarray:
        """Channels (3, height, width) of a random piece of an image, mirrored every second time.

        Args:
            image: in RGB.
            generator: of the random numbers; None is torch's own, as of dropout.
        """
        height, width = self.size
        box = _random_box(image.width, image.height, generator)
        piece = image.crop(box).resize((width, height), self._filter)
        channels = _channels(piece)
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        return np.ascontiguousarray(channels[:, :, ::-1]) if mirrored else channels

    def normalised(self, channels: Tensor) -> Tensor:
        """Pixels (B, 3, height, width) in float32 of channels in uint8."""
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return (channels.float() / 255 - mean) / std

    @property
    def _filter(self) -> Any:
        from PIL.Image import Resampling

        return Resampling[self.resample.upper()]


# transformers' ViT without its preprocessor_config.json, as VPT prepares images for VTAB
VTAB = Preparation()
CLIP = Preparation(edge=224, resample="bicubic", mean=CLIP_MEAN, std=CLIP_STD)


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return size["height"], size["width"]


def _channels(image: "Image") -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _random_box(
    width: int, height: int, generator: torch.Generator | None
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random piece; the middle where none fits."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for _ in range(_TRIES):
        area = width * height * between(*_AREA)
        ratio = math.exp(between(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=generator))
            top = int(torch.randint(height - h + 1, (), generator=generator))
            return left, top, left + w, top + h
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class ImageCache:
    """Decoded or resized images that its maker keeps in memory, up to a number of bytes.

    What does not fit any more is read anew every time.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        """Keep at most `limit` bytes."""
        self.limit, self.used = limit, 0
        self._kept: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """What is kept, or None."""
        return self._kept.get(key)

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep a value of so many bytes, if it fits."""
        if key not in self._kept and self.used + size <= self.limit:
            self._kept[key], self.used = value, self.used + size


@dataclass(frozen=True)
class ImageReader:
    """Pixels of images' files, read when they are asked for.

    Attributes:
        preparation: what is done to them.
        cache: of whoever made it; None reads files every time.
    """

    preparation: Preparation
    cache: ImageCache | None = None

    def pixels(self, paths: Sequence[str | Path]) -> Tensor:
        """Pixels (B, 3, height, width) in float32.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file is no image.
        """
        return self._normalised([self._prepared(path) for path in paths])

    def varied(
        self, paths: Sequence[str | Path], generator: torch.Generator | None = None
    ) -> Tensor:
        """Pixels (B, 3, height, width) of random pieces, mirrored at random; errors as `pixels`."""
        images = [self._image(path) for path in paths]
        return self._normalised([self.preparation.varied(one, generator) for one in images])

    def _normalised(self, channels: list[np.ndarray]) -> Tensor:
        return self.preparation.normalised(torch.from_numpy(np.stack(channels)))

    def _prepared(self, path: str | Path) -> np.ndarray:
        done = self.preparation
        key = (str(path), done.size, done.edge, done.resample)
        found = None if self.cache is None else self.cache.get(key)
        if found is None:
            found = done.prepared(_opened(path))
            if self.cache is not None:
                self.cache.put(key, found, found.nbytes)
        return found

    def _image(self, path: str | Path) -> "Image":
        key = (str(path),)
        found = None if self.cache is None else self.cache.get(key)
        if found is None:
            found = _opened(path)
            if self.cache is not None:
                self.cache.put(key, found, 3 * found.width * found.height)
        return found


def _opened(path: str | Path) -> "Image":
    try:
        from llama_adapter.multimodal.image_files import opened
    except ImportError as error:
        raise ImportError(f"{_REMEDY} ({error})") from None
    return opened(path)
