"""Features of images by a frozen CLIP, transformers' own: global ones of several of its layers.

Imported only where images are: transformers and Pillow read them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from transformers.utils import logging

from llama_adapter.multimodal.features import digest_of
from llama_adapter.quiet import quiet
from llama_adapter.vision import Scales


class ClipFeatures:
    """Concatenated global features (B, M * width) of images, I_1 to I_M of equation 9.

    Attributes:
        scales: what is taken.
        width: numbers that describe an image.
        digest: of the weights, the preparation of images and the scales.
    """

    def __init__(
        self, model: CLIPVisionModelWithProjection, processor: Any, scales: Scales | None = None
    ) -> None:
        """Freeze an encoder.

        Args:
            model: CLIP's visual half.
            processor: turns an image into pixels, as transformers' CLIPImageProcessor.
            scales: what is taken; None for `Scales()`.

        Raises:
            ValueError: the encoder has fewer layers.
        """
        self._model, self._processor = model.requires_grad_(False).eval(), processor
        self.scales = Scales() if scales is None else scales
        config = model.config
        if max(self.scales.layers) > config.num_hidden_layers:
            raise ValueError(
                f"layers must be at most the encoder's {config.num_hidden_layers}, "
                f"got {self.scales.layers}"
            )
        each = config.projection_dim if self.scales.project else config.hidden_size
        if self.scales.pool == "tokens":
            # the class token's and the patches'
            each *= int(model.vision_model.embeddings.num_positions)
        self.width: int = each * len(self.scales.layers)
        prepared = sorted(processor.to_dict().items())
        self.digest = digest_of([*model.parameters()], self.scales, prepared)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        scales: Scales | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "ClipFeatures":
        """The encoder of a folder that transformers has saved.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the encoder has fewer layers than are asked for.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, of a CLIP that transformers saved")
        with quiet(), _no_bar():
            model = CLIPVisionModelWithProjection.from_pretrained(
                folder, dtype=dtype, local_files_only=True
            )
            processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        nn.Module.to(model, device)
        return cls(model, processor, scales)

    def pixels(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Pixels (B, 3, height, width) of images or their files, as the encoder wants them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file is no image.
        """
        return self._processor(images=[_opened(one) for one in images], return_tensors="pt")[
            "pixel_values"
        ]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, width) in the encoder's dtype of pixels (B, 3, height, width)."""
        encoder = self._model.vision_model
        given = pixels.to(self._model.device, self._model.dtype)
        states = encoder(given, output_hidden_states=True).hidden_states
        found = []
        for layer in self.scales.layers:
            state = states[layer]
            x = state
            if self.scales.pool != "tokens":
                x = state[:, 0] if self.scales.pool == "cls" else state[:, 1:].mean(1)
            if self.scales.post_norm:
                x = encoder.post_layernorm(x)
            if self.scales.project:
                x = self._model.visual_projection(x)
            x = x / x.norm(dim=-1, keepdim=True) if self.scales.normalise else x
            found.append(x.flatten(1))
        return torch.cat(found, -1)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' bar, which takes longer to read than the weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _opened(image: str | Path | Image.Image) -> Image.Image:
    """An image in RGB, whatever its file holds."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no image that can be read ({error})") from error
