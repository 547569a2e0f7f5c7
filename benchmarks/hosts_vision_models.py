"""The hosts of the vision worlds of `benchmarks.hosts`: transformers' ViT and CLIP, pre-trained.

The ViT learns shape, texture and colour of the source pictures at once, the CLIP which caption
belongs to which picture. Both learn from pictures drawn as they go, each seen once.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging

from benchmarks.hosts_vision_pictures import COLOURS, SHAPES, SIDE, TEXTURES
from benchmarks.hosts_vision_tasks import sources
from llama_adapter.quiet import quiet
from llama_adapter.tasks.image_pixels import Preparation

WIDTH, LAYERS, HEADS, PATCH = 64, 4, 4, 6
# of the CLIP's text encoder
TEXT_LAYERS = 2
BATCH, ADAM_LR, MUON_LR = 64, 2e-3, 0.02
PREPARATION = Preparation(size=(SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TEMPLATE = "a photo of a {}."
# what a caption may leave out
SHOWN = 0.75
_CONTEXT = 16
_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


def as_pixels(pictures: Tensor) -> Tensor:
    """What PREPARATION makes of pictures (B, 3, S, S) in 0 to 1."""
    return 2 * pictures - 1


def loaded(load: Callable[[Path], Any], folder: Path) -> Any:
    """What transformers loads from a folder, frozen, without what it says meanwhile."""
    logging.disable_progress_bar()
    with quiet():
        return load(folder).requires_grad_(False).eval()


def train_vit(steps: int, seed: int = 0) -> ViTModel:
    """A ViT that tells shapes, textures and colours of the source pictures apart.

        loss = sum of the cross entropies of three linear heads on the first token

    Args:
        steps: of BATCH pictures.
        seed: of weights and pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = ViTConfig(**_SHAPE, image_size=SIDE, patch_size=PATCH)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = ViTModel(config, add_pooling_layer=False)
        heads = nn.ModuleList(nn.Linear(WIDTH, len(names)) for names in (SHAPES, TEXTURES, COLOURS))

    def loss() -> Tensor:
        pictures, labels = sources(BATCH, generator)
        seen = model(pixel_values=as_pixels(pictures)).last_hidden_state[:, 0]
        parts = [F.cross_entropy(head(seen), y) for head, y in zip(heads, labels, strict=True)]
        return torch.stack(parts).sum()

    _descend(nn.ModuleList([model, heads]), loss, steps)
    return model.requires_grad_(False).eval()


def _descend(module: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    """Muon for the layers' matrices, AdamW for the rest; 100 steps up, and a cosine down."""
    named = list(module.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "layers." in name]
    rest = [p for name, p in named if p.ndim != 2 or "layers." not in name]
    optims: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01), MUON_LR),
        (torch.optim.AdamW(rest, lr=ADAM_LR, weight_decay=0.02, betas=(0.9, 0.98)), ADAM_LR),
    ]
    warm = max(1, min(100, steps // 10))
    for step in range(steps):
        share = min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2
        for optim, rate in optims:
            for group in optim.param_groups:
                group["lr"] = rate * share
            optim.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optim, _ in optims:
            optim.step()


def phrase(shape: str, texture: str = "", colour: str = "") -> str:
    """A thing in words, "red striped circle"; what is "" is left out."""
    return " ".join(word for word in (colour, texture, shape) if word)


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer, trained on the captions' words: pieces that end in </w>, two marks."""
    words = [*SHAPES, *TEXTURES, *COLOURS, *TEMPLATE.replace("{}", "").replace(".", " . ").split()]
    ends = {"bos": "<|startoftext|>", "eos": "<|endoftext|>"}
    bare = Tokenizer(models.BPE(unk_token=ends["eos"], end_of_word_suffix="</w>"))
    bare.normalizer = normalizers.Lowercase()
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(ends.values()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bare.train_from_iterator([" ".join(words)] * 4, trainer)
    bare.model.save(str(folder))
    # the names of these two are others in older transformers
    own = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    own.model_max_length = _CONTEXT
    own.save_pretrained(folder)


def captions(labels: Sequence[Tensor], generator: torch.Generator) -> tuple[list[str], Tensor]:
    """A caption for each of B pictures, and which captions are true of which pictures.

    Args:
        labels: shape, texture and colour of each, (B,).
        generator: of what a caption leaves out; the shape never is.

    Returns:
        Texts, and true (B, B): of picture i, caption j is true.
    """
    shape, texture, colour = labels
    n = len(shape)
    told = torch.rand(2, n, generator=generator) < SHOWN
    texts = []
    for i in range(n):
        own = TEXTURES[int(texture[i])] if told[0, i] else ""
        hue = list(COLOURS)[int(colour[i])] if told[1, i] else ""
        texts.append(TEMPLATE.format(phrase(SHAPES[int(shape[i])], own, hue)))
    same = [(one[:, None] == one[None]) for one in labels]
    true = same[0] & (same[1] | ~told[0][None]) & (same[2] | ~told[1][None])
    return texts, true


def contrast(logits: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss of logits (B, B), without pairs that are true and not a picture's own.

    loss = (CE of rows + CE of columns) / 2
    """
    own = torch.arange(len(logits))
    others = true & ~torch.eye(len(logits), dtype=torch.bool)
    logits = logits.masked_fill(others, -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_clip(folder: Path, steps: int, seed: int = 0) -> None:
    """Write a CLIP that knows source pictures by their captions, with its tokenizer.

    Args:
        folder: which is made.
        steps: of BATCH pictures.
        seed: of weights, pictures and captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    text: dict[str, Any] = {
        **_SHAPE,
        "num_hidden_layers": TEXT_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**_SHAPE, "image_size": SIDE, "patch_size": PATCH}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH // 2)
        )

    def loss() -> Tensor:
        pictures, labels = sources(BATCH, generator)
        texts, true = captions(labels, generator)
        unique = list(dict.fromkeys(texts))
        ids = tokenizer(unique, padding=True, return_tensors="pt")
        found = model(pixel_values=as_pixels(pictures), **ids)
        places = torch.tensor([unique.index(one) for one in texts])
        return contrast(found.logits_per_image[:, places], true)

    _descend(model, loss, steps)
    model.requires_grad_(False).eval().save_pretrained(folder)
    _write_preparation(folder)


def _write_preparation(folder: Path) -> None:
    # it says that torchvision is missing, which nothing here needs
    with quiet():
        from transformers import CLIPImageProcessor

        CLIPImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=list(PREPARATION.mean),
            image_std=list(PREPARATION.std),
        ).save_pretrained(folder)
