"""Features of the images that records name: found below one folder, made once, some absent.

The one way from paths of images to what `Adapter.visual_tokens` takes, in training and after.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama_adapter.caches import cache_folder
from llama_adapter.config import VisualConfig
from llama_adapter.multimodal.features import Encoder, FeatureCache
from llama_adapter.quiet import quiet
from llama_adapter.vision import Scales, VisionOptions

# images that are looked at together, between two steps of the bar
_TOGETHER = 256


class Pictures:
    """Images by their paths, and one encoder's features of them.

    Attributes:
        encoder: what makes the features.
        root: folder that paths start from; None takes them as they are.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: str | Path | None = None,
        root: str | Path | None = None,
        *,
        scales: Scales | None = None,
        progress: bool | None = False,
    ) -> None:
        """Keep an encoder's features.

        Args:
            encoder: of images.
            folder: of the cached features; None is among the user's caches.
            root: folder that no path may leave; None takes paths as they are.
            scales: what the encoder takes of an image, for adapters to remember; None where it is
                no CLIP.
            progress: show a bar on stderr while images are encoded; None on a terminal.

        Raises:
            NotADirectoryError: root is no folder.
            OSError: the user has no home for the features.
        """
        self.encoder, self._scales = encoder, scales
        self.root = None if root is None else Path(root)
        if self.root is not None and not self.root.is_dir():
            raise NotADirectoryError(f"{root}: no such folder, of images")
        kept = cache_folder("features", "--feature-cache") if folder is None else folder
        self._cache, self._progress = FeatureCache(kept, encoder), progress

    @classmethod
    def load(
        cls,
        options: VisionOptions,
        scales: Scales | None = None,
        *,
        visual: VisualConfig | None = None,
        device: torch.device | str = "cpu",
        progress: bool | None = False,
    ) -> "Pictures":
        """The encoder and the images that options name.

        Args:
            options: where they lie; the encoder's folder is needed.
            scales: what is taken of an image; None for an adapter's, or `Scales()`.
            visual: of an adapter that is to take the features: it says the scales.
            device: of the encoder.
            progress: show a bar on stderr while images are encoded; None on a terminal.

        Raises:
            FileNotFoundError: a folder does not exist.
            ValueError: no encoder is named, it is another than the adapter's or lacks a layer, the
                adapter's features are of another kind, or transformers is not installed.
        """
        if options.vision_model is None:
            raise ValueError(
                "images need --vision-model, the folder of the CLIP that sees them, got none"
            )
        if visual is not None:
            scales = visual.scales
            if scales is None:
                raise ValueError(
                    f"{options.vision_model}: the adapter must take features of a CLIP, got one "
                    f"that takes {visual.features} numbers of its maker's own"
                )
        try:
            with quiet():
                from llama_adapter.multimodal.clip import ClipFeatures
        except ImportError as error:
            raise ValueError(
                f"images need transformers and Pillow ({error}): "
                "pip install 'llama-adapter-kernels[hf]'"
            ) from error
        encoder = ClipFeatures.load(options.vision_model, scales, device=device)
        found = cls(
            encoder,
            options.feature_cache,
            options.images,
            scales=encoder.scales,
            progress=progress,
        )
        if visual is not None:
            found.check(visual, str(options.vision_model))
        return found

    def check(self, visual: VisualConfig, name: str = "the encoder") -> None:
        """Raise unless an adapter was trained on this encoder's features.

        One whose header names no encoder is held to the number of features alone.

        Args:
            visual: the adapter's.
            name: of this encoder, for the message.

        Raises:
            ValueError: it was trained on another's.
        """
        own = self.encoder.digest
        if visual.encoder not in ("", own):
            raise ValueError(
                f"{name} must be the encoder that the adapter was trained with, digest "
                f"{visual.encoder}, got one of digest {own}"
            )
        if visual.features != self.encoder.width:
            raise ValueError(
                f"{name} must give {visual.features} features, as the adapter takes, got "
                f"{self.encoder.width}"
            )

    def visual_config(self, **shape: Any) -> VisualConfig:
        """What an adapter for these features says of them; `shape` are its other fields."""
        own = VisualConfig(self.encoder.width, encoder=self.encoder.digest, scales=self._scales)
        return replace(own, **shape)

    def path(self, image: str | Path) -> Path:
        """Where an image lies; errors as `located`."""
        return located(image, self.root)

    @property
    def content(self) -> str:
        """Digest of the content of all images that `unusable` has found usable."""
        return self._cache.known

    def unusable(self, images: Iterable[str | Path]) -> dict[str, str]:
        """Why images cannot be used, by their paths as given; those that can are absent.

        Their features are in the cache then, and `content` is of them too.
        """
        asked = list(dict.fromkeys(images))
        found: dict[str, str] = {}
        hidden = None if self._progress is None else not self._progress
        with tqdm(total=len(asked), desc="images", delay=1, disable=hidden, leave=False) as bar:
            for start in range(0, len(asked), _TOGETHER):
                some = asked[start : start + _TOGETHER]
                found |= self._problems(some)
                bar.update(len(some))
        return found

    def _problems(self, images: list[str | Path]) -> dict[str, str]:
        try:
            self._cache([self.path(image) for image in images], know=True)
        except (FileNotFoundError, ValueError) as error:
            if len(images) == 1:
                return {str(images[0]): str(error)}
            half = len(images) // 2
            return self._problems(images[:half]) | self._problems(images[half:])
        return {}

    def __call__(self, images: Sequence[str | Path | None]) -> tuple[Tensor, Tensor]:
        """Features (B, F) in float32 on the CPU, zeros where there is no image, and (B,) bool.

        Args:
            images: paths, None where there is none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a path leaves the root, or a file is no image.
        """
        present = torch.tensor([image is not None for image in images], dtype=torch.bool)
        features = torch.zeros(len(images), self.encoder.width)
        given = [self.path(image) for image in images if image is not None]
        if given:
            features[present] = self._cache(given)
        return features, present


def located(image: str | Path, root: Path | None) -> Path:
    """Where an image lies.

    Args:
        image: its path.
        root: folder that the path starts from and may not leave; None takes it as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path leaves the root.
    """
    found = Path(image)
    if root is not None:
        top = os.path.normpath(root.absolute())
        found = Path(os.path.normpath(os.path.join(top, image)))
        if not found.is_relative_to(top):
            raise ValueError(f"image {str(image)!r} must lie in {root}, got {found}")
    if not _is_file(found):
        raise FileNotFoundError(f"image {found}: no such file")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # a name that no file can have
        return False
