"""Shapes of the base model, of the adapter and of its host; presets of every published LLaMA.

Both are frozen dataclasses of plain values: what a `params.json` or an adapter file's header holds.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from llama_adapter.vision import Scales


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's frequency scaling: slow frequencies are divided by `factor`.

    Wavelengths (in tokens) above original_context / low_freq_factor are scaled, those below
    original_context / high_freq_factor are kept, those between are interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of one LLaMA, in the names of Meta's `params.json`.

    Attributes:
        dim: model width C.
        n_layers: transformer layers.
        n_heads: query heads H.
        n_kv_heads: key and value heads G; None means H.
        vocab_size: rows of the embedding.
        multiple_of: the feed-forward width is rounded up to a multiple of it.
        ffn_dim_multiplier: factor on the feed-forward width before rounding.
        norm_eps: epsilon of the RMS norms.
        rope_theta: base of the rotary frequencies.
        rope_scaling: LLaMA 3.1's scaling, or None.
        tied_embeddings: the output projection is the embedding (LLaMA 3.2).
        max_seq_len: positions for which rotary angles are prepared.
        attention_head_dim: D; None means dim / n_heads.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    max_seq_len: int = 2048
    attention_head_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.attention_head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"dim must be a multiple of n_heads = {self.n_heads}, got {self.dim} "
                "(or give attention_head_dim)"
            )
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads = {self.n_heads}, got {self.n_kv_heads}"
            )
        if self.head_dim < 2:
            raise ValueError(f"head_dim must be at least 2, got {self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")

    @property
    def kv_heads(self) -> int:
        """G, key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """D, width of one head."""
        given = self.attention_head_dim
        return self.dim // self.n_heads if given is None else given

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4C, times the multiplier, rounded up."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)

    def describe(self) -> str:
        """One line a person can compare two models by."""
        return (
            f"dim {self.dim}, {self.n_layers} layers, {self.n_heads} heads "
            f"({self.kv_heads} key/value), vocabulary {self.vocab_size}"
        )


def width_of(dim: int, hidden_dim: int) -> dict[str, Any]:
    """The options of `LlamaConfig` that give a model of width `dim` this feed-forward width."""
    usual = int(2 * 4 * dim / 3)
    factor = None if hidden_dim >= usual else hidden_dim / usual
    return {"multiple_of": hidden_dim, "ffn_dim_multiplier": factor}


_LLAMA1 = {"vocab_size": 32000, "norm_eps": 1e-6, "max_seq_len": 2048}
_LLAMA2 = {"vocab_size": 32000, "norm_eps": 1e-5, "max_seq_len": 4096}
_LLAMA3 = {"vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 5e5, "n_kv_heads": 8}
_3_8B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}
_70B = {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}
_405B = {
    "dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2
}  # fmt: skip
_31 = {"rope_scaling": RopeScaling(8.0), "max_seq_len": 131072}
_32 = {
    "rope_scaling": RopeScaling(32.0),
    "max_seq_len": 131072,
    "tied_embeddings": True,
    "multiple_of": 256,
}


def _config(*parts: dict[str, Any], **rest: Any) -> LlamaConfig:
    merged: dict[str, Any] = {}
    for part in (*parts, rest):
        merged.update(part)
    return LlamaConfig(**merged)


# Touvron et al. 2023a,b and the LLaMA 3 family's published params.json files
PRESETS: dict[str, LlamaConfig] = {
    "llama-7b": _config(_LLAMA1, dim=4096, n_layers=32, n_heads=32),
    "llama-13b": _config(_LLAMA1, dim=5120, n_layers=40, n_heads=40),
    "llama-30b": _config(_LLAMA1, dim=6656, n_layers=60, n_heads=52),
    "llama-65b": _config(_LLAMA1, dim=8192, n_layers=80, n_heads=64, norm_eps=1e-5),
    "llama-2-7b": _config(_LLAMA2, dim=4096, n_layers=32, n_heads=32),
    "llama-2-13b": _config(_LLAMA2, dim=5120, n_layers=40, n_heads=40),
    "llama-2-70b": _config(_LLAMA2, _70B, n_kv_heads=8),
    "llama-3-8b": _config(_LLAMA3, _3_8B, max_seq_len=8192),
    "llama-3-70b": _config(_LLAMA3, _70B, max_seq_len=8192),
    "llama-3.1-8b": _config(_LLAMA3, _3_8B, _31),
    "llama-3.1-70b": _config(_LLAMA3, _70B, _31),
    "llama-3.1-405b": _config(_LLAMA3, _405B, _31),
    "llama-3.2-1b": _config(
        _LLAMA3, _32, dim=2048, n_layers=16, n_heads=32, ffn_dim_multiplier=1.5
    ),
    "llama-3.2-3b": _config(
        _LLAMA3, _32, dim=3072, n_layers=28, n_heads=24, ffn_dim_multiplier=1.0
    ),
}


