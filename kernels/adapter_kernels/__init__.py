"""Zero-initialized attention and its neighbours: the public functions of this package.

Every function chooses between Triton kernels and a reference in plain torch by the device of its
inputs; `backend` forces one. `load_native` adds C++ for decoding on a CPU. See
kernels/README.md for the way from an operation to its file.
"""

from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .native import load as load_native
from .rms_norm import rms_norm
from .rotary import apply_rotary
from .swiglu import swiglu
from .write_cache import write_cache
from .zero_init_attention import (
    gated_prompt_attention,
    zero_init_attention,
    zero_init_attention_decode,
    zero_init_attention_varlen,
)

__all__ = [
    "apply_rotary",
    "gated_prompt_attention",
    "linear",
    "linear_cross_entropy",
    "load_native",
    "rms_norm",
    "swiglu",
    "write_cache",
    "zero_init_attention",
    "zero_init_attention_decode",
    "zero_init_attention_varlen",
]
