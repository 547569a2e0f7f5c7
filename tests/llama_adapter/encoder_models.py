"""Small encoders of transformers with random numbers, for the tests of hosts."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
IMAGES = {"image_size": 20, "patch_size": 4}
WORDS = {"vocab_size": 101, "max_position_embeddings": 40}
ROBERTA = WORDS | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = WORDS | {"pad_token_id": 0}
_TOWER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}


def _with_dropout(values: dict[str, Any], dropout: float) -> dict[str, Any]:
    return values | {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}


def _clip_config(dropout: float) -> Any:
    vision = _TOWER | IMAGES | {"projection_dim": 24, "attention_dropout": dropout}
    text = _TOWER | WORDS | {"hidden_size": 32, "num_attention_heads": 2, "projection_dim": 24}
    text |= {"eos_token_id": 100, "bos_token_id": 99, "pad_token_id": 100}
    text["attention_dropout"] = dropout
    return transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)


def _made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(11)
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            continue
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "norm" in name.lower():
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def vit(labels: int = 5, dropout: float = 0.0, **changes: Any) -> Any:
    """A ViTForImageClassification for pictures of 20 x 20."""
    sizes = _with_dropout(SIZES | IMAGES, dropout) | {"num_labels": labels}
    return _made(
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**sizes | changes))
    )


def roberta(
    task: str = "TokenClassification", labels: int = 5, dropout: float = 0.0, **changes: Any
) -> Any:
    """A RobertaFor<task> of 101 words and 38 positions."""
    sizes = _with_dropout(SIZES | ROBERTA, dropout) | {"num_labels": labels}
    config = transformers.RobertaConfig(**sizes | changes)
    return _made(lambda: getattr(transformers, f"RobertaFor{task}")(config))


def bert(
    task: str = "TokenClassification", labels: int = 5, dropout: float = 0.0, **changes: Any
) -> Any:
    """A BertFor<task> of 101 words and 40 positions."""
    sizes = _with_dropout(SIZES | BERT, dropout) | {"num_labels": labels}
    config = transformers.BertConfig(**sizes | changes)
    return _made(lambda: getattr(transformers, f"BertFor{task}")(config))


def clip(dropout: float = 0.0) -> Any:
    """A CLIPModel whose encoders differ in width and heads."""
    return _made(lambda: transformers.CLIPModel(_clip_config(dropout)))


def pixels(batch: int = 3, seed: int = 3) -> Tensor:
    """Random pictures (B, 3, 20, 20)."""
    return torch.randn(batch, 3, 20, 20, generator=torch.Generator().manual_seed(seed))


def words(batch: int = 3, count: int = 13, seed: int = 4) -> Tensor:
    """Random words (B, T), none of them special; the last is CLIP's end."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(3, 99, (batch, count), generator=generator)
    found[:, -1] = 100
    return found


def padded(batch: int = 3, count: int = 13, left: bool = False) -> Tensor:
    """(B, T) of ones, with 4 and 2 zeros in the first two rows."""
    mask = torch.ones(batch, count, dtype=torch.int64)
    mask[0, -4:], mask[1, -2:] = 0, 0
    return mask.flip(-1) if left else mask