# beyond any use, and within what memory and float32 hold
_LONGEST_PROMPT = 65536
_LARGEST_STD = 1e6


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is, apart from its numbers (paper, sections 3.1 and 3.2)."""

    prompt_length: int = _option(10, "learnable prompt rows per adapted layer (the papers' K)")
    n_layers: int | None = _option(
        None,
        "adapted layers, counted from the top; default: all but the two lowest, with early fusion "
        "all but those that see the images",
    )
    prompt_std: float = _option(1.0, "standard deviation of the prompts' initial values")
    gate_activation: str = _option(
        "tanh",
        "the multiplier is tanh(gate), as in the official training code, or the gate itself, "
        "as in the paper's equation 7",
        ("tanh", "identity"),
    )
    gate_scope: str = _option("head", "one gate per head, or one per layer", ("head", "layer"))

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= _LONGEST_PROMPT:
            raise ValueError(
                f"prompt_length must be from 1 to {_LONGEST_PROMPT}, got {self.prompt_length}"
            )
        if self.n_layers is not None and self.n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {self.n_layers}")
        if not 0 < self.prompt_std <= _LARGEST_STD:
            raise ValueError(
                f"prompt_std must be above 0 and at most {_LARGEST_STD:.0f}, got {self.prompt_std}"
            )
        for spec in fields(self):
            choices = spec.metadata.get("choices")
            if choices and getattr(self, spec.name) not in choices:
                got = getattr(self, spec.name)
                raise ValueError(f"{spec.name} must be one of {choices}, got {got!r}")

    def layers_of(self, n_layers: int, lowest: int = 2) -> tuple[int, ...]:
        """Indices of the adapted layers in a model of `n_layers`: the topmost ones.

        Args:
            n_layers: of the model.
            lowest: layers that are left without prompts where no number is given.

        Raises:
            ValueError: more layers are asked for than the model has.
        """
        adapted = max(1, n_layers - lowest) if self.n_layers is None else self.n_layers
        if adapted > n_layers:
            raise ValueError(f"n_layers must be at most the model's {n_layers}, got {adapted}")
        return tuple(range(n_layers - adapted, n_layers))


# what the shape of a base is; the rest of its configuration changes no tensor
SHAPE_FIELDS = ("dim", "n_layers", "n_heads", "kv_heads", "head_dim", "hidden_dim", "vocab_size")


def shape_of(config: LlamaConfig) -> dict[str, int]:
    """The fields of a configuration that decide the tensors' shapes."""
    return {name: getattr(config, name) for name in SHAPE_FIELDS}


# rows of width C that a layer projects, or keys and values themselves (P-tuning v2's form)
PROMPT_KINDS = ("hidden", "kv")


@dataclass(frozen=True)
class HeadConfig:
    """A host's task head, which is trained beside the prompts.

    Attributes:
        name: of the module in the host: "classifier", "qa_outputs".
        labels: names of its outputs, in order.
        shapes: of its parameters, by their names in it.
    """

    name: str
    labels: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        # as JSON holds it a shape is a list
        object.__setattr__(self, "shapes", {n: tuple(x) for n, x in self.shapes.items()})
        sizes = [size for shape in self.shapes.values() for size in shape]
        if not self.shapes or min(sizes, default=0) < 1:
            raise ValueError(f"shapes must be of parameters of 1 and more, got {self.shapes}")


