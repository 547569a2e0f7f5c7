"""What maps the features of an image to tokens of the language model: one of two modules."""

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
        self.maps = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in widths)
        _initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C), or (B, P_v, C) of several tokens, in float32 of features (B, F) in any dtype."""
        activation = getattr(nn.functional, self.config.activation)
        first, *others = self.maps
        x = first(x.float())
        for one in others:
            x = one(activation(x))
        return x if self.config.single else x.unflatten(-1, (self.config.tokens, -1))


class QueryProjector(nn.Module):
    """P_v learned queries beside the S tokens of an image, through transformer layers.

        x = [queries; norm(W_in features)], then blocks, then norm(W_out x) of the first P_v rows

    The form of the official multimodal 7B, whose features are the 257 tokens of CLIP's ViT-L/14,
    whose sizes are the defaults of `Resampler`, and whose parameters are 60,460,800.

    Attributes:
        config: its shape.
        queries: (P_v, width).
    """

    def __init__(
        self, config: VisualConfig, dim: int, *, generator: torch.Generator | None = None
    ) -> None:
        """Create queries N(0, 1), maps with weights N(0, 1 / inputs) and biases of zero.

        Args:
            config: features F = S * inputs, the resampler and its activation.
            dim: C, the language model's width.
            generator: source of the random values.
        """
        super().__init__()
        shape = config.resampler
        assert shape is not None, "make_projector says so"
        self.config, self.inputs = config, shape.inputs
        # what the modules draw by themselves is not the caller's
        with torch.random.fork_rng([]):
            self.map_in, self.norm_in = (
                nn.Linear(shape.inputs, shape.width),
                nn.LayerNorm(shape.width),
            )
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    shape.width,
                    shape.heads,
                    4 * shape.width,
                    0.0,
                    getattr(nn.functional, config.activation),
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(shape.blocks)
            )
            self.map_out, self.norm_out = nn.Linear(shape.width, dim), nn.LayerNorm(dim)
        _initialise(self, generator)
        drawn = torch.randn(config.tokens, shape.width, generator=generator)
        self.queries = nn.Parameter(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P_v, C), or (B, C) of one token fused late, in float32 of features (B, F)."""
        x = self.norm_in(self.map_in(x.float().unflatten(-1, (-1, self.inputs))))
        x = torch.cat([self.queries.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm_out(self.map_out(x[:, : self.config.tokens]))
        return x[:, 0] if self.config.single else x


def make_projector(
    config: VisualConfig, dim: int, *, generator: torch.Generator | None = None
) -> Projector | QueryProjector:
    """The module of a configuration; arguments as theirs."""
    kind = Projector if config.resampler is None else QueryProjector
    return kind(config, dim, generator=generator)


def projector_shapes(config: VisualConfig, dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the module's parameters, for a model of width `dim`."""
    found: dict[str, tuple[int, ...]] = {}

    def add(name: str, outputs: int, *inputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, *inputs), (outputs,)

    if config.resampler is None:
        widths = pairwise((config.features, *config.hidden, config.tokens * dim))
        for number, (inputs, outputs) in enumerate(widths):
            add(f"maps.{number}", outputs, inputs)
        return found
    width = config.resampler.width
    add("map_in", width, config.resampler.inputs)
    add("norm_in", width)
    for number in range(config.resampler.blocks):
        at = f"blocks.{number}"
        found[f"{at}.self_attn.in_proj_weight"] = (3 * width, width)
        found[f"{at}.self_attn.in_proj_bias"] = (3 * width,)
        add(f"{at}.self_attn.out_proj", width, width)
        add(f"{at}.linear1", 4 * width, width)
        add(f"{at}.linear2", width, 4 * width)
        add(f"{at}.norm1", width)
        add(f"{at}.norm2", width)
    add("map_out", dim, width)
    add("norm_out", dim)
    return found | {"queries": (config.tokens, width)}


def _initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Weights N(0, 1 / inputs) and biases of zero; norms are as they are made."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
