"""What maps the features of an image to tokens of the language model."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from llama_adapter.config import VisualConfig


class Projector(nn.Module):
    """I_p = W_n a(... a(W_1 x + b_1) ...) + b_n, from features (B, F) to one token (B, C) each.

    For early fusion the last map makes P_v tokens (B, P_v, C), side by side.

    The paper gives "simple cascaded MLPs" and, in its Table 3, parameters: 6 features of 768, a
    hidden width of 64 and C = 4096 are 561,216, which with the prompts and gates of 30 layers are
    the 1.79 million of 7B. That these are the widths is inferred from the table, not stated.

    The last map is not zero at first: a gate of zero already hides the image.
    Source: LLaMA-Adapter, equation 9.

    Attributes:
        config: its shape.
        maps: the linear maps, first to last.
    """

    def __init__(
        self, config: VisualConfig, dim: int, *, generator: torch.Generator | None = None
    ) -> None:
        """Create maps with weights N(0, 1 / inputs) and biases of zero.

        Args:
            config: features F, hidden widths and the activation between two maps.
            dim: C, the language model's width.
            generator: source of the random values.
        """
        super().__init__()
        self.config = config
        widths = pairwise((config.features, *config.hidden, config.tokens * dim))
        maps = [nn.Linear(inputs, outputs) for inputs, outputs in widths]
        for one in maps:
            nn.init.normal_(one.weight, std=one.in_features**-0.5, generator=generator)
            nn.init.zeros_(one.bias)
        self.maps = nn.ModuleList(maps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C), early (B, P_v, C), in float32 of features (B, F) in any dtype."""
        activation = getattr(nn.functional, self.config.activation)
        first, *others = self.maps
        x = first(x.float())
        for one in others:
            x = one(activation(x))
        early = self.config.fusion == "early"
        return x.unflatten(-1, (self.config.tokens, -1)) if early else x
