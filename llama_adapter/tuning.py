"""What an adapter changes of the base's own maps: biases, scales, norms and LoRA, as plain values.

LLaMA-Adapter V2 unlocks them beside the prompts. Here is what they are called and what shapes they
have; tuned_modules.py runs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# the linear maps of a layer in Meta's names, and the projection to logits
LAYER_LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
LINEARS = (*LAYER_LINEARS, "output")
GROUPS = ("bias", "scale", "norm", "lora")
SCALE_SIDES = ("input", "output")
# the trained norms of a layer
LAYER_NORMS = ("attention_norm", "ffn_norm")
NORMS = (*LAYER_NORMS, "norm")
# those whose tensors are a vector per map, which no recipe decays
VECTORS = ("bias", "scale", "norm")
_LARGEST_RANK = 65536


@dataclass(frozen=True)
class Lora:
    """Low-rank additions W x + B A x, without a factor on B A, as the official code has them.

    Attributes:
        rank: rows of A (rank, in) and columns of B (out, rank).
        linears: of LINEARS, the maps that have one.
        prompts: whether keys and values of prompts have them, as in LLaMA2-Accessory, or those of
            tokens alone, as in the official multimodal code.
    """

    rank: int
    linears: tuple[str, ...] = LAYER_LINEARS
    prompts: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _LARGEST_RANK:
            raise ValueError(f"lora rank must be from 1 to {_LARGEST_RANK}, got {self.rank}")
        if not self.linears or list(self.linears) != [x for x in LINEARS if x in self.linears]:
            raise ValueError(
                f"lora linears must be some of {LINEARS} in this order, got {self.linears}"
            )


@dataclass(frozen=True)
class Tuning:
    """What an adapter changes of the base besides attention (LLaMA-Adapter V2, section 4.1).

    Attributes:
        groups: of GROUPS, those that the adapter has.
        linears: of LINEARS, the linear maps that have a bias and a scale.
        scale_side: "input", y = W (s * x) + b as in the official chat65b code, or "output",
            y = s * (W x + b) as in the paper and in litgpt; None without a scale.
        lora: of the group "lora": W x + B A x in the place of W x; None without it.
    """

    groups: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    scale_side: str | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for name, values, known in (
            ("groups", self.groups, GROUPS),
            ("linears", self.linears, LINEARS),
        ):
            if list(values) != [one for one in known if one in values]:
                raise ValueError(f"{name} must be some of {known} in this order, got {values}")
        if bool(self.linears) != ("bias" in self.groups or "scale" in self.groups):
            raise ValueError(
                f"linears must be named for a bias or a scale and for nothing else, got "
                f"{self.linears} with groups {self.groups}"
            )
        wanted = SCALE_SIDES if "scale" in self.groups else (None,)
        if self.scale_side not in wanted:
            raise ValueError(
                f"scale_side must be one of {wanted} with groups {self.groups}, got "
                f"{self.scale_side!r}"
            )
        if (self.lora is not None) != ("lora" in self.groups):
            raise ValueError(f"lora must go with the group lora, got {self.lora}, {self.groups}")

    def shapes(self, base: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors, one row per layer of the base.

        Args:
            base: dim, n_layers, n_heads and so on; those that the shapes follow from.

        Raises:
            KeyError: a number is needed that `base` does not have.
        """
        found: dict[str, tuple[int, ...]] = {}

        def rows(linear: str) -> tuple[int, ...]:
            return () if linear == "output" else (base["n_layers"],)

        for linear in self.linears:
            n_in, n_out = linear_widths(linear, base)
            if "bias" in self.groups:
                found[f"bias_{linear}"] = (*rows(linear), n_out)
            if "scale" in self.groups:
                width = n_in if self.scale_side == "input" else n_out
                found[f"scale_{linear}"] = (*rows(linear), width)
        if "norm" in self.groups:
            found |= dict.fromkeys(LAYER_NORMS, (base["n_layers"], base["dim"]))
            found["norm"] = (base["dim"],)
        if self.lora is not None:
            for linear in self.lora.linears:
                n_in, n_out = linear_widths(linear, base)
                found[f"lora_a_{linear}"] = (*rows(linear), self.lora.rank, n_in)
                found[f"lora_b_{linear}"] = (*rows(linear), n_out, self.lora.rank)
        return found


def tuned_group(name: str) -> str:
    """The group of a tuned tensor."""
    return "norm" if name in NORMS else name.partition("_")[0]


def linear_widths(linear: str, base: Mapping[str, int]) -> tuple[int, int]:
    """Input and output width of a linear map of LINEARS in a base of this shape."""
    heads = {"wq": "n_heads", "wk": "kv_heads", "wv": "kv_heads"}
    if linear in heads:
        return base["dim"], base[heads[linear]] * base["head_dim"]
    if linear == "wo":
        return base["n_heads"] * base["head_dim"], base["dim"]
    if linear == "output":
        return base["dim"], base["vocab_size"]
    if linear == "w2":
        return base["hidden_dim"], base["dim"]
    return base["dim"], base["hidden_dim"]


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "recipe": True})


@dataclass(frozen=True)
class TuningOptions:
    """Groups that are trained beside prompts and gates (LLaMA-Adapter V2)."""

    tune: tuple[str, ...] = _option(
        (), f"of the linear maps and norms of every layer: some of {', '.join(GROUPS)}"
    )
    scale_side: str | None = _option(
        None,
        "where a scale multiplies, the input or the output of its map; default: the output, as in "
        "the paper",
        SCALE_SIDES,
    )
    lora_rank: int | None = _option(None, "rank of the group lora; default: 16")

    def __post_init__(self) -> None:
        unknown = [name for name in self.tune if name not in GROUPS]
        if unknown or len(set(self.tune)) != len(self.tune):
            raise ValueError(f"tune must be some of {GROUPS}, each once, got {self.tune}")
        if self.scale_side not in (None, *SCALE_SIDES):
            raise ValueError(f"scale_side must be one of {SCALE_SIDES}, got {self.scale_side!r}")
        for name, group in (("scale_side", "scale"), ("lora_rank", "lora")):
            value = getattr(self, name)
            if value is not None and group not in self.tune:
                raise ValueError(f"{name} must be left out without tune {group}, got {value!r}")
        _ = self.tuning

    @property
    def tuning(self) -> Tuning:
        """The groups on all seven maps of every layer."""
        groups = tuple(group for group in GROUPS if group in self.tune)
        vectors = "bias" in groups or "scale" in groups
        rank = 16 if self.lora_rank is None else self.lora_rank
        return Tuning(
            groups,
            LAYER_LINEARS if vectors else (),
            (self.scale_side or "output") if "scale" in groups else None,
            Lora(rank) if "lora" in groups else None,
        )
