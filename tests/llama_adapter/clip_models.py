"""A CLIP of random numbers in a folder, and pictures of noise, for whatever takes images."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_file import save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.config import AdapterConfig
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.tuning import Tuning
from llama_adapter.vision import Scales, VisionOptions

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


def save_clip(path: Path, seed: int = 3, **shape: int) -> Path:
    """A folder as transformers leaves it."""
    random_clip(seed, **shape).save_pretrained(path)
    edge = (SHAPE | shape)["image_size"]
    sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    CLIPImageProcessor(**sizes).save_pretrained(path)
    return path


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (31, 40)) -> Path:
    """Noise around a colour, of both of which the width is the seed."""
    g = torch.Generator().manual_seed(size[0])
    colour = torch.randint(192, (3,), generator=g)
    pixels = colour + torch.randint(64, (size[1], size[0], 3), generator=g)
    Image.fromarray(pixels.to(torch.uint8).numpy()).convert(mode).save(path)
    return path


def save_image_adapter(
    path: Path, base: Path, clip: Path, seed: int = 3, tuning: Tuning | None = None, **shape: Any
) -> Path:
    """An adapter of two layers that sees a CLIP's pictures; gates are random, some above 1."""
    g = torch.Generator().manual_seed(seed)
    model = load_base(base, device="cpu").model
    pictures = Pictures.load(VisionOptions(vision_model=clip), Scales((2, 4)))
    visual = pictures.visual_config(**{"hidden": (7,), **shape})
    adapter = Adapter(
        AdapterConfig(4, n_layers=2), model.config, generator=g, tuning=tuning, visual=visual
    ).requires_grad_(False)
    assert adapter.projector is not None
    # features of a random CLIP differ less than those of a trained one
    adapter.projector.maps[0].weight.mul_(4)
    for name, parameter in adapter.tuned_parameters().items():
        around = 0.0 if name.startswith("bias_") else 1.0
        parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=g))
    for gates in (adapter.gates, adapter.visual_gates):
        if gates is not None:
            gates.normal_(std=1.5, generator=g)
    save_adapter(path, adapter, fingerprint(model, base.name))
    return path
