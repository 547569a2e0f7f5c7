"""A ViT and a CLIP of random numbers, and lists of pictures of noise, for the tasks of images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

SIDE = 24
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 8,
}
# what one character is worth in CLIP's vocabulary; a word's last one ends in </w>
LETTERS = "abcdefghijklmnopqrstuvwxyz.,"


def noise(path: Path, seed: int, size: tuple[int, int] = (31, 26)) -> Path:
    """A picture of noise around a colour."""
    g = np.random.default_rng(seed)
    pixels = g.integers(0, 160, 3) + g.integers(0, 96, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def random_vit(classes: int, seed: int = 3) -> ViTForImageClassification:
    """Two layers of width 24, for pictures of 24 x 24; no norm is 1."""
    torch.manual_seed(seed)
    return shaken(ViTForImageClassification(ViTConfig(**VISION, num_labels=classes)))


def shaken(model: Any) -> Any:
    """A model whose norms and biases are random, in eval mode."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def clip_config(classes: int = 2) -> CLIPConfig:
    """Two layers of width 24 on either side."""
    text = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": 2 * len(LETTERS) + 2,
        "max_position_embeddings": 64,
        "bos_token_id": 2 * len(LETTERS),
        "eos_token_id": 2 * len(LETTERS) + 1,
        "pad_token_id": 2 * len(LETTERS) + 1,
    }
    return CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16, num_labels=classes)


def random_clip(seed: int = 3) -> CLIPModel:
    """A CLIP whose classes differ."""
    torch.manual_seed(seed)
    return shaken(CLIPModel(clip_config()))


def random_clip_classifier(classes: int, seed: int = 3) -> CLIPForImageClassification:
    """The same with a head."""
    torch.manual_seed(seed)
    return shaken(CLIPForImageClassification(clip_config(classes)))


def save_clip(folder: Path) -> Path:
    """A folder of a CLIP as transformers leaves it: weights, tokenizer, preparation."""
    words = [*LETTERS, *(f"{one}</w>" for one in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: n for n, word in enumerate(words)}
    source = folder.parent / f"{folder.name}-vocabulary"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(source / "vocab.json"), str(source / "merges.txt"))
    random_clip().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def write_split(folder: Path, classes: int, counts: dict[str, int]) -> Path:
    """A split file in CoOp's form with its pictures in images/, classes in turn."""
    content = {}
    for seed, (split, count) in enumerate(counts.items()):
        content[split] = []
        for n in range(count):
            label = n % classes
            noise(folder / "images" / split / f"{n}.png", 1000 * seed + n, (26 + label, 31))
            content[split].append([f"{split}/{n}.png", label, f"class_{'abcdefgh'[label]}"])
    path = folder / "split_zhou_Own.json"
    path.write_text(json.dumps(content))
    return path
