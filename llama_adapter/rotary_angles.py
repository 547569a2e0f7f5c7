"""By what angles do queries and keys turn? LLaMA's rotary embedding and LLaMA 3.1's scaling."""

import math

import torch
from torch import Tensor

from llama_adapter.config import LlamaConfig


def rotary_angles(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/D), with LLaMA 3.1's scaling of the frequencies.

    Args:
        config: rope_theta, rope_scaling and head_dim.
        positions: (...,) integer token positions.

    Returns:
        cos and sin, (..., D/2) float32.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    # this form, not a negative exponent: one bit here turns position 100,000 by 0.001
    frequency = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        # turns made within the original context: slow ones are stretched, fast ones kept
        turns = scaling.original_context * frequency / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    angle = positions.float()[..., None] * frequency
    return angle.cos(), angle.sin()
