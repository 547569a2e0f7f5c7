"""What the methods on hosts are made with, each field documented once."""

from dataclasses import dataclass, field

from llama_adapter.hosts.facts import ENCODERS


@dataclass(frozen=True)
class MethodOptions:
    """What the methods are made with; which of these a method reads stands at the end."""

    prompt_length: int = field(default=10, metadata={"help": "prompts, per layer or for the input"})
    layers: int | None = field(
        default=None, metadata={"help": "layers that get some, counted from the top; default: all"}
    )
    prompt_std: float = field(
        default=1.0, metadata={"help": "standard deviation of the prompts' initial values"}
    )
    gate_activation: str | None = field(
        default=None,
        metadata={
            "help": "what turns a trained gate into its multiplier; default: the host's",
            "choices": ("tanh", "identity"),
        },
    )
    prompt_kind: str = field(
        default="hidden",
        metadata={
            "help": "prompts as hidden states, or as keys and values",
            "choices": ("hidden", "kv"),
        },
    )
    encoders: tuple[str, ...] = field(
        default=(),
        metadata={"help": "of a CLIP: visual, text or both; default: the method's usual one"},
    )
    shift_positions: bool = field(
        default=False, metadata={"help": "let words' positions begin behind the prompt"}
    )
    prefix_dropout: float = field(
        default=0.1, metadata={"help": "dropout on P-tuning v2's keys and values"}
    )
    reduction: int = field(
        default=8, metadata={"help": "the host's width over that of adapters and side networks"}
    )
    side_layers: int = field(default=2, metadata={"help": "layers of a side network"})
    side_alpha: float = field(
        default=0.5, metadata={"help": "the host's first share in the blend with a side network"}
    )
    rank: int = field(default=8, metadata={"help": "rank of LoRA"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of LoRA times its rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout in front of LoRA"})
    template_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens in front of a class's name, which CoOp replaces; default: those of the "
            "task's template, or the 4 of `a photo of a`"
        },
    )
    context_ids: tuple[int, ...] = field(
        default=(), metadata={"help": "tokens that CoOp's context starts from; default: random"}
    )

    def __post_init__(self) -> None:
        """Refuse what no method can be made with."""
        for name in ("prompt_length", "reduction", "side_layers", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prefix_dropout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.template_length is not None and self.template_length < 0:
            raise ValueError(f"template_length must be at least 0, got {self.template_length}")
        for encoder in self.encoders:
            if encoder not in ENCODERS:
                raise ValueError(f"encoders must be of visual, text, got {encoder!r}")
