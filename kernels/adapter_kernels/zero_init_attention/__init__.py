"""Zero-initialized attention: README.md derives it, reference.py computes it, op.py offers it."""

from .op import gated_prompt_attention, zero_init_attention, zero_init_attention_decode
from .varlen import zero_init_attention_varlen

__all__ = [
    "gated_prompt_attention",
    "zero_init_attention",
    "zero_init_attention_decode",
    "zero_init_attention_varlen",
]
