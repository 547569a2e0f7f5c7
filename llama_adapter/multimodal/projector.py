"""What maps the features of an image to one token of the language model."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS = {"silu": nn.functional.silu, "gelu": nn.functional.gelu}


class CascadedMLP(nn.Module):
    """I_p = W_n a(... a(W_1 x + b_1) ...) + b_n, from features (B, F) to one token (B, C) each.

    The paper gives "simple cascaded MLPs" and, in its Table 3, parameters: 6 features of 768, a
    hidden width of 64 and C = 4096 are 561,216, which with the prompts and gates of 30 layers are
    the 1.79 million of 7B. That these are the widths is inferred from the table, not stated.

    The last map is not zero at first: a gate of zero already hides the image.
    Source: LLaMA-Adapter, equation 9.

    Attributes:
        maps: the linear maps, first to last.
        activation: one of ACTIVATIONS, between two maps.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        hidden: Sequence[int] = (64,),
        activation: str = "silu",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create maps with weights N(0, 1 / inputs) and biases of zero.

        Args:
            features: F, numbers that describe an image.
            dim: C, the language model's width.
            hidden: widths between the maps; none makes it one linear map.
            activation: "silu" or "gelu".
            generator: source of the random values.

        Raises:
            ValueError: a width is below 1, or the activation is unknown.
        """
        super().__init__()
        widths = (features, *hidden, dim)
        if min(widths) < 1:
            raise ValueError(f"features, hidden and dim must be at least 1, got {widths}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {[*ACTIVATIONS]}, got {activation!r}")
        self.activation = activation
        maps = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        for one in maps:
            nn.init.normal_(one.weight, std=one.in_features**-0.5, generator=generator)
            nn.init.zeros_(one.bias)
        self.maps = nn.ModuleList(maps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) in float32 of features (B, F) in any dtype."""
        first, *others = self.maps
        x = first(x.float())
        for one in others:
            x = one(ACTIVATIONS[self.activation](x))
        return x