@dataclass(frozen=True)
class HostConfig:
    """The model that an adapter belongs to, where it is more than a LLaMA and its layers.

    Attributes:
        kind: "llama", or a row of hosts/facts.py.
        head: what is trained of its head; None leaves it alone.
        shift_positions: whether the tokens' positions begin behind the prompt, as in P-tuning v2.
        beside: numbers of what else of the model is frozen and not sampled with its layers, by the
            parameter's name: a pooler, a head that is left alone, CLIP's projections.
    """

    kind: str = "llama"
    head: HeadConfig | None = None
    shift_positions: bool = False
    beside: dict[str, tuple[float, ...]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "beside", {n: tuple(x) for n, x in self.beside.items()})


PROJECTOR_ACTIVATIONS = ("silu", "gelu")
FUSIONS = ("late", "early")
# LLaMA-Adapter V2, section 5.1
EARLY_TOKENS, EARLY_LAYERS = 20, 1


# a file's header is believed before its tensors are looked at
_MOST_BLOCKS = 1024


@dataclass(frozen=True)
class Resampler:
    """A projector of learned queries that attend to many tokens of an image, and to each other.

    Attributes:
        inputs: width of one of those tokens, so many of which are the features, side by side.
        width: of the queries and blocks.
        blocks: transformer layers over queries and tokens.
        heads: of their attention.
    """

    inputs: int = 768
    width: int = 768
    blocks: int = 8
    heads: int = 16

    def __post_init__(self) -> None:
        sizes = self.inputs, self.width, self.blocks, self.heads
        if min(sizes) < 1 or self.width % self.heads:
            raise ValueError(
                "inputs, width, blocks and heads must be at least 1 and heads divide width, got "
                f"{self.inputs}, {self.width}, {self.blocks} and {self.heads}"
            )
        if self.blocks > _MOST_BLOCKS:
            raise ValueError(f"blocks must be at most {_MOST_BLOCKS}, got {self.blocks}")


@dataclass(frozen=True)
class VisualConfig:
    """What features of an image an adapter takes, and its projector's shape.

    Attributes:
        features: F, numbers that describe an image, or whatever stands for one.
        hidden: widths of the projector between features and model.
        activation: of the projector, "silu" or "gelu".
        encoder: digest of what makes the features, which must be the same one again; "" where the
            caller makes them.
        fusion: "late", one token that is added to every prompt row (LLaMA-Adapter, equation 10) or
            a token for each, or "early", tokens that are a gated prompt of their own in the first
            layers (LLaMA-Adapter V2, section 4.3).
        tokens: P_v, tokens of an image; for late fusion 1, or as many as a layer has prompt rows.
        layers: K, the first layers that see them; 0 for late fusion, whose layers are the prompts'.
        scales: which features of a CLIP they are; None where the caller makes them.
        resampler: the projector of the official multimodal 7B; None is the cascade of `hidden`.
    """

    features: int
    hidden: tuple[int, ...] = (64,)
    activation: str = "silu"
    encoder: str = ""
    fusion: str = "late"
    tokens: int = 1
    layers: int = 0
    scales: Scales | None = None
    resampler: Resampler | None = None

    @property
    def single(self) -> bool:
        """Whether an image is one token (B, C), not (B, P_v, C)."""
        return self.fusion == "late" and self.tokens == 1

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {FUSIONS}, got {self.fusion!r}")
        if not 1 <= self.tokens <= _LONGEST_PROMPT:
            raise ValueError(f"tokens must be from 1 to {_LONGEST_PROMPT}, got {self.tokens}")
        if (self.layers >= 1) != (self.fusion == "early") or self.layers < 0:
            raise ValueError(
                "layers must be at least 1 for early fusion and 0 for late, got "
                f"{self.layers} for {self.fusion}"
            )
        if min((self.features, *self.hidden)) < 1:
            raise ValueError(
                f"features and hidden must be at least 1, got {self.features} and {self.hidden}"
            )
        if self.resampler is not None and (self.hidden or self.features % self.resampler.inputs):
            raise ValueError(
                "hidden must be empty with a resampler, and features a multiple of its inputs "
                f"{self.resampler.inputs}, got {self.hidden} and {self.features}"
            )
        if self.activation not in PROJECTOR_ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {PROJECTOR_ACTIVATIONS}, got {self.activation!r}"
            )
