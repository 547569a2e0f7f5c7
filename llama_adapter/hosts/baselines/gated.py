"""A gate in Flamingo's place: outside the attention, on what is added to the residual stream."""

from functools import partial

import torch
from torch import Tensor, nn

from llama_adapter.hosts.baselines.parts import (
    Generator,
    Installed,
    Part,
    Undo,
    before_layer,
    initialise,
    normal,
)


class GatedCrossAttention(nn.Module):
    """y = x + tanh(gate) * attention(norm(x), P), x (B, T, C), P (K, C); gate is 0 at first.

    All matrices of the attention are new and trained; Flamingo's feed-forward part is left out, and
    learnt rows stand for what it looks at.

    Source: Flamingo, section 2.2; supplement of LLaMA-Adapter, C.
    """

    def __init__(
        self, width: int, heads: int, length: int, std: float, generator: Generator
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.prompts = normal((length, width), std, generator)
        self.gate = nn.Parameter(torch.zeros(()))
        initialise(self.attention, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        prompts = self.prompts.expand(len(x), -1, -1)
        query = self.norm(x.to(prompts.dtype))
        seen, _ = self.attention(query, prompts, prompts, need_weights=False)
        return x + (self.gate.tanh() * seen).to(x.dtype)


class GatedLayers(Installed):
    """One `GatedCrossAttention` in front of each of the topmost layers."""

    def __init__(
        self, part: Part, length: int, layers: range, std: float, generator: Generator
    ) -> None:
        super().__init__()
        self.indices, heads = layers, part.config.num_attention_heads
        make = partial(GatedCrossAttention, part.width, heads, length, std, generator)
        self.layers = nn.ModuleList([make() for _ in layers])

    def install(self, part: Part) -> list[Undo]:
        """Put the gated attention into an encoder."""
        layers = part.layers()
        pairs = zip(self.indices, self.layers, strict=True)
        return [before_layer(layers[index], gated) for index, gated in pairs]
