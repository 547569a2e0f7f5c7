"""A tiny ViT of transformers, a task in memory and a method that trains two groups of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

LABELS = ("dark", "bright", "left")


def make_vit(seed: int = 3, dropout: float = 0.2) -> ViTForImageClassification:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=dropout,
            num_labels=len(LABELS),
            initializer_range=0.2,
        )
        return ViTForImageClassification(config).eval()


class Biases:
    """Trains a host's biases and its head, as wt-base's methods do, in groups of these names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self._groups: dict[str, dict[str, nn.Parameter]] = {"method": {}, "head": {}}
        for name, parameter in model.named_parameters():
            if name.startswith("classifier"):
                self._groups["head"][name] = parameter.requires_grad_()
            elif name.endswith("bias"):
                self._groups["method"][name] = parameter.requires_grad_()

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        return self._groups

    def state_dict(self) -> dict[str, Tensor]:
        return {n: p.data for group in self._groups.values() for n, p in group.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        assert own.keys() == state.keys()
        for name, value in own.items():
            value.copy_(state[name])


def make_items(count: int, seed: int) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        image = 0.3 * torch.randn(3, 8, 8, generator=generator)
        label = index % len(LABELS)
        image[:, :, :4] += (-1.0, 1.0, 1.0)[label]
        image[:, :, 4:] += (-1.0, 1.0, -1.0)[label]
        items.append((image, label))
    return items


@dataclass(frozen=True)
class Shades:
    """Which of three shades is it?"""

    train: Sequence[tuple[Tensor, int]] = field(default_factory=lambda: make_items(22, 1))
    validation: Sequence[tuple[Tensor, int]] = field(default_factory=lambda: make_items(9, 2))
    test: Sequence[tuple[Tensor, int]] = field(default_factory=lambda: make_items(12, 4))
    kind: str = "image-classification"
    labels: tuple[str, ...] = LABELS
    metric: str = "accuracy"

    def loss(self, model: nn.Module, batch: Sequence[tuple[Tensor, int]]) -> Tensor:
        images, labels = zip(*batch, strict=True)
        logits = model(pixel_values=torch.stack(images)).logits
        return nn.functional.cross_entropy(logits, torch.tensor(labels))

    @torch.no_grad()
    def predict(self, model: nn.Module, items: Sequence[tuple[Tensor, int]]) -> list[Any]:
        was_training = model.training
        model.eval()
        logits = model(pixel_values=torch.stack([image for image, _ in items])).logits
        model.train(was_training)
        return [LABELS[index] for index in logits.argmax(-1).tolist()]

    def score(
        self, items: Sequence[tuple[Tensor, int]], predictions: Sequence[Any]
    ) -> dict[str, float]:
        right = [LABELS[y] == said for (_, y), said in zip(items, predictions, strict=True)]
        return {"accuracy": 100 * sum(right) / len(right)}
