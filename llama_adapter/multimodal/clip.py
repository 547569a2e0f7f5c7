"""Features of images by a frozen CLIP, transformers' own: global ones of several of its layers.

Imported only where images are: transformers and Pillow read them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.utils import logging

from llama_adapter.multimodal.features import digest_of
from llama_adapter.multimodal.image_files import opened
from llama_adapter.quiet import quiet
from llama_adapter.vision import Scales

# of a CLIP's configuration, what changes its features and no weight's shape
_DECIDING = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size")
# of another package's message, the longest there may be
_SAID = 160


class ClipFeatures:
    """Concatenated global features (B, M * width) of images, I_1 to I_M of equation 9.

    Attributes:
        scales: what is taken.
        width: numbers that describe an image.
        digest: of the weights, the preparation of images and the scales.
    """

    def __init__(
        self,
        model: CLIPVisionModel | CLIPVisionModelWithProjection,
        processor: Any,
        scales: Scales | None = None,
    ) -> None:
        """Freeze an encoder.

        Args:
            model: CLIP's visual half.
            processor: turns an image into pixels, as transformers' CLIPImageProcessor.
            scales: what is taken; None for `Scales()`.

        Raises:
            ValueError: the encoder has fewer layers, or no projection where one is to be applied.
        """
        nn.Module.requires_grad_(model, False).eval()
        self._model, self._processor = model, processor
        self._encoder: Any = getattr(model, "vision_model", model)
        self._projection: Any = getattr(model, "visual_projection", None)
        self.scales = Scales() if scales is None else scales
        config = model.config
        if max(self.scales.layers) > config.num_hidden_layers:
            raise ValueError(
                f"layers must be at most the encoder's {config.num_hidden_layers}, "
                f"got {self.scales.layers}: choose with Scales, or --vision-layers"
            )
        if self.scales.project and self._projection is None:
            raise ValueError("project must be left out: this encoder has no projection")
        each = config.projection_dim if self.scales.project else config.hidden_size
        if self.scales.pool == "tokens":
            # the class token's and the patches'
            each *= int(self._encoder.embeddings.num_positions)
        self.width: int = each * len(self.scales.layers)
        used = [*self._encoder.parameters()]
        used += [*self._projection.parameters()] if self.scales.project else []
        # what no weight's shape tells
        more = [getattr(config, name) for name in _DECIDING]
        prepared = sorted(processor.to_dict().items())
        self.digest = digest_of(used, self.scales, more, prepared)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        scales: Scales | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "ClipFeatures":
        """The encoder of a folder that transformers has saved: a CLIP, or its visual half.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no CLIP, not all of it or numbers that are not finite, or the
                encoder has fewer layers than are asked for.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, of a CLIP that transformers saved")
        project = scales is not None and scales.project
        kind: Any = CLIPVisionModelWithProjection if project else CLIPVisionModel
        try:
            with quiet(), _no_bar():
                model, told = kind.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, output_loading_info=True
                )
                processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            said = " ".join(str(error).split())[:_SAID]
            raise ValueError(f"{folder} holds no CLIP that can be read ({said})") from error
        lacking = sorted(told["missing_keys"])
        if lacking:
            # transformers draws them at random, other ones every time
            raise ValueError(f"{folder} lacks {len(lacking)} weights of its CLIP, as {lacking[0]}")
        if not all(bool(x.isfinite().all()) for x in nn.Module.parameters(model)):
            raise ValueError(f"{folder}: weights must be finite, got NaN or infinity")
        nn.Module.to(model, device)
        return cls(model, processor, scales)

    def pixels(self, images: Sequence[str | Path | Image]) -> Tensor:
        """Pixels (B, 3, height, width) of images or their files, as the encoder wants them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file is no image.
        """
        return self._processor(images=[opened(one) for one in images], return_tensors="pt")[
            "pixel_values"
        ]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, width) in the encoder's dtype of pixels (B, 3, height, width)."""
        given = pixels.to(self._model.device, self._model.dtype)
        states = self._encoder(given, output_hidden_states=True).hidden_states
        found = []
        for layer in self.scales.layers:
            state = states[layer]
            x = state
            if self.scales.pool != "tokens":
                x = state[:, 0] if self.scales.pool == "cls" else state[:, 1:].mean(1)
            if self.scales.post_norm:
                x = self._encoder.post_layernorm(x)
            if self.scales.project:
                x = self._projection(x)
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
