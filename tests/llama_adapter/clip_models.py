"""A CLIP of random numbers in a folder, and pictures of noise, for whatever takes images."""

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

SHAPE = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 10,
}


def random_clip(seed: int = 3, **shape: int) -> CLIPVisionModelWithProjection:
    """Four layers of width 24, for pictures of 24 x 24; no norm is 1."""
    torch.manual_seed(seed)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SHAPE | shape))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def save_clip(path: Path, seed: int = 3) -> Path:
    """A folder as transformers leaves it."""
    random_clip(seed).save_pretrained(path)
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    CLIPImageProcessor(**sizes).save_pretrained(path)
    return path


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (31, 40)) -> Path:
    """Noise that the size is the seed of."""
    g = torch.Generator().manual_seed(size[0])
    pixels = torch.randint(256, (size[1], size[0], 3), generator=g, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path
